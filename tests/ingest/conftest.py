"""Small pictures, and crawls of them."""

import io
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from ingest.crawl import make_units
from ingest.crawl.crawl import crawl_shards
from ingest.fence.fence import environment
from ingest.fence.reading import end_waiting
from ingest.image.check_pool import Checker
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import CrawlReport
from ingest.sources import url_listing

Encode = Callable[..., bytes]


class _KeptChecker(Checker[Any]):
    """Processes that have nothing to do when a crawl has ended wait for the next that tells them the same:
    Python takes longer to start than a test's pictures to be checked.
    """

    waiting: ClassVar[list[tuple[object, Any]]] = []

    def __enter__(self) -> "_KeptChecker":
        # Not those of the process that this one was forked from.
        self._wanted = (os.getpid(), self._module, self._order, environment())
        mine = [each for each in self.waiting if each[0] == self._wanted][: self._workers]
        for each in mine:
            self.waiting.remove(each)
            self._idle.append(each[1])
            self._alive.add(each[1])
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            kept, self._idle = self._idle, type(self._idle)()
            self._alive.difference_update(kept)
            self.waiting.extend((self._wanted, process) for process in kept)
            while len(self.waiting) > 4:
                end_checker(self.waiting.pop(0))
        super().__exit__(kind, error, trace)


def end_checker(each: tuple[Any, Any]) -> None:
    wanted, process = each
    if wanted[0] == os.getpid():
        process.kill()
        process.close()


@pytest.fixture(scope="session", autouse=True)
def processes_wait_for_the_next_crawl() -> Iterator[None]:
    """Those that check images, and the one that reads lists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_units, "Checker", _KeptChecker)
        patch.setattr(url_listing, "end_waiting", lambda: None)
        yield
    end_waiting()
    for each in _KeptChecker.waiting:
        end_checker(each)


@pytest.fixture(scope="session")
def encode() -> Encode:
    """encode(picture, "PNG", **options) -> bytes"""

    def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def scene() -> Callable[..., Image.Image]:
    """scene(seed, width, height): a smooth picture without symmetry, different for each seed."""

    def scene(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
        rough = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
        return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)

    return scene


@pytest.fixture
def folder(tmp_path: Path, scene: Callable[..., Image.Image]) -> Callable[..., Path]:
    """folder(name, count): a folder of small pictures in two classes, and a text that claims to be one."""

    def folder(name: str = "pictures", count: int = 10) -> Path:
        root = tmp_path / name
        for number in range(count):
            path = root / ("cat", "dog")[number % 2] / f"{number:03}.{('jpg', 'png', 'webp')[number % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene(number, 24, 16).save(path)
        (root / "dog" / "note.jpg").write_text("no picture")
        return root

    return folder


@pytest.fixture(scope="session")
def crawl() -> Callable[..., CrawlReport]:
    """crawl([source, ...], output, workers=1, **settings) without progress."""

    def crawl(sources: list[Path], output: Path, *, workers: int = 1, **settings: object) -> CrawlReport:
        return crawl_shards(
            [str(source) for source in sources],
            output,
            CrawlSettings(**settings),
            workers=workers,
            progress=lambda counts: None,
        )

    return crawl


@pytest.fixture(scope="session")
def scan_bomb() -> bytes:
    """A progressive JPEG of 4 megapixels whose last scan comes 3,000 times: minutes of decoding."""
    buffer = io.BytesIO()
    Image.new("L", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[table:-2] * 3000 + data[-2:]


@pytest.fixture(scope="session")
def gif_of_comments() -> bytes:
    """Minutes within Pillow's Python: each comment is added to a copy of those before it."""
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, "GIF")
    data = buffer.getvalue()
    first = data.index(b",")  # the image descriptor
    long = b"\x21\xfe" + (b"\xff" + b"a" * 255) * 16_000 + b"\0"
    return data[:first] + long + b"\x21\xfe\x01a\0" * 200_000 + data[first:]


@pytest.fixture(scope="session")
def huge(encode: Encode) -> bytes:
    """A small file that is a picture of 16 megapixels."""
    return encode(Image.new("RGB", (4000, 4000)), "PNG")


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server."""
    from object_store import start_server

    server, port = start_server()
    yield port
    server.shutdown()


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://NAME of a new bucket, and an environment in which it is found."""
    import boto3

    from ingest.store.object_requests import forget_clients

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    forget_clients()
    name = f"test{secrets.token_hex(8)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def google_bucket(s3_port: int, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """gs://NAME of a new bucket, on the S3 server behind a translator."""
    from object_store import Proxy

    proxy = Proxy(s3_port, lambda method, path: None)
    account = {"gcs_base_url": proxy.url, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    yield f"gs://{bucket[5:]}"
    proxy.stop()


@pytest.fixture(scope="session")
def azurite() -> Iterator[Any]:
    """An emulator of Azure Blob Storage."""
    from object_store import Azurite, azurite_command

    command = azurite_command()
    if command is None:
        pytest.skip("Azurite is not installed: npm install --prefix .venv/azurite azurite")
    emulator = Azurite(command)
    yield emulator
    emulator.stop()


@pytest.fixture
def azure_container(azurite: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """az://NAME of a new container, and an environment in which it is found."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", azurite.account)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azurite.key)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.url)
    name = f"test{secrets.token_hex(8)}"
    azurite.create_container(name)
    return f"az://{name}"
