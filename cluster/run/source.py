"""The source that a run was submitted with: kept in the run folder, so that a restart days later runs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

from cluster.atomic_file import write_atomically

PACKAGES = ("cluster", "ingest", "pipeline", "configs")


def snapshot_source(run: Path) -> Path:
    """Copy the installed packages to `{run}/source`, with the commit and what differs from it.

    Returns:
        The folder to put on PYTHONPATH.
    """
    folder, temporary = run / "source", run / ".source"
    _copy_source(temporary)
    _clear(folder)
    temporary.rename(folder)
    return folder


def share_source(folder: Path) -> Path:
    """The same for many runs below a folder: `{folder}/source-DIGEST`, which is left as it is for as long as
    any of them may be started again.
    """
    temporary = folder / f".source-{secrets.token_hex(4)}"
    digest = hashlib.sha256()
    try:
        _copy_source(temporary)
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            name = f"{path.relative_to(temporary)}\0{path.stat().st_size}\0"
            digest.update(name.encode() + path.read_bytes())
        shared = folder / f"source-{digest.hexdigest()[:12]}"
        if not shared.is_dir():
            with contextlib.suppress(OSError):  # another submission was quicker
                temporary.rename(shared)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shared


def link_source(run: Path, shared: Path) -> None:
    """Have a run start from the source that it shares with those beside it."""
    _clear(run / "source")
    (run / "source").symlink_to(os.path.relpath(shared, run))


def _copy_source(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(_home(package), folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    write_atomically(folder / "version.json", json.dumps(source_version(), indent=2) + "\n")
    if (root := _checkout()) is not None:
        write_atomically(folder / "uncommitted.diff", _git(root, "diff", "--no-ext-diff", "HEAD"))


def _clear(folder: Path) -> None:
    """Remove a folder, or a link to one."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def source_version() -> dict[str, Any]:
    """The package's version and, in a git checkout, the commit and whether files differ from it."""
    kept = Path(__file__).parents[2] / "version.json"  # this very code is a snapshot
    if kept.is_file():
        version: dict[str, Any] = json.loads(kept.read_text())
        return version
    version = {"version": metadata.version("seer-pipeline"), "commit": None, "dirty": None}
    if (root := _checkout()) is None:
        return version
    commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    return version | {"commit": commit.strip(), "dirty": bool(status.strip())}


def _checkout() -> Path | None:
    """The git checkout that this code lies in, if git is here and trusts it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        _git(root, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return root


def _home(package: str) -> Path:
    found = util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    return done.stdout.decode(errors="replace")  # a changed file may be in any encoding
