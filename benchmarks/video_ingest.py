"""Claim: videos become checked clips at 3 times the rate per CPU-second of the ffmpeg command, one call per
stream or per file, as video2dataset and scripts like it run it. Not held where streams are decoded and ffmpeg
copies them: nine tenths of that time are FFmpeg's decoder, which a copy never calls.

    python benchmarks/video_ingest.py [--clips 64] [--films 8] [--rounds 3]

Clips of 10 s (320x240, 25 frames a second, H.264 of about 1 Mb/s, AAC) that stay as they are, and films of a
minute that become clips of 10 s. Each way takes the same files on one core, in turns, the calls of ffmpeg an
eighth of them; CPU time is that of all processes, with their start.

ours, decoded       `ingest crawl-shards --video --workers 1`: plan, cut, decode both streams completely, seal
ours, not decoded   the same with --no-decode: packets are counted
copied              `ffmpeg -c copy`, pictures and sound by a call each, in files of 10 s; and a tar of them
encoded again       one call that writes H.264 (veryfast) and AAC, in files of 10 s; and a tar of them
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_FFMPEG = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-y", "-i"]
_PARTS = ["-f", "segment", "-segment_time", "10", "-reset_timestamps", "1"]


def film(number: int, seconds: int) -> bytes:
    """A drifting pattern with noise, a keyframe every two seconds, and a sound that wanders."""
    rng = np.random.default_rng(number)
    width, height, fps, rate = 320, 240, 25, 44_100
    ground = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        picture = out.add_stream("libx264", rate=fps)
        picture.width, picture.height, picture.pix_fmt, picture.gop_size = width, height, "yuv420p", 50
        picture.bit_rate = 900_000
        picture.options = {"preset": "veryfast"}
        sound = out.add_stream("aac", rate=rate, layout="stereo")
        for index in range(seconds * fps):
            moved = np.roll(ground, (index // 2, index), (0, 1))[:height, :width]
            noisy = np.clip(moved + rng.normal(0, 6, moved.shape), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(noisy, "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            out.mux(picture.encode(frame))
            time = np.arange(index * rate // fps, (index + 1) * rate // fps) / rate
            wave = (0.3 * np.sin(2 * np.pi * (300 + 100 * np.sin(time)) * time)).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(wave.repeat(2)[None], format="flt", layout="stereo")
            samples.sample_rate, samples.pts, samples.time_base = rate, index * rate // fps, Fraction(1, rate)
            out.mux(sound.encode(samples))
        out.mux(picture.encode(None))
        out.mux(sound.encode(None))
    return buffer.getvalue()


def ours(files: list[Path], folder: Path, *, decode: bool) -> int:
    """Clips that were kept."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", "crawl-shards"]
    command += [str(files[0].parent), "--output", str(folder / "set"), "--video", "--workers", "1", "--json"]
    said = subprocess.run(
        [*command, *([] if decode else ["--no-decode"])], check=True, capture_output=True, text=True
    )
    return int(json.loads(said.stdout)["kept"])


def copied(files: list[Path], folder: Path) -> int:
    """Pictures and sound are cut by themselves."""
    for file in files:
        for stream, end in (("v", "mp4"), ("a", "m4a")):
            target = folder / f"{file.stem}_%03d.{end}"
            subprocess.run(
                [*_FFMPEG, file, "-map", f"0:{stream}:0", "-c", "copy", *_PARTS, target], check=True
            )
    return _packed(folder, "*.mp4")


def encoded(files: list[Path], folder: Path) -> int:
    """Both together, as H.264 and AAC."""
    for file in files:
        again = ["-c:v", "libx264", "-preset", "veryfast", "-threads", "1", "-c:a", "aac"]
        forced = ["-force_key_frames", "expr:gte(t,n_forced*10)"]
        subprocess.run(
            [*_FFMPEG, file, *again, *forced, *_PARTS, folder / f"{file.stem}_%03d.mp4"], check=True
        )
    return _packed(folder, "*.mp4")


def _packed(folder: Path, pattern: str) -> int:
    made = sorted(folder.iterdir())
    with tarfile.open(folder / "set.tar", "w") as tar:
        for path in made:
            tar.add(path, path.name)
    return len(list(folder.glob(pattern)))


def cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--films", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ways: dict[str, Callable[[list[Path], Path], int]] = {
        "ours, decoded": lambda files, folder: ours(files, folder, decode=True),
        "ours, not decoded": lambda files, folder: ours(files, folder, decode=False),
        "copied": copied,
        "encoded again": encoded,
    }
    print(
        subprocess.run(
            ["ffmpeg", "-version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
    )
    print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])
    with tempfile.TemporaryDirectory() as scratch:
        for what, count, seconds in (("clips of 10 s", given.clips, 10), ("films of 60 s", given.films, 60)):
            source = Path(scratch, what)
            source.mkdir()
            # Few are made, and each is there several times under another name: no way looks at copies.
            made = [film(number, seconds) for number in range(min(count, 4))]
            files = [source / f"{number:04d}.mp4" for number in range(count)]
            for number, file in enumerate(files):
                file.write_bytes(made[number % len(made)])
            found: dict[str, list[float]] = {name: [] for name in ways}
            size = sum(file.stat().st_size for file in files) / count
            print(f"\n{count} {what}, {size / 1e6:.2f} MB each")
            for _ in range(given.rounds):
                for name, way in ways.items():
                    # A call of ffmpeg takes as long for each file. Ours is one command for all.
                    some = files if name.startswith("ours") else files[: -(-count // 8)]
                    with tempfile.TemporaryDirectory(dir=scratch) as folder:
                        before = cpu_seconds()
                        way(some, Path(folder))
                        found[name].append(len(some) / (cpu_seconds() - before))
                _tell(found)


def _tell(found: dict[str, list[float]]) -> None:
    print("\n| way | videos per CPU-second | decoded / this | not decoded / this |\n|---|---|---|---|")
    for name, rates in found.items():
        ratios = [_ratio(found[f"ours, {which}"], rates) for which in ("decoded", "not decoded")]
        print(f"| {name} | {_spread(rates, 1)} | {' | '.join(ratios)} |", flush=True)


def _ratio(ours: list[float], others: list[float]) -> str:
    return _spread([own / other for own, other in zip(ours, others, strict=True)], 2)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
