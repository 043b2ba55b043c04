"""One work in many parts on SLURM: a run for each; for all one source, and as few arrays as it takes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

from cluster.errors import AlreadyRunning, Refused, UserError
from cluster.job import Job, State, Task
from cluster.run.folder import RunFolder
from cluster.run.source import link_source, share_source
from cluster.run.status import Status, why
from cluster.run.trust import refuse_untrusted
from cluster.slurm.executor import SlurmExecutor, array_limit
from cluster.slurm.script import Array, unique_name
from cluster.slurm.status import job_file, job_id, settled_statuses
from cluster.slurm.watch import end_watch
from cluster.submit import OTHERS, SBATCH_PATIENCE, prepare, restore
from cluster.wording import several

OPEN_FILES = 256  # besides the locks


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that SLURM has.

    Attributes:
        run: its folder; `submit status`, `logs` and `cancel` know it.
        id: SLURM's, such as 17_4: the fourth of array 17.
        new: it was submitted just now; else it was going on.
    """

    run: RunFolder
    id: str
    new: bool


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What has come of parts that were to be queued.

    Attributes:
        parts: those that SLURM has, in their order.
        waiting: those that it did not take; `refusal` is why.
    """

    parts: Sequence[Part]
    waiting: Sequence[RunFolder] = ()
    refusal: str = ""

    @property
    def runs(self) -> list[RunFolder]:
        """Those of the parts that SLURM has."""
        return [part.run for part in self.parts]

    def refuse_waiting(self, remedy: str) -> None:
        """Raise if some wait, and say which."""
        if self.waiting:
            names = [run.path.name for run in self.waiting]
            told = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            raise UserError(
                f"SLURM has {several(len(self.parts), 'part')}, and took no more: {self.refusal}; "
                f"{several(len(names), 'part')} of {self.waiting[0].path.parent} wait, {told}: {remedy}"
            )


def runs_of_parts(folder: Path, parts: int) -> list[Path]:
    """Where the runs of so many parts are: side by side in the folder of the work, as in `07-of-20`."""
    width = len(str(parts))
    return [folder.absolute() / f"{part + 1:0{width}d}-of-{parts}" for part in range(parts)]


def submit_parts(jobs: Sequence[Job], executor: SlurmExecutor) -> Submitted:
    """Queue jobs that differ in their arguments alone, unless they go on already.

    SLURM is asked once about all of them. Where it takes only so many, the first are queued.

    Args:
        jobs: in folders that `runs_of_parts` has named.

    Raises:
        UserError: if SLURM could never run such a job or does not answer, or others decide on what is in a
            folder.
    """
    jobs = [replace(job, directory=Path.cwd()) for job in jobs]
    executor.refuse_impossible(jobs[0])
    folder = jobs[0].folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *(job.folder for job in jobs if job.folder.is_dir())):
        refuse_untrusted(path, (), groups=None, remedy=OTHERS)
    runs = {job.folder: RunFolder.create(job.folder) for job in jobs}
    with _locked([*runs.values()]):
        going = _going([*runs.values()])
        waiting = [job for job in jobs if job.folder not in going]
        taken, refusal = _queue(waiting, executor, folder) if waiting else (0, "")
        late = {job.folder for job in waiting[taken:]}
        parts = [
            Part(run=run, id=job_id(run), new=path not in going)
            for path, run in runs.items()
            if path not in late
        ]
    return Submitted(parts=parts, waiting=[runs[path] for path in runs if path in late], refusal=refusal)


@contextlib.contextmanager
def _locked(runs: Sequence[RunFolder]) -> Iterator[None]:
    """Hold the locks of all: nobody else is to submit one of them meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, len(runs) + OPEN_FILES)), hard))
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(contextlib.closing(run.lock(patience=SBATCH_PATIENCE)))
        yield


def _going(runs: Sequence[RunFolder]) -> set[Path]:
    """The folders of those that have not ended."""
    before = [run for run in runs if run.status_before() is not None]
    statuses = settled_statuses(before, locked=True)
    for run, status in zip(before, statuses, strict=True):
        if status.state is State.UNKNOWN:
            raise AlreadyRunning(f"the run in {run.path} may be going on: {why(status)}")
    return {run.path for run, status in zip(before, statuses, strict=True) if not status.state.ended}


def _queue(jobs: Sequence[Job], executor: SlurmExecutor, folder: Path) -> tuple[int, str]:
    """Queue jobs until SLURM takes no more.

    Returns:
        How many of them it took, and why not more.
    """
    arrays = _arrays(jobs, folder)
    link = partial(link_source, shared=share_source(folder))
    before: dict[Path, Status | None] = {}
    taken, in_question, refusal = 0, 0, ""
    try:
        for _, members in arrays:
            for job in members:
                run = RunFolder(job.folder)
                before[job.folder] = run.status_before()
                pending = prepare(run, job, executor, before[job.folder], snapshot=link)
                job_file(run).unlink(missing_ok=True)
                end_watch(run)  # of one that was submitted anew, alone
                run.write_status(pending)
        for array, members in arrays:
            first, size = taken, len(members)
            while size and taken < first + len(members):
                some = members[taken - first :][:size]
                in_question = len(some)
                try:
                    executor.start_array(some, replace(array, numbers=_ranges(some)))
                    taken += len(some)
                except Refused as error:  # so many at a time, or so many more
                    refusal, size = str(error), size // 2
                in_question = 0
            if not size:
                break
    finally:  # where sbatch did not answer, they may be in the queue
        for job in jobs[taken + in_question :]:
            if job.folder in before:
                restore(RunFolder(job.folder), before[job.folder])
    return taken, refusal


def _arrays(jobs: Sequence[Job], folder: Path) -> list[tuple[Array, list[Job]]]:
    """The jobs as tasks of as few arrays as it takes: of a thousand, where SLURM numbers them below 1,001."""
    last, limit = int(jobs[0].folder.name.rpartition("-")[2]), array_limit()
    width = len(_number(jobs[0]))
    digits = width if last < limit else max(1, len(str(limit)) - 1)
    found = []
    for ahead, alike in groupby(jobs, key=lambda job: _number(job)[:-digits]):
        name = unique_name(f"{folder.name}-{ahead}" if ahead else folder.name, folder)
        members = [replace(job, task=Task(array=name, number=int(_number(job)[-digits:]))) for job in alike]
        behind = members[0].folder.name.removeprefix(_number(members[0]))
        array = Array(name=name, numbers="", folder=folder, ahead=ahead, digits=digits, behind=behind)
        found.append((array, members))
    return found


def _number(job: Job) -> str:
    return job.folder.name.partition("-")[0]


def _ranges(jobs: Sequence[Job]) -> str:
    """The numbers of tasks, as sbatch takes them: 3,5-9."""
    numbers = [job.task.number for job in jobs if job.task is not None]
    firsts = [n for before, n in pairwise([-2, *numbers]) if n != before + 1]
    lasts = [n for n, after in pairwise([*numbers, numbers[-1] + 2]) if after != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
