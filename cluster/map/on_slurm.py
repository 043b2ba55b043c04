"""A function over many tasks, as jobs of SLURM: an array of them.

Tasks and answers are files in a folder that all nodes reach. Each of `parts` jobs does every parts-th task;
answers are its checkpoint. One that is stopped, or has lost its node, starts again with what has no answer: a
task needs no signal handler, for what it had half done is done again.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import Job, Resources, State, import_function, import_name
from cluster.map.tasks import MapTasks, R, T
from cluster.parts import runs_of_parts, submit_parts
from cluster.run.folder import RunFolder
from cluster.run.status import raise_unless_completed
from cluster.site import Site
from cluster.slurm.executor import SlurmExecutor, cancel_jobs
from cluster.slurm.status import settled_statuses
from cluster.wording import several

_POLL_S = 2.0

logger = logging.getLogger(__name__)


def on_slurm(site: Site, *, name: str, parts: int, runs: Path, scratch: Path) -> MapTasks:
    """Jobs of SLURM, which end with this process unless it is killed.

    Args:
        site: the cluster's facts.
        name: what the work is called.
        parts: jobs, on a core each.
        runs: where their folders are made, which `submit status`, `logs` and `cancel` know.
        scratch: a folder that all nodes reach by this name.
    """
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{secrets.token_hex(4)}"

    def map_tasks(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        # A node that was given up may still write there.
        with tempfile.TemporaryDirectory(
            prefix="ingest-tasks-", dir=scratch.resolve(), ignore_cleanup_errors=True
        ) as folder:
            _tasks_file(Path(folder)).write_text(json.dumps(tasks))
            jobs = _jobs(
                f"{stem}-{function.__name__}", import_name(function), folder, min(parts, len(tasks)), runs
            )
            submitted = submit_parts(jobs, SlurmExecutor(site))
            try:
                submitted.refuse_waiting("give fewer --parts")
                logger.info("%s in %s", several(len(jobs), "slurm job"), jobs[0].folder.parent)
                yield from _answers(Path(folder), len(tasks), submitted.runs)
            except BaseException:  # Ctrl-C, too
                with contextlib.suppress(UserError):  # they have ended meanwhile
                    cancel_jobs(submitted.runs)
                raise

    return map_tasks


def task_rank(function: str, folder: str, run: str, part: int, parts: int) -> None:
    """The one rank of a job: calls the function with every parts-th task, from `part` on, without an answer.

    Args:
        function: "package.module:function".
        folder: of the tasks and answers.
        run: the job's folder.
    """
    call, place, job = import_function(function), Path(folder), RunFolder(Path(run))
    try:
        tasks = json.loads(_tasks_file(place).read_text())
    except FileNotFoundError:
        return  # started again when all answers had been taken
    (job.path / "checkpoints").mkdir(exist_ok=True)
    for index in range(part, len(tasks), parts):
        answer = _answer_file(place, index)
        if not answer.exists():
            result = call(tasks[index])
            job.refuse_if_superseded()
            write_atomically(answer, json.dumps(result))
            # A newer name is progress to whoever starts the job again, and renews its budget of restarts.
            write_atomically(job.path / "checkpoints" / "latest", f"task {index}\n")


def _jobs(stem: str, function: str, folder: str, parts: int, runs: Path) -> list[Job]:
    jobs = []
    for part, run in enumerate(runs_of_parts(runs / stem, parts)):
        arguments = {"function": function, "folder": folder, "run": str(run), "part": part, "parts": parts}
        jobs.append(
            Job(
                name=f"{stem}-{run.name}",
                function=import_name(task_rank),
                arguments=arguments,
                resources=Resources(cpus_per_rank=1),
                folder=run,
            )
        )
    return jobs


def _answers(folder: Path, tasks: int, runs: Sequence[RunFolder]) -> Iterator[Any]:
    """Each as soon as it is there, and those before it are."""
    following = 0
    while following < tasks:
        statuses = settled_statuses(runs)  # asked first: an answer that came before an end is seen
        # Listed, not looked up: a network file system may remember for long that a name was not there.
        there = set(os.listdir(folder))  # noqa: PTH208
        while (file := _answer_file(folder, following)).name in there:
            yield json.loads(file.read_text())
            following += 1
        if following < tasks:
            for status in statuses:
                if status.state.ended:
                    raise_unless_completed(status, remedy="run the same command again")
            if all(status.state is State.COMPLETED for status in statuses):
                raise UserError(
                    f"all jobs have ended, and {file} is not there: is --scratch a folder that all nodes and "
                    "this machine reach by the same name?"
                )
            time.sleep(_POLL_S)


def _tasks_file(folder: Path) -> Path:
    return folder / "tasks.json"


def _answer_file(folder: Path, index: int) -> Path:
    return folder / f"answer-{index:06d}.json"
