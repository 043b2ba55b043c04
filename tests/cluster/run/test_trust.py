"""Files that lead to execution are refused where anybody else could have written them."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.errors import UserError
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.trust import LEADS_TO_EXECUTION, refuse_untrusted
from cluster.submit import submit

FILES = (
    "status.json",
    "slurm-job",
    "slurm-watcher",
    "ray.json",
    "job.json",
    "site.yaml",
    "untold.json",
    "source/pipeline/train/loop.py",
    "checkpoints/step-00000001/.metadata",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as its owner left it."""
    for name in FILES:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "run"


def refuse(run: Path, *groups: str) -> None:
    refuse_untrusted(run, LEADS_TO_EXECUTION, groups=groups)


def belongs_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file away; or, where that is for root alone, have it seen so."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1, follow_symlinks=False)
        return
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        found = real(self)
        return os.stat_result([*found[:4], 54321, *found[5:10]]) if self == path else found

    monkeypatch.setattr(Path, "lstat", lstat)


@pytest.mark.parametrize("name", [".", "source", "checkpoints", *FILES])
@pytest.mark.parametrize("how", ["another's", "everybody", "a group"])
def test_S1_what_somebody_else_could_have_written_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    refuse(run)
    path = run / name
    if how == "another's":
        belongs_to_another(path, monkeypatch)
        told = "belongs to user 54321"
    else:
        path.chmod(path.stat().st_mode | (0o002 if how == "everybody" else 0o020))
        monkeypatch.setattr("cluster.run.trust._is_trusted", lambda number, trusted: False)
        told = "may be written by everybody" if how == "everybody" else "may be written by the group"
    with pytest.raises(UserError, match=f"{path} {told}.*--trust goes on with this run"):
        refuse(run)


def test_S1_a_link_is_refused_for_what_it_points_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("{}")
    (tmp_path / "theirs").chmod(0o666)
    (run / "job.json").unlink()
    (run / "job.json").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"job\.json may be written by everybody"):
        refuse(run)


def test_a_folder_that_all_may_write_and_none_may_tidy_is_no_danger(run: Path) -> None:
    run.chmod(0o1777)  # such as one directly in /tmp
    refuse(run)


def test_S1_nothing_is_submitted_where_somebody_else_decides(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the folder that a stage of a graph will have, made by another user before."""
    told = tmp_path / "told"
    (run / "site.yaml").write_text(f"notify: {{command: [sh, -c, 'touch {told}']}}")
    (run / "status.json").unlink()
    job = Job(name="t", function="os:getcwd", arguments={}, resources=Resources(), folder=run)
    run.chmod(0o777)
    with pytest.raises(UserError, match=f"{run} may be written by everybody.*remove it, or have the run in"):
        submit(job, LocalExecutor())
    assert not (run / "logs").exists()
    run.chmod(0o775)  # a group is another matter: where files lead to execution, the commands look at it
    assert submit(job, LocalExecutor()).wait() is State.COMPLETED
    assert not told.exists()  # nobody named a site
    belongs_to_another(run, monkeypatch)
    with pytest.raises(UserError, match=f"{run} belongs to user 54321"):
        submit(job, LocalExecutor())
    assert submit(job, LocalExecutor(), trust=True).wait() is State.COMPLETED


def test_files_that_are_not_there_are_not_asked_for(tmp_path: Path) -> None:
    refuse(tmp_path)


@pytest.mark.parametrize(
    ("own_name", "own_group", "members", "site", "refused"),
    [
        ("ann", 7, [], (), False),  # a group for each user, as many systems make one
        ("ann", 7, ["ann"], (), False),
        ("ann", 7, ["bob"], (), True),
        ("ann", 8, [], (), True),
        ("bob", 7, [], (), True),
        ("bob", 7, ["ann"], ("ann",), False),
        ("bob", 7, ["ann"], ("others",), True),
    ],
)
def test_a_group_is_trusted_if_it_is_the_user_s_alone_or_the_site_file_says_so(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_name: str,
    own_group: int,
    members: list[str],
    site: tuple[str, ...],
    refused: bool,
) -> None:
    entry = SimpleNamespace(gr_name="ann", gr_mem=members)
    monkeypatch.setattr(grp, "getgrgid", lambda number: entry)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name=own_name, pw_gid=own_group))
    monkeypatch.setattr("cluster.run.trust._is_trusted", with_group(7))
    (run / "job.json").chmod(0o664)
    if not refused:
        refuse(run, *site)
        return
    with pytest.raises(UserError, match="may be written by the group ann"):
        refuse(run, *site)


def with_group(number: int) -> Callable[[int, set[str]], bool]:
    """The question as it would be asked of a file of that group."""
    from cluster.run import trust

    asked = trust._is_trusted
    return lambda found, trusted: asked(number, trusted)
