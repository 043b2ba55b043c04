"""An object store over a folder."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ingest.store.object_requests import forget_clients


@pytest.fixture(scope="session")
def slow_object_server() -> ModuleType:
    path = Path(__file__).parents[4] / "benchmarks" / "slow_object_server.py"
    spec = importlib.util.spec_from_file_location("slow_object_server", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["slow_object_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_objects(
    slow_object_server: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """as_objects(FOLDER, fault_share=) -> s3:// URL of what is in the folder, from a server of its own."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path, **how: float) -> str:
            url = stack.enter_context(slow_object_server.served(folder.parent, **how))
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                monkeypatch.delenv(name)
            for name, value in {
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": url,
            }.items():
                monkeypatch.setenv(name, value)
            forget_clients()
            return f"s3://{folder.name}"

        yield serve
