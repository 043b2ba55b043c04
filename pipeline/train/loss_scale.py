"""float16 gradients kept within their range: the loss is multiplied by a power of two that finds its size.

Micikevicius et al., 2018 (https://arxiv.org/abs/1710.03740), section 3.2. Unlike torch's GradScaler it needs
no collective where gradients are sharded: it looks at the length of the whole gradient, which all ranks know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

START, GROWTH_STEPS = 2.0**16, 2000


class LossScale:
    """The factor, equal on every rank.

    Args:
        enabled: else the factor is 1 and stays so.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self.factor = START if enabled else 1.0
        self._taken = 0

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the factor, in place."""
        if self._enabled:
            torch._foreach_mul_(list(gradients), 1 / self.factor)

    def overflowed(self, loss: float, gradient_norm: float) -> bool:
        """Whether the step is lost because the gradient left float16's range; the factor follows.

        At a factor of 1 a gradient that is not finite has another cause.
        """
        if not self._enabled:
            return False
        if math.isfinite(gradient_norm):
            self._taken += 1
            if self._taken == GROWTH_STEPS:
                self.factor, self._taken = 2 * self.factor, 0
            return False
        if self.factor == 1 or not math.isfinite(loss):
            return False
        self.factor, self._taken = self.factor / 2, 0
        return True

    def state(self) -> list[float]:
        """JSON values for `load`."""
        return [self.factor, self._taken]

    def load(self, state: Sequence[float]) -> None:
        """Go on from a checkpoint; one of a run in another precision is taken up as it is."""
        if self._enabled:
            self.factor, self._taken = state[0], int(state[1])
