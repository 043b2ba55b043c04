"""Rows of features as evaluations read them: a chunk at a time, for all of them may not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cluster.errors import UserError

CHUNK_BYTES = 64 << 20  # of a chunk in float32
HELD_BYTES = 512 << 20  # of rows that are made once, on the CPU, or mixed
BLOCK_ROWS = 64  # neighbours that are read together


def chunk_rows(width: int, size: int | None = None) -> int:
    """How many rows of so many numbers a chunk of `size` bytes has; None for `CHUNK_BYTES`."""
    return max(1, (size or CHUNK_BYTES) // (4 * max(1, width)))


def floats(x: Tensor, device: torch.device) -> Tensor:
    """A chunk as it is computed with; of the mapping itself, if that is float32: not to be written to."""
    x = x.to(device)
    return x if x.dtype == torch.float64 else x.float()


def near(x: Tensor, device: torch.device) -> Tensor:
    """All rows on a GPU, if half of what is free there has room for them: they are read many times."""
    if device.type != "cuda" or x.device == device:
        return x
    free, _ = torch.cuda.mem_get_info(device)
    return x.to(device) if x.nbytes <= free // 2 else x


def refuse_not_finite(*parts: Tensor, device: torch.device) -> None:
    """Raises UserError if some of these (n, d) features are infinite or NaN."""
    for x in parts:
        step = chunk_rows(x.shape[1])
        for start in range(0, len(x), step):
            if not floats(x[start : start + step], device).isfinite().all():
                raise UserError(
                    "the features hold numbers that are not finite, which no classifier can use: the trunk "
                    "has diverged; export it from an older checkpoint"
                )


@dataclass(frozen=True)
class Standardiser:
    """Zero mean and unit deviation per feature; a feature that never varies becomes zero."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Standardiser:
        """From training features."""
        mean = sum((x.sum(0, dtype=torch.float64) for x, _ in rows), start=rows.zeros()) / len(rows)
        squares = sum(((x.double() - mean).square_().sum(0) for x, _ in rows), start=rows.zeros())
        deviation = (squares / len(rows)).sqrt()
        constant = deviation <= 1e-6 * mean.abs().clamp_min(1e-30)
        scale = torch.where(constant, 0.0, 1 / deviation.clamp_min(1e-30))
        return cls(mean.to(rows.dtype), scale.to(rows.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean).mul_(self.scale)


@dataclass(frozen=True)
class Axes:
    """Directions at right angles, the columns of `directions`, (d, d), and the mean square of rows along each
    of them, (d,).
    """

    directions: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Axes:
        """The principal axes of rows of zero mean: along these they do not covary."""
        width = rows.x.shape[1]
        covariance = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        for x, _ in rows:
            wide = x.double()
            covariance.addmm_(wide.T, wide)
        found = torch.linalg.eigh(covariance.div_(len(rows)))
        return cls(found.eigenvectors.to(rows.dtype), found.eigenvalues.clamp_min(0).to(rows.dtype))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Labelled rows of features, as a linear classifier is given them. Iterates over chunks: (n, d) numbers,
    and (n,) classes.

    Attributes:
        x: (N, D) features, which may be a mapped file.
        y: (N,) int64 classes.
        kept: (N,) bool, those that take part; None for all.
        scaler: applied to every chunk.
        axes: onto which every chunk is turned then. To turn the weights instead would be cheaper, but hides
            in float32 what they say along axes of little variance.
    """

    x: Tensor
    y: Tensor
    device: torch.device = torch.device("cpu")  # noqa: RUF009 -- immutable
    kept: Tensor | None = None
    scaler: Standardiser | None = None
    axes: Axes | None = None

    def __len__(self) -> int:
        return len(self.x) if self.kept is None else int(self.kept.sum())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = chunk_rows(self.x.shape[1])
        for start in range(0, len(self.x), step):
            x, y = self.x[start : start + step], self.y[start : start + step]
            if self.kept is not None:
                kept = self.kept[start : start + step]
                x, y = x[kept.to(x.device)], y[kept.to(y.device)]
            if len(y):
                wide = floats(x, self.device)
                wide = wide if self.scaler is None else self.scaler(wide)
                yield wide if self.axes is None else wide @ self.axes.directions, y.to(self.device)

    def at_hand(self) -> Rows:
        """The same rows, made once, if there is room: in `HELD_BYTES`, or half of what a GPU has free."""
        room = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else HELD_BYTES
        if len(self) * self.x.shape[1] * self.dtype.itemsize > room:
            return self
        x, y = (torch.cat(parts) for parts in zip(*self, strict=True))
        return Rows(x=x, y=y, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @cached_property
    def squares(self) -> Tensor:
        """The mean square along every axis, or of every feature, (d,)."""
        if self.axes is not None:
            return self.axes.squares
        total = sum((x.square().sum(0, dtype=torch.float64) for x, _ in self), start=self.zeros())
        return (total / len(self)).to(self.dtype)

    def zeros(self) -> Tensor:
        """(d,), to sum up in."""
        return torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.device)


def in_batches(rows: Rows, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in an order drawn from the generator, `size` at a time, neither scaled nor turned; what is left
    over is left out, unless it is all there is.

    Blocks of neighbours are drawn, and the rows of as many as `HELD_BYTES` have room for are mixed: a file
    that has more is read in pieces that disks are quick with, and all others are shuffled as a whole.
    """
    starts = torch.arange(0, len(rows.x), BLOCK_ROWS)
    starts = starts[torch.randperm(len(starts), generator=generator)]
    at_once = max(1, chunk_rows(rows.x.shape[1], HELD_BYTES) // BLOCK_ROWS)
    left, all_that_is = [(rows.x[:0], rows.y[:0])], len(rows) < size
    for group in range(0, len(starts), at_once):
        blocks = [_block(rows, start) for start in starts[group : group + at_once].tolist()]
        x, y = (torch.cat(parts) for parts in zip(*left, *blocks, strict=True))
        del blocks
        order = torch.randperm(len(x), generator=generator)
        for first in range(0, len(x) - size + 1, size):
            chosen = order[first : first + size]
            yield floats(x[chosen.to(x.device)], rows.device), y[chosen].to(rows.device)
        rest = order[len(x) // size * size :]
        left = [(x[rest.to(x.device)], y[rest])]
        del x, y  # before the next ones are there
    if all_that_is:
        yield floats(left[0][0], rows.device), left[0][1].to(rows.device)


def _block(rows: Rows, start: int) -> tuple[Tensor, Tensor]:
    part = slice(start, start + BLOCK_ROWS)
    x, y = rows.x[part], rows.y[part]
    return (x, y) if rows.kept is None else (x[rows.kept[part].to(x.device)], y[rows.kept[part]])
