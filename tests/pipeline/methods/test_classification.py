"""The classifier: its equations, what is mixed, what is averaged, what is frozen, and on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tiny_classification import MIXED, Never, recipe_of, run, world_of
from tiny_training import make_dataset, make_recipe
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.rank.preempt import Preempted
from ingest.dataset.open import open_dataset
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.data.targets import Targets
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.methods.classification import ClassificationMethod, soft_cross_entropy
from pipeline.methods.dropout import dropout
from pipeline.methods.mixing import Mix, draw_mix, mix
from pipeline.models.classifier import Classifier
from pipeline.recipe.method import Classification
from pipeline.train.branch import branch_recipe, parent_of
from pipeline.train.loop import forward_backward, pretrain, steps, train
from pipeline.train.metrics import Stopwatch
from pipeline.train.run_recipe import pin_dataset
from pipeline.train.setup import set_up

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@given(st.data())
def test_the_loss_is_the_cross_entropy_with_shared_labels(data: st.DataObject) -> None:
    rows, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    labels = [data.draw(st.sets(st.integers(0, classes - 1), min_size=1)) for _ in range(rows)]
    logits = np.array(
        data.draw(st.lists(st.floats(-30, 30), min_size=rows * classes, max_size=rows * classes))
    )
    logits = logits.reshape(rows, classes)
    starts = np.cumsum([0, *map(len, labels)])
    targets = Targets(
        codes=torch.tensor([code for of_one in labels for code in sorted(of_one)]),
        starts=torch.from_numpy(starts),
    )
    shares = targets.shares(classes, dtype=torch.float64)
    expected = 0.0
    for row, of_one in enumerate(labels):
        log_sum = np.log(np.exp(logits[row] - logits[row].max()).sum()) + logits[row].max()
        expected -= sum(logits[row, code] - log_sum for code in of_one) / len(of_one) / rows
    assert float(soft_cross_entropy(torch.from_numpy(logits), shares)) == pytest.approx(expected, abs=1e-9)


def test_mixing_blends_or_pastes_the_mirror_image_and_shares_the_labels() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone()
    shares = torch.eye(4)
    drawn = Mix(
        keep=np.array([0.25, 0.9]),
        boxes=np.array([[0, 0, 1, 1], [0.5, 0.25, 1.0, 0.75]]),
        pastes=np.array([False, True]),
    )
    mixed, labels = mix(images, shares, drawn)
    assert torch.allclose(mixed[0], torch.tensor(0.75)) and torch.allclose(mixed[1], torch.tensor(0.25))
    assert labels[0].tolist() == [0.25, 0.75, 0, 0]
    box = torch.zeros(8, 8, dtype=torch.bool)
    box[4:, 2:6] = True
    assert (mixed[2, 0][box] == 3).all() and (mixed[2, 0][~box] == 2).all()
    assert labels[3].tolist() == [0, 0, 0.25, 0.75]  # 16 of 64 pixels are the other's


def test_what_is_mixed_follows_the_beta_distribution_and_the_group_alone() -> None:
    section = Classification(name="classification", mixup=0.3)
    drawn = draw_mix(section, seed=3, number=7, first=0, groups=20_000)
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert drawn.keep.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.keep.var() == pytest.approx(1 / (4 * 1.6), rel=0.03)
    part = draw_mix(section, seed=3, number=7, first=100, groups=5)
    assert (part.keep == drawn.keep[100:105]).all()
    assert (draw_mix(section, seed=3, number=8, first=0, groups=5).keep != drawn.keep[:5]).all()
    both = draw_mix(section.model_copy(update={"cutmix": 1.0}), seed=3, number=7, first=0, groups=20_000)
    assert both.pastes.mean() == pytest.approx(0.5, abs=0.02)


def test_dropout_follows_the_row_of_the_global_batch_alone_and_keeps_the_mean() -> None:
    ones = torch.ones(2_000, 30)
    dropped = dropout(ones, 0.3, seed=3, number=7, first=0)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(dropout(ones[:5], 0.3, seed=3, number=7, first=100), dropped[100:105])
    for seed, number in ((3, 8), (4, 7)):
        assert not torch.equal(dropout(ones, 0.3, seed=seed, number=number, first=0), dropped)
    assert torch.equal(dropout(ones, 0.0, seed=3, number=7, first=0), ones)
    assert dropout(ones.bfloat16(), 0.3, seed=3, number=7, first=0).dtype == torch.float32


def test_T5_a_head_that_learns_first_and_dropout_equal_a_plain_loop(data: Path, tmp_path: Path) -> None:
    """As AVID's fine-tuning has it: first an optimizer for the classifier, then another for all."""
    recipe = recipe_of(
        data,
        {"dropout": 0.5, "head_deviation": 0.1},
        optim={
            "name": "adam",
            "lr": 0.01,
            "schedule": "multistep",
            "milestones": [0.8],
            "weight_decay": 0.1,
            "exclude_bias_and_norm": False,
            "head_first": 0.4,
        },
        train={"steps": 5, "precision": "fp64"},
    )
    training = set_up(recipe, tmp_path, world_of(None))
    assert isinstance(training.method, ClassificationMethod)
    trunk, head = deepcopy(training.method.trunk), deepcopy(training.method.head)
    everything = [*trunk.parameters(), *head.parameters()]
    start = [parameter.detach().clone() for parameter in trunk.parameters()]
    alone = torch.optim.Adam(head.parameters(), lr=0.01, weight_decay=0.1)
    together = torch.optim.Adam(everything, lr=0.01, weight_decay=0.1)
    losses = []
    for step, (batch,) in steps(training, Stopwatch()):
        inputs = training.loader.augment(batch, dtype=torch.float64)
        (images,) = inputs.views.values()
        kept = dropout(torch.ones(12, head.weight.shape[1]), 0.5, seed=recipe.seed, number=step, first=0) > 0
        assert inputs.targets is not None
        loss = nn.functional.cross_entropy(head(trunk(images) * kept / 0.5), inputs.targets.codes)
        losses.append(loss.item())
        optimizer = alone if step < 2 else together
        optimizer.param_groups[0]["lr"] = 0.01 if step < 4 else 0.001
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1:
            assert all(torch.equal(one, other) for one, other in zip(trunk.parameters(), start, strict=True))
    trained = run(recipe, tmp_path).method
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
    expected = Classifier(trunk, head).state_dict()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=name)


class StopAfter:
    """Asks for an end after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.slow
def test_T3_a_head_that_learns_first_goes_on_exactly_on_either_side_of_its_end(
    data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(data, {"dropout": 0.5}, optim__head_first=0.5, train={"steps": 6})
    whole = run(recipe, tmp_path / "whole").method.state_dict()
    for steps_done in (2, 3, 4):
        folder = tmp_path / str(steps_done)
        first = set_up(recipe, folder, world_of(None))
        with pytest.raises(Preempted):
            train(first, StopAfter(steps_done))  # type: ignore[arg-type]
        assert first.metrics is not None
        first.metrics.close()
        resumed = run(recipe, folder).method.state_dict()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items()), steps_done


def test_a_branch_does_not_go_back_to_the_head_alone_and_the_remedy_is_accepted(
    data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(data, {}, optim__head_first=0.5, train={"steps": 4})
    pretrain(pin_dataset(recipe, tmp_path / "run"), tmp_path / "run")
    checkpoint = latest(tmp_path / "run")
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"00004 lies between: give optim\.head_first=0\.166") as refused:
        parent_of(checkpoint, branch_recipe(checkpoint, ["train.steps=12"]))
    remedy = str(refused.value).rpartition(" ")[2]
    assert parent_of(checkpoint, branch_recipe(checkpoint, ["train.steps=12", remedy])).step == 4


def test_a_method_without_a_head_is_not_to_begin_with_one(data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"optim\.head_first is for a classifier, and method swav makes none"
    ):
        make_recipe(data, optim__head_first=0.5)


def _gradients(
    group: dist.ProcessGroup | None, data: Path, folder: Path, sections: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        recipe = recipe_of(
            data,
            MIXED | {"head_deviation": 0.1},
            train={"steps": 20, "accumulate": 2, "precision": "fp64", "sync_bn_samples": 6} | section,
        )
        t = set_up(recipe, folder / name, world_of(group))
        step, batches = next(steps(t, Stopwatch()))
        terms, _ = forward_backward(t, batches, step)
        found[name] = {"loss": float(terms["loss"]), "train_top1": float(terms["train_top1"])}
        for tensor_name, tensor in named_tensors(t.method):
            if tensor.grad is not None:
                found[name][tensor_name] = whole(tensor.grad, tensor).numpy()
            elif "running" in tensor_name:
                found[name][tensor_name] = tensor.numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_T1_mixed_batches_give_the_same_gradients_on_any_number_of_ranks(
    data: Path, tmp_path: Path, run_on_ranks: Ranks, ranks: int
) -> None:
    alone = _gradients(None, data, tmp_path / "alone", {"ddp": {}})["ddp"]
    trains: dict[str, dict[str, Any]] = {
        "ddp": {},
        "fsdp2": {"strategy": "fsdp2", "activation_checkpointing": "full"},
    }
    if ranks == 3:  # groups of 6 do not fit 3 ranks of 4 rows
        trains = {name: section | {"sync_bn_samples": 12} for name, section in trains.items()}
        alone = _gradients(None, data, tmp_path / "whole", {"ddp": {"sync_bn_samples": 12}})["ddp"]
    for found in run_on_ranks(ranks, _gradients, data, tmp_path / "ranks", trains):
        for name, values in found.items():
            assert values.keys() == alone.keys()
            for key, value in values.items():
                scale = np.abs(alone[key]).max()
                assert np.abs(value - alone[key]).max() <= 1e-10 * scale, (name, key)


def _stepwise(group: dist.ProcessGroup | None, data: Path, folder: Path, section: dict[str, Any]) -> None:
    train = {"steps": 5, "precision": "fp64"} | section
    run(recipe_of(data, MIXED, optim__head_first=0.4, train=train), folder, group)


@pytest.mark.slow
def test_T1_the_average_is_that_of_one_rank_and_equals_the_sum_of_its_past(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    recipe = recipe_of(
        data,
        MIXED,
        optim__head_first=0.4,
        train={"steps": 5, "precision": "fp64"},
        run__checkpoint_every_steps=1,
        run__keep_last=20,
    )
    run(recipe, tmp_path / "alone")
    expected: dict[str, Tensor] = {}
    for step in range(1, 6):
        (folder,) = (tmp_path / "alone" / "checkpoints").glob(f"step-*{step:06d}")
        tensors = read_tensors(folder, prefix="")
        now = {name: each.double() for name, each in tensors.items() if name.startswith(("trunk.", "head."))}
        keep = 0.9 if step > 1 else 0.0  # for a fifth of five steps it follows at once
        expected = {name: keep * expected.get(name, each) + (1 - keep) * each for name, each in now.items()}
        for name, value in expected.items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(tensors[f"average.{name}"], value, rtol=1e-12, atol=1e-12)
    for strategy in ("ddp", "fsdp2"):
        run_on_ranks(2, _stepwise, data, tmp_path / strategy, {"strategy": strategy})
        found = read_tensors(latest(tmp_path / strategy) or Path(), prefix="average.")
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), tensors[f"average.{name}"].double(), rtol=1e-9, atol=1e-9
            )


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["trunk", "batch_norm"])
def test_what_is_frozen_stays_to_the_byte(data: Path, tmp_path: Path, freeze: str) -> None:
    recipe = recipe_of(
        data, {"freeze": freeze}, train={"steps": 4}, run__checkpoint_every_steps=1, run__keep_last=9
    )
    training = set_up(recipe, tmp_path, world_of(None))
    before = {name: tensor.detach().clone() for name, tensor in training.method.named_parameters()}
    before |= {name: tensor.clone() for name, tensor in training.method.named_buffers()}
    train(training, Never())  # type: ignore[arg-type]
    assert training.metrics is not None
    training.metrics.close()
    after = {**dict(training.method.named_parameters()), **dict(training.method.named_buffers())}
    moved = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    trunk = training.method.trunk
    norms = {
        f"trunk.{name}.{tensor}"
        for name, layer in trunk.named_modules()
        if getattr(layer, "running_mean", None) is not None
        for tensor in (*dict(layer.named_parameters()), *dict(layer.named_buffers()))
    }
    frozen = norms if freeze == "batch_norm" else {name for name in after if name.startswith("trunk.")}
    assert norms and {"head.weight", "head.bias"} <= moved and not moved & frozen
    assert freeze == "trunk" or any(name.endswith("conv.weight") for name in moved)


def test_it_learns_and_says_how_well_but_nothing_of_a_collapse(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, {}, train={"steps": 60}, run__checkpoint_every_steps=100)
    pretrain(recipe, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(np.log(4), abs=1e-5)  # the head starts at zero
    assert np.mean([row["train_top1"] for row in rows[-10:]]) > 0.9
    assert not {"embedding_std", "rankme"} & rows[-1].keys()


def test_the_head_has_a_rate_of_its_own(data: Path, tmp_path: Path) -> None:
    training = set_up(recipe_of(data, {}), tmp_path, world_of(None))
    rates = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in training.method.named_parameters()}
    assert {rate for name, rate in named.items() if name.startswith("head.")} == {0.2}
    assert {rate for name, rate in named.items() if name.startswith("trunk.")} == {0.05}
    assert training.metrics is not None
    training.metrics.close()


def test_substitutes_bring_their_own_label(data: Path, tmp_path: Path) -> None:
    training = set_up(recipe_of(data, {}), tmp_path, world_of(None))
    dataset = open_dataset(data)
    keys, codes = [], []
    for unit in range(len(dataset.units)):
        labels = dataset.unit_labels(unit)
        keys += dataset.unit_keys(unit).tolist()
        codes += [int(labels.of(row)[0]) for row in range(len(labels))]
    label_of = dict(zip(keys, codes, strict=True))
    bad = training.loader.locate(0)[2]
    seen = training.loader._batches
    read = type(seen)._read_and_cut

    def spoil(self: Any, place: tuple[int, int], *rest: Any) -> None:
        if place == bad:
            from pipeline.data.reader import BadSampleError

            raise BadSampleError("broken on purpose")
        read(self, place, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(seen), "_read_and_cut", spoil)
        _, batch = next(training.loader.from_step(0))
    assert batch.targets is not None
    assert batch.targets.codes.tolist() == [label_of[key] for key in batch.keys.tolist()]
    assert training.metrics is not None
    training.metrics.close()


def test_classes_are_counted_from_the_data(data: Path, tmp_path: Path) -> None:
    assert isinstance(section := pin_dataset(recipe_of(data, {}), tmp_path).method, Classification)
    assert section.classes == 4
    with pytest.raises(UserError, match=r"method\.classes is 5, and .* has 4 labels: leave it out"):
        pin_dataset(recipe_of(data, {"classes": 5}), tmp_path)
    one = make_dataset(tmp_path / "one", images=12, classes=1)
    with pytest.raises(UserError, match=r"has 1 labels, and method classification needs two at least"):
        pin_dataset(recipe_of(one, {}), tmp_path)


def test_batches_that_cannot_be_mixed_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mix_rows 5 does not divide the 12 images of a rank"):
        set_up(recipe_of(data, {"mixup": 0.1, "mix_rows": 5}), tmp_path, world_of(None))
    twice = recipe_of(data, {}, data__window=32)
    twice = twice.model_copy(update={"data": twice.data.model_copy(update={"crops": twice.data.crops * 2})})
    with pytest.raises(UserError, match=r"is shown one crop of an image, and data\.crops gives 2"):
        set_up(twice, tmp_path, world_of(None))


def test_a_trunk_without_batch_norm_can_be_frozen() -> None:
    from pipeline.methods.classification import _batch_norms

    assert _batch_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == []
