"""Small colour profiles, ICC version 2, and what they mean in arithmetic of our own."""

import struct

import numpy as np

# Red, green and blue as columns of XYZ, adapted to D50, and the exponent of the numbers.
SRGB = (
    (0.4360747, 0.3850649, 0.1430804),
    (0.2225045, 0.7168786, 0.0606169),
    (0.0139322, 0.0971045, 0.7141733),
)
SPACES = {
    "p3": (((0.51512, 0.29198, 0.1571), (0.2412, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)), 2.2),
    "adobe": (
        ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)),
        2.19921875,
    ),
    "prophoto": (((0.79767, 0.13519, 0.03135), (0.28804, 0.71187, 0.00009), (0.0, 0.0, 0.8252)), 1.8),
    "gamma18": (SRGB, 1.8),
}


def rgb_profile(columns, gamma):
    tags = {f"{name}XYZ": _xyz([row[place] for row in columns]) for place, name in enumerate("rgb")}
    return _profile(b"RGB ", b"XYZ ", tags | {f"{name}TRC": _curve(gamma) for name in "rgb"})


def grey_profile(gamma):
    return _profile(b"GRAY", b"XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile():
    """Inks take from white: all of black leaves L* 20, all of another 60; between them, straight lines."""
    nodes = np.stack(np.meshgrid(*[(0, 1)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    light = 100 - 40 * nodes[:, :3].max(axis=1)
    light = np.where(nodes[:, 3] == 1, 20, light)
    lab = np.stack([np.rint(light * 2.55), np.full(16, 128), np.full(16, 128)], axis=1).astype(np.uint8)
    ramp = bytes(range(256))
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + struct.pack(">9i", *[65536, 0, 0, 0] * 2, 65536)
    return _profile(b"CMYK", b"Lab ", {"A2B0": table + 4 * ramp + lab.tobytes() + 3 * ramp}, device=b"prtr")


def srgb_of(colour, columns, gamma):
    """sRGB levels of levels of such a profile: (..., 3) floats."""
    linear = (np.asarray(colour, float) / 255) ** gamma
    rgb = np.clip(linear @ np.array(columns).T @ np.linalg.inv(np.array(SRGB)).T, 0, 1)
    return 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


def _xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space, connection, tags, device=b"mntr"):
    tags = {"wtpt": _xyz((0.9642, 1.0, 0.8249))} | tags
    at = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytearray(128)
    struct.pack_into(">I4sI4s4s4s", head, 0, at + len(body), b"test", 0x02200000, device, space, connection)
    head[36:40] = b"acsp"
    head[68:80] = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    return bytes(head) + table + body
