"""Commands on a timetable: a `scrontab` entry, or where there is none a SLURM job that queues its successor.

A schedule is one file, `{folder}/{name}.json`. Firing it is `python -m cluster.slurm.schedule FILE`: with
scrontab SLURM fires it; without, it is a job that first queues the next firing and then runs the command.
What the command does must be harmless when done twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from cronsim import CronSim, CronSimError

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.site import LINE_BREAK, Site
from cluster.slurm.command import call
from cluster.slurm.script import Options, memory, pattern, sbatch_script, site_options, site_setup
from cluster.typed_json import read_record

logger = logging.getLogger(__name__)

FIRING_MINUTES = 60  # a firing submits jobs, or evaluates one small model; it is no training


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A command and when to run it.

    Attributes:
        name: letters, digits, dash and underscore.
        every: five fields of cron, in the time zone of the machine that fires.
        command: program and arguments.
        directory: where the command runs.
        fired_by: scrontab, or a job that queues its successor.
    """

    name: str
    every: str
    command: tuple[str, ...]
    directory: str
    fired_by: Literal["scrontab", "sbatch"]

    def next(self, after: datetime) -> datetime:
        """The first time of firing after a time."""
        return next(CronSim(self.every, after))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The schedule of a file that `install` wrote.

        Raises:
            UserError: if it is damaged.
        """
        return read_record(cls, path, remedy=_remedy(path))


def _remedy(path: Path) -> str:
    return f"`submit schedule remove {path.stem}`, and give it again"


def install(folder: Path, name: str, every: str, command: Sequence[str], site: Site) -> Schedule:
    """Have a command fired from now on; a schedule of the same name is replaced.

    Raises:
        UserError: if the name or the times are wrong, or there is no SLURM here.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"{name!r} cannot name a schedule: use letters, digits, '-' and '_'")
    every = " ".join(every.split())
    try:
        if len(every.split()) != 5:
            raise CronSimError("five fields are needed")
        CronSim(every, datetime.now())
    except CronSimError as error:
        raise UserError(
            f"{every!r} is no time of cron ({error}); every night at two is '0 2 * * *'"
        ) from None
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no SLURM here to fire a schedule: use cron, with `submit evaluate` as its command"
        )
    fired_by: Literal["scrontab", "sbatch"] = "scrontab" if _scrontab() is not None else "sbatch"
    schedule = Schedule(
        name=name, every=every, command=tuple(command), directory=str(Path.cwd()), fired_by=fired_by
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    script = _script(path, site)
    if any(LINE_BREAK.search(word) for word in [*command, str(path.absolute())]):
        raise UserError(f"{shlex.join(command)} has a line break in it, and cannot be put on a timetable")
    if path.is_file():
        remove(folder, name)
    write_atomically(folder / f"{name}.site.json", site.model_dump_json(indent=2), private=True)
    write_atomically(path, json.dumps(asdict(schedule), indent=2) + "\n")
    try:
        if fired_by == "scrontab":
            write_atomically(folder / f"{name}.sbatch", script, private=True)
            _write_scrontab([*_other_lines(path), *_entry(path, schedule, script)])
        else:
            queue_next(path)
    except UserError:
        for file in (path, folder / f"{name}.site.json", folder / f"{name}.sbatch"):
            file.unlink(missing_ok=True)
        raise
    return schedule


def installed(folder: Path) -> list[Schedule]:
    """All schedules, by name; one whose file is damaged is left out, and told of."""
    schedules = []
    for name in _names(folder):
        try:
            schedules.append(Schedule.read(folder / f"{name}.json"))
        except UserError as error:
            logger.warning("%s", error)
    return schedules


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json") if not path.stem.endswith(".site"))


def remove(folder: Path, name: str) -> None:
    """Fire it no more. What it has started goes on.

    Raises:
        UserError: if there is no such schedule.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(_names(folder)) or "none"
        raise UserError(f"there is no schedule {name!r} in {folder}; there are: {there}")
    if _is_in_scrontab(path):
        _write_scrontab(_other_lines(path))
    path.unlink()  # before the queue is looked at: a firing that is going on finds nothing to queue
    for job in _waiting(path):
        call(["scancel", job])
    for kind in ("site.json", "sbatch"):
        (folder / f"{name}.{kind}").unlink(missing_ok=True)


def _is_in_scrontab(path: Path) -> bool:
    try:
        return Schedule.read(path).fired_by == "scrontab"
    except UserError:  # its file is damaged; its entry has to go all the same
        return _mark(path) in (_scrontab() or "").splitlines()


def queue_next(path: Path) -> None:
    """Queue the firing after now, unless it is queued already."""
    if not path.is_file() or _waiting(path):
        return
    schedule = Schedule.read(path)
    site = read_record(Site, path.parent / f"{schedule.name}.site.json", remedy=_remedy(path))
    when = schedule.next(datetime.now())
    script = path.parent / f"{schedule.name}.sbatch"
    write_atomically(script, _script(path, site), private=True)
    answer = call(["sbatch", "--parsable", f"--begin={when:%Y-%m-%dT%H:%M:%S}", str(script)])
    if answer.returncode != 0:
        raise UserError(f"SLURM refused the schedule {schedule.name}: {answer.stderr.strip()}")
    logger.info("next firing of %s: %s, job %s", schedule.name, when, answer.stdout.strip())


def fire(path: Path) -> int:
    """Run the command of a schedule, after the next firing has been queued: its failure ends no schedule.

    Returns:
        The command's exit status; 0 if the schedule is gone.
    """
    if not path.is_file():
        logger.info("%s was removed: nothing to do", path)
        return 0
    schedule = Schedule.read(path)
    if schedule.fired_by == "sbatch":
        try:
            queue_next(path)
        except UserError as error:  # tried once more below
            logger.warning("%s", error)
    began = time.monotonic()
    status = subprocess.run(schedule.command, cwd=schedule.directory, check=False).returncode
    logger.info("%s ended with status %d after %.0f s", schedule.name, status, time.monotonic() - began)
    if schedule.fired_by == "sbatch":
        queue_next(path)
    return status


def _job_name(path: Path) -> str:
    """Names all firings of one schedule, and of no other with its name in another folder."""
    return f"schedule-{path.stem}-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"


def _waiting(path: Path) -> list[str]:
    """Ids of the firings that wait for their time."""
    answer = call(
        ["squeue", "--noheader", "--me", "--states=PENDING", f"--name={_job_name(path)}", "--format=%i"]
    )
    return [job for job in answer.stdout.split() if job != os.environ.get("SLURM_JOB_ID")]


def _script(path: Path, site: Site) -> str:
    """The batch script of a firing."""
    where = site.for_cpu_jobs()
    own: Options = {"time": FIRING_MINUTES}
    if site.cpu is not None:  # else it is of nodes that a firing does not need whole
        own |= {"mem": memory(where)}
    fixed: Options = {
        "output": pattern(path.absolute().parent) + f"/{path.stem}.log",
        "open-mode": "append",
    }
    firing = shlex.join([sys.executable, "-m", "cluster.slurm.schedule", str(path.absolute())])
    return sbatch_script(
        _job_name(path),
        path.absolute().parent,
        own | site_options(where) | fixed,
        setup=site_setup(where, failed='echo "setup failed: $1" >&2'),
        command=f"exec {firing}",
    )


def _entry(path: Path, schedule: Schedule, script: str) -> list[str]:
    """The lines of a scrontab entry; the mark says whose they are."""
    command = shlex.join(["bash", str(path.absolute().with_suffix(".sbatch"))])
    # No shell submits what scrontab fires: there is nothing to inherit.
    lines = [line for line in script.split("\n") if line.startswith("#SBATCH ")]
    options = [line for line in lines if not line.startswith("#SBATCH --export=")]
    return [
        _mark(path),
        *(line.replace("#SBATCH", "#SCRON", 1) for line in options),
        f"{schedule.every} {command}",
        f"{_mark(path)} end",
    ]


def _mark(path: Path) -> str:
    return f"# {_job_name(path)}"


def _scrontab() -> str | None:
    """This user's scrontab; None where there is no such thing."""
    if shutil.which("scrontab") is None:
        return None
    answer = call(["scrontab", "-l"])
    if answer.returncode == 0:
        return answer.stdout
    # "no crontab for ..." is an empty one; anything else (disabled, say) means that there is none to be had.
    return "" if "no crontab" in answer.stdout + answer.stderr else None


def _other_lines(path: Path) -> list[str]:
    """The scrontab without this schedule's lines."""
    text = _scrontab()
    if text is None:  # writing now would take every other entry away
        raise UserError("scrontab does not show its entries: `scrontab -l` says why")
    lines, ours = [], False
    for line in text.splitlines():
        if line == _mark(path):
            ours = True
        if not ours:
            lines.append(line)
        if line == f"{_mark(path)} end":
            ours = False
    return lines


def _write_scrontab(lines: Sequence[str]) -> None:
    answer = call(["scrontab", "-"], text="\n".join([*lines, ""]))
    if answer.returncode != 0:
        raise UserError(f"scrontab refused the entry: {answer.stderr.strip()}")


def main() -> None:
    """Fire a schedule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("schedule", type=Path)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(fire(parser.parse_args().schedule))


if __name__ == "__main__":
    main()
