"""What could never be evaluated is not put on a timetable."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.cli import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without a checkpoint as yet, a site, and a scrontab."""
    run = RunFolder.create(tmp_path / "runs" / "one")
    run.write_status(
        Status(state=State.RUNNING, name="one", executor="slurm", id="1", ranks=1, attempt=1, submitted=0.0)
    )
    (tmp_path / "site.yaml").write_text("executor: slurm\n")
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "scrontab"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -l ] || cat "$1" > {tmp_path}/table\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def schedule(*words: str, dag: str = "evals", run: str = "one") -> Result:
    command = ["schedule", dag, "--run", run, "--every", "0 2 * * *", "--cluster", "site.yaml", *words]
    return CliRunner().invoke(app, command)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stages.knn.recipe.kk=1"], "recipe of stage knn: 'kk' is not a key of the recipe"),
        (["stages.knm.recipe.k=1"], "knm"),
        (["stages.train.kind=nothing"], "there is no kind 'nothing'"),
        (["k"], "'k' is not an override"),
    ],
)
def test_an_override_that_no_firing_could_use_is_refused_at_once(
    here: Path, words: list[str], told: str
) -> None:
    refused = schedule(*words)
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert not (here / "table").exists()
    assert not (here / "runs" / "schedules").exists()


def test_a_run_or_graph_that_is_not_there_is_refused_at_once(here: Path) -> None:
    assert "runs/two" in schedule(run="two").stderr
    assert "evaluations" in schedule(dag="evaluations").stderr
    assert not (here / "table").exists()


def test_a_run_that_has_no_checkpoint_yet_can_be_scheduled(here: Path) -> None:
    done = schedule("stages.knn.recipe.k=[5]")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("evals-one: 0 2 * * *, by scrontab")
    assert "evals-one" in (here / "table").read_text()
