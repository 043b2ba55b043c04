"""Someone outside who looks: beside a training's job a small one, which SLURM starts once that has ended.

`python -m cluster.slurm.watch RUN JOB`. How a run ends, its batch script decides and tells, and then it takes
the watcher out of the queue. Where the script could not, because it was killed, or its node or its disk was
gone, the watcher asks SLURM how the job ended, writes that down, tells of it, and submits the job anew unless
SLURM starts it again by itself. It also tells what the compute nodes had no way out for.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.notify import tell_the_untold
from cluster.run.restarts import Cause
from cluster.run.status import Failure, Status
from cluster.site import Site, read_site
from cluster.slurm.again import submit_anew
from cluster.slurm.command import call, id_in
from cluster.slurm.finish import finish, stop
from cluster.slurm.script import Options, job_name, pattern, sbatch_script, site_options, site_setup
from cluster.slurm.state import NoAnswerError, Seen, ask, find_jobs, shares_nodes
from cluster.slurm.status import ended_without_a_word, job_id, watcher_file, watcher_id
from cluster.slurm.verdict import verdict

logger = logging.getLogger(__name__)

MINUTES = 15
PATIENCE = 600.0  # seconds: a controller may be restarting
PAUSE = 5.0
LOCK_PATIENCE = 60.0  # seconds that somebody else may have the run's lock


def set_watch(run: RunFolder, watched: str) -> None:
    """Queue a watcher of a job; that there is none is said, and changes nothing else."""
    try:
        for trace in (watcher_file(run), run.unwatched):
            trace.unlink(missing_ok=True)
        site = read_site(run.path / "site.yaml")
        script = _script(run, site, watched)
        answer = call(["sbatch", "--parsable"], text=script)
        if answer.returncode != 0:
            raise UserError(f"SLURM does not take it: {answer.stderr.strip()}")
        write_atomically(watcher_file(run), id_in(answer.stdout) + "\n")
    except (OSError, UserError, NoAnswerError) as error:
        told = f"no job looks how job {watched} ends, if its script cannot tell: {error}"
        logger.warning("%s", told)
        with contextlib.suppress(OSError):
            write_atomically(run.unwatched, told + "\n")


def end_watch(run: RunFolder) -> None:
    """Take the watcher out of the queue: there is nothing left for it to do."""
    with contextlib.suppress(OSError, UserError):
        if known := watcher_id(run):
            watcher_file(run).unlink()
            call(["scancel", known])


def _script(run: RunFolder, site: Site, watched: str) -> str:
    fixed: Options = {
        "dependency": f"afterany:{watched}",
        "output": pattern(run.path / "logs") + "/slurm.log",  # which is there, whatever the disk is like
        "propagate": "NONE",
    }
    watch = shlex.join([sys.executable, "-m", "cluster.slurm.watch", str(run.path), watched])
    source = f"export PYTHONPATH={shlex.quote(str(run.path / 'source'))} PYTHONSAFEPATH=1"
    return sbatch_script(
        f"watch-{job_name(run.read_job())}",
        run.path / "logs",
        _place(site) | fixed,
        setup=[*site_setup(site.for_cpu_jobs(), failed='echo "setup failed: $1" >&2'), source],
        command=f"exec {watch}",
    )


def _place(site: Site) -> Options:
    """Where watchers run, and what they get.

    Raises:
        UserError: if there is only room that they would waste: whole nodes.
        NoAnswerError: if SLURM does not say so.
    """
    if site.cpu is None and not shares_nodes(site.partition):
        named = "SLURM's partition" if site.partition is None else f"partition {site.partition}"
        raise UserError(
            f"{named} gives whole nodes, too much for that; name another under `cpu` in the site file"
        )
    small: Options = {"nodes": 1, "ntasks": 1, "cpus-per-task": 1, "mem": "500M", "time": MINUTES}
    # Without a section of their own, what all jobs ask for is meant for nodes of GPUs.
    place = site.for_cpu_jobs() if site.cpu else site.model_copy(update={"constraint": None, "sbatch": {}})
    return small | site_options(place)


def main() -> None:
    """The command of the watcher's job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("watched", help="SLURM's id of the job that has ended")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s watcher %(message)s")
    run = RunFolder(options.run)
    try:
        look(run, options.watched)
    except UserError as error:  # somebody else has the run, or nobody can read what lies there
        logger.error("%s", error)
    tell_the_untold(run)


def look(run: RunFolder, watched: str) -> None:
    """See to the end of a run whose job has ended, unless that is done, or not for us to do."""
    seen = _seen(watched)
    with contextlib.closing(run.lock(patience=LOCK_PATIENCE)):
        status = run.read_status()
        if status.state.ended or status.executor != "slurm" or (status.id or job_id(run)) != watched:
            return  # it has told its end, or something else goes on with the run
        if seen is not None and not seen.state.ended:
            logger.info("SLURM starts job %s again by itself", watched)
            set_watch(run, watched)
            return
        if find_jobs([job_name(run.read_job())]):
            return  # somebody has submitted it, and has not written so yet
        _see_to(run, replace(status, id=watched), seen)


def _see_to(run: RunFolder, status: Status, seen: Seen | None) -> None:
    """Have a run whose batch script could not do so go on, or end."""
    # Of a job that SLURM has forgotten nobody can say that it was not cancelled, and one that could not begin
    # could not the next time.
    over = seen is None or seen.state in (State.CANCELLED, State.COMPLETED) or status.started is None
    if seen is None or over or run.cancel_requested():
        end = ended_without_a_word(run, status, seen)
        stop(run, end, end.state, end.failure, at=run.last_sign())
        return
    found = verdict(run, status, srun=1, stopped=True)
    if found.cause is Cause.LOST and found.failure is None:
        message = f"SLURM ended job {status.id} as {seen.word}, and its batch script could not say why"
        found = replace(found, failure=Failure(rank=None, type="Lost", message=message))
    after = finish(run, status, found, lambda: submit_anew(run, status.id), at=run.last_sign())
    if not after.state.ended:
        set_watch(run, after.id)


def _seen(watched: str) -> Seen | None:
    """How SLURM says that a job ended; None if it has forgotten.

    Raises:
        UserError: if it does not answer.
    """
    deadline = time.monotonic() + PATIENCE
    while (answer := ask([watched])).silence:
        if time.monotonic() > deadline:
            raise UserError(f"nobody knows how job {watched} ended: {answer.silence}")
        time.sleep(PAUSE)
    return answer.seen.get(watched)


if __name__ == "__main__":
    main()
