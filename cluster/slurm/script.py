"""The batch script of a job: what sbatch is given, rendered by submitit."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.job import Job
from cluster.rank.process import MALLOC_SETTINGS, OPENMP_SETTINGS
from cluster.site import Site

NOTHING_TO_DO = 3  # exit status of `cluster.slurm.batch begin`: the run is complete already


def render(job: Job, site: Site, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
    """The batch script of a job. Needs no SLURM here.

    Args:
        job, site: what runs, where.
        after: ids of jobs that must complete first; if one fails, this one is cancelled.
        exclude: nodes not to use, besides the site's.
    """
    named = [site.partition, site.account, site.qos, site.constraint]
    refuse_line_breaks([job.folder, *after, *exclude, *site.exclude, *site.sbatch.values(), *named])
    # The renderer is what the public class calls, and the class cannot be had without srun on this machine.
    from submitit.slurm.slurm import _make_sbatch_string

    wants = job.resources
    options: dict[str, Any] = {name: value for name, value in site.sbatch.items() if value is not False}
    options["requeue"] = True
    # Equal names in a row: a second submission of the same work waits, and then finds it done.
    dependencies = [f"afterok:{':'.join(after)}"] if after else []
    options["dependency"] = ",".join([*dependencies, "singleton"])
    options["kill-on-invalid-dep"] = "yes"
    gpus = wants.gpus_per_rank * wants.ranks_per_node
    minutes = wants.minutes or site.minutes
    cpus = wants.cpus_per_rank or site.cpus_per_rank
    # Wait for ever: rank 0 may have much to do when the others are done. Who hangs, the watchdog ends.
    ranks = ["--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--open-mode=append"]
    ranks += ["--output", pattern(job.folder / "logs") + "/rank-%t.log"]
    ranks += [f"--cpus-per-task={cpus}"] if cpus is not None else []  # srun does not take it from the job
    if site.container is not None:
        ranks += [
            f"--container-image={site.container}",
            f"--container-mounts={','.join([str(job.folder), *site.container_mounts])}",
        ]
    text: str = _make_sbatch_string(
        command=shlex.join([sys.executable, "-m", "cluster.rank", str(job.folder / "job.json")]),
        folder=job.folder / "logs",
        job_name=job_name(job),
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        exclude=",".join([*site.exclude, *exclude]) or None,
        nodes=wants.nodes,
        ntasks_per_node=wants.ranks_per_node,
        cpus_per_task=cpus,
        gpus_per_node=gpus or None,
        mem=None if site.memory_gb is None else f"{site.memory_gb}G",
        # Of a short job not more than half: else it would be asked to stop as it starts.
        signal_delay_s=site.signal_seconds if minutes is None else min(site.signal_seconds, 30 * minutes),
        wckey="",
        stderr_to_stdout=True,
        setup=_setup(job, site),
        teardown=["trap '' TERM USR2", f"{_batch('end', job)} --status $status ${{stopped:+--stopped}}"],
        srun_args=ranks,
        additional_parameters=options | {"output": pattern(job.folder / "logs") + "/slurm.log"},
        time=minutes or 0,
    )
    unwanted = ("#SBATCH --wckey", "#SBATCH --time=0")  # submitit has no way to leave these to the site
    lines = [line for line in text.splitlines() if not line.startswith(unwanted)]
    command = next(index for index, line in enumerate(lines) if line.startswith("srun "))
    lines.insert(command + 1, "status=$?")
    return "\n".join(lines) + "\n"


def job_name(job: Job) -> str:
    """What SLURM calls the job: like its run, and not like a run of that name in another folder."""
    return f"{job.name}-{hashlib.sha256(str(job.folder.absolute()).encode()).hexdigest()[:8]}"


def _setup(job: Job, site: Site) -> list[str]:
    """What the script does before the ranks start."""
    lines = ["trap '' TERM USR2"]  # what is ignored stays ignored in the commands below
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    settings = dict(site.environment) | {"PYTHONUNBUFFERED": "1"}
    if job.resources.gpus_per_rank == 0:
        settings = MALLOC_SETTINGS | OPENMP_SETTINGS | settings
    # The run's own source, and not what happens to lie in the working directory.
    settings |= {"PYTHONPATH": str(job.folder / "source"), "PYTHONSAFEPATH": "1"}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    if (cpus := job.resources.cpus_per_rank or site.cpus_per_rank) is not None:
        lines.append(f"export OMP_NUM_THREADS={cpus}")
    lines += [
        "export SUBMIT_START=${SLURM_RESTART_COUNT:-0}",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + SUBMIT_START) % 12000))",
        _batch("begin", job),
        f"case $? in 0) ;; {NOTHING_TO_DO}) exit 0 ;; *) exit 1 ;; esac",
        "# Only noted: this shell is to look at how the ranks end.",
        "trap 'stopped=1' TERM; trap : USR2",
    ]
    return lines


def _batch(moment: str, job: Job) -> str:
    return shlex.join([sys.executable, "-m", "cluster.slurm.batch", moment, str(job.folder)])


def pattern(folder: Path) -> str:
    """A path for sbatch and srun, to which % begins a replacement."""
    return str(folder).replace("%", "%%")


def refuse_line_breaks(values: Sequence[object]) -> None:
    """An #SBATCH line is a comment to the shell, and ends with the line.

    Raises:
        UserError: if one of the values would end it early.
    """
    for value in values:
        if re.search(r"[\n\r\0]", str(value)):
            raise UserError(f"{str(value)!r} has a line break in it, and cannot stand in a batch script")
