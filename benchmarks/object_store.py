"""Requests to an object store: obstore, which `ingest.store` is made of, against s3fs, which it had before.

    python -m pip install s3fs
    python benchmarks/object_store.py [--rounds 5] [--latency-ms 0 30 100]

Both speak to `slow_object_server.py` on this machine, in turn, with as many requests in flight: ranges, whole
files of a Parquet's size, creates of 2 KB, and one upload in parts of 16 MB, four at once. It tells the
medians of the rounds, the range of their ratios, and this process's CPU time for one request. The server
shares the cores: at 0 ms it bounds what is quick.
"""

import argparse
import asyncio
import base64
import hashlib
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slow_object_server import served

from ingest.store.object_requests import client, forget_clients
from ingest.store.object_store import PART_BYTES, UPLOADS_AT_ONCE, ObjectStore

TAR, TAR_BYTES = "shards/0/00000000.tar", 64 << 20
PARQUET, PARQUET_BYTES = "meta/0/00000000.parquet", 2 << 20
UPLOAD_BYTES = 64 << 20


class Arm(Protocol):
    """One library's way to do it; names are keys of the bucket."""

    async def read(self, name: str) -> None: ...
    async def read_range(self, name: str, start: int, size: int) -> None: ...
    async def create(self, name: str, data: bytes) -> None: ...
    async def upload(self, name: str, path: Path) -> None: ...


class Obstore:
    """`ingest.store`'s own class, with its retries and checks of answers."""

    def __init__(self, bucket: str) -> None:
        self._bucket = f"s3://{bucket}"
        self._store = ObjectStore(self._bucket)

    async def read(self, name: str) -> None:
        await self._store.read_async(name)

    async def read_range(self, name: str, start: int, size: int) -> None:
        (data,) = await self._store.read_ranges(name, [start], [size])
        assert len(data) == size

    async def create(self, name: str, data: bytes) -> None:
        await client(self._bucket).put_async(name, data, mode="create", use_multipart=False)

    async def upload(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            await client(self._bucket).put_async(
                name, file, chunk_size=PART_BYTES, max_concurrency=UPLOADS_AT_ONCE
            )


class S3fs:
    """The client of s3fs, with the requests that `ingest.store` sent through it."""

    def __init__(self, bucket: str, connections: int) -> None:
        import s3fs  # type: ignore[import-untyped,unused-ignore]

        config = {"max_pool_connections": connections, "retries": {"max_attempts": 0}}
        self._files = s3fs.S3FileSystem(asynchronous=True, skip_instance_cache=True, config_kwargs=config)
        self._place = {"Bucket": bucket}

    async def _client(self) -> Any:
        return await self._files.set_session()

    async def close(self) -> None:
        await (await self._client()).close()

    async def _get(self, name: str, **wanted: str) -> bytes:
        answer = await (await self._client()).get_object(**self._place, Key=name, **wanted)
        async with answer["Body"] as body:
            data: bytes = await body.read()
            return data

    async def read(self, name: str) -> None:
        await self._get(name)

    async def read_range(self, name: str, start: int, size: int) -> None:
        assert len(await self._get(name, Range=f"bytes={start}-{start + size - 1}")) == size

    async def create(self, name: str, data: bytes) -> None:
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _checksum(data)}
        await (await self._client()).put_object(
            **self._place, Key=name, Body=data, IfNoneMatch="*", **checksum
        )

    async def upload(self, name: str, path: Path) -> None:
        s3, place = await self._client(), self._place | {"Key": name}
        started = await s3.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
        place["UploadId"] = started["UploadId"]
        few = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def send(number: int, first: int, file: Any) -> dict[str, Any]:
            async with few:
                data = os.pread(file.fileno(), PART_BYTES, first)
                part = {"PartNumber": number, "ChecksumSHA256": _checksum(data)}
                answer = await s3.upload_part(**place, Body=data, **part)
                return part | {"ETag": answer["ETag"]}

        with path.open("rb") as file:
            edges = enumerate(range(0, path.stat().st_size, PART_BYTES), 1)
            parts = await asyncio.gather(*(send(number, first, file) for number, first in edges))
        await s3.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


@dataclass(frozen=True)
class Work:
    """What is done `count` times, `at_once` in flight."""

    name: str
    count: int
    at_once: int
    one: Callable[[Arm, int], Awaitable[None]]


def works(big: Path) -> list[Work]:
    """What is measured; `big` is the file to upload."""
    started = time.time_ns()
    names = (f"commits/{started}-{number}.json" for number in itertools.count())

    def reading(size: int) -> Callable[[Arm, int], Awaitable[None]]:
        places = random.Random(size)
        return lambda arm, _: arm.read_range(TAR, places.randrange(TAR_BYTES - size), size)

    return [
        Work("ranges of 2 KB", 1000, 256, reading(2 << 10)),
        Work("ranges of 100 KB", 500, 256, reading(100 << 10)),
        Work("whole Parquets of 2 MB", 40, 16, lambda arm, _: arm.read(PARQUET)),
        Work("creates of 2 KB", 300, 64, lambda arm, _: arm.create(next(names), bytes(2048))),
        Work("one upload of 64 MB", 1, 1, lambda arm, _: arm.upload("shards/0/00000001.tar", big)),
    ]


async def seconds(work: Work, arm: Arm) -> tuple[float, float]:
    """Wall and CPU time of all of it."""
    numbers = iter(range(work.count))

    async def lane() -> None:
        for number in numbers:
            await work.one(arm, number)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(lane() for _ in range(work.at_once)))
    return time.perf_counter() - wall, time.process_time() - cpu


async def measure(latency_ms: float, rounds: int, big: Path) -> None:
    """Print a row per kind of work."""
    s3fs = S3fs("bench", connections=256)
    arms: list[Arm] = [s3fs, Obstore("bench")]
    for work in works(big):
        times: list[list[tuple[float, float]]] = [[], []]
        for turn in range(rounds + 1):
            for arm, found in zip(arms, times, strict=True):
                took = await seconds(work, arm)
                if turn:  # the first connects
                    found.append(took)
        before, after = (statistics.median(wall for wall, _ in found) for found in times)
        ratios = sorted(old[0] / new[0] for old, new in zip(*times, strict=True))
        cpu = [statistics.median(used for _, used in found) / work.count * 1e3 for found in times]
        print(
            f"| {latency_ms:g} ms | {work.name} | {work.count / before:,.1f} | {work.count / after:,.1f} | "
            f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) | "
            f"{cpu[0]:.2f} | {cpu[1]:.2f} |",
            flush=True,
        )
    await s3fs.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0, 30, 100])
    given = parser.parse_args(arguments)
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    print(
        "| to the first byte | what | s3fs /s | obstore /s | ratio (range) | s3fs CPU ms | obstore CPU ms |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        for key, size in ((TAR, TAR_BYTES), (PARQUET, PARQUET_BYTES)):
            (folder / "bench" / key).parent.mkdir(parents=True)
            (folder / "bench" / key).write_bytes(random.Random(0).randbytes(size))
        (folder / "big").write_bytes(random.Random(1).randbytes(UPLOAD_BYTES))
        for latency_ms in given.latency_ms:
            with served(folder, latency_ms=latency_ms) as url:
                os.environ["AWS_ENDPOINT_URL"] = url
                forget_clients()
                asyncio.run(measure(latency_ms, given.rounds, folder / "big"))


if __name__ == "__main__":
    main()
