"""Trainings whose labels are tags."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from captioned import CLASSES, captioned
from tiny_classification import CROP, recipe_of, run, world_of
from tiny_training import make_recipe

from cluster.errors import UserError
from cluster.job import Resources
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.dataset.view import write_view
from ingest.plan.settings import CrawlSettings
from pipeline.dag.stage import Input, Receipt, Work
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.data.tags import Tags, open_tags
from pipeline.recipe.data import Data
from pipeline.recipe.stages import HashtagsRecipe
from pipeline.stages.data import hashtags
from pipeline.stages.training import train_job
from pipeline.train.loop import Stopwatch, forward_backward, steps
from pipeline.train.run_recipe import pin_dataset
from pipeline.train.setup import set_up

Made = Callable[..., Tags]
Ranks = Callable[..., list[Any]]
CROPS = [{"count": 1, "size": 8, "scale": [0.3, 1.0]}]
FOUR_BLOCKS = {"name": "regnety_tiny", "stem": "low_resolution"}  # they learn lies, too; two see through them


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, made: Made) -> tuple[Path, Tags]:
    """Images of which about half have two tags: what their captions say, and what is true."""
    folder = tmp_path_factory.mktemp("mixed")
    data = captioned(folder, noise=0.5, silent=4)
    whole = open_dataset(data)
    tags = made(whole, folder / "tags", read=("caption", "labels"))
    assert {len(codes) for codes in told(data, tags).values()} == {1, 2}
    return data, tags


def told(data: Path, tags: Tags) -> dict[int, list[int]]:
    """The tags of each image that has any, by its key."""
    seen = open_dataset(data).through(tags.tagged)
    of_units = [(seen.unit_keys(unit), tags.unit_labels(seen, unit)) for unit in range(len(seen.units))]
    return {int(key): labels.of(row).tolist() for keys, labels in of_units for row, key in enumerate(keys)}


def loader(root: Path, tags: Tags, *, rank: int = 0, ranks: int = 1, **values: Any) -> Loader:
    data = {"root": str(root), "tags": str(tags.folder), "batch_size": 12, "window": 8, "crops": CROPS}
    return Loader(
        Data.model_validate(data | values),
        seed=3,
        rank=rank,
        world_size=ranks,
        workers=0,
        device=torch.device("cpu"),
        targets=True,
    )


def targets_of(batch: Batch) -> list[list[int]]:
    assert batch.targets is not None
    starts, codes = batch.targets.starts.tolist(), batch.targets.codes.tolist()
    return [codes[first:end] for first, end in pairwise(starts)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_L1_batches_have_the_tagged_images_and_their_tags_on_any_number_of_ranks(
    dataset: Path, tmp_path: Path, made: Made, ranks: int
) -> None:
    tags = made(open_dataset(dataset), tmp_path, max_tags=3)
    of_key = told(dataset, tags)
    whole = loader(dataset, tags)
    assert len(whole.dataset) == tags.vocabulary.tagged == 39
    seen = set()
    parts = [loader(dataset, tags, rank=rank, ranks=ranks).from_step(0) for rank in range(ranks)]
    for (_, batch), *of_ranks in islice(zip(whole.from_step(0), *parts, strict=True), 6):
        keys = batch.keys.tolist()
        seen |= set(keys)
        assert targets_of(batch) == [of_key[key] for key in keys]
        assert [key for _, part in of_ranks for key in part.keys.tolist()] == keys
        assert [codes for _, part in of_ranks for codes in targets_of(part)] == targets_of(batch)
    assert seen <= of_key.keys()
    assert len(seen) > 30


def test_of_a_view_and_tags_what_both_have_is_read(dataset: Path, tmp_path: Path, made: Made) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    whole = open_dataset(data)
    tags = made(whole, tmp_path / "tags")
    keeps = {
        int(unit): np.arange(count) % 3 > 0 for unit, count in zip(whole.units, whole.counts, strict=True)
    }
    write_view(data, "some", root=whole.root, keeps=keeps)
    view = open_dataset(data, view="some")
    wanted = {int(key) for unit in range(len(view.units)) for key in view.unit_keys(unit)}
    both = loader(data, tags, view="some")
    found = {int(key) for unit in range(len(both.dataset.units)) for key in both.dataset.unit_keys(unit)}
    assert found == wanted & told(data, tags).keys()
    _, batch = next(both.from_step(0))
    assert targets_of(batch) == [told(data, tags)[key] for key in batch.keys.tolist()]
    assert both.dataset.view is not None
    assert both.dataset.view.digest not in (view.view and view.view.digest, tags.sha256)


def test_a_training_learns_its_tags_and_goes_on_with_no_others(
    dataset: Path, tmp_path: Path, made: Made
) -> None:
    tags = made(open_dataset(dataset), tmp_path / "tags")
    recipe = recipe_of(dataset, {}, data__tags=str(tags.folder))
    pinned = pin_dataset(recipe, tmp_path / "run")
    assert pinned.method.classes == 4  # type: ignore[union-attr]
    training = run(pinned, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == list(tags.names)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_top1"] > 0.7 > rows[0]["train_top1"]
    assert training.loader.state()["tags"] == tags.sha256
    shutil.rmtree(tags.folder)
    made(open_dataset(dataset), tags.folder, read=("labels",))
    with pytest.raises(UserError, match=r"the checkpoint's batches have .*: go on with the same data"):
        set_up(pinned, tmp_path / "run", world_of(None))


@pytest.mark.slow
def test_hashtags_recover_the_class_and_the_less_the_more_captions_lie(tmp_path: Path, made: Made) -> None:
    """By the true labels of other images."""
    test = Loader(
        Data.model_validate({"root": str(captioned(tmp_path, images=40)), "batch_size": 40, "crops": [CROP]}),
        seed=0,
        rank=0,
        world_size=1,
        workers=0,
        device=torch.device("cpu"),
        targets=True,
    )
    _, batch = next(test.from_step(0))
    assert batch.targets is not None
    (images,) = test.augment(batch).views.values()
    true = [test.training_set.classes[code] for code in batch.targets.codes.tolist()]
    right = []
    for noise in (0.0, 0.4, 0.9):
        folder = tmp_path / str(noise)
        data = captioned(folder, noise=noise)
        tags = made(open_dataset(data), folder / "tags")
        changes = {"data__tags": str(tags.folder), "train": {"steps": 70}}
        recipe = recipe_of(data, {"classes": 4}, trunk=FOUR_BLOCKS, **changes)
        t = set_up(recipe, folder / "run", world_of(None))
        for step, batches in steps(t, Stopwatch()):
            forward_backward(t, batches, step)
            t.optimizer.step()
            t.optimizer.zero_grad()
        assert t.metrics is not None
        t.metrics.close()
        with torch.inference_mode():
            said = t.method.eval().head(t.method.trunk(images)).argmax(1).tolist()  # type: ignore[operator]
        right.append(sum(tags.names[code] == name for code, name in zip(said, true, strict=True)) / 40)
    assert right[0] > 0.85
    assert right[0] > right[1] + 0.1
    assert right[1] > right[2] + 0.1


def test_a_method_without_labels_is_shown_the_tagged_images_only(
    dataset: Path, tmp_path: Path, made: Made
) -> None:
    tags = made(open_dataset(dataset), tmp_path / "tags", max_tags=2)
    recipe = make_recipe(dataset, data__tags=str(tags.folder))
    training = set_up(recipe, tmp_path / "run", world_of(None))
    assert len(training.loader.dataset) == tags.vocabulary.tagged == 26
    _, batch = next(training.loader.from_step(0))
    assert batch.targets is None
    assert set(batch.keys.tolist()) <= told(dataset, tags).keys()
    assert training.metrics is not None
    training.metrics.close()


def test_tags_of_another_root_are_refused_with_a_way_that_works(tmp_path: Path, made: Made) -> None:
    data = captioned(tmp_path, images=24)
    before = open_dataset(data)
    tags = made(before, tmp_path / "tags")
    shutil.copytree(tmp_path / "images", tmp_path / "more")
    crawl_shards(
        [str(tmp_path / "images"), str(tmp_path / "more")],
        data,
        CrawlSettings(unit_rows=17),
        workers=1,
        extend=True,
        progress=lambda counts: None,
    )
    assert open_dataset(data).root != before.root
    with pytest.raises(UserError, match=rf"are of root .*: open it with data\.sealed={before.root}, or"):
        loader(data, tags)
    assert len(loader(data, tags, sealed=before.root).dataset) == tags.vocabulary.tagged
    with pytest.raises(UserError, match=r"nowhere has no tags: make some with `submit hashtags DATASET "):
        open_tags(tmp_path / "nowhere")


def _gradients(group: dist.ProcessGroup | None, data: Path, tags: str, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(
        data,
        {"head_deviation": 0.1},
        data__tags=tags,
        train={"steps": 4, "precision": "fp64", "sync_bn_samples": 12},
    )
    t = set_up(recipe, folder, world_of(group))
    step, batches = next(steps(t, Stopwatch()))
    terms, _ = forward_backward(t, batches, step)
    gradients = {name: parameter.grad for name, parameter in t.method.named_parameters()}
    return {"loss": float(terms["loss"])} | {k: v.numpy() for k, v in gradients.items() if v is not None}


@pytest.mark.slow
def test_T1_images_with_several_tags_give_the_same_gradients_on_any_number_of_ranks(
    mixed: tuple[Path, Tags], tmp_path: Path, run_on_ranks: Ranks
) -> None:
    data, tags = mixed
    alone = _gradients(None, data, str(tags.folder), tmp_path / "alone")
    for found in run_on_ranks(2, _gradients, data, str(tags.folder), tmp_path / "ranks"):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            assert np.abs(value - alone[name]).max() <= 1e-10 * np.abs(alone[name]).max(), name


def test_a_pretraining_stage_takes_its_tags_from_the_stage_before(dataset: Path, tmp_path: Path) -> None:
    def made_by(kind: str, path: Path, metrics: dict[str, Any]) -> Input:
        blank = {"key": "", "stage": kind, "kind": kind, "version": 1, "recipe": {}, "inputs": {}}
        spent = {"outputs": {}, "started": 0.0, "seconds": 0.0, "gpu_hours": 0.0, "machine": ""}
        return Input(path=path, receipt=Receipt.model_validate(blank | spent | {"metrics": metrics}))

    data = made_by("shards", dataset, {"root": open_dataset(dataset).root})
    tagging, training = tmp_path / "tagging", tmp_path / "training"
    tagging.mkdir()
    recipe = HashtagsRecipe.model_validate({"min_images": 5, "run": {"workers": 1}})
    result = hashtags(Work(recipe=recipe, inputs={"data": data}, folder=tagging))
    assert result.metrics["tagged_share"] == pytest.approx(52 / 60)
    assert sorted(result.outputs) == sorted(path.name for path in tagging.iterdir())
    inputs = {"data": data, "tags": made_by("hashtags", tagging, dict(result.metrics))}
    job = train_job(Work(recipe=recipe_of(tmp_path, {}), inputs=inputs, folder=training), Resources())
    assert job.arguments["recipe"]["data"]["tags"] == str(tagging)
    assert job.arguments["recipe"]["method"]["classes"] == len(CLASSES)
