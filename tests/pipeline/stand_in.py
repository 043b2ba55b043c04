"""A device that is none: its tensors say that they lie elsewhere, and are computed on the CPU.

A build for CPUs has no GPU. This stands in for one, with values, in a process of its own, for what PyTorch
registers stays. An operation on tensors of both sides fails, as it would on a GPU, and so does a generator of
the other side; what makes the host wait for the device, as `torch.cuda.set_sync_debug_mode` has it, is noted
with the function that asked for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
_STREAM = SimpleNamespace(synchronize=lambda: None)
torch.elsewhere.current_stream = lambda: _STREAM  # which torch's writer of checkpoints asks for
torch.elsewhere.stream = contextlib.nullcontext
_LIBRARY = torch.library.Library("_", "IMPL")  # lives as long as the process
_LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

DEVICE = torch.device("elsewhere:0")
CPU = torch.device("cpu")
_PRODUCT = Path(__file__).parents[2]
_ROOMS = tuple(str(_PRODUCT / floor) for floor in ("pipeline", "cluster"))

aten = torch.ops.aten
# What looks at values to know a shape, or gives the host a value.
_LOOKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._linalg_check_errors.default,
}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}


class Elsewhere(torch.Tensor):
    """A tensor of the stand-in device; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.values!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """While it is entered, tensors may be made on `DEVICE`.

    Attributes:
        waits: what made the host wait for the device since `waits` was last cleared: "what in where", and how
            often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor copies to the device unseen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (wait := _wait_of(function, args, kwargs)) is not None:
            self.waits[f"{wait} in {_who_asks()}"] += 1
        return _computed(function, args, kwargs)


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors(args, kwargs))
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    goal = kwargs.get("device")
    to_be_there = there if goal is None else torch.device(goal).type == DEVICE.type
    if not there and not to_be_there:
        return function(*args, **kwargs)
    _refuse_both_sides(function, tensors, [*args, *kwargs.values()])
    raw_args, raw_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.values, (args, kwargs))
    if goal is not None:
        raw_kwargs["device"] = CPU
        if there != to_be_there and function is aten._to_copy.default:  # a copy, and never an alias
            raw_args = (raw_args[0].clone(), *raw_args[1:])
    out = function(*raw_args, **raw_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if not to_be_there:
        return out
    inferred = tensors[0].is_inference() if function.is_view else torch.is_inference_mode_enabled()
    with torch.inference_mode(inferred):
        wrapped = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped


def _refuse_both_sides(function: Any, tensors: list[Tensor], arguments: list[Any]) -> None:
    if any(isinstance(each, torch.Generator) for each in arguments):
        raise AssertionError(f"{function} draws from a generator of the CPU, in {_who_asks()}")
    if function in _COPIES or not any(isinstance(each, Elsewhere) for each in tensors):
        return  # the latter makes a tensor there of the shape of one here
    some = tensors[:1] if function in _INDEXED else tensors  # indices may be the host's
    if function in _INDEXED and not isinstance(tensors[0], Elsewhere):
        raise AssertionError(f"{function} takes indices of the device on the host, in {_who_asks()}")
    if apart := [each for each in some if not isinstance(each, Elsewhere) and each.ndim]:
        shape = tuple(apart[0].shape)
        raise AssertionError(f"{function} takes a tensor of the CPU, {shape}, in {_who_asks()}")


def _wait_of(function: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What the host would wait for in a call; None if for nothing."""
    tensors = list(_tensors(args, kwargs))
    there = [isinstance(tensor, Elsewhere) for tensor in tensors]
    if function is aten._to_copy.default:
        goal = kwargs.get("device")
        crosses = goal is not None and (torch.device(goal).type == DEVICE.type) != there[0]
        return _direction(there[0]) if crosses and not kwargs.get("non_blocking") else None
    if function is aten.copy_.default:
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return _direction(there[1]) if there[0] != there[1] and blocking else None
    if not any(there):
        return None
    if function in _INDEXED:
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype == torch.bool for each in indices):
            return "selecting by a mask"
        return "an index of the host" if any(not isinstance(each, Elsewhere) for each in indices) else None
    if function is aten.repeat_interleave.Tensor:
        return None if kwargs.get("output_size") is not None else "repeat_interleave"
    return function.overloadpacket.__name__ if function in _LOOKS else None


def _direction(to_host: bool) -> str:
    return "a copy to the host" if to_host else "a copy to the device"


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterable[Tensor]:
    return (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))


def _who_asks() -> str:
    """The innermost function of the product that is at work, as "room/file.py function"."""
    frame = sys._getframe(1)
    while frame is not None:  # type: ignore[redundant-expr]
        if frame.f_code.co_filename.startswith(_ROOMS):
            path = Path(frame.f_code.co_filename).relative_to(_PRODUCT)
            return f"{path} {frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a backward pass"


class Clock:
    """In place of a GPU's events."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Clock) -> float:
        return 0.0
