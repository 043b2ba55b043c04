"""A clip that was made, before it is a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FPS = 16
RATE = 16_000  # Hz


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames, (T, side, side, 3) uint8 at `FPS`, and a mono waveform, (n,) float32 in [-1, 1] at `RATE`."""

    frames: NDArray[np.uint8]
    sound: NDArray[np.float32]

    @property
    def digest(self) -> str:
        """sha256 of what was drawn. The file's own depends on the encoder, too."""
        return hashlib.sha256(self.frames.tobytes() + self.sound.tobytes()).hexdigest()
