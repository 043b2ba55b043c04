"""Numbers of the host on the device, without waiting for it: a step that waits cannot be prepared ahead."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; on the CPU the tensor itself. What is called next there finds it."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # who asks first may infer only, and the next may train
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that every batch needs, (n,), copied once; not to be written to."""
    return torch.tensor(values, device=device, dtype=dtype)
