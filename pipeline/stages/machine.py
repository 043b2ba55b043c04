"""What a stage needs of a machine: devices and time."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from pydantic import NonNegativeInt

from cluster.job import Resources
from cluster.typed_yaml import Section


class Machine(Section):
    """Where a stage runs; changes no number."""

    workers: NonNegativeInt = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


class OnAMachine(Protocol):
    """A recipe that says where it runs."""

    @property
    def run(self) -> Machine: ...


def _one_gpu(recipe: object, gpus_per_node: int | None) -> Resources:
    there = torch.cuda.device_count() if gpus_per_node is None else gpus_per_node
    return Resources(gpus_per_rank=min(1, there))


def _one_gpu_or_none(recipe: OnAMachine, gpus_per_node: int | None) -> Resources:
    """One, unless the recipe wants the CPU."""
    return Resources() if recipe.run.device == "cpu" else _one_gpu(recipe, gpus_per_node)


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is the GPU if there is one."""
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


def _gpus(device: torch.device) -> int:
    return int(device.type == "cuda")
