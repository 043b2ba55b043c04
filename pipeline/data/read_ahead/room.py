"""How the cache of a node is shared out: packs of the next steps, and windows if they fit whole."""

from __future__ import annotations

from dataclasses import dataclass

FEW_STEPS = 4
CHUNK_BYTES = 4 << 20
_SHARE_OF_PACKS = 1 / 4


@dataclass(frozen=True)
class Room:
    """Bytes for packs, and for windows, whose neighbours are then read together; 0 if they do not fit."""

    packs: int
    windows: int


def share_out(total: int, *, step_bytes: int, window_bytes: float) -> Room:
    """Divide `total` bytes.

    Args:
        step_bytes: what all ranks of the node read at one step.
        window_bytes: of the windows that are open at a time, from the first sample to the last; 0 if none is
            to be read whole.
    """
    packs = max(int(total * _SHARE_OF_PACKS), FEW_STEPS * step_bytes)
    windows = max(total - packs, 0) // CHUNK_BYTES * CHUNK_BYTES
    return Room(packs, windows) if 0 < window_bytes <= windows else Room(total, 0)
