"""Claim: what the launcher adds to a job's start is small: beside bare sbatch and torchrun, same training.

    python benchmarks/slurm_latency.py DATASET [--rounds 3]

Needs root, slurm-wlm and munge: the virtual nodes of the tests' SLURM. From the moment that the submission
has returned to the end of the first training step, 2 nodes of one gloo rank each, the demo recipe with batch
16; the two take turns. The peer's script is `srun torchrun -m cluster.rank RUN/job.json`: the same ranks.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))
from lab import SlurmLab, wait_until
from training import Submitter, Training

BARE = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output={run}/slurm.log
export OMP_NUM_THREADS=1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --output={run}/rank-%t.log {bin}/torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d \\
  --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$MASTER_ADDR:29500 -m cluster.rank {run}/job.json
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, SlurmLab(Path(folder) / "lab") as lab:
        submit = Submitter(lab, Path(folder))
        submit.site()
        words = ["pretrain", "--recipe", "demo", f"data.root={options.dataset.absolute()}", "probe=null"]
        words += ["data.batch_size=16", "train.steps=3", "run.log_every=1", "run.workers=0", "run.device=cpu"]
        ours, theirs = [], []
        for number in range(options.rounds):
            name = f"ours{number}"
            submit(*words, "--executor", "slurm", "--nodes", "2", "--run", name)
            ours.append(first_step(submit.run(name), time.time()))
            lab.wait_idle(120)
            theirs.append(bare(lab, submit, words, f"bare{number}"))
            lab.wait_idle(120)
            print(
                f"round {number}: {ours[-1]:.1f} s, bare sbatch and torchrun {theirs[-1]:.1f} s", flush=True
            )
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"median {statistics.median(ours):.1f} s, {statistics.median(theirs):.1f} s: {ratio:.2f}×")


def bare(lab: SlurmLab, submit: Submitter, words: list[str], name: str) -> float:
    """The same job without this launcher: only its job.json is made by a submission, which is cancelled."""
    lab.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # what is queued now does not start
    submit(*words, "--executor", "slurm", "--nodes", "2", "--run", name)
    submit("cancel", name)
    lab.run("scontrol", "update", "PartitionName=main", "State=UP")
    run = submit.run(name)
    script = run.path / "bare.sbatch"
    script.write_text(BARE.format(run=run.path, bin=Path(sys.executable).parent))
    for trace in ("status.json", "cancelled"):  # of the submission that was not to run
        (run.path / trace).unlink()
    lab.run("sbatch", str(script))
    return first_step(run, time.time())


def first_step(run: Training, submitted: float) -> float:
    """Seconds to the end of the first step, by the rank's own clock."""
    wait_until(lambda: run.rows("timing"), f"the first step of {run.path.name}", 180)
    return float(run.rows("timing")[0]["time"]) - submitted


if __name__ == "__main__":
    main()
