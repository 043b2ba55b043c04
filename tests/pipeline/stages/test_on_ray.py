"""C1, T3, C2: a training and a graph on a Ray cluster of two nodes: the numbers of this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny_training import SHALLOW, make_dataset, make_recipe
from typer.testing import CliRunner
from weakly_supervised import tuning_graph, weak_recipe

from cluster.job import Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, read_restarts
from cluster.submit import submit
from pipeline.cli import app
from pipeline.dag.graph import build_graph
from pipeline.dag.recipe import DagRecipe
from pipeline.dag.stage import Receipt
from pipeline.stages.kinds import KINDS
from pipeline.stages.room import Queue
from pipeline.stages.side_by_side import run_side_by_side
from pipeline.train.job import pretrain_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps_of_attempt(run: RunFolder, attempt: int) -> int:
    """Steps that an attempt has done; none if it is not the present one."""
    status, path = run.read_status(), run.path / "timing.jsonl"
    if status.attempt != attempt or status.started is None or not path.is_file():
        return 0
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return sum(json.loads(line)["time"] > status.started for line in lines)


def rank_process(run: RunFolder, rank: int) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        ours = "cluster.rank" in command and str(run.path / "job.json") in command
        if ours and process.environ()["RANK"] == str(rank):
            return process
    raise AssertionError(f"rank {rank} does not run")


def test_C1_T3_a_killed_worker_and_a_lost_node_change_no_number(ray_cluster: Any, tmp_path: Path) -> None:
    from cluster.ray.executor import RayExecutor

    recipe = make_recipe(make_dataset(tmp_path), trunk=SHALLOW, train__steps=100)
    here = pretrain_job(recipe, tmp_path / "local", Resources(ranks_per_node=2, cpus_per_rank=1))
    assert submit(here, LocalExecutor()).wait() is State.COMPLETED

    there = pretrain_job(recipe, tmp_path / "ray", Resources(nodes=2, cpus_per_rank=1))
    handle, run = submit(there, RayExecutor(ray_cluster.address)), RunFolder(tmp_path / "ray")
    wait_until(lambda: steps_of_attempt(run, 1) > 3)
    rank_process(run, 1).kill()
    wait_until(lambda: steps_of_attempt(run, 2) > 3)
    ray_cluster.remove_node(ray_cluster.list_all_nodes()[-1], allow_graceful=False)
    ray_cluster.add_node(num_cpus=1)
    assert handle.wait() is State.COMPLETED

    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("local", "ray")]
    assert metrics[0] == metrics[1]
    assert [restart.cause for restart in read_restarts(run)] == [Cause.CRASH, Cause.LOST]


def test_C2_a_graph_and_evaluations_of_its_run_go_as_jobs_and_not_twice(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.ray.executor import RayExecutor

    weak = weak_recipe(tmp_path / "weak", train__steps=6, run__checkpoint_every_steps=2, run__keep_last=3)
    out = str(tmp_path / "out")
    graph = DagRecipe.model_validate(
        {
            "folder": out,
            "stages": {
                "data": {"kind": "dataset", "recipe": {"path": weak.data.root}},
                "pretrain": {
                    "kind": "pretrain",
                    "recipe": weak.model_dump(mode="json"),
                    "inputs": {"data": "data/data"},
                },
            },
        }
    )
    stages, said = build_graph(graph, KINDS), list[str]()
    for _ in range(2):
        room = Queue(executor=RayExecutor(ray_cluster.address))
        results = run_side_by_side(graph, stages, room, gpus_per_node=0, say=said.append)
        assert all(isinstance(result, Receipt) for result in results.values()), results
    ways = [line.split()[1] for line in said]
    assert ways == ["started", "done"] * 2 + ["finished"] * 2

    (tmp_path / "evals.yaml").write_text(yaml.safe_dump(tuning_graph(weak.data.root, tmp_path / "out")))
    (tmp_path / "site.yaml").write_text(
        yaml.safe_dump({"ray_address": ray_cluster.address, "gpus_per_node": 0})
    )
    monkeypatch.setenv("SUBMIT_CLUSTER", str(tmp_path / "site.yaml"))
    words = ["evaluate", f"{out}/latest/pretrain", "--dag", str(tmp_path / "evals.yaml"), "--newest"]
    ways = []
    for _ in range(2):
        answer = CliRunner().invoke(app, [*words, "--gpu-hours", "1", "--executor", "ray"])
        assert answer.exit_code == 0, answer.output
        assert answer.output.startswith("step 6\n")
        ways += [line.split()[1] for line in answer.output.splitlines()[1:]]
    # The dataset is the graph's; what it takes to tune the newest checkpoint runs once.
    assert sorted(ways) == ["done"] * 3 + ["finished"] * 5 + ["started"] * 3
    assert (tmp_path / "out" / "latest" / "tuned" / "classifier" / "classifier.safetensors").is_file()
