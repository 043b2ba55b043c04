"""Parameters, gradients and optimizer state in pieces, by FairScale: SEER-10B was trained with it.

FairScale authors, 2021 (https://github.com/facebookresearch/fairscale). Parameters are not flattened
together: LARC and LARS need the length of each. All is gathered in the parameters' own precision.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.data.batch import Inputs
from pipeline.distributed.sharded import mark_share, named_tensors
from pipeline.methods.method import Method
from pipeline.parallel.initialize import initialize
from pipeline.parallel.units import named_blocks, own_units


class FairScaleEngine:
    """See `pipeline.parallel.engine.Engine`.

    Args:
        method: on `meta`; it is sharded block by block, so that a rank never holds more than the largest
            block besides its pieces, which are drawn from the seed.

    Raises:
        UserError: if fairscale is not installed, or a trunk declares no blocks.
    """

    def __init__(self, method: Method, *, seed: int, world: World) -> None:
        if world.group is None:
            raise ValueError("one rank has nothing to shard")
        sharded = _sharded_class(world.device)
        settings: dict[str, Any] = {
            "process_group": world.group,
            "process_group_reduce_scatter": world.group,
            "flatten_parameters": False,
            "compute_device": world.device,
            # A bucket is reduced when it is full, which on the CPU has no stream to happen in.
            "bucket_cap_mb": 0 if world.device.type == "cpu" else 25,
        }
        self.method = method
        names = {parameter: name for name, parameter in method.named_parameters()}
        self._groups = [
            group | {"params": [names[parameter] for parameter in group["params"]]}
            for group in method.param_groups()
        ]
        shapes = {name: parameter.shape for parameter, name in names.items()}

        def shard(modules: Iterable[nn.Module]) -> list[Any]:
            units = []
            for module in modules:
                units.append(sharded(module.to_empty(device=world.device), **settings))
                _replace(method, module, units[-1])
            return units

        for trunk in method.trunks().values():
            shard(named_blocks(trunk, key="train.strategy", off="ddp"))
        self._own_units = shard(own_units(method))
        # What is frozen too, for the outermost unit is freed by its gradients.
        shard([child for child in method.children() if _is_frozen(child)])
        method.to_empty(device=world.device)
        self._root = sharded(method, **settings)
        for name, parameter in named_tensors(method):
            if name in shapes:
                mark_share(parameter, ranks=world.group, shape=shapes[name])
        initialize(method, seed=seed)

    def __call__(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self._root(inputs, step))

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._root.no_sync():
            yield

    def after_step(self, step: int) -> None:
        with contextlib.ExitStack() as stack:
            for unit in self._own_units:
                stack.enter_context(unit.summon_full_params())
            self.method.after_step(step)

    def param_groups(self) -> list[dict[str, Any]]:
        parameters = dict(named_tensors(self.method))
        return [group | {"params": [parameters[name] for name in group["params"]]} for group in self._groups]


def _replace(method: nn.Module, module: nn.Module, unit: nn.Module) -> None:
    """Put a unit where a module is, under its name."""
    name = next(name for name, each in method.named_modules() if each is module)
    parent, _, own = name.rpartition(".")
    method.get_submodule(parent).add_module(own, unit)


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none of them learns."""
    learns = [parameter.requires_grad for parameter in module.parameters()]
    return bool(learns) and not any(learns)


class _NoStream:
    """The one stream of a machine without GPUs: what is asked for has been done when it is asked."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


def _sharded_class(device: torch.device) -> Any:
    """FairScale's class; on the CPU, one that does without CUDA's streams."""
    try:
        from fairscale.nn import FullyShardedDataParallel
    except ImportError:
        raise UserError(
            "train.strategy is fairscale, which is not installed: pip install 'seer-pipeline[fairscale]'"
        ) from None
    # It speaks the torch of 2021, and torch says so at every call.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    warnings.filterwarnings("ignore", message=".*_(all_gather|reduce_scatter)_base. is a private function")
    if device.type == "cuda":
        return FullyShardedDataParallel
    if torch.cuda.is_available():
        raise UserError(
            "train.strategy fairscale runs on the CPU only where torch sees no GPU: set CUDA_VISIBLE_DEVICES="
        )
    stream = _NoStream()
    # Nobody else can have called these: without a GPU they only raise.
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]

    class OnCPU(FullyShardedDataParallel):  # type: ignore[misc]
        def _setup_streams(self) -> None:
            super()._setup_streams()
            if self._is_root:
                for name in ("fp32_to_fp16", "all_gather", "post_backward"):
                    self._streams[name] = stream

    return OnCPU
