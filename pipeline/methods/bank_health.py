"""Whether a bank has neighbourhoods, and whether positives are neighbours: what CMA stands on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.feistel import derive_key, permute
from pipeline.distributed.rows import fetch_rows
from pipeline.methods import nearest
from pipeline.methods.bank import AUDIO, VIDEO, Bank

_SAMPLE, _PAIRS = 0x6865_616C, 0x7061_6972  # keys that nothing else is drawn by


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
    mixed = _mixed(own, seed=seed)
    found = []
    ways: tuple[tuple[nearest.Agreement, int], ...] = (("video", AUDIO), ("audio", VIDEO))
    for how, other in ways:
        near = bank.fetch(nearest.nearest(bank, rows, how=how, count=count))[..., other, :]
        alike = (near * own[:, None, other]).sum(-1).mean()
        any_two = (mixed[:, other] * mixed.roll(1, 0)[:, other]).sum(-1)
        found.append(float((alike - any_two.mean()) / any_two.std().clamp(min=1e-6)))
    return min(found)


@torch.no_grad()
def mean_cosines(bank: Bank, *, seed: int) -> dict[str, float]:
    """Of some samples' two rows, and of two samples' rows within and across modalities, as metrics name
    them.
    """
    mixed = _mixed(bank.fetch(sample_rows(bank, seed=seed)), seed=seed)
    pairs = mixed.roll(1, 0)
    return {
        "pair_cosine": _mean_cosine(mixed[:, VIDEO], mixed[:, AUDIO]),
        "random_cosine_across": _mean_cosine(mixed[:, VIDEO], pairs[:, AUDIO]),
        "random_cosine_video": _mean_cosine(mixed[:, VIDEO], pairs[:, VIDEO]),
        "random_cosine_audio": _mean_cosine(mixed[:, AUDIO], pairs[:, AUDIO]),
    }


@torch.no_grad()
def mutual_share(positives: Tensor, bank: Bank, *, seed: int) -> float:
    """Of some samples' positives, how many have the sample among theirs.

    Args:
        positives: this rank's, (rows of the chunk, P).
    """
    rows = sample_rows(bank, seed=seed)
    of_each = fetch_rows(positives, rows, rows=bank.samples, group=bank.group).long()
    back = fetch_rows(positives, of_each, rows=bank.samples, group=bank.group)
    return float((back == rows[:, None, None]).any(-1).double().mean())


@torch.no_grad()
def kept_share(before: Tensor, after: Tensor, bank: Bank, *, seed: int) -> float:
    """Of some samples' positives, how many were so before."""
    rows = sample_rows(bank, seed=seed)
    old, new = (fetch_rows(each, rows, rows=bank.samples, group=bank.group) for each in (before, after))
    return float((new[:, :, None] == old[:, None, :]).any(-1).double().mean())


def _mixed(own: Tensor, *, seed: int) -> Tensor:
    """Rows in another order. Not each with the next: rows lie as files do, those of a label or of a film side
    by side.
    """
    return own[torch.from_numpy(permute(np.arange(len(own)), len(own), derive_key(seed, _PAIRS)))]


def _mean_cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(-1).mean())
