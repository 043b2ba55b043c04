"""CMA's positives: equal to a search by the equation, and on any number of ranks; planted ones are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import avid_reference as reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distributed.collectives import all_gather_rows
from pipeline.distributed.rows import deliver_rows, fetch_rows, own_rows
from pipeline.methods import nearest
from pipeline.methods.bank import Bank
from pipeline.methods.bank_health import kept_share, mean_cosines, mutual_share, shared_neighbourhoods
from pipeline.methods.nearest import Best, nearest_in_cells, nearest_in_two_stages, nearest_of_all

Ranks = Callable[..., list[Any]]
DIM = 16


def planted(samples: int, classes: int, *, noise: float, seed: int = 0) -> Tensor:
    """Rows (samples, 2, DIM) of known classes, row i of class i % classes; some are there twice."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 2, DIM, generator=generator)
    rows = centres[torch.arange(samples) % classes]
    rows = rows + noise * torch.randn(samples, 2, DIM, generator=generator)
    rows[3 * classes :: 5 * classes] = rows[0]
    return F.normalize(rows, dim=-1)


def bank_of(rows: Tensor, group: dist.ProcessGroup | None = None) -> Bank:
    """This rank's chunk; `parallelize` would make a DTensor of it."""
    bank = Bank(len(rows), rows.shape[-1], dtype=torch.float32, group=group)
    here = own_rows(len(rows), group)
    bank.rows = rows[here.start : here.stop].clone()
    return bank


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "QUERIES", 64)
    monkeypatch.setattr(nearest, "KEYS", 256)


@pytest.mark.parametrize("how", ["consensus", "union", "video", "audio"])
def test_T5_positive_sets_equal_the_equation(how: Any) -> None:
    rows = planted(150, 10, noise=0.6)
    found = nearest_of_all(bank_of(rows), how=how, count=9, progress=lambda: None)
    np.testing.assert_array_equal(found.numpy(), reference.positive_sets(rows.numpy(), how, 9))
    assert not (found == torch.arange(150)[:, None]).any()  # itself, though others are as near as that


def test_of_those_that_tie_the_smaller_rows_are_taken() -> None:
    best = Best(2, 3, torch.device("cpu"))
    best.add(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5], [-0.5, 0.0, -0.0, 0.9, -1.0]]), torch.arange(10, 15))
    best.add(torch.tensor([[0.5, 0.5], [0.0, -1.0]]), torch.arange(20, 22))
    assert best.rows.tolist() == [[10, 11, 12], [13, 11, 12]]


def test_planted_positives_are_found_by_consensus_where_one_modality_is_not_enough() -> None:
    """Two labels, one seen and one heard: both agree only for those that have both."""
    generator = torch.Generator().manual_seed(1)
    seen, heard = torch.randint(0, 6, (2, 1200), generator=generator)
    centres = torch.randn(2, 6, DIM, generator=generator)
    rows = torch.stack([centres[0][seen], centres[1][heard]], dim=1)
    bank = bank_of(F.normalize(rows + 0.3 * torch.randn(rows.shape, generator=generator), dim=-1))

    def precision(how: Any) -> float:
        found = nearest_of_all(bank, how=how, count=8, progress=lambda: None).long()
        both = (seen[found] == seen[:, None]) & (heard[found] == heard[:, None])
        return float(both.double().mean())

    assert precision("consensus") > 0.99
    assert max(precision("video"), precision("audio")) < 0.5


def test_cells_find_nearly_all_of_what_all_pairs_find() -> None:
    bank = bank_of(planted(1500, 50, noise=0.7))
    exact = nearest_of_all(bank, how="consensus", count=16, progress=lambda: None)
    every_cell = nearest_in_cells(
        bank, how="consensus", count=16, seed=0, progress=lambda: None, probes=10_000
    )
    assert torch.equal(every_cell.rows, exact) and every_cell.certified.all()
    some = nearest_in_cells(bank, how="consensus", count=16, seed=0, progress=lambda: None).rows
    assert (some[:, :, None] == exact[:, None, :]).any(-1).double().mean() > 0.95
    few = nearest_in_cells(bank, how="consensus", count=200, seed=0, progress=lambda: None, probes=1).rows
    assert few.min() >= 0 and few.max() < 1500 and not (few == torch.arange(1500)[:, None]).any()


@pytest.mark.parametrize("how", ["consensus", "union", "video", "audio"])
@pytest.mark.parametrize("noise", [0.05, 0.3, 100.0])
def test_certified_rows_are_those_of_all_pairs_and_the_others_are_sought_again(
    how: Any, noise: float
) -> None:
    """In a bank of tight classes nearly all are certified, in one without classes hardly any."""
    bank = bank_of(planted(900, 60, noise=noise))
    options: Any = {"how": how, "count": 5, "progress": lambda: None}
    exact = nearest_of_all(bank, **options)
    found, certified = nearest_in_cells(bank, seed=0, probes=3, **options)
    assert torch.equal(found[certified], exact[certified])
    kept, _ = nearest_in_two_stages(bank, seed=0, again=False, probes=3, **options)
    assert torch.equal(kept, found)
    again, share = nearest_in_two_stages(bank, seed=0, again=True, probes=3, **options)
    assert torch.equal(again, exact) and share == pytest.approx(certified.double().mean().item())
    if noise == 0.05:
        assert share > 0.8
    elif noise == 100.0:
        assert share < 0.1 and not torch.equal(found, exact)


def _search(group: dist.ProcessGroup | None) -> dict[str, NDArray[Any]]:
    nearest.QUERIES, nearest.KEYS = 64, 256
    bank = bank_of(planted(333, 11, noise=0.6), group)
    found = {
        "all": nearest_of_all(bank, how="consensus", count=7, progress=lambda: None),
        "cells": nearest_in_cells(
            bank, how="consensus", count=7, seed=3, progress=lambda: None, probes=5
        ).rows,
        "stages": nearest_in_two_stages(
            bank, how="consensus", count=7, seed=3, again=True, progress=lambda: None, probes=5
        )[0],
    }
    health = [
        shared_neighbourhoods(bank, count=7, seed=3),
        mutual_share(found["all"], bank, seed=3),
        kept_share(found["cells"], found["all"], bank, seed=3),
    ]
    padded = {name: F.pad(rows, (0, 0, 0, 333 - len(rows)), value=-1) for name, rows in found.items()}
    together = {name: all_gather_rows(rows, group) for name, rows in padded.items()}
    rows = {name: each[each[:, 0] >= 0].numpy() for name, each in together.items()}
    table = torch.arange(333)[own_rows(333, group).start : own_rows(333, group).stop] * 10
    fetched = fetch_rows(table, torch.tensor([0, 100, 332]), rows=333, group=group)
    mine = torch.arange(333)
    if group is not None:
        mine = mine[dist.get_rank(group) :: dist.get_world_size(group)]
    delivered = deliver_rows(mine, mine * 10, rows=333, group=group)
    assert torch.equal(delivered, table)
    return {**rows, "health": np.array(health), "fetched": fetched.numpy()}


def test_positives_of_three_ranks_are_those_of_one(run_on_ranks: Ranks) -> None:
    alone = _search(None)
    assert alone["fetched"].tolist() == [0, 1000, 3320]
    for found in run_on_ranks(3, _search):
        for name, value in found.items():
            np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_health_tells_a_bank_with_neighbourhoods_from_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearest, "QUERIES", 1024)
    drawn = Bank(2000, DIM, dtype=torch.float32, group=None)
    drawn.draw("")
    assert abs(shared_neighbourhoods(drawn, count=8, seed=0)) < 0.1
    rows = planted(2000, 20, noise=0.7)
    assert shared_neighbourhoods(bank_of(rows), count=8, seed=0) > 1
    by_label = rows.unflatten(0, (-1, 20)).transpose(0, 1).flatten(0, 1)  # as folders lie
    assert shared_neighbourhoods(bank_of(by_label), count=8, seed=0) > 1
    shuffled = torch.stack([rows[:, 0], rows[torch.randperm(2000), 1]], dim=1)
    assert abs(shared_neighbourhoods(bank_of(shuffled), count=8, seed=0)) < 0.1
    assert abs(shared_neighbourhoods(bank_of(rows[:1].expand(2000, 2, DIM)), count=8, seed=0)) < 0.1
    collapsed = mean_cosines(bank_of(rows[:1].expand(2000, 2, DIM)), seed=0)
    assert collapsed["random_cosine_video"] == pytest.approx(1) and abs(collapsed["pair_cosine"]) < 1
    assert all(abs(value) < 0.1 for value in mean_cosines(drawn, seed=0).values())
    found = nearest_of_all(bank_of(rows), how="consensus", count=8, progress=lambda: None)
    assert kept_share(found, found, bank_of(rows), seed=0) == 1
    assert 0.1 < mutual_share(found, bank_of(rows), seed=0) < 1
