"""Small clips with sound, made on the spot: a square that moves, and a tone whose pitch goes with it."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def clip_bytes(
    number: int = 0,
    *,
    seconds: float = 2.0,
    size: tuple[int, int] = (64, 48),
    fps: int | Fraction = 16,
    video: str | None = "libx264",
    keyframe_every: int = 8,
    still: bool = False,
    audio: str | None = "aac",
    rate: int = 24_000,
    channels: int = 1,
    volume: float = 0.3,
    container: str = "mp4",
    title: str = "",
) -> bytes:
    """A clip; the number decides colour, path and pitch.

    Args:
        number: of the clip.
        seconds, size, fps: of the picture; (width, height).
        video, audio: encoders; None leaves the stream out.
        keyframe_every: so many frames.
        still: the square stays where it is.
        rate, channels, volume: of the sound.
        container: what FFmpeg calls its muxer, such as "mp4", "matroska", "webm", "avi", "mpegts".
        title: of the file, and of its picture.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as out:
        if title:
            out.metadata["title"] = title
        streams: list[tuple[Any, list[Any]]] = []
        if video is not None:
            stream = out.add_stream(video, rate=Fraction(fps))
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
            stream.gop_size = keyframe_every
            if title:
                stream.metadata["title"] = title
            stream.codec_context.thread_count = 1
            if video == "libx264":
                stream.options = {"preset": "ultrafast", "crf": "30", "x264-params": "scenecut=0"}
            if video == "libvpx":
                stream.options = {"deadline": "realtime", "cpu-used": "8"}
            streams.append((stream, _frames(number, seconds, size, Fraction(fps), still=still)))
        if audio is not None:
            layout = {1: "mono", 2: "stereo", 8: "7.1"}[channels]
            sound = out.add_stream(audio, rate=rate, layout=layout)
            streams.append((sound, _sound(number, seconds, rate, layout, channels, volume)))
        both = [
            (frame.pts * frame.time_base, stream, frame) for stream, frames in streams for frame in frames
        ]
        for _, stream, frame in sorted(both, key=lambda each: each[0]):
            out.mux(stream.encode(frame))
        for stream, _ in streams:
            out.mux(stream.encode(None))
    return buffer.getvalue()


def write_clips(
    folder: Path, count: int, *, labels: tuple[str, ...] = ("red", "green"), **options: Any
) -> list[Path]:
    """Clips 0 … count - 1 as `folder/{label}/{number:04d}.mp4`, labels in turn; `options` of `clip_bytes`."""
    paths = [folder / labels[number % len(labels)] / f"{number:04d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip_bytes(number, **options))
    return paths


def _frames(
    number: int, seconds: float, size: tuple[int, int], fps: Fraction, *, still: bool
) -> list[av.VideoFrame]:
    width, height = size
    side = min(size) // 3
    # A dark ground, and a bright square.
    colours = np.random.default_rng(number).integers([[20] * 3, [150] * 3], [[100] * 3, [236] * 3])
    frames = []
    for index in range(max(1, round(seconds * fps))):
        picture = np.empty((height, width, 3), np.uint8)
        picture[:] = colours[0]
        step = 0 if still else index
        x, y = (3 * step * (1 + number % 3)) % (width - side), (2 * step + 5 * number) % (height - side)
        picture[y : y + side, x : x + side] = colours[1]
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        frame.pts, frame.time_base = index, 1 / fps
        frames.append(frame)
    return frames


def _sound(
    number: int, seconds: float, rate: int, layout: str, channels: int, volume: float
) -> list[av.AudioFrame]:
    time = np.arange(round(seconds * rate)) / rate
    wave = volume * np.sin(2 * np.pi * (220 + 55 * (number % 16)) * time)
    frames = []
    for start in range(0, len(wave), 1024):
        part = np.repeat(wave[start : start + 1024].astype(np.float32), channels)
        frame = av.AudioFrame.from_ndarray(part[None], format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        frames.append(frame)
    return frames
