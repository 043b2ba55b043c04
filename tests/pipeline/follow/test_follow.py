"""A run that is followed: what is new is told once, in order, whatever becomes of its files meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_values
from typer.testing import CliRunner

import pipeline.follow.follow as following
from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status, explain
from cluster.typed_yaml import read_yaml
from pipeline.cli import app
from pipeline.follow.follow import Point, Remote, flattened, follow
from pipeline.follow.rows import Rows, Sent
from pipeline.train.row_file import RowFile


class Recorder:
    """A tracker that keeps what it is given."""

    place = "a test"

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.recipes: list[dict[str, Any]] = []
        self.remotes: list[str] = []
        self.made, self.closed = 0, 0
        self.ended: tuple[str, str] | None = None
        self.refuses = False

    def new_id(self, name: str) -> str:
        self.made += 1
        return f"{name}-{self.made}"

    def open(self, remote: Remote) -> None:
        self.remotes.append(remote.id)

    def recipe(self, values: dict[str, Any]) -> None:
        self.recipes.append(values)

    def send(self, points: Sequence[Point]) -> None:
        if self.refuses:
            raise UserError("it does not answer")
        self.points += points

    def end(self, state: str, why: str) -> None:
        self.ended = state, why

    def close(self) -> None:
        self.closed += 1

    def told(self, name: str = "loss") -> list[tuple[int, float]]:
        return [(point.step, point.values[name]) for point in self.points if name in point.values]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = RunFolder.create(tmp_path / "runs" / "first")
    set_state(found, State.RUNNING)
    (found.path / "recipe.yaml").write_text(json.dumps(make_values(tmp_path / "data")))
    (found.path / "attempts.jsonl").write_text('{"time": 1.5}\n')
    return found


def set_state(run: RunFolder, state: State) -> None:
    run.write_status(
        Status(state=state, name="first", executor="local", id="1", ranks=1, attempt=1, submitted=0.0)
    )


def rows(run: RunFolder, *, step: int = 0, name: str = "metrics.jsonl") -> RowFile:
    """The file as a training opens it, when it goes on from a checkpoint of that step."""
    return RowFile(run.path / name, step=step)


def once(run: RunFolder, tracker: Recorder) -> int:
    return follow(run, tracker, status=RunFolder.read_status, why=explain, once=True)


def test_rows_are_told_once_though_a_run_is_followed_again(run: RunFolder) -> None:
    tracker, file = Recorder(), rows(run)
    file.write({"step": 1, "loss": 3.0, "knn": None, "skipped": [], "text": "x"})
    file.write({"step": 2, "loss": 2.0})
    with (run.path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3, "lo')
    assert once(run, tracker) == 2
    assert [point.values for point in tracker.points] == [{"loss": 3.0}, {"loss": 2.0}]
    with (run.path / "metrics.jsonl").open("a") as torn:
        torn.write('ss": 1.0}\n')
    assert once(run, tracker) == 1
    assert once(run, tracker) == 0
    assert tracker.told() == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert tracker.remotes == ["first-1"] * 3  # one record there
    assert tracker.closed == 3
    assert not any(path.name == "follow" for path in run.path.rglob("*"))


def test_a_restart_repeats_nothing_that_is_the_same_and_tells_what_changed(run: RunFolder) -> None:
    tracker, polls = Recorder(), 0
    file = rows(run)
    for step in range(1, 6):
        file.write({"step": step, "loss": float(step)})
    file.close()

    def wait(seconds: float) -> None:
        nonlocal polls
        polls += 1
        if polls == 1:  # it was killed, and goes on from step 2
            again = rows(run, step=2)
            again.write({"step": 3, "loss": 3.0})
            again.close()
        if polls == 2:
            again = rows(run, step=3)  # and once more, and is soon further than it was
            for step, loss in ((4, 44.0), (5, 5.0), (6, 6.0), (7, 7.0)):
                again.write({"step": step, "loss": loss})
            again.close()
        if polls == 3:
            set_state(run, State.COMPLETED)

    assert follow(run, tracker, status=RunFolder.read_status, why=explain, wait=wait) == 8
    assert tracker.told() == [(step, float(step)) for step in range(1, 6)] + [(4, 44.0), (6, 6.0), (7, 7.0)]
    assert tracker.ended == ("completed", "first is completed")
    assert once(run, Recorder()) == 0


def test_a_file_that_is_cut_short_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    found = Rows(path)
    assert len(list(found.new())) == 2
    os.truncate(path, 5)
    assert list(found.new()) == []
    with path.open("a") as file:
        file.write('p": 1, "x": 1}\n{"step": 20}\n{"step": 30}\n')
    assert [json.loads(line)["step"] for line in found.new()] == [1, 20, 30]
    assert list(found.new()) == []
    write_atomically(path, '{"step": 7}\n' * 9)  # longer than what it replaces
    assert len(list(found.new())) == 9
    found.close()


def test_what_was_not_taken_is_told_again(run: RunFolder) -> None:
    tracker, file = Recorder(), rows(run)
    file.write({"step": 1, "loss": 3.0})
    tracker.refuses = True
    with pytest.raises(UserError, match="does not answer"):
        once(run, tracker)
    assert (tracker.closed, tracker.ended) == (1, None)
    tracker.refuses = False
    assert once(run, tracker) == 1
    assert tracker.told() == [(1, 3.0)]


def test_a_record_that_was_cut_short_forgets_its_last_row_only(tmp_path: Path) -> None:
    line, other = b'{"step": 1, "loss": 1}\n', b'{"step": 2, "loss": 1}\n'
    sent = Sent(tmp_path / "sent")
    sent.add([line, other])
    sent.close()
    os.truncate(tmp_path / "sent", len(line) + 4)
    again = Sent(tmp_path / "sent")
    assert again.lacks(line) is None
    assert again.lacks(other) == {"step": 2, "loss": 1}
    assert again.lacks(b"damaged\n") is None
    again.add([other])
    again.close()
    assert (tmp_path / "sent").read_bytes() == line + other


def test_numbers_are_dated_by_the_time_of_their_step(run: RunFolder) -> None:
    tracker = Recorder()
    rows(run).write({"step": 5, "loss": 3.0})
    rows(run, name="timing.jsonl").write({"step": 5, "seconds": 0.5, "time": 1234.5})
    assert once(run, tracker) == 2
    assert {point.time for point in tracker.points} == {1234.5}
    assert tracker.told("seconds") == [(5, 0.5)]
    assert not tracker.told("time")


def test_a_recipe_is_told_flat_and_again_once_it_has_changed(run: RunFolder) -> None:
    tracker = Recorder()

    def wait(seconds: float) -> None:
        values = read_yaml(run.path / "recipe.yaml")
        values["train"]["steps"] = 99
        (run.path / "recipe.yaml").write_text(json.dumps(values))
        set_state(run, State.FAILED if len(tracker.recipes) == 2 else State.RUNNING)

    follow(run, tracker, status=RunFolder.read_status, why=explain, wait=wait)
    first, second = tracker.recipes
    assert first["data.crops.1.size"] == 8
    assert first["data.crops.1.scale"] == "[0.1, 0.3]"
    assert first["method.name"] == "swav"
    assert second == first | {"train.steps": 99}
    assert tracker.ended is not None and tracker.ended[0] == "failed"
    assert flattened({"a": {"b": [], "c": None}}) == {"a.b": "[]", "a.c": None}


def test_another_run_in_the_same_folder_is_told_from_its_start(run: RunFolder) -> None:
    tracker, file = Recorder(), rows(run)
    file.write({"step": 1, "loss": 3.0})
    once(run, tracker)
    (run.path / "attempts.jsonl").write_text('{"time": 2.5}\n')
    assert once(run, tracker) == 1
    assert tracker.remotes == ["first-1", "first-2"]


def test_a_run_is_followed_by_one_at_a_time_and_only_once_it_has_begun(run: RunFolder) -> None:
    def wait(seconds: float) -> None:
        set_state(run, State.COMPLETED)
        with pytest.raises(UserError, match=r"first is being followed to a test already"):
            once(run, Recorder())

    follow(run, Recorder(), status=RunFolder.read_status, why=explain, wait=wait)
    (run.path / "attempts.jsonl").unlink()
    with pytest.raises(UserError, match="has not begun: there is nothing to send"):
        once(run, Recorder())


def test_a_hostile_name_of_a_number_is_not_passed_on(run: RunFolder) -> None:
    tracker = Recorder()
    rows(run).write({"step": 1, "loss": 1.0, "x" * 300: 2.0, "a\nb": 3.0, "<b>": 4.0, "ok/name": 5.0})
    once(run, tracker)
    assert tracker.points[0].values == {"loss": 1.0, "ok/name": 5.0}


@pytest.mark.parametrize("to", ["mlflow", "wandb"])
def test_a_library_that_is_not_there_is_named_with_its_extra(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setitem(sys.modules, to, None)
    result = CliRunner().invoke(app, ["follow", str(run.path), "--to", to, "--once"])
    assert result.exit_code == 2
    assert f"pip install 'seer-pipeline[{to}]'" in result.stderr


def test_mlflow_has_the_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.setattr(following, "POLL_SECONDS", 0.0)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    file = rows(run)
    for step in range(1, 1200):
        file.write({"step": step, "loss": 1 / step, "lr": 0.1})
    submit = ["follow", str(run.path), "--to", "mlflow", "--project", "tests"]
    for words in (["--once"], ["--once"], []):
        result = CliRunner().invoke(app, [*submit, *words])
        assert result.exit_code == 0, result.output
        set_state(run, State.COMPLETED)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((each.step, each.value) for each in history) == [(n, 1 / n) for n in range(1, 1200)]
    assert found.data.params["method.name"] == "swav"
    assert (found.info.status, found.data.tags["state"]) == ("FINISHED", "completed")


def test_wandb_has_the_run_offline(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rows(run).write({"step": 1, "loss": 2.5})
    set_state(run, State.COMPLETED)
    result = CliRunner().invoke(app, ["follow", str(run.path), "--to", "wandb"])
    assert result.exit_code == 0, result.output
    assert "1 new row sent to W&B, project submit" in result.output
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in log.read_bytes() and b"2.5" in log.read_bytes()
