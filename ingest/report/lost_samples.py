"""Some of the attempts that were not kept, of each reason: where to look for what went wrong."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ingest.dataset.open import read_each, sealed_units
from ingest.report.stats import Losses, Stats, retried_generations
from ingest.report.thumbnails import draw_positions
from ingest.store.open import open_store

SAMPLES_PER_REASON = 50
_COLUMNS = ["status", "reason", "retryable", "url", "http_status"]


class Loss(NamedTuple):
    """An attempt that was not kept: its URL or path, and what the server answered."""

    url: str
    http_status: int | None


def sample_losses(stats: Stats) -> list[list[Loss]]:
    """Of each of `stats.losses` some attempts, in the dataset's order: drawn without regard to anything, and
    always the same of one dataset. Only units that have one of them are read.

    Raises:
        UserError: a unit's metadata cannot be read.
    """
    samples: list[list[Loss]] = [[] for _ in stats.losses]
    wanted: defaultdict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, loss in enumerate(stats.losses):
        for unit, positions in _drawn(loss):
            wanted[unit].append((number, positions))
    if not wanted:
        return samples
    store = open_store(stats.path)
    sealed = sealed_units(stats.path, stats.root, columns=["meta", "generation"])
    retried = retried_generations(store, sealed)
    places = sorted(wanted)
    metas, generations = (sealed[name].take(places).to_pylist() for name in ("meta", "generation"))
    read = read_each(store, metas, lambda _, parquet: parquet.read(columns=_COLUMNS, use_threads=False))
    for place, generation, rows in zip(places, generations, read, strict=True):
        lost = rows.filter(pc.invert(rows["retryable"])) if generation in retried else rows
        reasons = pc.fill_null(lost["reason"], "no reason given")
        for number, positions in wanted[place]:
            loss = stats.losses[number]
            ours = lost.filter(pc.and_(pc.equal(lost["status"], loss.status), pc.equal(reasons, loss.reason)))
            there = [position for position in positions if position < len(ours)]  # if counts are right, all
            chosen = ours.take(pa.array(there, pa.int64()))
            samples[number] += map(Loss, chosen["url"].to_pylist(), chosen["http_status"].to_pylist())
    return samples


def _drawn(loss: Losses) -> list[tuple[int, list[int]]]:
    """Places of units, ascending, and which of their attempts that were lost so are drawn."""
    ends = np.cumsum(loss.counts)
    found: defaultdict[int, list[int]] = defaultdict(list)
    for position in draw_positions(loss.count, SAMPLES_PER_REASON, seed=0):
        which = int(np.searchsorted(ends, position, side="right"))
        found[loss.units[which]].append(position - int(ends[which] - loss.counts[which]))
    return list(found.items())
