"""The `submit` command, as it is typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_training import make_dataset, make_values
from typer.testing import CliRunner, Result

from cluster.host import Process
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Failure, Status
from cluster.typed_yaml import load_recipe
from ingest.cli import app as ingest
from ingest.dataset.open import open_dataset
from ingest.dataset.view import write_view
from pipeline.cli import app
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loop import pretrain

SUBMIT = [sys.executable, "-c", "from pipeline.cli import main; main()"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with its dataset."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(make_values(make_dataset(folder), train__steps=6)))
    return path


@pytest.fixture(autouse=True)
def elsewhere(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = tmp_path_factory.mktemp("site") / "site.yaml"
    site.write_text("executor: local\n")  # also where SLURM is installed
    monkeypatch.setenv("SUBMIT_CLUSTER", str(site))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def line(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    lines = [each for each in result.stderr.splitlines() if each]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_both_programs_say_their_version_without_a_command() -> None:
    for program, name in ((app, "submit"), (ingest(), "ingest")):
        told = CliRunner().invoke(program, ["--version"], prog_name=name)
        assert (told.exit_code, told.output) == (0, f"{name} {metadata.version('seer-pipeline')}\n")


@pytest.mark.slow
def test_a_run_from_the_first_step_to_the_last_and_back_again(recipe: Path) -> None:
    words = ("pretrain", "--recipe", recipe, "--run", "first", "--ranks", 2)
    dry = submit(*words, "--dry-run")
    assert dry.exit_code == 0
    assert "would run runs/first from the start, on this machine: 2 ranks, each on the CPU" in dry.output
    assert "temperature: 0.1" in dry.output  # defaults are written out
    assert not Path("runs").exists()

    done = submit(*words)
    assert done.exit_code == 0, done.output
    assert "step 6/6" in done.output
    assert "completed: runs/first" in done.output
    saved = yaml.safe_load(Path("runs/first/recipe.yaml").read_text())
    assert saved["data"]["sealed"] == open_dataset(saved["data"]["root"]).root
    assert saved["optim"]["lr"] == 0.3 and saved["run"]["name"] == "first"
    attempt = json.loads(Path("runs/first/attempts.jsonl").read_text())
    assert attempt["ranks"] == 2
    assert attempt.keys() >= {"commit", "dirty", "torch", "host"}

    assert "from step 6" in submit(*words, "--dry-run").output
    told = line(submit(*words, "optim.lr=0.1", "data.crops.0.size=24"))
    assert "data.crops.0.size is 16 there, 24 here; optim.lr is 0.3 there, 0.1 here" in told

    listed = json.loads(submit("status", "--json").output)
    assert [run["state"] for run in listed] == ["completed"]
    assert listed[0]["progress"]["step"] == 6
    table = submit("status").output
    assert re.search(r"first\s+completed\s+local\s+20\d\d-\d\d-\d\d \d\d:\d\d\s+6/6", table), table
    assert "first is completed" in submit("status", "first").output
    assert "step 1/6" in submit("logs", "first").output
    whole = submit("logs", "first").output
    assert submit("logs", "runs/first", "--follow").output == whole
    assert submit("logs", "first", "--lines", 2).output.splitlines() == whole.splitlines()[-2:]
    assert "has no log of rank 2: it has ranks 0 to 1" in line(submit("logs", "first", "--rank", 2))
    assert "is not running: it is completed" in line(submit("cancel", "first"))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(recipe: Path) -> None:
    words = [*SUBMIT, "pretrain", "--recipe", str(recipe), "--run", "stopped", "train.steps=100000"]
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = Path("runs/stopped/progress.json")
    deadline = time.monotonic() + 60
    while not progress.is_file():
        assert time.monotonic() < deadline and launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    assert json.loads(submit("status", "stopped", "--json").output)["state"] == "running"
    launcher.send_signal(signal.SIGINT)
    output, error = launcher.communicate(timeout=30)
    assert launcher.returncode == 85
    assert "SIGINT: saving and stopping at the next step" in output
    assert "stopped was stopped; give the same command again to go on from where it last saved" in error
    assert "Traceback" not in output + error
    assert re.search(r"from step \d+", submit(*words[3:], "--dry-run").output)

    # Moved, and named from elsewhere: that folder is the run.
    moved, elsewhere = Path("moved").absolute(), Path("elsewhere")
    Path("runs/stopped").rename(moved)
    elsewhere.mkdir()
    words = [*SUBMIT, "resume", str(moved)]
    launcher = subprocess.Popen(
        words, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len((moved / "attempts.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.02)
    assert "moved is cancelled" in submit("cancel", moved).output
    assert launcher.wait(timeout=30) == 1
    assert json.loads(submit("status", moved, "--json").output)["state"] == "cancelled"
    assert list(elsewhere.iterdir()) == [] and not Path("runs/stopped").exists()


@pytest.mark.slow
def test_a_mistake_that_only_the_ranks_can_see_is_one_line_too(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("pretrain", "--recipe", recipe, "--run", "wrong")
    finished = submit(*words, "--ranks", 2, "train.strategy=fsdp2", "train.shard_ranks=3")
    told = line(finished)
    assert told.startswith("submit: ")
    assert "train.shard_ranks 3 does not divide 2 ranks" in told
    assert "Traceback" not in finished.stdout
    assert capfd.readouterr() == ("", "")  # nor do the ranks write past the command
    status = RunFolder.open(Path("runs/wrong")).status()
    assert status.state is State.FAILED and status.failure is not None and status.failure.user_error


def test_mistakes_are_told_in_one_line_and_in_full_with_debug(recipe: Path) -> None:
    told = line(submit("pretrain", "--recipe", recipe, "--nodes", 2))
    assert "wants 2 nodes" in told and "--executor slurm or ray" in told
    assert "did you mean 'optim.lr'?" in line(submit("pretrain", "--recipe", recipe, "optim.lrr=1"))
    assert "nowhere is not a dataset" in line(submit("pretrain", "--recipe", recipe, "data.root=nowhere"))
    assert "there is no file nowhere" in line(
        submit("pretrain", "--recipe", recipe, "trunk.init_from=nowhere")
    )
    assert "neither nothing nor runs/nothing" in line(submit("status", "nothing"))
    assert "there is no run" in line(submit("logs", "nothing"))
    assert "there is no run runs/nothing: " in line(submit("export", "runs/nothing", "out"))
    assert "no runs in runs" in submit("status").output
    shown = subprocess.run(
        [*SUBMIT, "logs", "nothing", "--debug"], capture_output=True, text=True, check=False
    )
    assert "Traceback" in shown.stderr
    assert not Path("runs").exists()


def test_the_recipe_that_nobody_chose_is_named() -> None:
    result = submit("pretrain", "--dry-run", "optim.no=1")
    assert "recipe: seer_regnety_256gf, the default; --recipe chooses another" in result.stderr


def test_status_tells_why(tmp_path: Path) -> None:
    status = Status(
        state=State.FAILED,
        name="crashed",
        executor="local",
        id="local-1",
        ranks=2,
        attempt=3,
        submitted=0.0,
        launcher=Process.current(),
        failure=Failure(rank=1, type="ValueError", message="boom", log_tail=("the last line",)),
    )
    RunFolder.create(tmp_path / "runs" / "crashed").write_status(status)
    shown = submit("status", "crashed").output
    assert "rank 1 of 2 failed first: ValueError: boom" in shown
    assert "the last line" in shown


def test_doctor_tells_about_images_and_torch() -> None:
    result = submit("doctor", "--json")
    names = " ".join(check["name"] for check in json.loads(result.output)).lower()
    assert "torch" in names and "python" in names


@pytest.mark.slow
def test_a_trunk_is_exported_and_scored(recipe: Path) -> None:
    data = yaml.safe_load(recipe.read_text())["data"]["root"]
    short = ["train.steps=2", "optim.warmup_steps=1"]
    pretrain(load_recipe(PretrainRecipe, str(recipe), short, kind="pretrain"), Path("runs/short"))
    assert submit("export", "runs/short", "trunk").exit_code == 0
    assert Path("trunk/trunk.safetensors").is_file()
    assert "swav without a teacher: export --which student" in line(
        submit("export", "runs/short", "teacher", "--which", "teacher")
    )
    place = ("trunk", "--train", data, "--test", data, "--workers", 0, "--json")
    scores = json.loads(submit("knn", *place, "k=[5]").output)
    assert 0 <= scores["top1"] <= 1 and scores["k"] == 5
    opened = open_dataset(data)
    counts = zip(opened.units.tolist(), opened.counts.tolist(), strict=True)
    keeps = {unit: np.arange(count) % 4 == 0 for unit, count in counts}
    write_view(data, "quarter", root=opened.root, keeps=keeps)
    seen = json.loads(submit("knn", *place, "--test-view", "quarter", "k=[5]").output)
    assert (seen["train_samples"], seen["test_samples"]) == (len(opened), sum(map(np.sum, keeps.values())))
    scores = json.loads(submit("linear", *place, "regularisation=[0.1]").output)
    assert 0.25 < scores["top1"] <= 1
