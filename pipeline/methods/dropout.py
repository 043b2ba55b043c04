"""Dropout that any number of ranks draws alike.

Srivastava et al., 2014 (https://jmlr.org/papers/v15/srivastava14a.html).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.philox import uniforms
from pipeline.data.to_device import to_device

# No substitute stands so far behind, and what is mixed is drawn one place further.
_STREAM = 0xFFFF_FFFE


def dropout(features: Tensor, probability: float, *, seed: int, number: int, first: int) -> Tensor:
    """Set features to zero, each with the same probability, and scale the rest so that the mean stays.

    Which of them is a pure function of (seed, number, row of the global batch, feature).

    Args:
        features: (rows, dim).
        number: of the global batch.
        first: the first row's place in it.

    Returns:
        (rows, dim), float32 or wider.
    """
    rows, dim = features.shape
    draws = uniforms(
        seed=seed,
        epoch=number,
        keys=np.arange(first, first + rows),
        ahead=np.full(rows, _STREAM),
        views=1,
        draws=dim,
    )[:, 0]
    wide = torch.promote_types(features.dtype, torch.float32)
    scale = torch.from_numpy((draws >= probability) / (1 - probability))
    return features.to(wide) * to_device(scale, features.device).to(wide)
