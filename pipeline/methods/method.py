"""What the rest of the product asks of a method, which is all that it knows of one.

A new method is a class with these answers, a section of the recipe (`pipeline.recipe.method`), and a row in
the table from the one to the other (`pipeline.methods.build`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pipeline.data.batch import Inputs
from pipeline.methods.bank import Bank
from pipeline.recipe.method import CMA


class Method(nn.Module, ABC):
    """Trunks, what stands on them, and a loss. It does not know how it is trained or laid over ranks.

    A class and no Protocol, for engines need the module as well as the answers, and Python has no type for
    what is both. It has no code: nothing is inherited but the duty to answer.

    Attributes:
        trunk: the trunk that learns, on which progress is measured: images to features (N, feature_dim).
    """

    trunk: nn.Module

    @abstractmethod
    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch, of which this rank has its rows.

        It changes no buffer but the running statistics of BatchNorm, which the guard puts back if the step
        is skipped. Whatever else is to be remembered waits for `after_step`.

        Args:
            step: the optimizer step, from 0; the same for the micro-batches that add up to it.

        Returns:
            "loss" and other scalars to be logged, equal on every rank; and "embedding", (n·rows, dim),
            view-major, detached, of one view or more, which shows a collapse and which samples are broken.
        """

    @abstractmethod
    def after_step(self, step: int) -> None:
        """What follows a step of the optimizer. A step that is skipped is not followed by it."""

    @abstractmethod
    def forget_batches(self) -> None:
        """Drop what waits for the next `after_step`: the training goes back to a checkpoint."""

    @abstractmethod
    def trunks(self) -> dict[str, nn.Module]:
        """The networks of the recipe's `trunk`, by the names they are exported under: the "student" learns,
        a "teacher" follows it.
        """

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """What an optimizer is told of the parameters that learn: {"params": [...], "bias_and_norm": bool,
        "lr_fixed": bool, "head": bool}. A fixed rate does not follow the schedule; a classifier's head may
        have a rate of its own.
        """


@runtime_checkable
class HasPositives(Protocol):
    """A method with a bank, which may compare a sample with others that agree with it. Whoever trains it
    seeks them in the bank.

    Attributes:
        cma: how they are sought; None if it does not.
        positives: of each row of the bank's chunk, (rows, P) int32 or int64; None until they are filled in.
        seed: of what is drawn.
    """

    bank: Bank
    cma: CMA | None
    positives: Tensor | None
    seed: int

    def forget_values(self) -> None:
        """Let `forward` be counted on tensors that have no values: what it would recall is zeros."""
        ...
