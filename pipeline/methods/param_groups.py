"""Parameters as an optimizer wants them: what is decayed and scaled, and what some recipes leave alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def weights_and_the_rest(
    parameters: Iterable[nn.Parameter], *, lr_fixed: bool = False, head: bool = False
) -> list[dict[str, Any]]:
    """Groups of those that learn: weights, then biases and norms; none that is empty.

    Args:
        lr_fixed: their learning rate stays at its peak whatever the schedule says.
        head: they are a classifier's.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    common = {"lr_fixed": lr_fixed, "head": head}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p.ndim > 1], "bias_and_norm": False, **common},
        {"params": [p for p in learning if p.ndim <= 1], "bias_and_norm": True, **common},
    ]
    return [group for group in groups if group["params"]]
