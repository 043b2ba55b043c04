"""Run-length coded BMP, 4 and 8 bits a pixel.

Pillow 12 reads runs of single pixels wrong where their number is odd, and two colours not at all.
"""

_RLE8, _RLE4 = 1, 2
_COMPRESSION_AT = 30
_SHORTEST_HEADER = 40


def depth(data: bytes) -> int | None:
    """Bits of a pixel, 4 or 8, of a run-length coded BMP; None of another."""
    if int.from_bytes(data[14:18], "little") < _SHORTEST_HEADER:
        return None
    compression = int.from_bytes(data[_COMPRESSION_AT : _COMPRESSION_AT + 4], "little")
    return {_RLE8: 8, _RLE4: 4}.get(compression)


def indices(runs: bytes, *, width: int, height: int, bits: int) -> bytes:
    """The palette index of every pixel, (height, width), in the order of the file; 0 where it says none.

    Args:
        runs: the file from its first run on.
        width, height: of the picture.
        bits: of a pixel, 4 or 8.

    Raises:
        ValueError: the runs end before the picture does.
    """
    rows = bytearray(width * height)
    at = x = y = 0
    while y < height:
        if at + 2 > len(runs):
            raise ValueError("truncated")
        count, value = runs[at], runs[at + 1]
        at += 2
        if count:
            run = _pair(value) * (count // 2 + 1) if bits == 4 else bytes([value]) * count
        elif value == 0:
            x, y = 0, y + 1
            continue
        elif value == 1:
            break
        elif value == 2:
            if at + 2 > len(runs):
                raise ValueError("truncated")
            x, y = x + runs[at], y + runs[at + 1]
            at += 2
            continue
        else:
            count = value
            size = (count + 1) // 2 if bits == 4 else count
            run = runs[at : at + size]
            if len(run) < size:
                raise ValueError("truncated")
            if bits == 4:
                run = b"".join(map(_pair, run))
            # Each begins at an even place.
            at += size + size % 2
        there = max(0, min(count, width - x))
        rows[y * width + x : y * width + x + there] = run[:there]
        x += count
    return bytes(rows)


def _pair(byte: int) -> bytes:
    return bytes((byte >> 4, byte & 15))
