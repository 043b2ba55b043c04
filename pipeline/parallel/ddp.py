"""Every rank holds the whole method; gradients are averaged (Li et al., 2020,
https://arxiv.org/abs/2006.15704).
"""

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from cluster.rank.torch_dist import World
from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import mean_of
from pipeline.methods.method import Method


class ReplicatedEngine:
    """See `pipeline.parallel.engine.Engine`. With one rank the method is called as it is."""

    def __init__(self, method: Method, *, world: World) -> None:
        self.method = method
        self._replicas: DistributedDataParallel | None = None
        if world.group is None:
            return
        with warnings.catch_warnings():
            # The argument has a new name from torch 2.13 on, which 2.8 does not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self._replicas = DistributedDataParallel(
                method,
                process_group=world.group,
                broadcast_buffers=False,  # running statistics are equal already
                gradient_as_bucket_view=True,
            )
        if world.device.type == "cpu":
            self._replicas.register_comm_hook(world.group, mean_in_rank_order)

    def __call__(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        terms = (self._replicas or self.method)(inputs, step)
        return cast(dict[str, Tensor], terms)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        if last or self._replicas is None:
            return contextlib.nullcontext()
        return self._replicas.no_sync()

    def after_step(self, step: int) -> None:
        self.method.after_step(step)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.method.param_groups()


def mean_in_rank_order(group: ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients over the ranks, with rounding that depends on the values alone.

    gloo's all-reduce of three ranks or more adds in an order that depends on the place in the buffer, and DDP
    regroups its buckets after the first step: a resumed run would differ in the last bit (T3).
    """
    own = bucket.buffer()
    pieces = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(pieces, own, group=group, async_op=True)

    future: Future[Tensor] = work.get_future().then(lambda _: mean_of(pieces))
    return future
