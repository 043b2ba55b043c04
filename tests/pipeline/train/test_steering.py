"""A run that goes on otherwise than it began: what may change, what is told of it, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_recipe

from cluster.errors import UserError
from pipeline.dag.stage import stage_key
from pipeline.recipe.pretrain import STEERING, PretrainRecipe, Train
from pipeline.train.run_recipe import adopt
from pipeline.train.steering import check_may_go_on, differences, read_changes

PROBE = {"train": "a", "test": "b", "every_steps": 4, "image_size": 16}
# Whatever may change, with another value than the recipe of these tests has.
MAY: dict[str, Any] = {
    "run__log_every": 7,
    "run__workers": 3,
    "probe": PROBE,
    "train__strategy": "fsdp2",
    "train__activation_checkpointing": "full",
    "train__compile": True,
    "train__max_skipped_steps": 9,
    "train__max_rollbacks": 5,
    "train__spike_deviations": 40.0,
}
MAY_NOT: dict[str, Any] = {
    "seed": 2,
    "optim__lr": 0.1,
    "optim__clip_norm": 1.0,
    "train__precision": "bf16",
    "train__accumulate": 2,
    "train__steps": 40,
    "data__batch_size": 6,
    "method__temperature": 0.2,
}


def recipe(**changes: Any) -> PretrainRecipe:
    return make_recipe(Path("/somewhere"), **{"data__sealed": "0" * 64, **changes})


def key_of(of: PretrainRecipe) -> str:
    return stage_key(kind="pretrain", version=1, recipe=of, inputs={}, outside="")


def constant(**changes: Any) -> PretrainRecipe:
    optim = {"name": "larc", "lr": 0.3, "schedule": "constant"}
    return recipe(optim=optim, **changes)


def saved_step(run: Path, step: int) -> Path:
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    return checkpoint


@pytest.mark.parametrize("key", MAY)
def test_what_steers_may_change_is_recorded_and_makes_no_other_stage(key: str, tmp_path: Path) -> None:
    adopt(recipe(), tmp_path)
    saved_step(tmp_path, 5)
    other = recipe(**{key: MAY[key]})
    adopt(other, tmp_path)
    adopt(other, tmp_path)  # which is no change any more
    (change,) = read_changes(tmp_path)
    section, _, name = key.partition("__")
    assert change.step == 5
    assert list(change.settings) == [f"{section}.{name}" if name else section]
    assert key_of(other) == key_of(recipe())
    adopt(recipe(), tmp_path)
    assert len(read_changes(tmp_path)) == 2


def test_every_steering_key_is_a_key_of_train() -> None:
    assert set(STEERING) <= Train.model_fields.keys()


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_changes_the_numbers_is_another_run_and_another_stage(key: str, tmp_path: Path) -> None:
    adopt(recipe(), tmp_path)
    other = recipe(**{key: MAY_NOT[key]})
    with pytest.raises(UserError, match="another recipe"):
        adopt(other, tmp_path)
    assert not read_changes(tmp_path)
    assert key_of(other) != key_of(recipe())


def test_a_dataset_is_its_root_and_not_its_path(tmp_path: Path) -> None:
    adopt(recipe(), tmp_path)
    adopt(recipe(data__root="/moved/there"), tmp_path)
    assert dict(read_changes(tmp_path)[0].settings) == {"data.root": ("/somewhere", "/moved/there")}
    with pytest.raises(UserError, match=r"data\.sealed is '0000"):
        check_may_go_on(recipe(data__sealed="1" * 64), tmp_path)


def test_a_run_at_a_constant_rate_may_be_lengthened_and_not_end_before_it_is(tmp_path: Path) -> None:
    adopt(constant(), tmp_path)
    saved_step(tmp_path, 20)
    adopt(constant(train={"steps": 40}), tmp_path)
    adopt(constant(train={"epochs": 9}), tmp_path)
    assert [list(change.settings) for change in read_changes(tmp_path)] == [
        ["train.steps"],
        ["train.epochs", "train.steps"],
    ]
    with pytest.raises(UserError, match=r"train\.steps is 19, and the run has saved step 20 already"):
        adopt(constant(train={"steps": 19}), tmp_path)
    assert key_of(constant()) != key_of(constant(train={"steps": 40}))


def test_a_teacher_that_stands_still_at_the_end_has_a_length(tmp_path: Path) -> None:
    byol = {"name": "byol", "projector": [8, 8], "predictor": 8}
    adopt(constant(method=byol), tmp_path)
    with pytest.raises(UserError, match=r"train\.steps is 20 there, 40 here"):
        adopt(constant(method=byol, train={"steps": 40}), tmp_path)


def test_a_head_that_learns_first_does_so_for_a_share_of_a_length(tmp_path: Path) -> None:
    classifier: dict[str, Any] = {
        "data__crops": [{"count": 1, "size": 16, "scale": [0.3, 1.0]}],
        "method": {"name": "classification"},
        "optim__head_first": 0.2,
    }
    adopt(constant(**classifier), tmp_path)
    with pytest.raises(UserError, match=r"train\.steps is 20 there, 40 here"):
        adopt(constant(**classifier, train={"steps": 40}), tmp_path)


def test_differences_are_found_at_any_depth() -> None:
    there = {"a": {"b": [1, {"c": 2}], "same": 0}, "gone": 1}
    here = {"a": {"b": [1, {"c": 3}], "same": 0}, "new": 1}
    assert differences(there, here) == {"a.b.1.c": (2, 3), "gone": (1, None), "new": (None, 1)}
    assert differences({"a": [1]}, {"a": [1, 2]}) == {"a": ([1], [1, 2])}
