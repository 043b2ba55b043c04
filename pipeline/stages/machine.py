"""What a stage needs of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.job import DeviceName, Resources
from pipeline.recipe.stages import Machine

if TYPE_CHECKING:
    import torch


class OnAMachine(Protocol):
    """A recipe that says where it runs."""

    @property
    def run(self) -> Machine: ...


def one_gpu(recipe: object, gpus_per_node: int | None) -> Resources:
    """One GPU, where there is any."""
    return _for_device("auto", gpus_per_node)


def one_gpu_or_none(recipe: OnAMachine, gpus_per_node: int | None) -> Resources:
    """One GPU, unless the recipe wants the CPU.

    Raises:
        UserError: if the recipe wants a GPU, and there is none here.
    """
    return _for_device(recipe.run.device, gpus_per_node)


def _for_device(device: DeviceName, gpus_per_node: int | None) -> Resources:
    if device == "cpu":
        return Resources()
    if gpus_per_node is None:
        from cluster.rank.torch_dist import gpus_here

        gpus_per_node = gpus_here(device)
    return Resources(gpus_per_rank=min(1, gpus_per_node))


def gpus_held(device: torch.device) -> int:
    """How many GPUs a stage holds that works on this device."""
    return int(device.type == "cuda")
