"""Heads side by side are what each would be alone; the head is chosen without the test set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import UserError
from pipeline.recipe.transfer import LinearSgdRecipe
from pipeline.transfer import rows as module
from pipeline.transfer.features import Features
from pipeline.transfer.linear_sgd import Setting, linear_sgd, train_heads
from pipeline.transfer.rows import Rows, in_batches

RECIPE = LinearSgdRecipe(
    rates=(0.02, 0.5), batch_size=16, epochs=3, milestones=(0.5,), weight_decay=0.01, validation_fraction=0.2
)


def blobs(samples: int, seed: int = 0, classes: int = 3, dim: int = 5) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=generator)
    x = 3 + 2 * centres[y] + torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return Features(x=x, y=y, keys=torch.arange(samples), classes=tuple("abc"[:classes]))


def batches_of(rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(RECIPE.seed)
    return [batch for _ in range(RECIPE.epochs) for batch in in_batches(rows, RECIPE.batch_size, generator)]


def by_hand(rows: Rows, peak: float) -> tuple[np.ndarray, np.ndarray]:
    """SGD with Nesterov momentum, written out."""
    weights, bias = np.zeros((3, 5)), np.zeros(3)
    speeds = [np.zeros_like(weights), np.zeros_like(bias)]
    batches = batches_of(rows)
    for step, (x, y) in enumerate(batches):
        rate = peak * (0.1 if step >= len(batches) / 2 else 1)
        logits = x.numpy() @ weights.T + bias
        off = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y.numpy()]
        off /= len(y)
        for values, speed, slope in zip(
            (weights, bias), speeds, (off.T @ x.numpy(), off.sum(0)), strict=True
        ):
            decayed = slope + RECIPE.weight_decay * values
            speed[:] = RECIPE.momentum * speed + decayed
            values[:] -= rate * (decayed + RECIPE.momentum * speed)
    return weights, bias


def alone(rows: Rows, peak: float) -> nn.Sequential:
    """A head with BatchNorm, by torch's SGD with its own scheduler."""
    head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    nn.init.zeros_(head[1].weight), nn.init.zeros_(head[1].bias)
    optimizer = torch.optim.SGD(
        [{"params": head[0].parameters(), "weight_decay": 0.0}, {"params": head[1].parameters()}],
        lr=peak,
        momentum=RECIPE.momentum,
        nesterov=True,
        weight_decay=RECIPE.weight_decay,
    )
    batches = batches_of(rows)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [len(batches) // 2 + len(batches) % 2])
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def test_each_head_is_what_it_would_be_alone() -> None:
    data = blobs(100)
    rows = Rows(x=data.x, y=data.y)
    settings = [Setting(rate, norm) for rate in (0.02, 0.5, 1e9) for norm in (True, False)]  # one diverges
    heads = dict(zip(settings, train_heads(rows, 3, settings, RECIPE), strict=True))
    for rate in (0.02, 0.5):
        peak = rate * 16 / 256
        weights, bias = by_hand(rows, peak)
        plain, normed = heads[Setting(rate, False)], heads[Setting(rate, True)]
        np.testing.assert_allclose(plain[0].weight.detach().numpy(), weights, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(plain[0].bias.detach().numpy(), bias, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(
            normed.state_dict(), alone(rows, peak).state_dict(), rtol=1e-10, atol=1e-13
        )


def test_the_head_is_chosen_on_training_images_alone() -> None:
    train, test = blobs(300), blobs(200, seed=1)
    scores = linear_sgd(train, test, RECIPE)
    shuffled = linear_sgd(train, replace(test, y=test.y.flip(0)), RECIPE)
    assert scores.top1 > 0.8 > shuffled.top1
    assert (shuffled.chosen, shuffled.validation) == (scores.chosen, scores.validation)
    assert scores.chosen == max(scores.validation, key=lambda setting: scores.validation[setting])
    metrics = scores.metrics()
    assert {name for name in metrics if name.startswith("validation_")} == {
        f"validation_{norm}_{rate}" for norm in ("plain", "batch_norm") for rate in ("0.02", "0.5")
    }
    assert metrics["top1_low"] < metrics["top1"] < metrics["top1_high"]


def test_a_head_that_diverges_is_not_chosen() -> None:
    recipe = RECIPE.model_copy(update={"rates": (0.5, 1e300), "batch_norm": (False,)})
    scores = linear_sgd(blobs(300), blobs(100, seed=1), recipe)
    assert scores.chosen == Setting(0.5, False)
    assert scores.validation[Setting(1e300, False)] == 0


@pytest.mark.parametrize("held", [1 << 9, 1 << 20])
def test_batches_show_each_row_once_in_another_order_each_time(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", held)
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    x = torch.arange(150.0)[:, None].half()
    kept = torch.arange(150) % 3 > 0
    rows = Rows(x=x, y=torch.arange(150), kept=kept)
    generator = torch.Generator().manual_seed(0)
    first, second = (list(in_batches(rows, 32, generator)) for _ in range(2))
    for batches in (first, second):
        shown = torch.cat([y for _, y in batches])
        assert [len(y) for _, y in batches] == [32, 32, 32]  # of 100
        assert kept[shown].all() and len(shown.unique()) == 96
        assert torch.equal(torch.cat([x for x, _ in batches])[:, 0], shown.float())
    assert not torch.equal(first[0][1], second[0][1])
    [(_, few)] = in_batches(rows, 128, generator)
    assert torch.equal(few.sort().values, torch.arange(150)[kept])


def test_features_that_are_not_finite_are_refused() -> None:
    data = blobs(50)
    data.x[3, 1] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        linear_sgd(data, data, RECIPE)
