"""C2, C1: a graph of stages on SLURM, and evaluation on a timetable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lab import SlurmLab, wait_until
from training import Submitter

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from tiny_training import make_dataset, make_values
from weakly_supervised import tuning_graph, weak_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = ("train", "test", "pretrain", "trunk", "features", "knn", "linear")
TRANSFER = {
    "features": {
        "kind": "features",
        "recipe": {"run": {"workers": 0}},
        "inputs": {"trunk": "trunk", "train": "train", "test": "test"},
    },
    "knn": {"kind": "knn", "recipe": {"k": [5]}, "inputs": {"features": "features"}},
    "linear": {"kind": "linear", "recipe": {"regularisation": [0.01]}, "inputs": {"features": "features"}},
}


@pytest.fixture
def submit(slurm: SlurmLab, tmp_path: Path) -> Submitter:
    make_dataset(tmp_path)
    training = make_values(tmp_path, train__steps=8)
    stages = {
        "train": {"kind": "shards", "recipe": {"source": str(tmp_path / "images"), "unit_rows": 32}},
        "test": {"kind": "shards", "recipe": {"source": str(tmp_path / "images"), "unit_rows": 48}},
        "pretrain": {"kind": "pretrain", "recipe": training, "inputs": {"data": "train"}},
        "trunk": {"kind": "export", "inputs": {"run": "pretrain"}},
        **TRANSFER,
    }
    graph = {"folder": str(tmp_path / "out"), "stages": stages}
    (tmp_path / "graph.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    return Submitter(slurm, tmp_path)


def states(submit: Submitter, *overrides: str) -> dict[str, str]:
    lines = submit("dag", "graph.yaml", *overrides, "--plan").stdout.splitlines()
    return {line.split()[0]: line.split()[1] for line in lines if line.split()[0] in STAGES}


def starts(folder: Path) -> dict[str, int]:
    """How often the job of each stage's folder has started."""
    logs = [*folder.glob("out/jobs/*/logs/slurm.log"), *folder.glob("out/*/logs/slurm.log")]
    return {log.parents[1].name: log.read_text().count(" slurm attempt ") for log in logs}


def test_C2_a_failed_stage_cancels_its_descendants_and_mended_only_what_is_missing_runs(
    slurm: SlurmLab, submit: Submitter, tmp_path: Path
) -> None:
    too_big = "stages.pretrain.recipe.data.batch_size=1000"
    submit("dag", "graph.yaml", too_big, "--executor", "slurm")
    answer = submit("dag", "graph.yaml", too_big, "--executor", "slurm", "--wait", check=False)
    assert answer.returncode == 2
    assert "stage pretrain failed: " in answer.stderr
    assert "not run because of that: trunk, features, knn, linear" in answer.stderr
    found = states(submit, too_big)
    assert found == {
        "train": "finished",
        "test": "finished",
        "pretrain": "failed",
        **dict.fromkeys(("trunk", "features", "knn", "linear"), "cancelled"),
    }
    before = starts(tmp_path)

    two = [submit.start("dag", "graph.yaml", "--executor", "slurm", "--wait") for _ in range(2)]
    for process in two:
        assert process.wait(timeout=300) == 0, process.stdout and process.stdout.read()
    assert set(states(submit).values()) == {"finished"}
    ran = {name: count - before.get(name, 0) for name, count in starts(tmp_path).items()}
    assert {name.split("-")[0]: count for name, count in ran.items() if count} == dict.fromkeys(
        ("pretrain", "export", "features", "knn", "linear"), 1
    )

    last = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true").stdout
    assert submit("dag", "graph.yaml", "--executor", "slurm").stdout.count("finished") == len(STAGES)
    next_one = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true").stdout
    assert int(next_one) == int(last) + 1  # nothing was submitted
    submit("dag", "graph.yaml", "--plan", "--picture", "plan.svg")
    assert (tmp_path / "plan.svg").read_text().count("finished") >= len(STAGES)


def test_a_schedule_tunes_the_chosen_checkpoints_of_a_weakly_supervised_run_once_each(
    slurm: SlurmLab, submit: Submitter, tmp_path: Path
) -> None:
    weak = weak_recipe(tmp_path / "weak", train__steps=12, run__checkpoint_every_steps=4, run__keep_last=3)
    (tmp_path / "weak.yaml").write_text(yaml.safe_dump(weak.model_dump(mode="json")))
    submit("pretrain", "--recipe", "weak.yaml", "--executor", "local", "--run", "one")
    evals = tuning_graph(weak.data.root, tmp_path / "evals")
    (tmp_path / "evals.yaml").write_text(yaml.safe_dump(evals, sort_keys=False))
    schedule = ["schedule", str(tmp_path / "evals.yaml"), "--name", "nightly", "--run", "one"]
    # Of steps 4, 8 and 12, the first and the last.
    made = submit(*schedule, "--every", "0 2 * * *", "--steps-apart", "5", "--gpu-hours", "1")
    assert made.stdout.startswith("nightly: 0 2 * * *, by ")
    assert "nightly" in submit("schedule", "list").stdout
    waiting = slurm.run("squeue", "--noheader", "--states=PENDING", "--format=%i %j").stdout.splitlines()
    assert len(waiting) == 1
    file = tmp_path / "runs" / "schedules" / "nightly.json"

    def fire() -> None:
        subprocess.run(
            [sys.executable, "-m", "cluster.slurm.schedule", str(file)],
            cwd=tmp_path,
            env=submit.environment(),
            check=True,
            timeout=200,
        )

    # Two o'clock comes now, and it comes twice.
    job = waiting[0].split()[0]
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    fire()

    def receipts() -> list[Path]:
        return sorted(tmp_path.glob("evals/finetune-*/receipt.json"))

    # What one takes was not known: one began.
    wait_until(lambda: len(receipts()) == 1, "the first checkpoint is evaluated", 200)
    slurm.wait_for_job(job, "COMPLETED", 60)
    fire()
    wait_until(lambda: len(receipts()) == 2, "so is the last", 200)
    steps = [json.loads(path.read_text()) for path in tmp_path.glob("evals/checkpoint-*/receipt.json")]
    assert sorted(receipt["metrics"]["step"] for receipt in steps) == [4, 12]
    logs = [*tmp_path.glob("evals/jobs/*/logs/slurm.log"), *tmp_path.glob("evals/*/logs/slurm.log")]
    assert len(logs) == 7
    assert {log.read_text().count(" slurm attempt ") for log in logs} == {1}

    waiting = slurm.run("squeue", "--noheader", "--states=PENDING", "--format=%j").stdout.split()
    assert len([name for name in waiting if not name.startswith("watch-")]) == 1  # the next night
    submit("schedule", "remove", "nightly")
    wait_until(lambda: slurm.run("squeue", "--noheader").stdout == "", "nothing waits or runs")
    assert submit("schedule", "list").stdout == ""
    assert submit("schedule", "remove", "nightly", check=False).returncode == 2
