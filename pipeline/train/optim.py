"""Optimizers. LARC and LARS keep each layer's step in proportion to its weights, as large batches need.

Both use the gradients as scratch: after a step they hold what was added to the momentum. Lengths are those
of whole parameters, also where a rank holds a piece only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.distributed.sharded import norms, own
from pipeline.recipe.pretrain import Optim

LARC_EPSILON = 1e-8  # as in apex, which SwAV and SEER were trained with


class HasParamGroups(Protocol):
    """What a method tells about its parameters."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of {"params": [...], "bias_and_norm": bool, "lr_fixed": bool, "head": bool}; see
        `pipeline.methods.method.Method.param_groups`.
        """
        ...


def build_optimizer(method: HasParamGroups, section: Optim) -> Optimizer:
    """The recipe's optimizer over a method's parameters, each group at its peak rate.

    With `exclude_bias_and_norm`, biases and norms are not decayed, and LARS does not scale their steps either
    (as BYOL and Barlow Twins have it). LARC scales every parameter, as SwAV and SEER have it.
    """
    groups: list[dict[str, Any]] = []
    for group in method.param_groups():
        plain = group["bias_and_norm"] and section.exclude_bias_and_norm
        settings: dict[str, Any] = {"weight_decay": 0.0 if plain else section.weight_decay}
        if section.name == "lars":
            settings |= {"adapt": not plain, "clip": section.clip_trust}
        own = section.lr_head if group["head"] else section.lr_bias if group["bias_and_norm"] else None
        lr = section.lr if own is None else own
        settings |= {"lr": lr, "lr_factor": None if group["lr_fixed"] else lr / section.lr}
        settings |= {"head": group["head"]}
        groups.append({"params": group["params"], **settings})
    match section.name:
        case "larc":
            return LARC(groups, lr=section.lr, momentum=section.momentum, trust=section.trust)
        case "lars":
            return LARS(groups, lr=section.lr, momentum=section.momentum, trust=section.trust)
        case "sgd":
            # On a CPU the fused kernel gives the same bits in one pass over memory; DTensors have none.
            fused = all(_is_whole_on_cpu(each) for group in groups for each in group["params"])
            return torch.optim.SGD(
                groups,
                lr=section.lr,
                momentum=section.momentum,
                nesterov=section.nesterov,
                foreach=not fused,
                fused=fused,
            )
        case "adam":
            return torch.optim.Adam(groups, lr=section.lr, betas=section.betas, foreach=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, foreach=True)


def _is_whole_on_cpu(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and not isinstance(parameter, DTensor)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """The schedule's rate of a step, for every group of `build_optimizer` that follows it."""
    for group in optimizer.param_groups:
        if group["lr_factor"] is not None:
            group["lr"] = lr * group["lr_factor"]


def drop_all_but_the_head(optimizer: Optimizer) -> None:
    """Leave a step without the gradients of what is no classifier's head: it stays, and keeps no state."""
    for group in optimizer.param_groups:
        if not group["head"]:
            for parameter in group["params"]:
                parameter.grad = None


class LARC(Optimizer):
    """Layer-wise adaptive rates with the decay inside (You et al., 2017, https://arxiv.org/abs/1708.03888,
    eq. 6, as in apex with `clip=False`, which SwAV and SEER were trained with).

    For each parameter w with gradient g:
        u = trust |w| / (|g| + weight_decay |w| + 1e-8) * (g + weight_decay w)
        m = momentum m + u
        w = w - lr m
    A parameter of length 0 takes u = g; a gradient of length 0 gives u = 0, without decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            weights, gradients = _with_gradients(group)
            if not weights:
                continue
            decay = group["weight_decay"]
            length, slope = norms(weights, weights), norms(gradients, weights)
            scale = group["trust"] * length / (slope + decay * length + LARC_EPSILON)
            scale = torch.where(length == 0, 1.0, scale)
            scale = torch.where(slope == 0, 0.0, scale)
            torch._foreach_add_(_own(gradients), _own(weights), alpha=decay)
            torch._foreach_mul_(_own(gradients), list(scale.unbind()))
            _momentum_step(self, group, weights, gradients)
        return loss


class LARS(Optimizer):
    """Layer-wise adaptive rates (You et al., 2017, https://arxiv.org/abs/1708.03888), as BYOL and Barlow
    Twins use them.

    For each parameter w with gradient g:
        d = g + weight_decay w
        m = momentum m + trust |w| / |d| * d
        w = w - lr m
    A group with `adapt` false, and a parameter with |w| = 0 or |d| = 0, takes m = momentum m + d. With `clip`
    the rate of a layer is trust |w| / |d|, but at most lr: m = momentum m + min(trust |w| / |d| / lr, 1) d.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
        clip: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "adapt": adapt,
            "clip": clip,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _evaluate(closure)
        for group in self.param_groups:
            weights, gradients = _with_gradients(group)
            if not weights:
                continue
            if group["weight_decay"]:
                torch._foreach_add_(_own(gradients), _own(weights), alpha=group["weight_decay"])
            if group["adapt"]:
                length, slope = norms(weights, weights), norms(gradients, weights)
                scale = group["trust"] * length / slope
                if group["clip"]:
                    scale = (scale / group["lr"]).clamp(max=1.0)
                scale = torch.where((length == 0) | (slope == 0), 1.0, scale)
                torch._foreach_mul_(_own(gradients), list(scale.unbind()))
            _momentum_step(self, group, weights, gradients)
        return loss


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [weight for weight in group["params"] if weight.grad is not None]
    return weights, [weight.grad for weight in weights]


def _momentum_step(
    optimizer: Optimizer, group: dict[str, Any], weights: list[Tensor], updates: list[Tensor]
) -> None:
    buffers = []
    for weight in weights:
        state = optimizer.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffers.append(state["momentum_buffer"])
    momentum = _own(buffers)
    torch._foreach_mul_(momentum, group["momentum"])
    torch._foreach_add_(momentum, _own(updates))
    torch._foreach_add_(_own(weights), momentum, alpha=-group["lr"])


def _own(tensors: list[Tensor]) -> list[Tensor]:
    return [own(tensor) for tensor in tensors]
