"""What the loop asks of a method that all ranks train together, whatever lies where."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from pipeline.data.batch import Inputs
from pipeline.methods.method import Method


class Engine(Protocol):
    """A method on its ranks; `pipeline.parallel.parallelize` makes it.

    Attributes:
        method: what is trained. Its parameters may be pieces of whole ones (see
        `pipeline.distributed.sharded`).
    """

    method: Method

    def __call__(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The method's `forward`, to which `inputs` go as they are."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients; `loss` is made of the loss of the last call. Not `loss.backward()`: the graph
        may end at a trunk's features.
        """
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients add up, and are averaged with the last."""
        ...

    def after_step(self, step: int) -> None:
        """The method's `after_step`."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """The method's `param_groups`, of the parameters as they lie on this rank."""
        ...
