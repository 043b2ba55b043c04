"""A training that hangs is ended by its watchdog, and goes on when it is started again."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny_training import make_dataset, make_values

from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.submit import submit


def stop_a_rank_at(folder: Path, step: int) -> None:
    """SIGSTOP to rank 1, as a machine that dies slowly would."""
    deadline = time.monotonic() + 120
    progress = folder / "progress.json"
    while not (progress.is_file() and json.loads(progress.read_text())["step"] >= step):
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    ranks = [child for child in living if "cluster.rank" in child.cmdline()]
    os.kill(next(rank.pid for rank in ranks if rank.environ()["RANK"] == "1"), signal.SIGSTOP)


def make_job(data: Path, folder: Path, *, hang_seconds: float, ranks: int) -> Job:
    values = make_values(data, train__steps=15, run__hang_seconds=hang_seconds)
    return Job(
        name="tiny",
        function="pipeline.train.loop:run_pretrain",
        arguments={"recipe": values, "folder": str(folder)},
        resources=Resources(ranks_per_node=ranks, cpus_per_rank=1),
        folder=folder,
    )


@pytest.mark.slow
def test_a_stopped_rank_ends_the_training_which_then_goes_on(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", make_dataset(tmp_path)
    blow = threading.Thread(target=stop_a_rank_at, args=(folder, 6))
    blow.start()
    # More than a step takes on a machine that does much else.
    assert submit(make_job(data, folder, hang_seconds=4.0, ranks=2), LocalExecutor()).wait() is State.FAILED
    blow.join()
    run = RunFolder(folder)
    failure = run.status().failure
    assert failure is not None
    assert (failure.type, failure.rank) == ("Hang", 1)
    assert re.search(r"rank 1 for \d+ s after step \d+ \(stopped, state T\)", failure.message)
    for rank in range(2):
        stacks = (folder / "stacks" / f"rank-{rank}.txt").read_text()
        assert "pipeline/train/loop.py" in stacks and "in train" in stacks
    assert (
        submit(make_job(data, folder, hang_seconds=300.0, ranks=1), LocalExecutor()).wait() is State.COMPLETED
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert not list((folder / "errors").iterdir())
