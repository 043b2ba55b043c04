"""Claims: dedup finds every near duplicate within r bits, of 10 million hashes in a minute on one core; and
what perceptual hashes find of photographs that were changed.

    python benchmarks/dedup.py hashes [--count 10000000] [--radius 4] [--scratch FOLDER]
    python benchmarks/dedup.py photos photos.tar

hashes: random ones, a tenth of them copies of others at 0 to r + 2 bits, through the functions that
`ingest dedup` maps over its tasks, in one process. Exits with 1 if recall within r is not 1, or if something
was dropped that has no kept hash within r. photos: copies of each photograph in a tar, re-encoded, resized,
cropped, grey, brighter, mirrored: how many have a hash within r bits of their original's; and how many pairs
of different photographs do.
"""

import argparse
import io
import multiprocessing
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ingest.dedup import duplicates
from ingest.dedup.hamming import bands
from ingest.dedup.partition import read_partition
from ingest.dedup.tasks import ROWS_PER_PARTITION, ROWS_PER_TASK
from ingest.image.phash import perceptual_hash

Copy = Callable[[Image.Image], Image.Image]


def planted(count: int, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes; and for each its original's position, or -1; and how many bits lie between. Shuffled."""
    rng = np.random.default_rng(0)
    copies = count // 10
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    original = np.full(count, -1)
    bits = np.zeros(count, np.int64)
    original[count - copies :] = rng.permutation(count - copies)[:copies]
    bits[count - copies :] = np.arange(copies) % (radius + 3)
    # The first so many of a random order of the 64 bits are turned over.
    for start in range(count - copies, count, 1 << 18):
        part = slice(start, min(start + (1 << 18), count))
        order = np.argsort(rng.random((part.stop - start, 64), np.float32), axis=1).astype(np.uint64)
        chosen = np.arange(64) < bits[part, None]
        flips = np.bitwise_or.reduce(np.where(chosen, np.uint64(1) << order, np.uint64(0)), axis=1)
        hashes[part] = hashes[original[part]] ^ flips
    order = rng.permutation(count)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    moved = original[order]
    return hashes[order], np.where(moved >= 0, place[moved], -1), bits[order]


def find(radius: int, scratch: Path, partitions: int) -> tuple[np.ndarray, dict[str, float]]:
    """DROPS of the hashes in scratch, whose ids are their positions, and figures."""
    hashes = np.load(scratch / "hashes.npy", mmap_mode="r")
    started = time.perf_counter()
    paths = []
    for number, first in enumerate(range(0, len(hashes), ROWS_PER_TASK)):
        paths.append(scratch / f"hashes-{number}")
        part = hashes[first : first + ROWS_PER_TASK]
        ids = np.arange(first, first + len(part), dtype=np.uint64)
        duplicates.scatter_hashes(paths[-1], part, ids, radius=radius, partitions=partitions)
    scattered = time.perf_counter()
    same, alike = [], []
    compared = hot = 0
    for place in range((radius + 1) * partitions):
        records = read_partition(paths, place, (radius + 1) * partitions, duplicates.HASHES)
        near = duplicates.near_duplicates(records, radius=radius, band=place // partitions, first_own=0)
        same.append(near.same)
        alike.append(near.alike)
        compared += near.pairs.compared
        hot += near.pairs.hot_buckets
    searched = time.perf_counter()
    kept_first = duplicates.first_come(np.concatenate(alike))
    drops = duplicates.settle(np.empty(0, duplicates.DROPS), np.concatenate(same), kept_first)
    ended = time.perf_counter()
    # Not ru_maxrss, which a process inherits from the one that started it.
    peak = int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    figures = {
        "peak": peak,
        "scatter": scattered - started,
        "search": searched - scattered,
        "settle": ended - searched,
        "compared": compared,
        "hot": hot,
    }
    return drops, figures


def hashes_main(count: int, radius: int, scratch: Path | None) -> None:
    hashes, original, bits = planted(count, radius)
    partitions = -(-count // ROWS_PER_PARTITION)
    # In a process of its own, so that its peak is not that of planting.
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory(dir=scratch) as folder, pool:
        np.save(Path(folder) / "hashes.npy", hashes)
        drops, figures = pool.submit(find, radius, Path(folder), partitions).result()
    seconds = figures["scatter"] + figures["search"] + figures["settle"]
    print(f"{count:,} hashes, r = {radius}: {seconds:.1f} s on one core ", end="")
    print(", ".join(f"{name} {figures[name]:.1f}" for name in ("scatter", "search", "settle")))
    print(f"peak memory {figures['peak']:.0f} MiB; {partitions} partitions of each band;", end=" ")
    print(f"{figures['compared']:,.0f} pairs compared, {figures['hot']:.0f} hot buckets")
    gone = np.zeros(count, bool)
    gone[drops["id"].astype(np.int64)] = True
    # A pair is caught when one of the two is dropped: which one, their positions say.
    copies = np.flatnonzero(original >= 0)
    caught = gone[copies] | gone[original[copies]]
    for distance in range(radius + 3):
        of = bits[copies] == distance
        print(f"  copies at {distance} bits: {caught[of].mean():.6f} of {of.sum():,} caught")
    measured = np.bitwise_count(hashes[drops["id"].astype(int)] ^ hashes[drops["winner"].astype(int)])
    sound = bool((measured <= radius).all() and not gone[drops["winner"].astype(int)].any())
    planted_pairs = np.zeros(count, bool)
    within = copies[bits[copies] <= radius]
    planted_pairs[np.maximum(within, original[within])] = True
    by_chance = int((gone & ~planted_pairs).sum())
    print(f"  {len(drops):,} dropped, each within r of one kept: {sound}; {by_chance} were not planted")
    extrapolate(count, radius, seconds, int(figures["compared"]))
    if not sound or not caught[bits[copies] <= radius].all():
        raise SystemExit(1)


def extrapolate(count: int, radius: int, seconds: float, compared: int) -> None:
    """Work per hash is constant but for comparisons, which grow with the square of the count."""
    outer = [length for _, length in bands(64, radius)]
    # How likely two random hashes are to share a bucket: over all tables, and if there were bands alone.
    chance = sum(2.0 ** -(length + part) for length in outer for _, part in bands(64 - length, radius))
    plain_chance = sum(2.0**-length for length in outer)
    pairs = compare_seconds(1 << 22)
    print(f"model: {seconds / count * 1e6:.2f} us per hash, and {pairs * 1e9:.1f} ns for each of")
    print(f"  N^2 / 2 * {chance:.3g} compared pairs ({count**2 / 2 * chance:,.0f} here")
    print(f"  by the model, {compared:,} counted)")
    for large in (10**9, 10**10):
        compares = large**2 / 2 * chance
        linear, square = large * seconds / count / 3600, compares * pairs / 3600
        print(
            f"  {large:.0e}: {linear + square:.1f} core-hours ({linear:.1f} + {square:.1f} for "
            f"{compares:.1e} pairs), {large * 16 * (radius + 1) / 1e9:,.0f} GB of scratch"
        )
        plain = large**2 / 2 * plain_chance
        print(f"    (buckets of one band: {plain:.1e} pairs, {plain * pairs / 3600:,.0f} core-hours)")


def compare_seconds(count: int) -> float:
    """Of one pair: hashes in full buckets of 64, as at a size 100 times larger."""
    from ingest.dedup.hamming import _at_lags

    table = np.sort(np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64))
    buckets = np.arange(count, dtype=np.uint64) // np.uint64(64)
    started, compared = time.perf_counter(), 0
    for lag, at in _at_lags(buckets, 64):
        compared += len(at)
        _ = at[np.bitwise_count(table[at] ^ table[at + lag]) <= 3]
    return (time.perf_counter() - started) / compared


def recoded(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(picture: Image.Image, share: float) -> Image.Image:
    size = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    return recoded(picture.resize(size, Image.Resampling.LANCZOS), 90)


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without this share of width and height, half of it at each side."""
    x, y = picture.width * share / 2, picture.height * share / 2
    return recoded(
        picture.crop((round(x), round(y), round(picture.width - x), round(picture.height - y))), 90
    )


def copies() -> dict[str, Copy]:
    made: dict[str, Copy] = {}
    for quality in (90, 75, 50):
        made[f"JPEG quality {quality}"] = lambda p, q=quality: recoded(p, q)
    for share in (0.75, 0.5, 0.25):
        made[f"resized to {share:.0%}, quality 90"] = lambda p, s=share: resized(p, s)
    for share in (0.01, 0.02, 0.05, 0.10):
        made[f"cropped by {share:.0%}, quality 90"] = lambda p, s=share: cropped(p, s)
    made["grey"] = lambda p: recoded(p.convert("L").convert("RGB"), 90)
    for factor in (0.7, 1.3):
        made[f"brightness x {factor}"] = lambda p, f=factor: recoded(
            ImageEnhance.Brightness(p).enhance(f), 90
        )
    made["mirrored"] = lambda p: recoded(ImageOps.mirror(p), 90)
    return made


def pictures(path: str) -> Iterator[tuple[str, Image.Image]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                file: Any = tar.extractfile(member)
                picture = ImageOps.exif_transpose(Image.open(io.BytesIO(file.read())))
                yield Path(member.name).stem, picture.convert("RGB")


def photos_main(path: str) -> None:
    radii = (3, 4, 6, 10)
    made = copies()
    names, originals, changed = [], [], []
    for name, picture in pictures(path):
        names.append(re.sub(r"\d+", "#", name))
        originals.append(perceptual_hash(picture))
        changed.append([perceptual_hash(copy(picture)) for copy in made.values()])
    hashes = np.array(originals, np.uint64)
    distances = np.bitwise_count(np.array(changed, np.uint64) ^ hashes[:, None])
    flat = duplicates.is_flat(hashes)
    bits = np.bitwise_count(hashes)
    print(
        f"{len(hashes)} photographs; {int(flat.sum())} too flat; {(bits == 32).mean():.1%} have 32 bits set"
    )
    print(f"{'recall of copies':34}" + "".join(f"  r = {r:2}" for r in radii) + "  median distance")
    for name, column in zip(made, distances.T, strict=True):
        shares = "".join(f"{(column <= r).mean():8.1%}" for r in radii)
        print(f"{name:34}{shares}  {int(np.median(column))}")
    first, second = np.triu_indices(len(hashes), 1)
    between = np.bitwise_count(hashes[first] ^ hashes[second])
    told = {r: Counter() for r in radii}
    for r in radii:
        near = np.flatnonzero(between <= r)
        told[r].update(" ~ ".join(sorted({names[first[p]], names[second[p]]})) for p in near)
    print(f"{len(between):,} pairs of originals; taken for alike, by name:")
    for r in radii:
        print(f"  r = {r:2}: " + ", ".join(f"{count} {name}" for name, count in sorted(told[r].items())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hashes = commands.add_parser("hashes")
    hashes.add_argument("--count", type=int, default=10_000_000)
    hashes.add_argument("--radius", type=int, default=4)
    hashes.add_argument("--scratch", type=Path)
    photos = commands.add_parser("photos")
    photos.add_argument("tar")
    arguments = parser.parse_args()
    if arguments.command == "hashes":
        hashes_main(arguments.count, arguments.radius, arguments.scratch)
    else:
        photos_main(arguments.tar)


if __name__ == "__main__":
    main()
