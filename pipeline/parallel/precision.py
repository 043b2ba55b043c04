"""What the arithmetic is done in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

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


@contextmanager
def sound_convolutions(train: Train, device: torch.device) -> Iterator[None]:
    """torch's own convolutions in place of oneDNN's, where these are wrong: of bfloat16 on a CPU. Where a map
    of one pixel comes out, they read memory that nobody has written, and the gradient of the weights holds it
    (https://github.com/pytorch/pytorch/issues/163347).
    """
    if train.precision != "bf16" or device.type != "cpu":
        yield
        return
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)
