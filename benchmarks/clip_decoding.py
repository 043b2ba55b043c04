"""Claim: a clip and its sound are decoded as fast as by torchcodec, and half as fast again as by decord.

    pip install --target PEERS --no-deps torchcodec==0.13.0 decord==0.6.0    # and FFmpeg's libraries
    PYTHONPATH=PEERS python benchmarks/clip_decoding.py [--clips 48] [--files 6] [--size 320x240]

From the bytes of an MP4 (H.264 of 25 pictures a second, 10 s, AAC of 44.1 kHz in two channels) to 8 pictures
at 16 a second, cut by one box and resized to 224 pixels, and 2 s of one channel at 24 kHz. Everybody is given
the same moments, and resizes with Pillow; each on one thread, in turns that change their order. CPU time of
this process: medians over clips, the quartiles, and for each peer the median of what it takes over what we
take for the same clip.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.clip.media import opened
from pipeline.data.clip.pictures import pictures
from pipeline.data.clip.sound import waveform
from pipeline.data.clip.windows import Span, clip_begin, frame_times, sound_begin
from pipeline.data.image.crops import GEOMETRY_DRAWS, crop_box
from pipeline.recipe.data import Audio, Clip

SECONDS, FPS, RATE = 10, 25, 44_100
CLIP, AUDIO = Clip(), Audio()
Shown = tuple[NDArray[np.uint8], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=48, help="of each kind of file")
    parser.add_argument("--files", type=int, default=6, help="of each kind")
    parser.add_argument("--size", default="320x240")
    given = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, given.size.split("x"))
    arms: dict[str, Callable[[bytes, Moment], Shown]] = {
        "ours": ours,
        "torchcodec, exact": partial(by_torchcodec, seek="exact"),
        "torchcodec, approximate": partial(by_torchcodec, seek="approximate"),
        "decord": by_decord,
    }
    for interval in (250, 50, 12):
        files = [movie(seed, width, height, interval) for seed in range(given.files)]
        report(f"{given.size}, keyframe every {interval}", files, arms, given.clips)


class Moment:
    """What is drawn for one clip."""

    def __init__(self, number: int) -> None:
        draws = np.random.default_rng(number).random(GEOMETRY_DRAWS + 2)
        self.span = Span(0.0, float(SECONDS))
        self.sound = sound_begin(self.span, AUDIO.seconds, float(draws[0]))
        heard = Span(self.sound, self.sound + AUDIO.seconds)
        seconds = CLIP.frames / CLIP.fps
        begin = clip_begin(self.span, seconds, float(draws[1]), sound=heard, offset=CLIP.offset_seconds)
        self.times = frame_times(self.span, begin, frames=CLIP.frames, fps=CLIP.fps)
        self.geometry = draws[2:].tolist()


def ours(data: bytes, moment: Moment) -> Shown:
    with opened(data, video=True, audio=True) as media:
        assert media.video is not None and media.audio is not None
        sound = waveform(media.audio, media.span, moment.sound, samples=AUDIO.samples, rate=AUDIO.rate)
        return cut(list(pictures(media.video, moment.times)), moment), sound


def by_torchcodec(data: bytes, moment: Moment, *, seek: str) -> Shown:
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    video = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek)
    frames = video.get_frames_played_at(moment.times.tolist()).data.numpy()
    sound = AudioDecoder(data, sample_rate=AUDIO.rate, num_channels=1)
    heard = sound.get_samples_played_in_range(moment.sound, moment.sound + AUDIO.seconds).data[0].numpy()
    return cut([Image.fromarray(frame) for frame in frames], moment), heard


def by_decord(data: bytes, moment: Moment) -> Shown:
    import decord

    video = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    frames = video.get_batch([int(moment * FPS) for moment in moment.times]).asnumpy()
    sound = decord.AudioReader(io.BytesIO(data), ctx=decord.cpu(0), sample_rate=AUDIO.rate, mono=True)
    first = int(moment.sound * AUDIO.rate)
    heard = sound.get_batch(range(first, first + AUDIO.samples)).asnumpy()[0]
    return cut([Image.fromarray(frame) for frame in frames], moment), heard


def cut(frames: list[Image.Image], moment: Moment) -> NDArray[np.uint8]:
    left, top, width, height = crop_box(*frames[0].size, moment.geometry, CLIP)
    box, size = (left, top, left + width, top + height), (CLIP.size, CLIP.size)
    return np.stack([np.asarray(each.resize(size, Image.Resampling.BILINEAR, box=box)) for each in frames])


def report(
    title: str, files: list[bytes], arms: dict[str, Callable[[bytes, Moment], Shown]], clips: int
) -> None:
    taken: dict[str, list[float]] = {name: [] for name in arms}
    apart: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(-2, clips):
        data, moment, shown = files[number % len(files)], Moment(number + 2), {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.process_time()
            shown[name] = arms[name](data, moment)
            if number >= 0:
                taken[name].append(1e3 * (time.process_time() - began))
        for name in names:
            apart[name].append(float(np.abs(shown[name][0].astype(int) - shown["ours"][0]).mean()))
    size = sum(map(len, files)) / len(files) / SECONDS * 8 / 1e3
    print(f"\n{title}, {size:.0f} kb/s, {clips} clips\n")
    heads = ("", "CPU ms per clip", "quartiles", "clips/s per core", "over ours", "pixels apart, of 255")
    print("|", " | ".join(heads), "|\n" + "|---" * len(heads) + "|")
    for name in names:
        low, middle, high = np.percentile(taken[name], (25, 50, 75))
        ratio = np.median(np.array(taken[name]) / taken["ours"])
        print(
            f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {1e3 / middle:.1f} | {ratio:.2f} "
            f"| {np.mean(apart[name]):.2f} |"
        )


def movie(seed: int, width: int, height: int, interval: int) -> bytes:
    """A textured picture that drifts, with grain; a chirp and a tone."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    scene = np.asarray(Image.fromarray(rough).resize((2 * width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        picture = out.add_stream("libx264", rate=FPS)
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        picture.options = {"g": str(interval), "crf": "23", "threads": "1"}
        sound = out.add_stream("aac", rate=RATE, layout="stereo")
        for number in range(SECONDS * FPS):
            moved = np.roll(scene, -3 * number, 1)[:, :width].astype(np.int16)
            grain = rng.integers(-6, 7, (height, width, 1), np.int16)
            frame = av.VideoFrame.from_ndarray(np.clip(moved + grain, 0, 255).astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))
        moments = np.arange(SECONDS * RATE) / RATE
        waves = np.stack(
            [np.sin(2 * np.pi * (300 + 200 * moments) * moments), np.sin(2 * np.pi * 700 * moments)]
        )
        for first in range(0, SECONDS * RATE, 1024):
            part = np.ascontiguousarray(0.3 * waves[:, first : first + 1024], np.float32)
            heard = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            heard.sample_rate, heard.pts, heard.time_base = RATE, first, Fraction(1, RATE)
            out.mux(sound.encode(heard))
        out.mux(sound.encode(None))
    return buffer.getvalue()


if __name__ == "__main__":
    main()
