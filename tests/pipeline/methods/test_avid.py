"""AVID's loss and bank: the equations, the negatives, and what a step leaves behind."""

from __future__ import annotations

from typing import Any

import avid_reference as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import UserError
from pipeline.data.batch import Inputs
from pipeline.methods.avid import AVIDMethod, both_ways, mean_exponential, scores
from pipeline.methods.bank import AUDIO, VIDEO, Bank, draw_negatives
from pipeline.models.audio_convnet import AudioConvNet
from pipeline.models.r2plus1d import R2Plus1D
from pipeline.parallel.initialize import initialize
from pipeline.recipe.method import AVID

SAMPLES, DIM, BATCH = 40, 8, 4
HEAD = {"hidden": [8], "output": DIM, "batch_norm": False}


def directions(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("loss", ["nce", "softmax"])
@pytest.mark.parametrize("across", [True, False])
def test_T5_a_comparison_equals_the_equation(loss: Any, across: bool) -> None:
    v, a = directions(BATCH, DIM), directions(BATCH, DIM, seed=1)
    positives, negatives = directions(BATCH, 3, 2, DIM, seed=2), directions(BATCH, 5, 2, DIM, seed=3)
    z, temperature = 1.7, 0.2
    found = both_ways(
        v, a, positives, negatives, across=across, loss=loss, temperature=temperature, log_z=np.log(z)
    )
    of_one = {"nce": reference.nce, "softmax": reference.softmax}[loss]
    p, n = positives.numpy(), negatives.numpy()
    keys = (AUDIO, VIDEO) if across else (VIDEO, AUDIO)
    expected = np.mean(
        [
            (
                of_one(v[i].numpy(), p[i, :, keys[0]], n[i, :, keys[0]], temperature=temperature, z=z)
                + of_one(a[i].numpy(), p[i, :, keys[1]], n[i, :, keys[1]], temperature=temperature, z=z)
            )
            / 2
            for i in range(BATCH)
        ]
    )
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_T5_no_score_overflows() -> None:
    """e^(1 / 0.07) is beyond float16, and e^(1 / 0.005) beyond float32: the loss is not."""
    v = directions(2, DIM).float()
    rows = v[:, None, None].expand(2, 3, 2, DIM)
    found = both_ways(v, v, rows, rows, across=True, loss="nce", temperature=0.005, log_z=0.8)
    assert torch.isfinite(found) and float(found) == pytest.approx(3 * (200 - np.log(3) - 0.8), rel=1e-4)


def test_Z_is_the_mean_of_the_exponentials() -> None:
    unlike = directions(BATCH, 6, DIM)[..., 0]
    expected = np.exp(unlike.numpy() / 0.3).mean()
    assert float(mean_exponential(unlike, temperature=0.3)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(2, 300),
    wanted=st.integers(1, 300),
    positives=st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_negatives_are_distinct_and_never_the_sample_or_its_positives(
    samples: int, wanted: int, positives: int, seed: int
) -> None:
    positives = min(positives, samples - 2)
    count = min(wanted, samples - 1 - positives)
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, samples, 5)
    chosen = np.stack(
        [rng.choice(np.delete(np.arange(samples), here), positives, replace=False) for here in positions]
    )
    drawn = draw_negatives(positions, chosen, samples=samples, count=count, seed=seed, number=7)
    assert drawn.shape == (5, count)
    for here, taken, others in zip(positions, chosen, drawn, strict=True):
        assert len(set(others)) == count and others.min() >= 0 and others.max() < samples
        assert not set(others) & {here, *taken}
    again = draw_negatives(positions[2:3], chosen[2:3], samples=samples, count=count, seed=seed, number=7)
    np.testing.assert_array_equal(again[0], drawn[2])


def test_every_other_sample_is_drawn_as_often_as_any() -> None:
    positions = np.arange(SAMPLES)
    counts = np.zeros(SAMPLES)  # by how far they are from the sample
    for number in range(200):
        others = (positions[:, None] + 3) % SAMPLES
        drawn = draw_negatives(positions, others, samples=SAMPLES, count=5, seed=0, number=number)
        np.add.at(counts, (drawn - positions[:, None]) % SAMPLES, 1)
    assert counts[0] == counts[3] == 0
    expected = 200 * SAMPLES * 5 / (SAMPLES - 2)
    assert np.abs(np.delete(counts, [0, 3]) - expected).max() < 5 * np.sqrt(expected)


def test_a_bank_is_drawn_row_by_row() -> None:
    whole = Bank(9000, DIM, dtype=torch.float32, group=None)
    whole.draw("1/bank")
    other = Bank(5000, DIM, dtype=torch.float32, group=None)
    other.draw("1/bank")
    assert torch.equal(whole.rows[:5000], other.rows)
    other.draw("2/bank")
    assert not torch.equal(whole.rows[0], other.rows[0])
    torch.testing.assert_close(whole.rows.norm(dim=-1), torch.ones(9000, 2))
    assert whole.rows.mean(0).abs().max() < 0.05


def test_a_bank_stays_in_its_own_type() -> None:
    bank = Bank(10, DIM, dtype=torch.float16, group=None)
    torch.nn.Sequential(bank).to(torch.float64)
    assert bank.rows.dtype == torch.float16
    bank.draw("")
    assert bank.fetch(torch.tensor([3, 1])).dtype == torch.float32


def test_of_a_row_that_is_seen_twice_the_last_counts() -> None:
    bank = Bank(6, DIM, dtype=torch.float64, group=None)
    bank.draw("")
    before = bank.rows.clone()
    first, second = directions(3, 2, DIM, seed=4), directions(2, 2, DIM, seed=5)
    bank.update([(torch.tensor([4, 1, 4]), first), (torch.tensor([1, 0]), second)], momentum=0.25)
    expected = before.clone()
    for row, seen in ((4, first[2]), (1, second[0]), (0, second[1])):
        expected[row] = F.normalize(0.25 * before[row] + 0.75 * seen, dim=-1)
    torch.testing.assert_close(bank.rows, expected, rtol=0, atol=1e-15)


def make(**changes: Any) -> AVIDMethod:
    section = AVID.model_validate({"name": "avid", "head": HEAD, "negatives": 6} | changes)
    trunks = R2Plus1D(10, width=2), AudioConvNet(width=2)
    method = AVIDMethod(
        *trunks,
        section,
        feature_dim=16,
        audio_feature_dim=16,
        batch_size=BATCH,
        samples=SAMPLES,
        seed=0,
        group=None,
    ).double()
    initialize(method, seed=0)
    return method


def batch(number: int) -> Inputs:
    rng = np.random.default_rng(number)
    return Inputs(
        views={
            "clip": torch.from_numpy(rng.normal(size=(BATCH, 3, 2, 16, 16))),
            "audio": torch.from_numpy(rng.normal(size=(BATCH, 1, 16, 17))),
        },
        number=number,
        positions=torch.from_numpy(rng.choice(SAMPLES, BATCH, replace=False)),
    )


def test_the_loss_weighs_its_terms() -> None:
    cma = {"positives": 2, "weight": 3.0, "within_negatives": 4}
    method = make(cross_weight=1.0, within_weight=0.5, log_z=0.7, cma=cma)
    method.positives = torch.arange(SAMPLES).add(1).remainder(SAMPLES)[:, None].repeat(1, 2)
    method.positives[:, 1] = (method.positives[:, 1] + 1) % SAMPLES
    inputs = batch(0)
    terms = method(inputs, 0)
    weighted = terms["cross"] + 0.5 * terms["within"] + 3 * terms["agreeing"]
    torch.testing.assert_close(terms["loss"], weighted / 4.5)
    own, positives, negatives = method.recall(inputs)
    assert inputs.positions is not None
    positives, negatives = positives.double(), negatives.double()
    torch.testing.assert_close(positives[:, 1].float(), method.bank.rows[(inputs.positions + 2) % SAMPLES])
    torch.testing.assert_close(own, method.bank.rows[inputs.positions])
    v = F.normalize(method.head(method.trunk(inputs.views["clip"])), dim=1)
    a = F.normalize(method.audio_head(method.audio_trunk(inputs.views["audio"])), dim=1)
    expected = both_ways(
        v, a, positives, negatives[:, :4], across=False, loss="nce", temperature=0.07, log_z=0.7
    )
    torch.testing.assert_close(terms["agreeing"], expected.detach(), check_dtype=False)


def test_a_forward_pass_leaves_the_bank_alone_and_a_skipped_step_too() -> None:
    method = make()
    before = {name: each.clone() for name, each in method.bank.state_dict().items()}
    method(batch(0), 0)
    method(batch(1), 1)  # step 0 was skipped
    assert torch.equal(method.bank.rows, before["rows"]) and float(method.normaliser) == 0
    method.after_step(1)
    seen = batch(1).positions
    changed = (method.bank.rows != before["rows"]).flatten(1).any(1)
    assert seen is not None and set(changed.nonzero()[:, 0].tolist()) == set(seen.tolist())
    method.eval()(batch(2), 2)
    after = method.bank.rows.clone()
    method.after_step(2)
    assert torch.equal(method.bank.rows, after)


def test_Z_is_that_of_the_first_step_that_is_done_and_stays() -> None:
    method = make()
    first = batch(5)
    terms = method(first, 0)
    negatives = method.recall(first).negatives[..., AUDIO, :].double()
    v = terms["embedding"]
    z = mean_exponential(scores(v, negatives), temperature=0.07)
    method(batch(6), 0)  # a second micro-batch goes by the first one's
    method.after_step(0)
    torch.testing.assert_close(method.normaliser, z)
    method(batch(7), 1)
    method.after_step(1)
    torch.testing.assert_close(method.normaliser, z)
    assert method._normalised  # no step waits for the device to say so
    method.forget_batches()
    assert not method._normalised  # a checkpoint may be from before


def test_a_dataset_with_too_few_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"with 40 others, and the dataset has 40: lower method\.negatives"):
        make(negatives=40)
