"""Claim: whatever befalls a training on SLURM, its numbers are those of an undisturbed one; and how soon.

    python benchmarks/slurm_faults.py DATASET [--steps 60]

Needs root, slurm-wlm and munge: the four virtual nodes of the tests' SLURM. The demo recipe, batch 96, on 3
nodes of one gloo rank each, compared row by row with the same training on this machine. One run suffers, one
after the other: preemption by a job of higher priority, `scontrol requeue`, a node killed, a node's network
cut, a rank stopped (SIGSTOP). Another reaches its time limit of two minutes again and again. Prints, for each
fault, the seconds to the next training step, and the cause that was found.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))
from lab import SlurmLab
from training import Submitter, Training

NODES = 3
STEPS_BETWEEN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only-limit", action="store_true", help="the time limit, and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, SlurmLab(Path(folder) / "lab") as lab:
        submit = Submitter(lab, Path(folder))
        submit.site()
        words = ["pretrain", "--recipe", "demo", f"data.root={options.dataset.absolute()}", "probe=null"]
        words += ["data.batch_size=96", f"train.steps={options.steps}", "run.log_every=1", "run.workers=0"]
        words += ["run.checkpoint_every_steps=5", "run.hang_seconds=15", "run.device=cpu"]
        submit(*words, "--executor", "local", "--ranks", str(NODES), "--run", "undisturbed")
        expected = submit.run("undisturbed").rows()
        on_slurm = [*words, "--executor", "slurm", "--nodes", str(NODES)]
        limited(submit, on_slurm, expected)
        if options.only_limit:
            return
        submit(*on_slurm, "--run", "disturbed")
        run = submit.run("disturbed")
        for name, fault, mend in faults(lab, run):
            measure(run, name, fault)
            mend()
        compare(run, expected)


def faults(lab: SlurmLab, run: Training) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """What happens, in order: its name, how it is done, and how it is undone once the run goes on."""
    hit = -1

    def last_node() -> int:
        nonlocal hit
        names = lab.run("scontrol", "show", "hostnames", run.status().nodes or "").stdout.split()
        hit = int(names[-1].removeprefix("node"))
        return hit

    def stop_rank() -> None:
        for pid in lab.node_pids(last_node()):
            process = psutil.Process(pid)
            if "cluster.rank" in process.cmdline():
                process.suspend()

    def nothing() -> None:
        pass

    job = run.status().id or (run.path / "slurm-job").read_text().strip()
    return [
        (
            "preempted",
            lambda: lab.run(
                "sbatch",
                "--partition=high",
                "--nodes=4",
                "--exclusive",
                "--output=/dev/null",
                "--wrap",
                "true",
            ),
            nothing,
        ),
        ("scontrol requeue", lambda: lab.run("scontrol", "requeue", job), nothing),
        ("node killed", lambda: lab.kill_node(last_node()), lambda: lab.start_node(hit)),
        ("network cut", lambda: lab.cut_node(last_node()), nothing),
        ("rank stopped", stop_rank, nothing),
    ]


def measure(run: Training, name: str, fault: Callable[[], object]) -> None:
    """Do it in the middle of an attempt, and wait for the first step of the next one."""
    attempt = run.status().attempt or 1
    ends = len(run.restarts())
    run.wait_for_steps(STEPS_BETWEEN, attempt=attempt, seconds=300)
    before, began = run.rows()[-1]["step"], time.time()
    fault()
    run.wait_for_steps(1, attempt=attempt + 1, seconds=300)
    first = min(row["time"] for row in run.rows("timing") if row["time"] > (run.status().started or 0))
    step = next(row["step"] for row in run.rows("timing") if row["time"] == first)
    end = run.restarts()[ends]
    where = f" {end.node}" if end.node else ""
    print(
        f"{name:<18} {first - began:6.1f} s to the next step; {end.cause}{where}; "
        f"it was at step {before}, and went on with {step}",
        flush=True,
    )


def compare(run: Training, expected: list[dict[str, object]]) -> None:
    run.wait("completed", 600)
    causes = [str(restart.cause) for restart in run.restarts()]
    print(f"{run.path.name}: {len(causes) + 1} attempts, ended by: {', '.join(causes)}")
    print(f"{run.path.name}: all {len(expected)} rows equal: {run.rows() == expected}", flush=True)


def limited(submit: Submitter, words: list[str], expected: list[dict[str, object]]) -> None:
    """The same with a time limit that it cannot keep."""
    values = yaml.safe_load(submit.site().read_text())
    limited = submit.folder / "limited.yaml"
    limited.write_text(yaml.safe_dump(values | {"minutes": 2, "signal_seconds": 50}))
    submit(*words, "--run", "limited", "--cluster", str(limited))
    run = submit.run("limited")
    compare(run, expected)


if __name__ == "__main__":
    main()
