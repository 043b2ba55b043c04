"""Whose word leads to execution: files that others could have written are refused, unless told otherwise.

Looking at a run trusts nothing. Who goes on with one, or cancels it, does what its files say: calls the
function of job.json, with the environment of site.yaml, from the code in source/, and signals the process,
the job or the cluster that they name.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.errors import UserError
from cluster.host import user_name

# What a run is cancelled by, and whom its site has told of an end.
CONTROLS = ("status.json", "slurm-job", "slurm-watcher", "ray.json", "job.json", "site.yaml", "untold.json")
CHECKPOINTS = ("checkpoints",)
LEADS_TO_EXECUTION = (*CONTROLS, *CHECKPOINTS, "source")


def refuse_untrusted(
    run: Path,
    names: Iterable[str],
    *,
    groups: Iterable[str] | None,
    remedy: str = "--trust goes on with this run all the same",
) -> None:
    """Refuse a run some of whose files anybody but this user and root could have written.

    Args:
        names: of the files, and of folders, which stand for all that is in them. One that is not there could
            still be put there: the run's own folder is looked at, too. What lies above that is not.
        groups: those whose members are trusted to write them; None: any.
        remedy: what to do about it.

    Raises:
        UserError: names the file, and who could have written it.
    """
    trusted = None if groups is None else {*groups}
    for path in [run, *(path for name in names for path in _all_of(run / name))]:
        if (why := _written_by_others(path, trusted)) is not None:
            raise UserError(
                f"{path} {why}, and would decide what is done as you: look at what it says; {remedy}"
            )


def _all_of(path: Path) -> Iterator[Path]:
    if not os.path.lexists(path):
        return
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


def _written_by_others(path: Path, trusted: set[str] | None) -> str | None:
    """Who else could have written a file, in words; None if nobody could. Of a link, it and its target."""
    for found in (path.lstat(), path.stat()) if path.exists() else (path.lstat(),):
        mine = {0, os.geteuid()}
        if found.st_uid not in mine:
            return f"belongs to {user_name(found.st_uid)}"
        if stat.S_ISLNK(found.st_mode) or _is_sticky_folder(found.st_mode):
            continue  # its bits mean nothing; nobody may replace what is another's
        if found.st_mode & stat.S_IWOTH:
            return "may be written by everybody (chmod o-w)"
        if found.st_mode & stat.S_IWGRP and not _is_trusted(found.st_gid, trusted):
            group = _group(found.st_gid)
            return f"may be written by the group {group} (chmod g-w, or `trusted_groups` in the site file)"
    return None


def _is_sticky_folder(mode: int) -> bool:
    return stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)


def _is_trusted(number: int, trusted: set[str] | None) -> bool:
    """Whether a group is named as trusted, or is this user's own, as many systems make one for each."""
    if trusted is None or _group(number) in trusted:
        return True
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == number and {*group.gr_mem} <= {user.pw_name}


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
