"""Having SLURM start a job again: by its own requeue, or by submitting the job's script anew."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, replace

from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.slurm.command import call, id_in
from cluster.slurm.script import script_file
from cluster.slurm.state import NoAnswerError, from_controller, waiting_for

logger = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds: a controller may be restarting
PAUSE = 10.0
# A no of the controller's. All else may be said by one that cannot be reached.
REFUSED = re.compile(r"disabled|denied|not permitted|invalid", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Again:
    """What came of it.

    Attributes:
        job: SLURM's id of the job that goes on; empty if none does.
        why: why none does.
        answered: whether SLURM has said so, or was silent.
        cancelled: somebody has cancelled the job meanwhile.
    """

    job: str = ""
    why: str = ""
    answered: bool = True
    cancelled: bool = False


def start_again(run: RunFolder, job: str, *, start: int) -> Again:
    """Have SLURM start the job again whose batch script this is, or another one like it.

    Args:
        start: which start of the job this is.
    """
    again = requeue(job, start=start)
    if again.job or again.cancelled or not again.answered:
        return again
    logger.warning("SLURM does not requeue job %s (%s): its script is submitted anew", job, again.why)
    anew = submit_anew(run, job)
    if not anew.job:
        return replace(anew, why=f"{again.why}; and to submit it anew was refused: {anew.why}")
    return anew


def requeue(job: str, *, start: int) -> Again:
    """The same job, with its place among those that wait for it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            seen = from_controller(job)
            if seen is not None and seen.state is State.CANCELLED:  # a requeue would undo that
                return Again(cancelled=True)
            if seen is not None and (seen.state is State.PENDING or (seen.restarts or 0) > start):
                return Again(job=job)  # SLURM is at it already
            answer = call(["scontrol", "requeue", job])
            if answer.returncode == 0:
                return Again(job=job)
            why = answer.stderr.strip()
            if REFUSED.search(why):
                return Again(why=why)
        except (NoAnswerError, UserError) as error:
            why = str(error) or "its controller does not answer"
        if time.monotonic() > deadline:
            logger.error("SLURM does not start job %s again: %s", job, why)
            return Again(why=why, answered=False)
        logger.warning("SLURM does not start job %s again yet: %s", job, why)
        time.sleep(PAUSE)


def submit_anew(run: RunFolder, old: str) -> Again:
    """A new job from the script of an old one, which what waits for the old one waits for from now on.

    It starts after the old one has ended, and in the same budgets: to the run it is one more attempt. Of an
    array the one task is submitted.
    """
    try:
        job = run.read_job()
        # What the old one waited for is done, and SLURM may know it no more. Other tasks have its name, too.
        words, task = ["--dependency=singleton"], ""
        if job.task is not None:
            words, task = (
                [f"--dependency=afterany:{old}", f"--array={job.task.number}"],
                f"_{job.task.number}",
            )
        answer = call(["sbatch", "--parsable", *words, str(script_file(job))])
        if answer.returncode != 0:
            return Again(why=answer.stderr.strip() or "no reason given")
        new = id_in(answer.stdout) + task
    except UserError as error:
        return Again(why=str(error))
    _take_along(old, new)
    return Again(job=new)


def _take_along(old: str, new: str) -> None:
    try:
        for job, dependency in waiting_for(old).items():
            moved = re.sub(rf"\bafterok:{old}\b", f"afterok:{new}", dependency)
            answer = call(["scontrol", "update", f"JobId={job}", f"Dependency={moved}"])
            if answer.returncode != 0:
                logger.warning("job %s goes on waiting for job %s: %s", job, old, answer.stderr.strip())
    except (NoAnswerError, UserError) as error:
        logger.warning("what waits for job %s does not wait for job %s: %s", old, new, error)
