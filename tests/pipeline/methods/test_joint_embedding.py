"""Barlow Twins, BYOL and SimSiam: the papers' equations, and what each method promises beyond its loss."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joint_embedding_reference import barlow_twins_of_the_paper, byol_of_the_paper, simsiam_of_the_paper
from numpy.typing import NDArray
from tiny_training import as_inputs, build_method, make_recipe
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.distributed.collectives import rank_in, world_size
from pipeline.methods import barlow_twins
from pipeline.methods.barlow_twins import BarlowTwinsMethod, barlow_twins_loss
from pipeline.methods.build import assemble_method
from pipeline.methods.byol import BYOLMethod, byol_loss, teacher_momentum
from pipeline.methods.method import Method
from pipeline.methods.simsiam import SimSiamMethod, simsiam_loss
from pipeline.train.optim import build_optimizer, set_learning_rate

ROWS, STEPS = 6, 10
VIEWS = [{"count": 2, "size": 16, "scale": [0.3, 1.0]}]
BARLOW = {"name": "barlow_twins", "projector": [16, 16, 12], "off_diagonal_weight": 0.1, "scale": 0.5}
BYOL = {"name": "byol", "projector": [16, 8], "predictor": 12, "momentum": 0.7}
SIMSIAM = {"name": "simsiam", "projector": [16, 16, 8], "predictor": 4}


def build(section: dict[str, Any], **changes: Any) -> Method:
    """A method in float64, on one process."""
    recipe = make_recipe(Path("unused"), method=section, data__crops=VIEWS, data__batch_size=ROWS, **changes)
    return build_method(recipe, total_steps=STEPS, group=None).double()


def make_views(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, ROWS, 3, 16, 16, generator=generator, dtype=torch.float64).unbind()
    return one, other


def numpy(*tensors: Tensor) -> list[NDArray[Any]]:
    return [tensor.detach().numpy() for tensor in tensors]


def slopes(loss: Callable[..., float], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Gradients of a NumPy function by central differences."""
    found = []
    for array in arrays:
        slope = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            before, around = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = before + step
                around.append(loss(*arrays))
            array[index] = before
            slope[index] = (around[0] - around[1]) / 2e-5
        found.append(slope)
    return found


@given(samples=st.integers(3, 12), dim=st.integers(1, 9), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_T5_losses_equal_the_papers(samples: int, dim: int, seed: int) -> None:
    arrays = list(np.random.default_rng(seed).standard_normal((4, samples, dim)))
    one, two, three, four = map(torch.from_numpy, arrays)
    terms = barlow_twins_loss(one, two, off_diagonal_weight=0.3, epsilon=0)
    expected = barlow_twins_of_the_paper(arrays[0], arrays[1], 0.3)
    assert [float(term) for term in terms] == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert float(byol_loss(one, two, three, four)) == pytest.approx(byol_of_the_paper(*arrays), abs=1e-10)
    assert float(simsiam_loss(one, two, three, four)) == pytest.approx(
        simsiam_of_the_paper(*arrays), abs=1e-10
    )


def _loss_and_gradients(group: ProcessGroup | None) -> dict[str, tuple[float, list[NDArray[Any]]]]:
    """Of every loss alone on this rank's rows of 8; the gradients as an engine averages them."""
    arrays = np.random.default_rng(3).standard_normal((4, 8, 5))
    rows = 8 // world_size(group)
    mine = slice(rank_in(group) * rows, (rank_in(group) + 1) * rows)
    losses: dict[str, Callable[..., Tensor]] = {
        "barlow": lambda a, b, *_: (
            barlow_twins_loss(a, b, off_diagonal_weight=0.3, epsilon=0, group=group).loss
        ),
        "byol": lambda *inputs: byol_loss(*inputs, group=group),
        "simsiam": lambda *inputs: simsiam_loss(*inputs, group=group),
    }
    found = {}
    for name, loss in losses.items():
        inputs = [torch.from_numpy(array[mine]).requires_grad_() for array in arrays]
        value = loss(*inputs)
        value.backward()
        gradients = [
            (each.grad / world_size(group)).numpy() if each.grad is not None else np.zeros((rows, 5))
            for each in inputs
        ]
        found[name] = float(value.detach()), gradients
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_T5_gradients_on_n_ranks_are_the_slopes_of_the_papers_losses(
    monkeypatch: pytest.MonkeyPatch, run_on_ranks: Callable[..., list[Any]], ranks: int
) -> None:
    if ranks == 1:
        monkeypatch.setattr(barlow_twins, "_BLOCK", 10)  # two rows of five at a time, and one
    arrays = list(np.random.default_rng(3).standard_normal((4, 8, 5)))
    papers: dict[str, Callable[..., float]] = {
        "barlow": lambda a, b, *_: barlow_twins_of_the_paper(a, b, 0.3)[0],
        "byol": byol_of_the_paper,
        "simsiam": simsiam_of_the_paper,
    }
    everyone = run_on_ranks(ranks, _loss_and_gradients)
    for name, paper in papers.items():
        for found in everyone:
            assert found[name][0] == pytest.approx(paper(*arrays), rel=1e-10)
        for number, expected in enumerate(slopes(paper, arrays)):
            gradient = np.concatenate([found[name][1][number] for found in everyone])
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8, err_msg=name)


def test_T5_methods_equal_the_papers_from_the_images_on() -> None:
    one, other = make_views()
    barlow = cast(BarlowTwinsMethod, build(BARLOW))
    terms = barlow(as_inputs(torch.cat([one, other])), 0)
    z_a, z_b = numpy(*(barlow.projector(barlow.trunk(view)) for view in (one, other)))
    expected = barlow_twins_of_the_paper(z_a, z_b, 0.1, epsilon=1e-5)
    assert float(terms["loss"].detach()) == pytest.approx(0.5 * expected[0], rel=1e-10)
    assert [float(terms[name]) for name in ("invariance", "redundancy")] == pytest.approx(expected[1:])

    byol = cast(BYOLMethod, build(BYOL))
    assert byol.teacher is not None
    loss = byol(as_inputs(one, other), 0)["loss"]  # two groups of one view
    p = [byol.predictor(byol.projector(byol.trunk(view))) for view in (one, other)]
    t = [byol.teacher(view) for view in (one, other)]
    assert float(loss.detach()) == pytest.approx(byol_of_the_paper(*numpy(*p, *t)), rel=1e-10)

    simsiam = cast(SimSiamMethod, build(SIMSIAM))
    loss = simsiam(as_inputs(torch.cat([one, other])), 0)["loss"]
    z = [simsiam.projector(simsiam.trunk(view)) for view in (one, other)]
    p = [simsiam.predictor(each) for each in z]
    assert float(loss.detach()) == pytest.approx(simsiam_of_the_paper(*numpy(*p, *z)), rel=1e-10)


def test_barlow_twins_equals_the_authors_code() -> None:
    """Their BatchNorm, with its epsilon, on embeddings of any scale, also where a component has collapsed."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 10, generator=generator, dtype=torch.float64) * torch.logspace(-4, 2, 10)
    z[..., 3] = 1.0
    z_a, z_b = z.requires_grad_().unbind()
    norm = nn.BatchNorm1d(10, affine=False).double()
    c = norm(z_a).T @ norm(z_b) / 16
    expected = (c.diagonal() - 1).square().sum() + 0.0051 * (c.square().sum() - c.diagonal().square().sum())
    found = barlow_twins_loss(z_a, z_b, off_diagonal_weight=0.0051)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_barlow_twins_needs_two_views_of_two_samples() -> None:
    for z_a, z_b in ((torch.zeros(1, 3), torch.zeros(1, 3)), (torch.zeros(4, 3), torch.zeros(4, 2))):
        with pytest.raises(ValueError, match="two samples or more are needed"):
            barlow_twins_loss(z_a, z_b, off_diagonal_weight=0.1)


def _megabytes_of_16384_components(sender: Any) -> None:
    torch.set_num_threads(2)
    z = torch.randn(2, 16, 16_384).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    barlow_twins_loss(*z.unbind(), off_diagonal_weight=0.0051).loss.backward()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)


@pytest.mark.slow
def test_barlow_twins_with_16384_components_never_holds_their_correlation() -> None:
    """It would take 1074 MB, and as much again for its gradient; blocks and their squares take 64 MB each."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")  # which has imported PyTorch
    process = context.Process(target=_megabytes_of_16384_components, args=(sender,))
    process.start()
    sender.close()
    try:
        assert receiver.poll(120)
        assert receiver.recv() < 300
    finally:
        process.kill()
        process.join()


def test_the_teacher_follows_the_student_as_it_is_after_the_step() -> None:
    method = cast(BYOLMethod, build(BYOL, optim={"name": "sgd", "lr": 0.1}))
    assert method.teacher is not None
    optimizer = build_optimizer(method, make_recipe(Path("unused"), optim={"name": "sgd", "lr": 0.1}).optim)
    before = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    student_before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    # It has weights of its own from the start, as published.
    assert not torch.equal(before["trunk.stem.conv.weight"], student_before["trunk.stem.conv.weight"])
    method(as_inputs(*make_views()), 4)["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    optimizer.step()
    moved = [
        name for name, tensor in method.named_parameters() if not torch.equal(tensor, student_before[name])
    ]
    assert not any(name.startswith("teacher.") for name in moved) and len(moved) > 10
    method.after_step(4)
    student = method.state_dict()
    tau = 1 - 0.3 * (np.cos(np.pi * 4 / STEPS) + 1) / 2
    for name, tensor in method.teacher.named_parameters():
        expected = tau * before[name] + (1 - tau) * student[name]
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=1e-12, msg=name)
    assert not torch.equal(
        method.teacher.state_dict()["trunk.stem.bn.running_mean"], before["trunk.stem.bn.running_mean"]
    )


def test_the_teachers_momentum_rises_along_a_cosine() -> None:
    found = [teacher_momentum(0.99, step=step, total_steps=8) for step in range(9)]
    assert found[0] == pytest.approx(0.99) and found[4] == pytest.approx(0.995) and found[8] == 1
    assert found == sorted(found)


@pytest.mark.parametrize("section", [BARLOW, BYOL, SIMSIAM])
def test_the_embedding_is_the_projectors_of_the_first_view_and_holds_no_graph(
    section: dict[str, Any],
) -> None:
    method = cast(BarlowTwinsMethod | BYOLMethod | SimSiamMethod, build(section))
    one, other = make_views()
    embedding = method(as_inputs(torch.cat([one, other])), 0)["embedding"]
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, method.projector(method.trunk(one)).detach(), rtol=0, atol=1e-12)


def test_what_follows_the_student_is_not_the_optimizers() -> None:
    method = cast(BYOLMethod, build(BYOL))
    learning = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert learning == {
        id(parameter) for name, parameter in method.named_parameters() if not name.startswith("teacher.")
    }


def test_a_projector_ends_plain_and_simsiams_predictor_with_a_bias() -> None:
    for section in (BARLOW, BYOL):
        last = list(cast(BarlowTwinsMethod | BYOLMethod, build(section)).projector.modules())[-1]
        assert isinstance(last, nn.Linear) and last.bias is None
    last = list(cast(SimSiamMethod, build(SIMSIAM)).predictor.modules())[-1]
    assert isinstance(last, nn.Linear) and last.bias is not None


def gradients_of(method: Method) -> set[str]:
    """The parts of a method that learn from a step."""
    method(as_inputs(*make_views()), 0)["loss"].backward()
    return {
        name.split(".")[0]
        for name, parameter in method.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


def test_each_asymmetry_of_byol_can_be_taken_away() -> None:
    assert gradients_of(build(BYOL)) == {"trunk", "projector", "predictor"}
    without_predictor = build(BYOL | {"predictor": None})
    assert gradients_of(without_predictor) == {"trunk", "projector"}
    two_students = cast(BYOLMethod, build(BYOL | {"stop_gradient": False}))
    assert gradients_of(two_students) == {"trunk", "projector", "predictor", "teacher"}
    learning = [parameter for group in two_students.param_groups() for parameter in group["params"]]
    assert len(learning) == len(list(two_students.parameters()))
    before = [parameter.clone() for parameter in two_students.parameters()]
    two_students.after_step(0)  # nobody follows
    assert all(torch.equal(a, b) for a, b in zip(before, two_students.parameters(), strict=True))
    shared = cast(BYOLMethod, build(BYOL | {"shared_weights": True}))
    assert shared.teacher is None and len(shared.trunks()) == 1
    assert gradients_of(shared) == {"trunk", "projector", "predictor"}


@pytest.mark.parametrize("section", [BYOL | {"shared_weights": True}, SIMSIAM])
def test_stopping_the_gradient_changes_it_and_not_the_loss(section: dict[str, Any]) -> None:
    inputs, found = as_inputs(*make_views()), []
    for stop in (True, False):
        method = build(section | {"stop_gradient": stop})
        loss = method(inputs, 0)["loss"]
        loss.backward()
        gradient = next(method.trunk.parameters()).grad
        assert gradient is not None
        found.append((float(loss.detach()), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("section", [BARLOW, BYOL, SIMSIAM])
def test_each_view_passes_alone_so_that_batch_statistics_are_of_one_view(section: dict[str, Any]) -> None:
    method = build(section)
    passes: list[int] = []
    for trunk in method.trunks().values():
        trunk.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    method(as_inputs(torch.cat(make_views())), 0)
    assert passes == [ROWS] * 2 * len(method.trunks())


@pytest.mark.parametrize("decays", [False, True])
def test_simsiams_predictor_keeps_its_rate_unless_told_otherwise(decays: bool) -> None:
    method = cast(SimSiamMethod, build(SIMSIAM | {"predictor_lr_decays": decays}))
    section = make_recipe(Path("unused"), optim={"name": "sgd", "lr": 0.4, "weight_decay": 1e-4}).optim
    optimizer = build_optimizer(method, section)
    set_learning_rate(optimizer, 0.01)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        kept = name.startswith("predictor.") and not decays
        assert rates[id(parameter)] == (0.4 if kept else 0.01), name


def test_simsiams_projector_ends_without_affine() -> None:
    method = cast(SimSiamMethod, build(SIMSIAM))
    last = cast(nn.Sequential, cast(Any, method.projector).layers)[-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.affine
    assert all(parameter.ndim > 1 for parameter in list(method.projector.parameters())[-1:])


def test_barlow_twins_projector_has_no_bias_and_its_vectors_have_a_rate_of_their_own() -> None:
    method = cast(BarlowTwinsMethod, build(BARLOW))
    linear = [layer for layer in method.projector.modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [16, 16, 12] and all(
        layer.bias is None for layer in linear
    )
    optim = {"name": "lars", "lr": 1.6, "lr_bias": 0.0384, "weight_decay": 1e-6}
    optimizer = build_optimizer(method, make_recipe(Path("unused"), optim=optim).optim)
    set_learning_rate(optimizer, 0.8)
    for group in optimizer.param_groups:
        vectors = group["params"][0].ndim == 1
        assert group["lr"] == pytest.approx(0.0192 if vectors else 0.8)
        assert (group["adapt"], group["weight_decay"]) == ((False, 0) if vectors else (True, 1e-6))


@pytest.mark.parametrize("section", [BARLOW, BYOL, SIMSIAM])
def test_other_than_two_views_are_refused_with_the_way_out(section: dict[str, Any]) -> None:
    one, two = {"count": 1, "size": 8, "scale": [0.1, 0.3]}, {"count": 2, "size": 16, "scale": [0.3, 1.0]}
    for crops, count in (([one], 1), ([two, one], 3)):
        recipe = make_recipe(Path("unused"), method=section, data__crops=crops)
        with pytest.raises(
            UserError, match=f"gives {count}: give one group with count: 2, or two with count: 1"
        ):
            assemble_method(recipe, total_steps=STEPS, group=None)


@pytest.mark.parametrize("section", [BARLOW, BYOL, SIMSIAM])
def test_bfloat16_autocast_keeps_the_loss_in_float32(section: dict[str, Any]) -> None:
    method = build(section).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(as_inputs(*(view.float() for view in make_views())), 0)
    assert terms["loss"].dtype == terms["embedding"].dtype == torch.float32 and bool(terms["loss"].isfinite())
    terms["loss"].backward()
