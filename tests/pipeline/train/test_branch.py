"""Runs that begin at another's checkpoint; and every remedy that a run names, given to the next command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import make_dataset, make_values
from typer.testing import CliRunner, Result

from cluster.errors import UserError
from cluster.job import Job, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import open_dataset
from pipeline.checkpoint.files import read_tensors
from pipeline.cli import app
from pipeline.commands import pretrain as command
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.report.compare import compare_runs
from pipeline.train.branch import find_checkpoint
from pipeline.train.guard import Diverged
from pipeline.train.loop import pretrain, remedies, run_pretrain
from pipeline.train.run_recipe import pin_dataset
from pipeline.train.steering import read_changes
from pipeline.trunks.export import export_trunk

STEPS, SAVED = 6, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, another one, a recipe, and a run of it that has saved steps 3 and 6."""
    here = tmp_path_factory.mktemp("branches")
    make_dataset(here)
    make_dataset(here / "other", images=60, seed=3)
    probe = {"train": "data", "test": "data", "every_steps": SAVED, "image_size": 16, "k": 5}
    values = make_values(here / "data", train__steps=STEPS, run__checkpoint_every_steps=SAVED)
    values["data"]["root"] = "data"
    (here / "r.yaml").write_text(yaml.safe_dump(values | {"probe": probe}))
    return here


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to write to; what is submitted runs here, and in no process of its own."""
    monkeypatch.chdir(made)
    torch.set_num_threads(1)
    if not (made / "runs" / "a").is_dir():
        recipe = load_recipe(PretrainRecipe, "r.yaml", ["run.name=a"], kind="pretrain")
        pretrain(pin_dataset(recipe, Path("runs/a")), Path("runs/a"))
        tell_completed(Path("runs/a"))
    for name in ("data", "other", "r.yaml", "runs"):
        (shutil.copy if name == "r.yaml" else shutil.copytree)(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tell_completed(run: Path) -> None:
    RunFolder.create(run).write_status(
        Status(
            state=State.COMPLETED, name=run.name, executor="local", id="1", ranks=1, attempt=1, submitted=0.0
        )
    )


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would have been started."""
    found: list[Job] = []
    monkeypatch.setattr(command, "launch", lambda job, *_, **__: found.append(job))
    return found


def train(job: Job) -> Path:
    run_pretrain(**job.arguments)
    tell_completed(job.folder)
    return job.folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


START = f"runs/a/checkpoints/step-{SAVED:08d}"


def test_a_branch_without_a_change_is_the_same_training(folder: Path, jobs: list[Job]) -> None:
    """All of the checkpoint is carried: the weights, the optimizer, the queue, the place in the data."""
    told = submit("pretrain", "--from", START, "--run", "b")
    assert told.exit_code == 0, told.output
    assert "nothing is changed" in told.output
    assert f"from step {SAVED}" in told.output
    shutil.rmtree(folder / "runs" / "a" / "checkpoints" / f"step-{SAVED:08d}")  # a branch needs it no more
    run = train(jobs[0])
    ends = [find_checkpoint(Path(f"runs/{name}/checkpoints/step-{STEPS}")) for name in "ab"]
    one, other = (read_tensors(end, prefix="") for end in ends)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(run) == [row for row in rows(Path("runs/a")) if row["step"] > SAVED]


def test_a_run_and_its_branches_find_their_data_from_everywhere(folder: Path, jobs: list[Job]) -> None:
    """What a recipe names by relative paths, a run names by absolute ones."""
    submit("pretrain", "--recipe", "r.yaml", "--run", "c")
    train(jobs[0])
    with pytest.MonkeyPatch.context() as there:
        there.chdir("/")
        run_pretrain(**{**jobs[0].arguments, "folder": str(folder / "runs/c")})  # as `submit resume` does
        words = ["--from", folder / "runs/c", "--run", "d", "--executor", "local", "--dry-run"]
        told = submit("pretrain", *words, "train.steps=9")
        assert told.exit_code == 0, told.output
    assert f"root: {folder}/data" in told.output
    assert f"train: {folder}/data" in told.output  # the probe's
    assert not read_changes(Path("runs/c"))
    again = submit("pretrain", "--recipe", "r.yaml", "--run", "c", "--dry-run")
    assert "changed" not in again.output and again.exit_code == 0, again.output


def test_a_branch_tells_where_it_left_and_what_it_changed(folder: Path, jobs: list[Job]) -> None:
    words = [
        "pretrain",
        "--from",
        START,
        "--run",
        "b",
        "optim.lr=0.1",
        "optim.clip_norm=1.0",
        "data.root=other/data",
    ]
    assert submit(*words, "--dry-run").exit_code == 0
    assert not Path("runs/b").exists()
    told = submit(*words, "data.batch_size=6")
    assert told.exit_code == 0, told.output
    assert "begins with it, because of data.sealed, data.batch_size" in told.output
    run = train(jobs[0])
    assert [row["step"] for row in rows(run)] == [4, 5, 6]
    assert rows(run)[0]["lr"] < rows(Path("runs/a"))[3]["lr"]

    again = submit(*words, "data.batch_size=6")  # the same command goes on with it
    assert again.exit_code == 0, again.output
    shown = json.loads(submit("status", "b", "--json").output)
    assert shown["parent"]["run"] == str(folder / "runs" / "a")
    assert shown["parent"]["settings"]["optim.lr"] == [0.3, 0.1]
    assert f"from a at step {SAVED}" in submit("status", "b").output
    assert export_trunk(run, folder / "trunk").provenance["parent"]["step"] == SAVED

    parent, left = compare_runs({name: Path("runs") / name for name in "ab"})
    (first, *_), (value, *_) = left.curves["rankme"].drawn
    assert first == SAVED
    assert value in parent.curves["rankme"].drawn[1]  # it leaves the parent's line
    assert left.branch == f"a, step {SAVED}"
    assert parent.branch == ""


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "method={name: simsiam, projector: [8], predictor: 4}",
            "method.name=swav, and its tensors are none of",
        ),
        ("trunk={name: resnet18}", "trained with trunk.name=regnet_y, and"),
        ("optim={name: sgd, lr: 0.1}", "trained with optim.name=larc, and"),
        ("train.precision=fp64", "trained with train.precision=fp32, and"),
        ("method.prototypes=16", r"prototypes.* has the shape \[8, 8\] there, and \[16, 8\] here"),
        (f"train.steps={SAVED}", f"train.steps is {SAVED}, and .* has taken {SAVED} already"),
        ("optim.rate=1", "'optim.rate' is not a key of optim"),
    ],
)
def test_what_cannot_be_carried_is_named(folder: Path, jobs: list[Job], word: str, told: str) -> None:
    answer = submit("pretrain", "--from", START, "--run", "b", word)
    assert answer.exit_code != 0
    assert re.search(told, answer.output), answer.output
    assert not Path("runs/b").exists()
    assert not jobs


def test_only_a_checkpoint_that_is_there_and_a_run_of_its_own(folder: Path, jobs: list[Job]) -> None:
    for words, told in [
        (["--from", "runs/a/checkpoints/step-4"], r"there are: runs/a/checkpoints/step-00000006, runs/a/"),
        (["--from", "runs/none"], "there is no such checkpoint"),
        (["--from", START, "--run", "a"], "holds a run that is no branch"),
        (["--from", START, "--recipe", "r.yaml"], "leave out --recipe"),
        (["--from", START, "test.root=data"], "'test' is a value, not a section"),
    ]:
        answer = submit("pretrain", *words)
        assert answer.exit_code != 0
        assert re.search(told, answer.output), answer.output
    assert not jobs


def test_a_branch_whose_checkpoint_broke_does_not_begin_anew(folder: Path, jobs: list[Job]) -> None:
    submit("pretrain", "--from", START, "--run", "b")
    state = Path("runs/b/checkpoints") / Path(START).name / "state.json"
    state.write_text(state.read_text().replace(str(SAVED), "4"))
    with pytest.raises(UserError, match="no checkpoint of it is whole"):
        run_pretrain(**jobs[0].arguments)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", ".metadata"])
def test_no_branch_begins_at_a_checkpoint_that_is_damaged(folder: Path, jobs: list[Job], name: str) -> None:
    file = Path(START) / name
    file.write_bytes(file.read_bytes()[:-40])
    answer = submit("pretrain", "--from", START, "--run", "b")
    assert re.search(rf"checkpoint {START} is broken .*: branch from another one", answer.output), answer
    assert not Path("runs/b").exists()
    assert not jobs


def test_a_branch_takes_nobody_s_checkpoints_away(folder: Path, jobs: list[Job]) -> None:
    file = folder / "runs" / "b" / "checkpoints" / "step-00000009" / "file"
    file.parent.mkdir(parents=True)
    file.touch()
    answer = submit("pretrain", "--from", START, "--run", "b")
    assert "holds a run that is no branch" in answer.output
    assert file.exists()
    assert not jobs


def test_a_branch_that_is_only_shown_is_no_part_of_the_script(folder: Path, jobs: list[Job]) -> None:
    shown = submit("pretrain", "--from", START, "--run", "b", "--executor", "slurm", "--dry-run")
    assert shown.stdout.startswith("#!/bin/bash"), shown.output
    assert f"#SBATCH --chdir={Path.cwd()}\n" in shown.stdout  # as it would be submitted


def remedied(message: str) -> list[list[str]]:
    """The commands that a message names: those in backticks, each with one of the settings beside them."""
    commands = [shlex.split(text)[1:] for text in re.findall(r"`submit ([^`]*)`", message)]
    commands = [["pretrain", *command] for command in commands] or [["pretrain", "--recipe", "r.yaml"]]
    outside = re.sub(r"`[^`]*`", "", message)
    settings = re.findall(r"\b(?:optim|train)\.\w+=[\w.]+", outside) or [""]
    return [[*command, *filter(None, [setting])] for command in commands for setting in settings]


@pytest.mark.parametrize("spiked", [False, True])
@pytest.mark.parametrize("saved", [SAVED, None])
def test_every_remedy_of_a_divergence_is_accepted(
    folder: Path, jobs: list[Job], saved: int | None, spiked: bool
) -> None:
    values = load_recipe(PretrainRecipe, "r.yaml", ["train.precision=bf16"], kind="pretrain")
    failure = Diverged("the loss", step=5, spiked=spiked)
    message = remedies(values, Path("runs/a"), saved, failure)
    branching, _, going_on = message.partition("; or go on")
    for words in remedied(branching):
        answer = submit(*words, "--run", f"b{len(jobs)}")
        assert answer.exit_code == 0, (words, answer.output)
    if spiked:
        (words,) = remedied(going_on)
        assert "train.spike_deviations=40" in words
        assert submit(*words, "--run", "a").exit_code == 0
    assert len(jobs) == 3  # of a divergence two settings and the precision; of a leap two, and its threshold


def test_the_remedy_of_a_refused_change_is_accepted(folder: Path, jobs: list[Job]) -> None:
    refused = submit("pretrain", "--recipe", "r.yaml", "--run", "a", "optim.lr=0.1", "train.steps=9")
    assert "or branch from it: `submit pretrain --from runs/a/checkpoints/step-00000006 " in refused.output
    (words,) = remedied(refused.output)
    answer = submit(*words, "--run", "b")
    assert answer.exit_code == 0, answer.output
    assert load_recipe(PretrainRecipe, "runs/b/recipe.yaml", kind="pretrain").optim.lr == 0.1


@pytest.mark.parametrize("pinned", [True, False])
def test_a_branch_to_other_data_is_named_with_their_place(
    folder: Path, jobs: list[Job], pinned: bool
) -> None:
    other = ["data.root=other/data", "train.steps=9"]
    other += [f"data.sealed={open_dataset('other/data').root}"] if pinned else []
    refused = submit("pretrain", "--recipe", "r.yaml", "--run", "a", *other)
    (words,) = remedied(refused.output)
    answer = submit(*words, "--run", "b")
    assert answer.exit_code == 0, answer.output


def test_a_root_that_is_gone_is_not_exchanged_for_a_newer_one(folder: Path, jobs: list[Job]) -> None:
    pinned = open_dataset("data").root
    shutil.copytree("other/data", "newer")
    for name in ("plan", "shards", "meta", "commits", "sealed", "DATASET.json"):  # as if sealed anew
        if Path("data", name).is_dir():
            shutil.rmtree(Path("data", name))
            shutil.copytree(Path("newer", name), Path("data", name))
        else:
            shutil.copy(Path("newer", name), Path("data", name))
    answer = submit("pretrain", "--recipe", "r.yaml", "--run", "a", "train.steps=9")
    assert answer.exit_code == 2
    assert f"has no sealed root {pinned[:12]}" in answer.output
