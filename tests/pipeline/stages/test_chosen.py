"""Which checkpoints are evaluated: all, the newest, or some steps apart; and within GPU-hours."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.cli import app
from pipeline.commands import evaluate
from pipeline.dag.stage import Receipt, Stage, job_folder
from pipeline.stages.chosen import choose


@settings(deadline=None)
@given(kept=st.lists(st.sets(st.integers(1, 60)), min_size=1, max_size=6), apart=st.integers(1, 20))
def test_what_is_chosen_lies_apart_whenever_one_looks_and_whatever_is_removed(
    kept: list[set[int]], apart: int
) -> None:
    chosen: set[int] = set()
    for there in kept:
        now = choose(there, chosen, apart=apart)
        assert set(now) <= there and chosen & there <= set(now)
        chosen |= set(now)
        assert all(
            any(abs(step - other) < apart for other in chosen) for step in there - chosen
        )  # none is left out in vain
    steps = sorted(chosen)
    assert all(b - a >= apart for a, b in itertools.pairwise(steps))


class Evaluations:
    """`submit evaluate` of a run whose stages take GPU-hours, but no time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.takes, self.goes_on = folder, 2.0, False
        self.made: list[str] = []
        run = RunFolder.create(folder / "run")
        run.write_status(
            Status(
                state=State.RUNNING, name="run", executor="slurm", id="1", ranks=1, attempt=1, submitted=0.0
            )
        )
        stages = {
            "checkpoint": {"kind": "checkpoint", "recipe": {"path": "RUN"}},
            "trunk": {"kind": "export", "inputs": {"run": "checkpoint/checkpoint"}},
        }
        self.graph = folder / "graph.yaml"
        self.graph.write_text(yaml.safe_dump({"folder": str(folder / "evals"), "stages": stages}))

    def save(self, *steps: int) -> None:
        for step in steps:
            folder = self.folder / "run" / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps(step))

    def remove(self, step: int) -> None:
        shutil.rmtree(self.folder / "run" / "checkpoints" / f"step-{step:08d}")

    def run_on(self, executor: str, dag: Any, stages: list[Stage], site: Any) -> None:
        for stage in stages:
            made = stage.folder / "receipt.json"
            if made.exists():
                continue
            stage.folder.mkdir(parents=True, exist_ok=True)
            if stage.kind_name == "export":
                self.made.append(Path(dag.stages["checkpoint"].recipe["path"]).name[-2:])
                if self.goes_on:
                    run = RunFolder.create(job_folder(stage).path)
                    run.write_status(
                        Status(
                            state=State.RUNNING,
                            name="x",
                            executor="local",
                            id="",
                            ranks=1,
                            attempt=1,
                            submitted=0.0,
                            started=time.time(),
                        )
                    )
                    return
            receipt = Receipt(
                key=stage.key,
                stage=stage.name,
                kind=stage.kind_name,
                version=1,
                recipe=stage.recipe.model_dump(mode="json"),
                inputs=stage.input_keys,
                outputs={},
                metrics={"step": int(Path(dag.stages["checkpoint"].recipe["path"]).name[5:])},
                started=0.0,
                seconds=1.0,
                gpu_hours=self.takes if stage.kind_name == "export" else 0.0,
                machine="",
            )
            made.write_text(receipt.model_dump_json())

    def ask(self, *words: str) -> Result:
        self.made.clear()
        return CliRunner().invoke(
            app, ["evaluate", str(self.folder / "run"), "--dag", str(self.graph), *words]
        )

    def __call__(self, *words: str) -> str:
        answer = self.ask(*words)
        assert answer.exit_code == 0, answer.output
        return answer.output


@pytest.fixture
def evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluations]:
    made = Evaluations(tmp_path)
    monkeypatch.setattr(evaluate, "run_on", made.run_on)
    monkeypatch.setattr("cluster.executors.Look.status", lambda look, run: run.read_status())
    yield made


def test_the_newest_alone_or_some_that_lie_apart(evaluations: Evaluations) -> None:
    evaluations.save(10, 12, 20)
    evaluations("--newest")
    assert evaluations.made == ["20"]
    evaluations("--steps-apart", "9")
    assert evaluations.made == ["10"]
    evaluations.remove(20)  # it counts all the same
    evaluations.save(27, 31)
    evaluations("--steps-apart", "9")
    assert evaluations.made == ["31"]
    evaluations()
    assert evaluations.made == ["12", "27"]
    latest = evaluations.folder / "latest"
    latest.symlink_to("run")
    evaluations.made.clear()
    CliRunner().invoke(app, ["evaluate", str(latest), "--dag", str(evaluations.graph)])
    assert evaluations.made == []  # the same run by another way
    answer = CliRunner().invoke(app, ["evaluate", str(latest), "--newest", "--steps-apart", "3"])
    assert answer.exit_code == 2 and "leave one out" in answer.output


def test_a_budget_ends_where_one_more_evaluation_would_not_fit(evaluations: Evaluations) -> None:
    evaluations.save(10, 20, 30)
    answer = evaluations("--gpu-hours", "5")
    assert evaluations.made == ["10", "20"]
    assert "step 30 is left out: 4 of 5 GPU-hours are taken, and one takes about 2\n" in answer
    evaluations.remove(10)
    evaluations("--gpu-hours", "5")
    assert evaluations.made == []  # what was removed has cost all the same
    evaluations("--gpu-hours", "6")
    assert evaluations.made == ["30"]
    evaluations.save(40)
    evaluations("--gpu-hours", "8")
    assert evaluations.made == ["40"]


def test_of_several_at_once_the_first_tells_what_one_takes(evaluations: Evaluations) -> None:
    evaluations.save(10, 20)
    evaluations.goes_on = True  # as on SLURM, which returns at once
    answer = evaluations("--gpu-hours", "100")
    assert evaluations.made == ["10"]
    assert "step 20 is left out: the first evaluation has not ended yet" in answer


def test_a_damaged_receipt_is_named_and_the_others_go_on(evaluations: Evaluations) -> None:
    evaluations.save(10)
    evaluations("--gpu-hours", "9")
    (damaged,) = (evaluations.folder / "evals").glob("export-*/receipt.json")
    damaged.write_text("{")
    evaluations.remove(10)
    evaluations.save(20, 30)
    for more in (["--gpu-hours", "9"], ["--steps-apart", "5"]):
        answer = evaluations.ask(*more)
        assert answer.exit_code == 2
        told = " ".join(answer.stderr.replace("\u2502", " ").split())
        assert told.count("is damaged: it is not JSON, or not all of it is there; remove it") == 1
        assert damaged.parent.name in told.replace(" ", "")
    assert evaluations.made == [] and len(list(damaged.parent.parent.glob("export-*/receipt.json"))) == 3
