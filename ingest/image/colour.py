"""Colour profiles: from the numbers in a file to sRGB, as browsers show it.

A profile comes from strangers, and littlecms is written in C. So its size, its kind and its parts are judged
here first; those that chain steps without end are not used. What cannot be used is passed over, and the
numbers are taken for sRGB, as they are without a profile. Colours are meant as in a photograph (perceptual
intent): white becomes white, and a print's darkest ink black.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

Space = Literal["RGB", "L", "CMYK"]

# Those of printers are the largest, 0.5 to 2.7 MB.
MAX_BYTES = 4 << 20
_MOST_TAGS = 128
_SPACES: dict[bytes, Space] = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
# Displays, cameras and scanners, printers, and colour spaces; no links between devices, no named colours.
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
_CONNECTIONS = (b"XYZ ", b"Lab ")
# Any number of steps of any kind, each done for every point of a table.
_CHAINS = b"mpet"
_LEVELS_OF_NOTE = 1


@dataclass(frozen=True, slots=True)
class Conversion:
    """From the colours of a profile to sRGB.

    Attributes:
        space: the mode of the pictures that it is for.
        transform: littlecms's; None if the profile says sRGB itself, to a level of 255.
    """

    space: Space
    transform: Any

    def __call__(self, picture: Image.Image) -> Image.Image:
        """RGB, L or CMYK to sRGB; a picture of a mode that the profile is not for stays as it is."""
        if self.transform is None:
            return picture
        if picture.mode == "L" and self.space == "RGB":
            # Common among photographs in grey, and meant so.
            picture = picture.convert("RGB")
        return self.transform.apply(picture) if picture.mode == self.space else picture


@lru_cache(maxsize=16)
def conversion(profile: bytes) -> Conversion | None:
    """What this profile does to pictures; None if it cannot be used.

    Most profiles of a crawl are among a handful, so a few are kept.
    """
    space = _space(profile)
    if space is None:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), space, "RGB"
        )
        sample = _sample(space)
        moved = sample is not None and _levels(transform.apply(sample), sample) > _LEVELS_OF_NOTE
    except Exception:
        # littlecms says no in several ways, all of them in words.
        return None
    return Conversion(space=space, transform=transform if moved or space == "CMYK" else None)


def _space(profile: bytes) -> Space | None:
    """The colours that it describes, if it is of a kind that is used and stays within bounds."""
    if not 132 <= len(profile) <= MAX_BYTES or profile[36:40] != b"acsp":
        return None
    if profile[12:16] not in _CLASSES or profile[20:24] not in _CONNECTIONS:
        return None
    tags = int.from_bytes(profile[128:132], "big")
    if tags > _MOST_TAGS or _CHAINS in _types(profile, tags):
        return None
    return _SPACES.get(profile[16:20])


def _types(profile: bytes, tags: int) -> Iterator[bytes]:
    for entry in range(132, 132 + 12 * tags, 12):
        at = int.from_bytes(profile[entry + 4 : entry + 8], "big")
        yield profile[at : at + 4]


def _sample(space: Space) -> Image.Image | None:
    """Colours by which to tell whether anything changes."""
    steps = np.arange(0, 256, 15).astype(np.uint8)
    if space == "RGB":
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
        return Image.fromarray(grid.reshape(len(steps), -1, 3))
    return Image.fromarray(np.arange(256).astype(np.uint8)[None]) if space == "L" else None


def _levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b.convert("RGB"), np.int16)).max())
