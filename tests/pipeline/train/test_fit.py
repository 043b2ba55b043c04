"""What does not fit is told before anything is submitted; and numbers that no training could use."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tiny_training import make_dataset, make_recipe
from torch import nn

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings
from pipeline.methods.swav import _entropies
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.collapse import signs_of_collapse
from pipeline.train.fit import refuse_large_on_cpu, refuse_misfit, refuse_uneven
from pipeline.train.probe import KnnProbe

SWAV = make_recipe(Path("x")).method.model_dump(mode="json")
CROP = {"count": 2, "size": 16, "scale": [0.3, 1.0]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset; one of which an image has no label; and one of a single label."""
    folder = tmp_path_factory.mktemp("fit")
    make_dataset(folder, images=24)
    make_dataset(folder / "one", images=6, classes=1)
    (folder / "partly" / "a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "partly" / "a" / "labelled.png")
    Image.new("RGB", (32, 32), "red").save(folder / "partly" / "loose.png")
    settings = CrawlSettings(unit_rows=8)
    crawl_shards(
        [str(folder / "partly")], folder / "partly-data", settings, workers=1, progress=lambda _: None
    )
    return folder


def test_what_fits_is_not_refused(here: Path) -> None:
    refuse_misfit(make_recipe(here / "data"), ranks=4)


@pytest.mark.parametrize(
    ("changes", "ranks", "told"),
    [
        ({}, 5, "5 ranks cannot share data.batch_size 12 evenly"),
        ({"data__batch_size": 32}, 1, "the dataset has 24 samples"),
        ({"data__batch_size": 1, "method": SWAV | {"queue_length": 0}}, 1, "of 2 at least"),
        ({"train__sync_bn_samples": 7}, 1, "train.sync_bn_samples 7 does not fit"),
        ({"train": {"epochs": 1, "accumulate": 50}}, 1, "fewer than the 50 batches of one step"),
        ({"data__crops": [CROP | {"count": 1}]}, 1, "data.crops gives one: set count: 2"),
        (
            {"optim__warmup_steps": 21},
            1,
            "optim.warmup_steps is 21, and the run has 20 steps: give 20 at most",
        ),
        ({"method__queue_length": 25}, 1, "method.queue_length is 25, and the dataset has 24 images"),
    ],
)
def test_what_does_not_fit_is_told(here: Path, changes: dict[str, Any], ranks: int, told: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_misfit(make_recipe(here / "data", **changes), ranks=ranks)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": "partly-data"}, "has no label"),
        ({"train": "one/data"}, "has 1 labels, and kNN tells two apart"),
        ({"k": 25}, "probe.k is 25, and there are 24 training images"),
        ({"max_samples": 4}, "probe.k is 5, and there are 4 training images"),
        ({"test": "nowhere"}, "nowhere"),
    ],
)
def test_a_probe_that_could_only_fail_is_told_before_the_first_step(
    here: Path, changes: dict[str, Any], told: str
) -> None:
    paths = {name: str(here / changes.get(name, "data")) for name in ("train", "test")}
    probe = {"every_steps": 4, "image_size": 16, "k": 5} | changes | paths
    with pytest.raises(UserError) as refused:
        refuse_misfit(make_recipe(here / "data", probe=probe), ranks=1)
    assert told in str(refused.value)
    with pytest.raises(UserError):
        KnnProbe(make_recipe(here / "data", probe=probe), device=CPU)


class Falls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")


def test_a_probe_that_fails_fails_alone(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = {name: str(here / "data") for name in ("train", "test")}
    recipe = make_recipe(here / "data", probe={"every_steps": 4, "image_size": 16, "k": 5} | paths)
    with caplog.at_level(logging.WARNING):
        assert KnnProbe(recipe, device=CPU).accuracy_or_none(Falls(), step=8) is None
    assert "step 8 is not probed (RuntimeError: CUDA out of memory); the training goes on" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__mean": [123.7, 116.3, 103.5]}, "divide those of pixels from 0 to 255 by 255"),
        ({"data__std": [58.4, 57.1, 57.4]}, "divide those of pixels from 0 to 255 by 255"),
        ({"data__crops": [CROP | {"scale": [1.0, 0.3]}]}, r"give \[0.3, 1\]"),
        ({"data__crops": [CROP | {"ratio": [2.0, 0.5]}]}, r"give \[0.5, 2\]"),
        ({"data__crops": [CROP | {"photometric": {"blur_sigma": [2.0, 0.1]}}]}, r"give \[0.1, 2\]"),
        ({"data__crops": [CROP | {"size": 1}]}, "greater than or equal to 2"),
        ({"method__prototypes": 1}, "greater than or equal to 2"),
        ({"optim__lr": math.inf}, "finite number"),
        ({"optim__lr": "inf"}, "finite number"),
    ],
)
def test_impossible_numbers_are_refused_with_the_range(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        make_recipe(Path("x"), **changes)


def test_assignments_that_say_nothing_are_a_sign_of_collapse() -> None:
    scores = torch.randn(2, 6, 512, generator=torch.Generator().manual_seed(0))
    for sharpness, collapsed in ((0.0, True), (20.0, False)):
        assignments = (sharpness * scores).softmax(-1)
        found = _entropies(scores, assignments, temperature=0.1, group=None)
        signs = signs_of_collapse({name: float(value) for name, value in found.items()})
        assert ("assignment_information" in signs) == collapsed


@pytest.mark.parametrize(
    ("changes", "ranks", "nodes", "told"),
    [
        ({"data__batch_size": 7936}, 512, 64, "512 ranks, 64 nodes of 8, .* use --nodes 62 or 124, or"),
        ({"data__batch_size": 7936}, 9, 1, "9 ranks cannot share .* such as .*8"),
        ({"data__batch_size": 64, "train__sync_bn_samples": 24}, 16, 2, "sync_bn_samples 24 does not fit"),
    ],
)
def test_arithmetic_is_told_without_any_data(
    changes: dict[str, Any], ranks: int, nodes: int, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        refuse_uneven(make_recipe(Path("nowhere"), **changes), ranks=ranks, nodes=nodes)


def test_a_large_trunk_is_trained_on_cpus_only_where_the_recipe_says_so() -> None:
    large = load_recipe(PretrainRecipe, "seer_regnety_16gf", kind="pretrain")
    with pytest.raises(UserError, match=r"81 million parameters is not trained on CPUs: .* run\.device=cpu"):
        refuse_large_on_cpu(large)
    refuse_large_on_cpu(load_recipe(PretrainRecipe, "seer_regnety_16gf", ["run.device=cpu"], kind="pretrain"))
    refuse_large_on_cpu(load_recipe(PretrainRecipe, "swav_resnet50", kind="pretrain"))
