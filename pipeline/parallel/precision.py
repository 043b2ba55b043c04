"""What the arithmetic is done in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from pipeline.recipe.pretrain import Train

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arithmetic(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """The autocast of the recipe's precision."""
    dtype = COMPUTE_DTYPES.get(train.precision)
    # Weights that come and go must not leave copies behind.
    cached = train.strategy == "ddp"
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cached)
