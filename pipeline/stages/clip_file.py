"""A clip that was made, and its file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError

FPS = 16
RATE = 16_000  # Hz
_KEYFRAME_EVERY = 16  # frames: whoever reads a second of it decodes two at most


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames, (T, side, side, 3) uint8 at `FPS`, and a mono waveform, (n,) float32 in [-1, 1] at `RATE`."""

    frames: NDArray[np.uint8]
    sound: NDArray[np.float32]

    @property
    def digest(self) -> str:
        """sha256 of what was drawn. The file's own depends on the encoder, too."""
        return hashlib.sha256(self.frames.tobytes() + self.sound.tobytes()).hexdigest()


def write_clip(clip: Clip, path: Path) -> None:
    """An MP4 file that browsers play: H.264, and FLAC, which loses nothing and is read quickly.

    Raises:
        UserError: if PyAV is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError("clips are written by PyAV: pip install 'av>=18,<20'") from error
    with av.open(path, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        video = file.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18"})
        video.height, video.width = clip.frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.gop_size = _KEYFRAME_EVERY
        video.codec_context.thread_count = 1
        audio = file.add_stream("flac", rate=RATE, layout="mono")
        for number, pixels in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            file.mux(video.encode(frame))
        samples = (clip.sound * 32_767).round().astype(np.int16)
        sound = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts = RATE, 0
        file.mux(audio.encode(sound))
        for stream in (video, audio):
            file.mux(stream.encode(None))
