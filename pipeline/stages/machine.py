"""What a stage needs of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from cluster.job import Resources
from pipeline.recipe.stages import Machine

if TYPE_CHECKING:
    import torch


class OnAMachine(Protocol):
    """A recipe that says where it runs."""

    @property
    def run(self) -> Machine: ...


def one_gpu(recipe: object, gpus_per_node: int | None) -> Resources:
    """One GPU, where there is any."""
    if gpus_per_node is None:
        import torch

        gpus_per_node = torch.cuda.device_count()
    return Resources(gpus_per_rank=min(1, gpus_per_node))


def one_gpu_or_none(recipe: OnAMachine, gpus_per_node: int | None) -> Resources:
    """One GPU, unless the recipe wants the CPU."""
    return Resources() if recipe.run.device == "cpu" else one_gpu(recipe, gpus_per_node)


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is the GPU if there is one."""
    import torch

    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


def gpus_held(device: torch.device) -> int:
    """How many GPUs a stage holds that works on this device."""
    return int(device.type == "cuda")
