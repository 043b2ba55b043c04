"""What the fences around pictures and checkpoints cost, and what they let through.

    python benchmarks/fences.py decode     # decoding for crops with and without them, in turns
    python benchmarks/fences.py scans      # the slowest JPEGs that are still decoded
    python benchmarks/fences.py metadata   # reading a checkpoint's list of tensors: torch's way, and ours

CPU time of this process throughout.
"""

import io
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ingest.image import decode as decoding
from pipeline.checkpoint import metadata as reading
from pipeline.data import in_hand as notes

PICTURES, ROUNDS = 60, 30
TENSORS, RANKS = 4_500, 64


def seconds(act: Callable[[], object]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:,.3f} ({low:,.3f} to {high:,.3f})"


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def decode() -> None:
    """Pictures of 500 x 375, as crops of half their size ask for them."""
    rng = np.random.default_rng(0)
    large = np.asarray(Image.effect_mandelbrot((1600, 1200), (-3, -2.5, 2, 2.5), 100).convert("RGB"), int)
    noisy = (large + rng.integers(-20, 20, large.shape)).clip(0, 255).astype(np.uint8)
    data = [
        jpeg(Image.fromarray(noisy[3 * i : 3 * i + 525, 5 * i : 5 * i + 700]).resize((500, 375)), quality=90)
        for i in range(PICTURES)
    ]
    in_hand = notes.InHand(1)

    def fenced() -> None:
        for number, picture in enumerate(data):
            with in_hand.holding((0, number)):
                decoding.decode(picture, at_least=lambda width, height: (width // 2, height // 2))

    class Open:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def bare() -> None:
        for picture in data:
            decoding.decode(picture, at_least=lambda width, height: (width // 2, height // 2))

    limit, scans = decoding.CpuLimit, decoding._has_too_many_scans
    notes.get_worker_info = lambda: SimpleNamespace(id=0)  # type: ignore[assignment, return-value]
    fenced()
    ratios, with_them, without = [], [], []
    for round_ in range(ROUNDS):
        for is_fenced in (round_ % 2 == 0, round_ % 2 == 1):
            if is_fenced:
                decoding.CpuLimit, decoding._has_too_many_scans = limit, scans  # type: ignore[misc]
                with_them.append(PICTURES / seconds(fenced))
            else:
                decoding.CpuLimit = Open  # type: ignore[assignment, misc]
                decoding._has_too_many_scans = lambda *_: False
                without.append(PICTURES / seconds(bare))
        ratios.append(with_them[-1] / without[-1])
    print(
        f"{sum(map(len, data)) // PICTURES:,} bytes each, {ROUNDS} rounds of {PICTURES}: median (quartiles)"
    )
    print(f"images per CPU second: with {quartiles(with_them)}, without {quartiles(without)}")
    print(f"ratio {quartiles(ratios)}")


def scans() -> None:
    for side, count in ((8000, 10), (8000, 32), (4000, 128), (1024, 1952), (100, 31_250), (8000, 1_700)):
        data = jpeg(Image.new("RGB", (side, side), "grey"), progressive=True)
        last = data.rindex(b"\xff\xda")
        more = data[data.rindex(b"\xff\xc4", 0, last) : -2] * (count - 10)
        bomb = data[:-2] + more + data[-2:]
        reason = "decoded"
        try:
            taken = seconds(lambda bomb=bomb: decoding.decode(bomb))  # type: ignore[misc]
        except decoding.ImageError as error:
            taken, reason = 0.0, str(error)
            decoding._has_too_many_scans, decoding.SECONDS = lambda *_: False, 1e6
            taken = seconds(lambda bomb=bomb: decoding.decode(bomb))  # type: ignore[misc]
        print(f"{side} x {side}, {count:,} scans, {len(bomb):,} bytes: {reason}, {taken:.2f} s to decode")


def metadata() -> None:
    tensors, places = {}, {}
    for number in range(TENSORS):
        name = f"optimizer.trunk.s3.b{number}.conv2.conv.weight/momentum_buffer"
        pieces = [
            ChunkStorageMetadata(torch.Size([8 * rank, 0, 0, 0]), torch.Size([8, 64, 3, 3]))
            for rank in range(RANKS)
        ]
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), torch.Size([8 * RANKS, 64, 3, 3]), pieces
        )
        for rank in range(RANKS):
            index = MetadataIndex(name, torch.Size([8 * rank, 0, 0, 0]), rank)
            places[index] = _StorageInfo(f"__{rank}_0.distcp", 20_000 * number, 20_000)
    data = pickle.dumps(Metadata(tensors, storage_data=places, storage_meta=StorageMeta()))
    files = {f"__{rank}_0.distcp": 20_000 * TENSORS for rank in range(RANKS)}

    def read() -> None:
        reading._made_anew(reading._Unpickler(io.BytesIO(data)).load(), files)

    theirs, ours = [], []
    for _ in range(5):
        theirs.append(seconds(lambda: pickle.loads(data)))  # noqa: S301 -- made above
        ours.append(seconds(read))
    print(f"{len(data) / 1e6:.0f} MB, {TENSORS * RANKS:,} pieces; seconds: median (quartiles)")
    print(f"torch {quartiles(theirs)}, ours {quartiles(ours)}")


if __name__ == "__main__":
    {"decode": decode, "scans": scans, "metadata": metadata}[sys.argv[1]]()
