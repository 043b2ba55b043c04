import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cluster.errors import UserError
from pipeline.recipe.transfer import LinearRecipe
from pipeline.transfer import rows as module
from pipeline.transfer.features import Features, FeatureWriter, load_features
from pipeline.transfer.linear import (
    WANTED_GAP,
    fit,
    linear_probe,
    loss_and_gradient,
    relative_gap,
    split_validation,
)
from pipeline.transfer.rows import Axes, Rows, Standardiser


def blobs(samples, classes=3, dim=5, spread=1.0, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    y = rng.integers(0, classes, samples)
    x = centres[y] + spread * rng.normal(size=(samples, dim))
    flipped = rng.random(samples) < noise
    y = np.where(flipped, rng.integers(0, classes, samples), y)
    return Features(
        x=torch.tensor(x, dtype=torch.float32),
        y=torch.tensor(y),
        keys=torch.arange(samples),
        classes=tuple("abcdefgh"[:classes]),
    )


@pytest.mark.parametrize("value", [1e-3, 1e-1])
def test_fit_equals_scikit_learn(value):
    data = blobs(300)
    x = data.x.double()
    weights, gap = fit(Rows(x=x, y=data.y), 3, value, 500)
    # scikit-learn minimises C * sum of losses + |W|^2 / 2, bias not regularised.
    other = LogisticRegression(C=1 / (value * len(x)), tol=1e-8, max_iter=5000).fit(x.numpy(), data.y.numpy())
    ours = torch.softmax(x @ weights[:-1] + weights[-1], dim=1).numpy()
    assert gap <= 1e-3
    # Both stop at a gradient of about 1e-5; the probabilities agree to that over the smallest curvature.
    np.testing.assert_allclose(ours, other.predict_proba(x.numpy()), atol=2e-3)


def test_fit_reaches_a_zero_gradient():
    data = blobs(200)
    x = data.x.double()
    weights, _ = fit(Rows(x=x, y=data.y), 3, 1e-2, 500)
    weights.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], data.y)
    (loss + 0.5e-2 * weights[:-1].square().sum()).backward()
    assert weights.grad.abs().max() < 1e-4


def entangled(samples=400, dim=40, classes=4):
    """Features of trunks: many say nearly the same, and along some directions they hardly vary."""
    data = blobs(samples, classes=classes, dim=dim, spread=1.5, noise=0.05)
    mixing = np.random.default_rng(5).normal(size=(dim, dim)) * np.geomspace(1, 3e-3, dim)
    turn = np.linalg.qr(np.random.default_rng(6).normal(size=(dim, dim)))[0]
    x = (data.x.double() @ torch.tensor(mixing @ turn)).float()
    return Features(x=x, y=data.y, keys=data.keys, classes=data.classes)


def loss_of(weights, x, y, value):
    """The objective in float64."""
    weights, x = weights.double(), x.double()
    loss = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y)
    return float(loss + 0.5 * value * weights[:-1].square().sum())


def optimum(x, y, value):
    """The smallest loss, by Newton's method of scikit-learn."""
    exact = LogisticRegression(C=1 / (value * len(x)), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    exact.fit(x.double().numpy(), y.numpy())
    weights = np.concatenate([exact.coef_.T, exact.intercept_[None]])
    return loss_of(torch.tensor(weights), x, y, value)


@pytest.mark.parametrize("value", [1e-5, 1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("iterations", [10, 600])
def test_the_gap_bounds_the_distance_to_the_optimum(value, iterations):
    data = entangled()
    rows = Rows(x=data.x, y=data.y)
    rows = replace(rows, scaler=Standardiser.of(rows))
    axes = Axes.of(rows)
    rows = replace(rows, axes=axes)
    x = torch.cat([part for part, _ in rows])
    weights, gap = fit(rows, 4, value, iterations)
    best = optimum(x, data.y, value)
    excess = loss_of(weights, x, data.y, value) / best - 1
    assert -1e-9 <= excess <= gap + 1e-7
    if iterations == 600:
        assert gap <= WANTED_GAP


def test_the_gap_counts_the_bias_which_has_no_regularisation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    y = (torch.arange(200) % 20).clamp_max(2)  # most are of the third class
    weights, value = torch.zeros(4, 3, dtype=torch.float64), 1e4  # W is right, nearly; the bias is not
    weights[-1] = (y.bincount() / 200).log() + torch.tensor([0.2, 0.0, -0.1])
    weights.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y)
    loss.backward()
    gap = relative_gap(Rows(x=x, y=y), weights.detach(), weights.grad, loss.detach(), value)
    excess = float(loss.detach()) / optimum(x, y, value) - 1
    assert 1e-3 < excess <= gap < 2 * excess


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_of_a_mapped_file_give_the_probe_of_one_chunk_in_memory(tmp_path, monkeypatch, precision):
    data, recipe = entangled(), LinearRecipe(regularisation=(1e-3, 1e-1))
    with FeatureWriter(
        tmp_path / "f", y=data.y, keys=data.keys, classes=data.classes, dim=40, precision=precision
    ) as file:
        file.write(0, data.x)
    mapped = load_features(tmp_path / "f")
    here = replace(data, x=mapped.x.float().clone())
    expected = linear_probe(here, here, recipe)
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 4 * 40)
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    found = linear_probe(mapped, mapped, recipe)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=0.05, abs=1e-3)  # `gap` is of roundings


def test_loss_and_gradient_are_those_of_autograd_along_any_axes(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 4 * 5)
    data = blobs(60)
    kept = torch.arange(60) % 3 > 0
    rows = Rows(x=data.x.double(), y=data.y, kept=kept)
    rows = replace(rows, scaler=Standardiser.of(rows))
    rows = replace(rows, axes=Axes.of(rows))
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, gradient = loss_and_gradient(rows, weights, 0.1)
    x = data.x.double()[kept]
    x = (x - x.mean(0)) / x.std(0, correction=0) @ rows.axes.directions
    torch.testing.assert_close(rows.squares, x.square().mean(0))
    weights.requires_grad_()
    expected = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], data.y[kept])
    expected = expected + 0.05 * weights[:-1].square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, weights.grad)


def test_a_probe_says_how_far_from_the_optimum_it_may_be(caplog):
    data = entangled()
    with caplog.at_level(logging.WARNING):
        good = linear_probe(data, data, LinearRecipe(regularisation=(1e-5,), max_iterations=600))
    assert good.converged and not caplog.text
    assert good.metrics()["gap"] == good.gap <= WANTED_GAP
    with caplog.at_level(logging.WARNING):
        poor = linear_probe(data, data, LinearRecipe(regularisation=(1e-5,), max_iterations=10))
    assert not poor.converged and poor.metrics()["converged"] == 0
    assert "of itself above the optimum; raise `max_iterations`" in caplog.text
    free = linear_probe(data, data, LinearRecipe(regularisation=(0.0,), max_iterations=10))
    assert not free.converged and free.metrics()["gap"] == 1
    assert "nothing bounds it without regularisation" in caplog.text


def test_a_trunk_that_has_collapsed_is_scored_and_one_that_has_diverged_is_a_sentence():
    data = blobs(60)
    flat = replace(data, x=torch.ones_like(data.x))
    scores = linear_probe(flat, flat, LinearRecipe(regularisation=(1e-2,)))
    assert scores.converged and scores.top1 == pytest.approx(float(data.y.bincount().max()) / 60)
    gone = replace(data, x=torch.full_like(data.x, math.nan))
    with pytest.raises(UserError, match=r"are not finite.*older checkpoint"):
        linear_probe(data, gone, LinearRecipe())


def test_regularisation_is_chosen_on_the_validation_split_not_on_the_test_set():
    train, test = blobs(120, dim=60, spread=2.0, noise=0.2), blobs(400, dim=60, spread=2.0, seed=1)
    recipe = LinearRecipe(regularisation=(1e-6, 1e-3, 1e-1, 1.0, 100.0), validation_fraction=0.3)
    scores = linear_probe(train, test, recipe)
    assert set(scores.validation) == {1e-6, 1e-3, 1e-1, 1.0, 100.0}
    assert scores.validation[scores.regularisation] == max(scores.validation.values())
    assert (
        scores.validation[1e-6] < 0.9
    )  # on what was fitted it would be 1: 60 dimensions separate 84 samples
    # Relabelling the test set changes the score and nothing else.
    permuted = Features(x=test.x, y=(test.y + 1) % 3, keys=test.keys, classes=test.classes)
    other = linear_probe(train, permuted, recipe)
    assert other.validation == scores.validation
    assert other.regularisation == scores.regularisation
    assert other.top1 != scores.top1
    assert scores.metrics()["top1"] == scores.top1


def test_a_best_value_at_the_edge_is_warned_about(caplog):
    train = blobs(200, dim=60, spread=3.0)
    with caplog.at_level(logging.WARNING):
        scores = linear_probe(train, train, LinearRecipe(regularisation=(1e-3, 1e3), max_iterations=50))
    assert scores.at_edge
    assert "at the edge of the grid" in caplog.text


def test_scale_and_offset_of_features_do_not_matter():
    train, test = blobs(200), blobs(100, seed=1)
    stretch = torch.tensor([1e-3, 1.0, 1e3, 10.0, 0.1])
    moved = [
        Features(x=part.x * stretch + 7 * stretch, y=part.y, keys=part.keys, classes=part.classes)
        for part in (train, test)
    ]
    recipe = LinearRecipe(regularisation=(1e-2,))
    assert linear_probe(*moved, recipe).top1 == pytest.approx(
        linear_probe(train, test, recipe).top1, abs=0.011
    )


def test_a_constant_feature_becomes_zero():
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    scaled = Standardiser.of(Rows(x=x, y=torch.zeros(3, dtype=torch.int64)))(x)
    assert torch.equal(scaled[:, 1], torch.zeros(3))
    torch.testing.assert_close(scaled[:, 0].square().mean(), torch.tensor(1.0))


def test_split_is_stratified_disjoint_and_reproducible():
    y = torch.tensor([0] * 50 + [1] * 10 + [2])
    fitted, held_out = split_validation(y, 0.2, 0)
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(61))
    assert y[held_out].bincount(minlength=3).tolist() == [10, 2, 0]
    again = split_validation(y, 0.2, 0)
    assert torch.equal(again[0], fitted)
    assert torch.equal(again[1], held_out)
    assert not torch.equal(split_validation(y, 0.2, 1)[1], held_out)


def test_one_sample_per_class_is_a_clear_error():
    with pytest.raises(UserError, match="at least two training samples"):
        split_validation(torch.tensor([0, 1, 2]), 0.1, 0)
