"""Losses that are not finite or leap: found on every rank alike, blamed on samples, kept from the weights."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from ingest.dataset.keys import key_name
from pipeline.data.batch import Inputs

logger = logging.getLogger(__name__)

CROPS, EMBEDDINGS, SPIKE = "the augmented crops", "the embeddings", "the loss"
WINDOW = 128  # losses that a spike is measured by
_SAMPLES_NAMED = 8
# The standard deviation of a normal distribution in median absolute deviations.
_NORMAL = 1.4826
# Losses on a plateau lie so close together that any change would be many of their deviations.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """Samples of one rank that a number which is not finite may come from."""

    rank: int
    keys: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        names = ", ".join(map(key_name, self.keys[:_SAMPLES_NAMED]))
        more = f" and {len(self.keys) - _SAMPLES_NAMED} more" if len(self.keys) > _SAMPLES_NAMED else ""
        return f"rank {self.rank}: {self.what} of samples {names}{more}"


class Diverged(UserError):  # noqa: N818
    """So many steps in a row were skipped, up to `step`, that the weights themselves must be to blame.

    `spiked`: their losses were finite, and leapt.
    """

    def __init__(self, message: str, *, step: int, spiked: bool) -> None:
        super().__init__(message)
        self.step, self.spiked = step, spiked


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """The training went back, and passed over the data of the steps in between.

    Attributes:
        to_step: of the checkpoint.
        from_step: the last step before it went back.
    """

    to_step: int
    from_step: int


class Guard:
    """Lets a step into the weights only if its loss and gradient are finite and the loss does not leap.

    Args:
        method: what its forward passes change, the running statistics of BatchNorm, is put back when a step
            is skipped; nothing else has been touched by then.
        max_skipped: after so many steps in a row the training goes back, or stops.
        spike_deviations: above the median of the last losses; see `spike_threshold`.

    Attributes:
        in_a_row: steps skipped so far.
        rollbacks: of this run so far, and of the one that it branched off from.
        inherited: how many of them are that one's, and not counted against `train.max_rollbacks`.
    """

    def __init__(self, method: nn.Module, *, world: World, max_skipped: int, spike_deviations: float) -> None:
        self._world, self._max_skipped, self._spike_deviations = world, max_skipped, spike_deviations
        self.in_a_row = 0
        self.rollbacks: list[Rollback] = []
        self.inherited = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._why = ""
        self._buffers = running_statistics(method)
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]

    @property
    def steps_passed_over(self) -> int:
        """How far the data is ahead of the steps."""
        return sum(back.from_step - back.to_step for back in self.rollbacks)

    @property
    def spiked(self) -> bool:
        """Whether the last step was refused for the height of its loss, not for what is not finite."""
        return self._why.startswith("the loss leapt")

    def state(self) -> dict[str, Any]:
        """JSON values for `load`."""
        return {
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "rollbacks": [[back.to_step, back.from_step] for back in self.rollbacks],
            "inherited": self.inherited,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.in_a_row = state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.rollbacks = [Rollback(to_step=to, from_step=start) for to, start in state["rollbacks"]]
        self.inherited = state.get("inherited", 0)  # of a checkpoint that was saved before

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the running statistics as they are before the step's first forward pass."""
        _copy(self._buffers, self._copies)

    def accepts(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step may be taken: the same answer on every rank, without a collective.

        The loss is the coupled batch's and the gradient is averaged already: a number that is not finite on
        one rank has reached them all.
        """
        limit = spike_threshold(self._losses, deviations=self._spike_deviations)
        if not math.isfinite(loss + gradient_norm):
            self._why = "the loss or gradient was not finite"
        elif limit is not None and loss > limit:
            self._why = f"the loss leapt to {loss:.4g}, above {limit:.4g}"
        else:
            self.in_a_row, self._why = 0, ""
            self._losses.append(loss)
        return not self._why

    @torch.no_grad()
    def restore(self) -> None:
        """Put the running statistics back as `remember` found them: the step is not taken."""
        _copy(self._copies, self._buffers)

    @torch.no_grad()
    def skip(self, step: int, suspects: Sequence[Suspect]) -> list[Suspect]:
        """Undo what the forward passes left behind, and name who may be to blame; all ranks call it together.

        Args:
            step: the number of the step, from 1.
            suspects: this rank's.

        Returns:
            The suspects of all ranks: those with broken crops alone if there are any, for their embeddings
            spoil everyone's through BatchNorm and the coupled loss.

        Raises:
            Diverged: after `max_skipped` steps in a row.
        """
        self.restore()
        self.in_a_row += 1
        everyone = [suspect for part in self._world.gather(list(suspects)) for suspect in part]
        everyone = [suspect for suspect in everyone if suspect.what == CROPS] or everyone
        named = "; ".join(map(str, everyone)) or "every sample's embedding is finite"
        why = self._why or "the loss or gradient was not finite"
        if self._world.is_first:
            logger.warning("step %d skipped: %s (%s)", step, why, named)
        if self.in_a_row >= self._max_skipped:
            raise Diverged(
                f"{why} in {self.in_a_row} steps in a row, up to step {step} ({named})",
                step=step,
                spiked=self.spiked,
            )
        return everyone


def spike_threshold(losses: Sequence[float], *, deviations: float) -> float | None:
    """The loss from which on a step is a spike: the median plus so many robust standard deviations.

    Median and median absolute deviation do not follow the outliers that they are to find (Leys et al., 2013,
    https://doi.org/10.1016/j.jesp.2013.03.013). A deviation counts as 1 % of the median at least.

    Args:
        losses: of the last steps that were taken, up to `WINDOW`.

    Returns:
        None while the window is not full.
    """
    if len(losses) < WINDOW:
        return None
    median = statistics.median(losses)
    deviation = _NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))


def running_statistics(method: nn.Module) -> list[Tensor]:
    """The buffers of BatchNorm layers, which are all that a method's forward pass may change."""
    names = {"running_mean", "running_var", "num_batches_tracked"}
    return [buffer for name, buffer in method.named_buffers() if name.rpartition(".")[2] in names]


def batch_suspect(rank: int, keys: Tensor) -> Suspect:
    """All samples of a micro-batch: the loss of one coupled batch does not tell them apart."""
    return Suspect(rank=rank, keys=tuple(keys.tolist()), what=SPIKE)


def find_suspects(rank: int, *, keys: Tensor, inputs: Inputs, embedding: Tensor) -> list[Suspect]:
    """Narrow a number that is not finite down to samples of one micro-batch.

    Args:
        keys: (b,) sample keys.
        inputs: what the method was shown of these samples.
        embedding: (n * b, d), view-major.

    Returns:
        The samples whose views are not finite; failing that, those whose embedding is not, which BatchNorm
        may have spread to all of them. Nothing if views and embeddings are finite.
    """
    rows = len(keys)
    bad_views = torch.zeros(rows, dtype=torch.bool)
    for views in inputs.views.values():
        bad_views |= _not_finite_rows(views, rows)
    bad_embeddings = _not_finite_rows(embedding, rows)
    if bad_views.any():
        return [Suspect(rank=rank, keys=tuple(keys[bad_views].tolist()), what=CROPS)]
    if bad_embeddings.any():
        return [Suspect(rank=rank, keys=tuple(keys[bad_embeddings].tolist()), what=EMBEDDINGS)]
    return []


def _not_finite_rows(values: Tensor, rows: int) -> Tensor:
    """(views * rows, …) → (rows,): whether any view of a row holds a number that is not finite."""
    finite = torch.isfinite(values).flatten(1).all(1)
    return ~finite.view(-1, rows).all(0).cpu()


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)
