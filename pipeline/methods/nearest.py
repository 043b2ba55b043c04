"""Who agrees most with each sample of a bank: by comparing all pairs, or first those of neighbouring cells.

Nothing depends on how the rows lie over the ranks: pairs are compared in tiles of one shape, in float32, and
of two that agree as much the smaller row comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.feistel import derive_key, permute
from pipeline.distributed.collectives import all_gather_rows, rank_in
from pipeline.distributed.rows import deliver_rows, own_rows, rows_per_rank
from pipeline.methods.bank import AUDIO, VIDEO, Bank
from pipeline.methods.cell_bounds import CellBounds

Agreement = Literal["consensus", "union", "video", "audio"]
Progress = Callable[[], None]
QUERIES, KEYS = 1024, 16_384  # rows of a tile
PROBES = 32  # cells that a row is compared with
_LLOYD_STEPS = 10
_ROWS_PER_CELL = 32  # of the sample that cells are made of
_SAMPLE = 0x7361_6D70  # keys that nothing else is drawn by
_NOBODY = -1


def agree(queries: Tensor, keys: Tensor, how: Agreement) -> Tensor:
    """How much rows agree, (q, 2, dim) and (k, 2, dim) to (q, k): the lesser of the two cosines
    ("consensus"), the greater ("union"), or that of one modality.

    Morgado et al., 2021 (https://arxiv.org/abs/2004.12943).
    """
    if how in {"video", "audio"}:
        one = VIDEO if how == "video" else AUDIO
        return queries[:, one] @ keys[:, one].T
    return _of_both(queries[:, VIDEO] @ keys[:, VIDEO].T, queries[:, AUDIO] @ keys[:, AUDIO].T, how)


class Best:
    """The best rows so far for each query, as numbers that sort by agreement and then by row."""

    def __init__(self, queries: int, count: int, device: torch.device) -> None:
        self.count = count
        self.numbers = torch.full((queries, count), torch.iinfo(torch.int64).min, device=device)

    def add(self, scores: Tensor, rows: Tensor) -> None:
        """Consider more rows, of which none was before: scores (queries, n) float32, rows (n,) below 2^32."""
        values, places = scores.topk(min(self.count + 1, len(rows)), dim=1)
        numbers = _numbers(values, rows[places])
        if len(rows) > self.count:
            # Of those that tie for the last place any may have been taken.
            tied = (values[:, -1] == values[:, -2]) & (values[:, -1] > -torch.inf)
            if tied.any():
                numbers[tied] = _numbers(scores[tied], rows).topk(self.count + 1, dim=1).values
        self.merge(numbers)

    def merge(self, numbers: Tensor) -> None:
        """Consider those of another one, (queries, n)."""
        together = torch.cat([self.numbers, numbers], dim=1)
        self.numbers = together.topk(self.count, dim=1).values

    @property
    def rows(self) -> Tensor:
        """(queries, count), the best first."""
        return 0xFFFF_FFFF - (self.numbers & 0xFFFF_FFFF)

    @property
    def least(self) -> Tensor:
        """How much the last of each query's best agrees, (queries,)."""
        bits = self.numbers[:, -1] >> 32
        return torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).to(torch.int32).view(torch.float32)


@torch.no_grad()
def nearest(bank: Bank, queries: Tensor, *, how: Agreement, count: int) -> Tensor:
    """The rows that agree most with some, never themselves; all ranks together, with the same queries.

    Every rank compares them with its own rows, and the best of all ranks are the best.

    Args:
        queries: (q,) rows, at most as many as a tile has, distinct and ascending.

    Returns:
        (q, count) rows, the best first.
    """
    device, chunk, here = queries.device, bank.chunk, bank.range
    tall, wide = tile_shape(bank.samples)
    asked = F.pad(queries, (0, tall - len(queries)), value=_NOBODY)
    vectors = F.pad(bank.fetch(queries), (0, 0, 0, 0, 0, tall - len(queries)))
    best = Best(tall, count, device)
    for start in range(here.start - here.start % wide, here.stop, wide):
        first, last = max(start, here.start), min(start + wide, here.stop)
        margins = (first - start, start + wide - last)
        rows = F.pad(torch.arange(first, last, device=device), margins, value=_NOBODY)
        keys = F.pad(chunk[first - here.start : last - here.start].float(), (0, 0, 0, 0, *margins))
        scores = agree(vectors, keys, how)
        scores.masked_fill_((asked[:, None] == rows) | (rows == _NOBODY), -torch.inf)
        best.add(scores, rows.clamp(min=0))
    everyone = all_gather_rows(best.numbers[None], bank.group)
    merged = Best(tall, count, device)
    merged.merge(everyone.transpose(0, 1).flatten(1))
    return merged.rows[: len(queries)]


@torch.no_grad()
def nearest_of_all(bank: Bank, *, how: Agreement, count: int, progress: Progress) -> Tensor:
    """For each of this rank's rows who agrees most, by comparing all pairs: (rows of the chunk, count)."""
    here = bank.range
    found = torch.empty((len(here), count), dtype=row_type(bank.samples), device=bank.chunk.device)
    tall, _ = tile_shape(bank.samples)
    for start in range(0, bank.samples, tall):
        stop = min(start + tall, bank.samples)
        rows = nearest(bank, torch.arange(start, stop, device=found.device), how=how, count=count)
        first, last = max(start, here.start), min(stop, here.stop)
        if first < last:
            found[first - here.start : last - here.start] = rows[first - start : last - start].to(found)
        progress()
    return found


class InCells(NamedTuple):
    """What a search in cells has found for this rank's rows.

    Attributes:
        rows: (rows of the chunk, count), the best first.
        certified: (rows of the chunk,), whether no other row of the bank can be among a row's best.
    """

    rows: Tensor
    certified: Tensor


@torch.no_grad()
def nearest_in_two_stages(
    bank: Bank,
    *,
    how: Agreement,
    count: int,
    seed: int,
    again: bool,
    progress: Progress,
    probes: int = PROBES,
) -> tuple[Tensor, float]:
    """For each of this rank's rows who agrees most, in cells first.

    Args:
        again: rows whose answer is not certified are then compared with all rows, so that the answer is that
            of all pairs. Otherwise they keep what their cells have.

    Returns:
        (rows of the chunk, count), and the share of rows that were certified, of all ranks.
    """
    group, here = bank.group, bank.range
    found, certified = nearest_in_cells(
        bank, how=how, count=count, seed=seed, progress=progress, probes=probes
    )
    padded = F.pad(certified, (0, rows_per_rank(bank.samples, group) - len(certified)))
    left = (~all_gather_rows(padded, group)[: bank.samples]).nonzero().flatten()
    for some in torch.split(left, tile_shape(bank.samples)[0]) if again else ():
        rows = nearest(bank, some, how=how, count=count)
        mine = (some >= here.start) & (some < here.stop)
        found[some[mine] - here.start] = rows[mine].to(found)
        progress()
    return found, 1 - len(left) / bank.samples


@torch.no_grad()
def nearest_in_cells(
    bank: Bank, *, how: Agreement, count: int, seed: int, progress: Progress, probes: int = PROBES
) -> InCells:
    """Who agrees most with each of this rank's rows among those of the nearest cells alone.

    Cells are k-means of both vectors together, whose inner product is the sum of both cosines: an upper bound
    of the lesser one, so that rows that agree in both lie near each other. Within the cells pairs are
    compared as everywhere. A rank takes whole cells, with all of their rows.
    """
    group, cells = bank.group, make_cells(bank, seed=seed)
    own = _cells_of(bank.chunk, cells)
    bounds = CellBounds(bank.chunk, own, cells, group=group)
    own = F.pad(own, (0, rows_per_rank(bank.samples, group) - len(own)))
    of_row = all_gather_rows(own, group)[: bank.samples]
    order = torch.argsort(of_row, stable=True)
    starts = torch.bincount(of_row, minlength=len(cells)).cumsum(0).tolist()
    members = [order[start:stop] for start, stop in pairwise([0, *starts])]
    mine = own_rows(len(cells), group)
    near = (cells[mine.start : mine.stop] @ cells.T).argsort(dim=1, descending=True, stable=True)
    asked, answers = [order[:0]], [order.new_empty((0, count + 1))]
    for number in range(rows_per_rank(len(cells), group)):  # on each rank as often: they fetch together
        probed = _probed(members, near[number], probes, least=count + 1) if number < len(mine) else []
        rows = torch.cat([order[:0], *(members[cell] for cell in probed)]).sort().values
        keys = bank.fetch(rows).float()
        queries = members[mine.start + number] if len(rows) else rows
        for some in torch.split(queries, QUERIES):
            vectors = keys[torch.searchsorted(rows, some)]
            best = Best(len(some), count, some.device)
            for start in range(0, len(rows), KEYS):
                others = rows[start : start + KEYS]
                scores = agree(vectors, keys[start : start + KEYS], how)
                best.add(scores.masked_fill_(some[:, None] == others, -torch.inf), others)
            elsewhere = _of_both(bounds.most(vectors, VIDEO), bounds.most(vectors, AUDIO), how)
            elsewhere[:, probed] = -torch.inf
            certified = best.least > elsewhere.amax(1)
            asked.append(some)
            answers.append(torch.cat([best.rows, certified[:, None]], dim=1))
        progress()
    numbers, where = torch.cat(asked).sort()
    found = torch.cat(answers)[where].to(row_type(bank.samples))
    delivered = deliver_rows(numbers, found, rows=bank.samples, group=group)
    return InCells(delivered[:, :count].contiguous(), delivered[:, count].bool())


@torch.no_grad()
def make_cells(bank: Bank, *, seed: int) -> Tensor:
    """Centres of cells, (cells, 2 · dim) of unit length, the same on every rank: spherical k-means of a keyed
    sample, with a fixed number of steps.
    """
    count = cell_count(bank.samples)
    sample = min(_ROWS_PER_CELL * count, bank.samples)
    drawn = permute(np.arange(sample), bank.samples, derive_key(seed, _SAMPLE))
    rows, places = torch.from_numpy(drawn).to(bank.chunk.device).sort()
    vectors = torch.empty((sample, 2 * bank.dim), device=rows.device)
    vectors[places] = bank.fetch(rows).flatten(1).float()
    centres = F.normalize(vectors[:count], dim=1)
    if rank_in(bank.group) == 0:
        for _ in range(_LLOYD_STEPS):
            sums = torch.zeros_like(centres).index_add_(0, _cells_of(vectors, centres), vectors)
            full = sums.abs().amax(1) > 0
            centres[full] = F.normalize(sums[full], dim=1)
    if bank.group is not None:  # a device may add up in any order
        dist.broadcast(centres, dist.get_global_rank(bank.group, 0), group=bank.group)
    return centres


def tile_shape(samples: int) -> tuple[int, int]:
    """Queries and keys that are compared at a time: of one shape for the whole bank, however it lies."""
    enough = 1 << max(0, samples - 1).bit_length()
    return min(QUERIES, enough), min(KEYS, enough)


def cell_count(samples: int) -> int:
    """About twice the root of the samples, a power of two: 65,536 for a billion."""
    return 1 << max(0, round(math.log2(2 * math.sqrt(samples))))


def row_type(samples: int) -> torch.dtype:
    """What row numbers are kept in."""
    return torch.int32 if samples < 1 << 31 else torch.int64


def _of_both(video: Tensor, audio: Tensor, how: Agreement) -> Tensor:
    """Agreement by both cosines."""
    if how in {"video", "audio"}:
        return video if how == "video" else audio
    return torch.minimum(video, audio) if how == "consensus" else torch.maximum(video, audio)


def _probed(members: list[Tensor], near: Tensor, probes: int, *, least: int) -> list[int]:
    """So many of the nearest cells; more, where these have fewer rows than `least`."""
    taken: list[int] = []
    rows = 0
    for cell in near.tolist():
        if len(taken) >= probes and rows >= least:
            break
        taken.append(cell)
        rows += len(members[cell])
    return taken


def _numbers(scores: Tensor, rows: Tensor) -> Tensor:
    """Integers that sort as the scores do and, where these are equal, the smaller row first."""
    bits = (scores + 0.0).view(torch.int32)  # there is a -0.0, too
    # A float's bits sort as integers do, the negative ones the other way round.
    bits = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).to(torch.int64)
    return (bits << 32) + (0xFFFF_FFFF - rows)


def _cells_of(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each row."""
    return torch.cat([(tile.flatten(1).float() @ centres.T).argmax(1) for tile in torch.split(rows, KEYS)])
