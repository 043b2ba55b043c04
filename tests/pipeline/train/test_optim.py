"""LARC and LARS equal their equations; every optimizer's state survives a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pipeline.recipe.pretrain import Optim
from pipeline.train.optim import LARC, LARS, build_optimizer, set_learning_rate

STEPS, LR, MOMENTUM, DECAY, TRUST = 4, 0.3, 0.9, 1e-2, 0.02


class Method(nn.Module):
    """Two matrices and two vectors; one vector starts at length 0, one parameter's gradient is always 0."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (4, 3), "still": (2, 3, 1, 1), "bias": (5,), "zero": (6,)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values * (name != "zero")))

    def param_groups(self) -> list[dict[str, Any]]:
        parameters = list(self.parameters())
        return [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "bias_and_norm": False,
                "lr_fixed": False,
                "head": False,
            },
            {
                "params": [p for p in parameters if p.ndim <= 1],
                "bias_and_norm": True,
                "lr_fixed": False,
                "head": False,
            },
        ]

    def set_gradients(self, step: int) -> dict[str, NDArray[Any]]:
        generator = torch.Generator().manual_seed(100 + step)
        gradients = {}
        for name, parameter in self.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (drawn * (name != "still")).to(parameter.dtype)
            gradients[name] = parameter.grad.numpy().astype(np.float64)
        return gradients


def make_section(name: str, **changes: Any) -> Optim:
    values = {"name": name, "lr": LR, "weight_decay": DECAY, "trust": TRUST}
    values |= {"betas": (MOMENTUM, 0.99)} if name.startswith("adam") else {"momentum": MOMENTUM}
    return Optim.model_validate(values | changes)


def larc_update(w: NDArray[Any], g: NDArray[Any], decay: float) -> NDArray[Any]:
    length, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
    if length == 0 or slope == 0:
        return g
    rate = TRUST * length / (slope + decay * length + 1e-8)
    update: NDArray[Any] = rate * (g + decay * w)
    return update


def lars_update(w: NDArray[Any], g: NDArray[Any], decay: float, adapt: bool) -> NDArray[Any]:
    decayed = g + decay * w
    length, slope = np.sqrt((w**2).sum()), np.sqrt((decayed**2).sum())
    if not adapt or length == 0 or slope == 0:
        return decayed
    update: NDArray[Any] = TRUST * length / slope * decayed
    return update


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["larc", "lars"])
def test_equals_the_equation_in_numpy(name: str, decay_all: bool) -> None:
    method = Method()
    optimizer = build_optimizer(method, make_section(name, exclude_bias_and_norm=not decay_all))
    weights = {key: value.detach().numpy().copy() for key, value in method.named_parameters()}
    buffers = {key: np.zeros_like(value) for key, value in weights.items()}
    for step in range(STEPS):
        gradients = method.set_gradients(step)
        optimizer.step()
        for key, w in weights.items():
            whole = decay_all or w.ndim > 1
            decay = DECAY if whole else 0.0
            if name == "larc":
                update = larc_update(w, gradients[key], decay)
            else:
                update = lars_update(w, gradients[key], decay, adapt=whole)
            buffers[key] = MOMENTUM * buffers[key] + update
            weights[key] = w - LR * buffers[key]
    for key, parameter in method.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[key], rtol=1e-12, atol=1e-14)
    if name == "larc":
        assert torch.equal(method.still, Method().still)  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.3])
def test_clipped_lars_moves_no_layer_faster_than_the_rate_of_its_step(lr: float) -> None:
    method = Method()
    optimizer = build_optimizer(method, make_section("lars", clip_trust=True, exclude_bias_and_norm=False))
    set_learning_rate(optimizer, lr)
    weights = {key: value.detach().numpy().copy() for key, value in method.named_parameters()}
    gradients = method.set_gradients(0)
    optimizer.step()
    for key, parameter in method.named_parameters():
        decayed = gradients[key] + DECAY * weights[key]
        length, slope = np.linalg.norm(weights[key]), np.linalg.norm(decayed)
        rate = lr if length == 0 else min(TRUST * length / slope, lr)
        np.testing.assert_allclose(
            parameter.detach().numpy(), weights[key] - rate * decayed, rtol=1e-12, atol=1e-14
        )


def test_biases_and_norms_may_have_a_rate_that_follows_the_schedule_in_proportion() -> None:
    optimizer = build_optimizer(Method(), make_section("lars", lr_bias=LR / 4))
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR / 4]
    set_learning_rate(optimizer, LR / 2)
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 2, LR / 8]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_biases_and_norms_are_decayed_only_on_request(name: str, kind: type) -> None:
    for decay_all in (False, True):
        optimizer = build_optimizer(Method(), make_section(name, exclude_bias_and_norm=not decay_all))
        assert type(optimizer) is kind
        assert [group["weight_decay"] for group in optimizer.param_groups] == [
            DECAY,
            DECAY if decay_all else 0.0,
        ]
        if isinstance(optimizer, torch.optim.AdamW):
            assert optimizer.param_groups[0]["betas"] == (MOMENTUM, 0.99)


@pytest.mark.parametrize("name", ["sgd", "larc", "lars", "adam", "adamw"])
def test_the_rate_of_the_groups_is_what_a_step_uses(name: str) -> None:
    method = Method()
    before = {key: value.detach().clone() for key, value in method.named_parameters()}
    optimizer = build_optimizer(method, make_section(name))
    method.set_gradients(0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in method.named_parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["sgd", "larc", "lars", "adam", "adamw"])
def test_T3_a_checkpoint_restores_the_optimizer_exactly(name: str, tmp_path: Path) -> None:
    first = Method()
    optimizer = build_optimizer(first, make_section(name))
    for step in range(2):
        first.set_gradients(step)
        optimizer.step()
    model_state, optimizer_state = get_state_dict(first, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    second = Method()
    resumed = build_optimizer(second, make_section(name))
    model_state, optimizer_state = get_state_dict(second, resumed)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(second, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(2, 4):
        for method, stepper in ((first, optimizer), (second, resumed)):
            method.set_gradients(step)
            stepper.step()
    for (key, value), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("kind", [LARC, LARS])
def test_parameters_without_gradient_and_empty_groups_are_left_alone(kind: type[LARC] | type[LARS]) -> None:
    method = Method().float()
    optimizer = kind([{"params": list(method.parameters())}, {"params": []}], lr=1.0)
    optimizer.step()
    assert not optimizer.state
    method.set_gradients(0)
    method.a.grad = None
    before = method.a.detach().clone()  # type: ignore[operator]
    optimizer.step()
    assert torch.equal(before, method.a)  # type: ignore[arg-type]
    assert len(optimizer.state) == 3


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = LARC([weight], lr=0.1)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 3.0
    assert bool((weight < 1).all())
