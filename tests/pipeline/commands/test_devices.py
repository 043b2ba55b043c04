"""Where a GPU is asked for and there is none, every place that chooses a device says so, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_training import make_recipe
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.rank.torch_dist import choose_device, distributed
from pipeline.cli import app
from pipeline.dag.stage import Work
from pipeline.recipe.stages import FeaturesRecipe, Machine, Machines, RandomTrunkRecipe
from pipeline.stages.kinds import KINDS
from pipeline.stages.ranks import extract
from pipeline.train.loop import run_pretrain
from pipeline.transfer.evaluations import EVALUATIONS

SENTENCE = (
    r"the device is to be cuda, but torch finds no GPU on \S+ \(see `submit doctor`\): choose auto or cpu; "
)
CUDA = Machine(device="cuda")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def join(folder: Path) -> None:
    with distributed("cuda"):
        pass


def train(folder: Path) -> None:
    run_pretrain(make_recipe(folder, run__device="cuda").model_dump(mode="json"), str(folder))


def extract_on_a_rank(folder: Path) -> None:
    extract({"run": {"device": "cuda"}}, "trunk", {}, {}, str(folder))


def ask_for_resources(kind: str, recipe: object) -> Callable[[Path], object]:
    return lambda folder: KINDS[kind].resources(recipe, None)


def run_stage(kind: str, recipe: object) -> Callable[[Path], object]:
    return lambda folder: KINDS[kind].run(Work(recipe=recipe, inputs={}, folder=folder))


@pytest.mark.parametrize(
    "choose",
    [
        join,
        train,
        ask_for_resources("pretrain", make_recipe(Path("nowhere"), run__device="cuda")),
        ask_for_resources("features", FeaturesRecipe(run=Machines(device="cuda"))),
        ask_for_resources("random_trunk", RandomTrunkRecipe(run=CUDA)),
        extract_on_a_rank,
        run_stage("random_trunk", RandomTrunkRecipe(run=CUDA)),
    ],
)
def test_a_gpu_that_is_not_there_is_one_sentence(choose: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=SENTENCE):
        choose(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--recipe", "demo", "--executor", "local", "--dry-run", "run.device=cuda"],
        *([name, "trunk", "--train", "a", "--test", "b", "--device", "cuda"] for name in EVALUATIONS),
    ],
    ids=lambda words: words[0],
)
def test_a_command_says_it_before_it_looks_at_anything(words: list[str]) -> None:
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 2
    assert not told.stdout and len(told.stderr.splitlines()) == 1
    assert told.stderr.startswith("submit: the device is to be cuda, but torch finds no GPU")


@pytest.mark.parametrize("device", ["mps", "cuda:7", "CUDA", "gpu", "", "0"])
def test_other_devices_are_refused_with_those_there_are(device: str) -> None:
    for words in (
        ["knn", "trunk", "--train", "a", "--test", "b", "--device", device],
        ["pretrain", "--recipe", "demo", "--dry-run", f"run.device={device!r}"],
        ["dag", "demo", "--plan", f"stages.features.recipe.run.device={device!r}"],
    ):
        told = CliRunner().invoke(app, words)
        assert told.exit_code == 2
        assert all(f"'{name}'" in told.stderr for name in ("auto", "cpu", "cuda")), told.stderr


@pytest.mark.parametrize(
    ("there", "name", "kind"), [(False, "auto", "cpu"), (True, "auto", "cuda"), (True, "cpu", "cpu")]
)
def test_auto_is_the_gpu_if_there_is_one(
    there: bool, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device(name).type == kind
