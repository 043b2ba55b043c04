"""What the tests of several folders share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors of tests are tiny: a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ranks_are_forks() -> None:
    gloo_ranks.start_server()


@pytest.fixture(autouse=True, scope="session")
def _all_is_seen_at_once() -> Iterator[None]:
    """Tests write where they read: what is not there does not come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.shared_folder.PATIENCE", 0.0)
        yield


@pytest.fixture
def run_on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """run_on_ranks(world, function, *arguments) calls function(group, *arguments) on real gloo ranks."""

    def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return gloo_ranks.run(world, function, arguments, folder=tmp_path)

    return run
