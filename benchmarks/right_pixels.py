"""Claims: colours come out as ImageMagick's, following profiles costs little, and no format loses images.

    python benchmarks/right_pixels.py colours                   # levels, beside ImageMagick and arithmetic
    python benchmarks/right_pixels.py kept                      # share per format, beside plain Pillow
    python benchmarks/right_pixels.py cost [--before CHECKOUT]  # images per CPU-second, in turns
    python benchmarks/right_pixels.py decode --before CHECKOUT  # JPEGs without a profile, in one process

Photographs are those that scikit-image ships. Needs Debian's imagemagick, colord-data and libgs-common, from
which the profiles of Adobe RGB, ProPhoto and CMYK are; P3 and gamma 1.8 are made from their matrices.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

sys.path.append(str(Path(__file__).parents[1] / "tests" / "ingest" / "image"))

CONVERT = "/usr/bin/convert-im6.q16"
COLORD = Path("/usr/share/color/icc/colord")
CMYK = Path("/usr/share/color/icc/ghostscript/default_cmyk.icc")
PHOTOGRAPHS = "astronaut coffee chelsea rocket hubble_deep_field motorcycle_left retina ihc"
LONGEST = 1024
ROUNDS = 9
WORK = ("resize 256", "bytes, hash", "bytes, no hash", "decode for crops")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["colours", "kept", "cost", "decode", "one-round"])
    parser.add_argument("--before", type=Path, help="A checkout of the version to compare with.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", choices=WORK)
    arguments = parser.parse_args()
    match arguments.what:
        case "colours":
            colours()
        case "kept":
            kept()
        case "cost":
            cost(arguments.before)
        case "decode":
            decode_in_turns(arguments.before)
        case _:
            print(json.dumps(one_round(arguments.folder, arguments.work)))


def photographs() -> Iterator[Image.Image]:
    import skimage

    for name in PHOTOGRAPHS.split():
        path = next(Path(skimage.__file__).with_name("data").glob(f"{name}.*"))
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((LONGEST, LONGEST))
        yield picture


def profiles() -> dict[str, bytes]:
    from profiles import SPACES, rgb_profile

    made = {name: rgb_profile(*SPACES[name]) for name in ("p3", "gamma18")}
    files = {name: (COLORD / f"{name}.icc").read_bytes() for name in ("AdobeRGB1998", "ProPhotoRGB", "sRGB")}
    return made | files | {"CMYK": CMYK.read_bytes()}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colours() -> None:
    """4,913 colours evenly over the cube: ours, ImageMagick's, and, of matrices, arithmetic of our own."""
    from profiles import SPACES, srgb_of

    from ingest.image.decode import decode

    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(17, -1, 3)
    inks = np.concatenate([cube, np.roll(cube[..., :1], 5, axis=0)], axis=-1)
    print("profile        ImageMagick: mean, 99 %, max   arithmetic: mean, max   profile ignored: mean, max")
    for name, profile in profiles().items():
        picture = Image.fromarray(inks, "CMYK") if name == "CMYK" else Image.fromarray(cube)
        data = encoded(picture, "TIFF", icc_profile=profile)
        ours = np.asarray(decode(data), int)
        theirs = magick(data)
        off = np.abs(ours - theirs)
        ignored = np.abs(np.asarray(picture.convert("RGB"), int) - theirs)
        line = f"{name:<14} {off.mean():.2f}, {np.percentile(off, 99):.0f}, {off.max()}"
        if name in SPACES:
            right = np.abs(ours - srgb_of(cube, *SPACES[name]))
            line += f"   {right.mean():.2f}, {right.max():.2f}"
        print(f"{line}   {ignored.mean():.1f}, {ignored.max()}")


def magick(data: bytes) -> np.ndarray:
    """ImageMagick's conversion of this TIFF to sRGB, with black point compensation, as ours has."""
    with tempfile.TemporaryDirectory() as folder:
        srgb, source, target = (Path(folder) / name for name in ("srgb.icc", "in.tif", "out.png"))
        srgb.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        source.write_bytes(data)
        options = ["-intent", "perceptual", "-black-point-compensation", "-profile", srgb]
        subprocess.run([CONVERT, source, *options, "-depth", "8", f"PNG24:{target}"], check=True)
        return np.asarray(Image.open(target).convert("RGB"), int)


def kept() -> None:
    """What a crawl keeps of each format and variant, and what plain `Image.open` and `load` read."""
    from ingest.image.check import Treatment, check

    counts: Counter[tuple[str, str]] = Counter()
    for picture in photographs():
        for name, data in variants(picture):
            counts[name, "files"] += 1
            counts[name, "kept"] += check(data, Treatment()).status == "kept"
            try:
                Image.open(io.BytesIO(data)).convert("RGB").load()
                counts[name, "pillow"] += 1
            except Exception:
                continue
    for name in sorted({name for name, _ in counts}):
        print(f"{name:<18} {counts[name, 'files']:3} files, kept {counts[name, 'kept']:3}, ", end="")
        print(f"plain Pillow {counts[name, 'pillow']:3}")


def variants(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = picture.quantize(64)
    for name, image, options in (
        ("JPEG", picture, {"quality": 85}),
        ("JPEG progressive", picture, {"progressive": True}),
        ("JPEG grey", grey, {}),
        ("JPEG CMYK", picture.convert("CMYK"), {}),
        ("PNG", picture, {}),
        ("PNG palette", palette, {}),
        ("PNG alpha", picture.convert("RGBA"), {}),
        ("PNG 16 bits", deep, {}),
        ("PNG text", picture, {}),
        ("PNG no end", picture, {}),
        ("WEBP", picture, {}),
        ("WEBP lossless", picture, {"lossless": True}),
        ("GIF", palette, {}),
        ("BMP", picture, {}),
        ("BMP palette", palette, {}),
        ("TIFF", picture, {}),
        ("TIFF LZW", picture, {"compression": "tiff_lzw"}),
        ("TIFF Deflate", picture, {"compression": "tiff_adobe_deflate"}),
        ("TIFF PackBits", picture, {"compression": "packbits"}),
        ("TIFF JPEG", picture, {"compression": "jpeg"}),
        ("TIFF G4", picture.convert("1"), {"compression": "group4"}),
        ("TIFF 16 bits", deep, {}),
        ("AVIF", picture, {"speed": 10}),
    ):
        data = encoded(image, name.split()[0], **options)
        if name == "PNG text":
            # A text whose checksum is wrong.
            data = data[:33] + b"\0\0\0\x07tEXtComment" + b"\0\0\0\0" + data[33:]
        yield name, data[:-12] if name == "PNG no end" else data


def cost(before: Path | None) -> None:
    """Images per CPU-second of this checkout and another, in turns, each round in a process of its own."""
    here = Path(__file__).parents[1]
    trees = {"after": here} | ({"before": before} if before else {})
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, picture in enumerate(photographs()):
            for kind, profile in (profiles() | {"none": b""}).items():
                image = picture.convert("CMYK") if kind == "CMYK" else picture
                data = encoded(image, "JPEG", quality=85, icc_profile=profile or None)
                (folder / f"{kind}-{number}.jpg").write_bytes(data)
        for number, work in itertools.product(range(ROUNDS), WORK):
            for tree, path in sorted(trees.items(), reverse=number % 2 == 1):
                environment = os.environ | {"PYTHONPATH": str(path), "OPENBLAS_NUM_THREADS": "1"}
                # As checking processes have them.
                environment |= {"MALLOC_MMAP_THRESHOLD_": "16777216", "MALLOC_TRIM_THRESHOLD_": "67108864"}
                command = [sys.executable, __file__, "one-round", "--folder", name, "--work", work]
                answer = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
                for kind, rate in json.loads(answer).items():
                    found.setdefault((f"{work}: {kind}", tree), []).append(rate)
    for work in sorted({work for work, _ in found}):
        print(f"{work:<28}", end="")
        for tree in trees:
            rates = found[work, tree]
            print(f"  {tree} {statistics.median(rates):6.1f} ({min(rates):.1f} to {max(rates):.1f})", end="")
        print()


def one_round(folder: Path, work: str) -> dict[str, float]:
    """Images per CPU-second of this process when it does this work, by the images' profile."""
    from ingest.image.check import Treatment, check
    from ingest.image.decode import decode

    treatments = {"resize 256": Treatment(resize=256), "bytes, no hash": Treatment(phash=False)}

    def do(data: bytes) -> None:
        if work == "decode for crops":
            decode(data, at_least=lambda width, height: (400, 300))
        else:
            check(data, treatments.get(work, Treatment()))

    rates = {}
    for kind in sorted({path.name.split("-")[0] for path in folder.iterdir()}, reverse=True):
        images = [path.read_bytes() for path in sorted(folder.glob(f"{kind}-*"))]
        do(images[0])
        repeats = 60 if work == "bytes, no hash" else 3
        started = time.process_time()
        for data in images * repeats:
            do(data)
        rates[kind] = repeats * len(images) / (time.process_time() - started)
    return rates


def decode_in_turns(before: Path) -> None:
    """Two versions in one process: between processes, how memory lies changes Pillow's own speed by 8 %."""
    here = Path(__file__).parents[1]
    decoders = {"before": decoder_of(before.resolve()), "after": decoder_of(here)}
    for longest, repeats in ((32, 40), (LONGEST, 1)):
        images = []
        for picture in photographs():
            picture.thumbnail((longest, longest))
            images.append(encoded(picture, "JPEG", quality=85))
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for number in range(60):
            for name in sorted(decoders, reverse=number % 2 == 1):
                started = time.process_time()
                for data in images * repeats:
                    decoders[name](data, at_least=lambda width, height: (width // 3, height // 3))
                seconds[name].append((time.process_time() - started) / len(images) / repeats)
        ratios = [after / first for first, after in zip(seconds["before"], seconds["after"], strict=True)]
        medians = ", ".join(
            f"{name} {1e6 * statistics.median(of_name):.0f}" for name, of_name in seconds.items()
        )
        low, middle, high = statistics.quantiles(ratios)
        print(
            f"{longest} pixels: us {medians}; after / before {middle:.3f}, quartiles {low:.3f} to {high:.3f}"
        )


def decoder_of(tree: Path) -> Callable[..., Image.Image]:
    """`decode` of a checkout, beside those of others."""
    sys.path.insert(0, str(tree))
    from ingest.image.decode import decode

    assert Path(decode.__code__.co_filename).is_relative_to(tree)
    sys.path.remove(str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ingest", "cluster")]:
        del sys.modules[name]
    return decode


if __name__ == "__main__":
    main()
