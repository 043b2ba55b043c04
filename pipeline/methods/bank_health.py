"""Whether a bank has neighbourhoods, and whether positives are neighbours: what CMA stands on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.feistel import derive_key, permute
from pipeline.distributed.rows import fetch_rows
from pipeline.methods import nearest
from pipeline.methods.bank import AUDIO, VIDEO, Bank

_SAMPLE, _PARTNERS = 0x6865_616C, 0x6865_616D  # keys that nothing else is drawn by


def sample_rows(bank: Bank, *, seed: int) -> Tensor:
    """Some rows, as many as are compared at a time, ascending: the same on every rank."""
    count = min(nearest.tile_shape(bank.samples)[0], bank.samples)
    drawn = permute(np.arange(count), bank.samples, derive_key(seed, _SAMPLE))
    return torch.from_numpy(np.sort(drawn)).to(bank.chunk.device)


@torch.no_grad()
def shared_neighbourhoods(bank: Bank, *, count: int, seed: int) -> float:
    """How much more alike the `count` nearest by one modality are in the other than any two samples, in
    standard deviations of the cosines of any two; of both directions the lesser. About 0 for a bank at
    random.
    """
    rows = sample_rows(bank, seed=seed)
    own = bank.fetch(rows)
    # Not the next row: datasets are often sorted by what they show, and neighbours there are alike.
    shuffled = permute(np.arange(len(rows)), len(rows), derive_key(seed, _PARTNERS))
    any_other = own[torch.from_numpy(shuffled.astype(np.int64)).to(own.device)]
    found = []
    ways: tuple[tuple[nearest.Agreement, int], ...] = (("video", AUDIO), ("audio", VIDEO))
    for how, other in ways:
        near = bank.fetch(nearest.nearest(bank, rows, how=how, count=count))[..., other, :]
        alike = (near * own[:, None, other]).sum(-1).mean()
        any_two = (own[:, other] * any_other[:, other]).sum(-1)
        found.append(float((alike - any_two.mean()) / any_two.std().clamp(min=1e-6)))
    return min(found)


@torch.no_grad()
def mutual_share(positives: Tensor, bank: Bank, *, seed: int) -> float:
    """Of some samples' positives, how many have the sample among theirs.

    Args:
        positives: this rank's, (rows of the chunk, P).
    """
    rows = sample_rows(bank, seed=seed)
    of_each = fetch_rows(positives, rows, rows=bank.samples, group=bank.group).long()
    others, places = torch.unique(of_each, return_inverse=True)
    back = fetch_rows(positives, others, rows=bank.samples, group=bank.group)[places]
    return float((back == rows[:, None, None]).any(-1).double().mean())


@torch.no_grad()
def kept_share(before: Tensor, after: Tensor, bank: Bank, *, seed: int) -> float:
    """Of some samples' positives, how many were so before."""
    rows = sample_rows(bank, seed=seed)
    old, new = (fetch_rows(each, rows, rows=bank.samples, group=bank.group) for each in (before, after))
    return float((new[:, :, None] == old[:, None, :]).any(-1).double().mean())
