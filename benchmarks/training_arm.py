"""One way to train, ready to take steps whose parts are timed; see `gpu_training.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cluster.rank.torch_dist import World
from pipeline.data.batch import Inputs
from pipeline.distributed.sharded import norms
from pipeline.methods.method import Method
from pipeline.parallel.engine import Engine
from pipeline.parallel.precision import arithmetic
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loss_scale import LossScale


@dataclass(kw_only=True)
class Arm:
    """One way to train, ready; `times` are seconds of forward, backward and optimizer of each step."""

    recipe: PretrainRecipe
    world: World
    method: Method
    engine: Engine
    optimizer: torch.optim.Optimizer
    scale: LossScale
    inputs: Inputs
    done: int = 0
    peak: int = 0
    times: list[tuple[float, float, float]] = field(default_factory=list)

    def step(self) -> float:
        """One step as the loop takes it, without its logging and guard; returns the loss."""
        marks = [mark(self.world.device)]
        with arithmetic(self.recipe.train, self.world.device):
            terms = self.engine(self.inputs, self.done)
        marks.append(mark(self.world.device))
        self.engine.backward(terms["loss"] * self.scale.factor)
        marks.append(mark(self.world.device))
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.scale.unscale(gradients)
        norm = torch.linalg.vector_norm(norms(gradients, parameters))
        if not self.scale.overflowed(terms["loss"], norm):
            self.optimizer.step()
            self.engine.after_step(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(mark(self.world.device))
        loss = float(terms["loss"].detach())
        self.done += 1
        forward, backward, update = (between(*pair) for pair in pairwise(marks))
        self.times.append((forward, backward, update))
        return loss

    def warm_up(self) -> None:
        """Compile, choose algorithms, make the optimizer's state, which waits for a loss scale that fits."""
        while self.done < 2 or (not self.optimizer.state and self.done < 20):
            self.step()
        self.times.clear()

    def own_bytes(self) -> int:
        """Weights, optimizer's state and inputs: what stays between steps."""
        state = [
            v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)
        ]
        tensors = [*self.method.parameters(), *self.method.buffers(), *state, *self.inputs.views.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment on the device's own time line."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds between two moments; waits for the second."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
