"""A part of a dataset, drawn in a graph, and the stages that are given it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_classification import recipe_of
from tiny_training import make_dataset

from cluster.errors import UserError
from cluster.job import Resources
from ingest.dataset.open import open_dataset
from ingest.dataset.view import write_view
from pipeline.dag.ensure import ensure
from pipeline.dag.stage import Input, Origin, Stage, Work
from pipeline.recipe.stages import DatasetRecipe, DedupRecipe, SubsetRecipe
from pipeline.stages.inputs import opened
from pipeline.stages.kinds import KINDS
from pipeline.stages.training import train_job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def stages(root: Path, data: Path, **recipe: Any) -> Stage:
    whole = Stage(
        name="train",
        kind_name="dataset",
        kind=KINDS["dataset"],
        recipe=DatasetRecipe(path=str(data)),
        inputs={},
        root=root,
    )
    return Stage(
        name="few",
        kind_name="subset",
        kind=KINDS["subset"],
        recipe=SubsetRecipe.model_validate(recipe | {"run": {"workers": 1}}),
        inputs={"data": Origin(stage=whole, path="data")},
        root=root,
    )


def made(stage: Stage) -> Input:
    return Input(path=stage.folder / "data", receipt=ensure(stage, None).receipt)  # type: ignore[arg-type]


def test_a_subset_is_a_view_and_leaves_the_dataset_alone(tmp_path: Path, data: Path) -> None:
    before = sorted(data.rglob("*"))
    few = made(stages(tmp_path, data, per_label=3, seed=1))
    assert len(opened(few)) == few.receipt.metrics["kept"] == 12
    assert sorted(data.rglob("*")) == before
    assert opened(few).read_shard(0, 0, 512)


def test_a_subset_of_a_subset(tmp_path: Path, data: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{number:04d}.png\n" for number in range(20)))
    listed = stages(tmp_path, data, keep=str(tmp_path / "list.txt"))
    assert made(listed).receipt.metrics["list_lines_unmatched"] == 0
    few = replace(stages(tmp_path, data, per_label=2), inputs={"data": Origin(stage=listed, path="data")})
    assert set(opened(made(few)).unit_keys(0)) < set(opened(made(listed)).unit_keys(0))
    assert len(opened(made(few))) == 8


def test_a_view_that_is_there_is_a_part_of_its_own_and_may_have_parts(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    whole = stages(tmp_path, data, per_label=2).inputs["data"].stage
    opened_whole = open_dataset(data)
    counts = zip(opened_whole.units.tolist(), opened_whole.counts.tolist(), strict=True)
    keeps = {unit: np.arange(count) < 8 for unit, count in counts}
    write_view(data, "first", root=opened_whole.root, keeps=keeps)
    first = replace(whole, recipe=DatasetRecipe(path=str(data), view="first"))
    assert first.key != whole.key
    assert len(opened(made(first))) == 24
    few = replace(stages(tmp_path, data, per_label=2), inputs={"data": Origin(stage=first, path="data")})
    assert set(opened(made(few)).unit_keys(0)) < set(opened(made(first)).unit_keys(0))


def test_a_training_sees_the_subset_and_no_view_of_its_recipe_with_it(tmp_path: Path, data: Path) -> None:
    few = made(stages(tmp_path, data, per_label=3))

    def job(**changes: Any) -> Work:
        return Work(recipe=recipe_of(data, {}, **changes), inputs={"data": few}, folder=tmp_path / "run")

    trained = train_job(job(), Resources()).arguments["recipe"]
    assert trained["data"]["view"] == few.receipt.metrics["view"]
    with pytest.raises(UserError, match=r"data.view is other and the input `data` is a subset already"):
        train_job(job(data__view="other"), Resources())


def test_duplicates_and_images_of_a_test_set_are_left_out(tmp_path: Path, data: Path) -> None:
    few = stages(tmp_path, data, per_label=3)
    whole = few.inputs["data"]
    half = make_dataset(tmp_path / "half", images=48)  # the first of them
    test = replace(whole.stage, name="test", recipe=DatasetRecipe(path=str(half)))

    def clean(**inputs: Origin) -> Stage:
        recipe = DedupRecipe.model_validate({"hamming": None, "run": {"workers": 1}})
        return Stage(
            name="clean",
            kind_name="dedup",
            kind=KINDS["dedup"],
            recipe=recipe,
            inputs={"data": whole, **inputs},
            root=tmp_path,
        )

    assert made(clean()).receipt.metrics["kept"] == 96  # each is another
    without = made(clean(against=Origin(stage=test, path="data"))).receipt.metrics
    assert (without["kept"], without["of_evaluation"]) == (48, 48)
    part = made(replace(clean(), inputs={"data": Origin(stage=few, path="data")}))
    assert set(opened(part).unit_keys(0)) == set(opened(made(few)).unit_keys(0))


def test_a_subset_of_nothing_is_told(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="a subset needs per_label"):
        made(stages(tmp_path, data))
    with pytest.raises(UserError, match=r"list .*/none.txt is not there"):
        made(stages(tmp_path, data, keep=str(tmp_path / "none.txt")))
    (tmp_path / "list.txt").write_text("none.png\n")
    with pytest.raises(UserError, match=r"nothing of .* is in the subset"):
        made(stages(tmp_path, data, keep=str(tmp_path / "list.txt")))
