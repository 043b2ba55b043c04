"""One rank of a job: `python -m cluster.rank FOLDER/job.json [--end-with-stdin]`, started by an executor.

The rank's place comes from RANK, LOCAL_RANK and WORLD_SIZE, or from what SLURM sets for each task.

Exit status: 0 done, 85 stopped on request and saved, 2 a mistake of the user, 1 anything else. The exception
goes to `FOLDER/errors/rank-N.json`, where the executor finds it.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from cluster.errors import UserError
from cluster.job import PREEMPTED_EXIT_CODE, Job
from cluster.output_trouble import refusal
from cluster.rank.preempt import STOP_SIGNALS, Preempted
from cluster.run.folder import BEGINNING, RunFolder, start_token
from cluster.run.rank_error import is_by_peer
from cluster.run.status import Failure

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the job's function and end the process with its status."""
    atexit.register(gc.freeze)  # what goes with the process is not looked through for garbage first
    _take_place_from_slurm()
    _open_as_many_files_as_allowed()
    job = RunFolder(Path(sys.argv[1]).parent).read_job()
    rank = int(os.environ["RANK"])
    _stop_at_once_until_work_begins(job)
    if RunFolder(job.folder).cancel_requested():  # by somebody whose signal came too early to be heard
        sys.exit(PREEMPTED_EXIT_CODE)
    if "--end-with-stdin" in sys.argv[2:]:
        threading.Thread(target=_die_with_the_launcher, daemon=True).start()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {job.name} [{rank}] %(message)s"
    )
    sys.exit(run(job, rank))


def run(job: Job, rank: int) -> int:
    """Call the function; what it raises is written down, and told by the exit status."""
    try:
        job.resolve()(**job.arguments)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # done: nothing may make a failure of it any more
    except Preempted as stop:
        logger.info("%s", stop)
        if rank == 0:
            RunFolder(job.folder).mark_requeue()
        return PREEMPTED_EXIT_CODE
    except (UserError, PermissionError) as error:
        told = refusal(error) if isinstance(error, PermissionError) else error
        _report(job, rank, told)
        logger.error("%s", told)
        return 2
    except Exception as error:
        _report(job, rank, error)  # before the log: what follows in it may be no more than a peer's death
        logger.exception("failed")
        return 1
    return 0


def _report(job: Job, rank: int, error: Exception) -> None:
    failure = Failure(
        rank=rank,
        type=type(error).__name__,
        message=str(error),
        user_error=isinstance(error, UserError),
        traceback="".join(traceback.format_exception(error)),
        by_peer=is_by_peer(error),
    )
    try:
        RunFolder(job.folder).write_error(f"rank-{rank}", failure)
    except OSError as trouble:  # a full disk may be what it failed of; the log, perhaps, and its status tell
        logger.error("how this rank failed cannot be written down: %s", trouble)


def _take_place_from_slurm() -> None:
    """Name the place of a task of `srun` as torch.distributed names it; and the start, in the log of all."""
    if "SLURM_PROCID" not in os.environ or "RANK" in os.environ:
        return
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items() if ours not in os.environ})
    sys.stderr.write(f"{BEGINNING}{start_token()}\n")


def _open_as_many_files_as_allowed() -> None:
    """Each of a rank's groups has a connection to every other rank: a shell's 1,024 are used up by 249."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_at_once_until_work_begins(job: Job) -> None:
    """Until the work takes the signals over, a request to stop finds nothing that is worth saving.

    Any rank may be the one that hears it: another may be waiting, deaf, for the rest.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        RunFolder(job.folder).mark_requeue()
        os._exit(PREEMPTED_EXIT_CODE)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def _die_with_the_launcher() -> None:
    """Standard input is a pipe whose other end only the launcher holds: end of file means that it is gone.

    The whole process group goes, loader workers included: orphans would write into a run that is resumed.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
