"""Gradients averaged over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.ddp import mean_in_rank_order


class Bucket:
    """As much of DDP's bucket as the hook looks at."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def buffer(self) -> torch.Tensor:
        return self._values


def _mean(group: dist.ProcessGroup, before: int, after: int) -> Any:
    own = torch.randn(10_007, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    padded = torch.cat([torch.ones(before), own, torch.ones(after)])
    mean = mean_in_rank_order(group, Bucket(padded)).wait()  # type: ignore[arg-type]
    return mean[before : before + len(own)].numpy()


def test_T3_a_mean_over_ranks_does_not_depend_on_the_place_in_a_bucket(
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    first, *others = run_on_ranks(3, _mean, 0, 0) + run_on_ranks(3, _mean, 333, 1111)
    assert all((first == other).all() for other in others)
    expected = sum(torch.randn(10_007, generator=torch.Generator().manual_seed(r)) for r in range(3)) / 3
    assert torch.from_numpy(first).numpy() == pytest.approx(
        torch.as_tensor(expected).numpy(), rel=1e-5, abs=1e-6
    )
