"""The checkpoints of a run as they lie on the disk: which there are, whether they are whole, what is in them.

RUN/checkpoints/step-00000123/   *.distcp, .metadata   every tensor (torch.distributed.checkpoint)
                                 state.json            the rest: step, loader, recipe digest
                                 manifest.json         bytes and sha256 of every other file
RUN/checkpoints/latest           the name of the newest

The sums are taken when a checkpoint is written. When a stage of a graph ends, its receipt repeats them, and
every file is looked for, with its size; what a file holds is compared when it is read: to go on, or to export
a trunk.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import UserError
from cluster.host import node_name
from cluster.shared_folder import appears

if TYPE_CHECKING:  # what checkpoints there are can be seen without torch
    from torch import Tensor

METHOD, OPTIMIZER = "method.", "optimizer."
BROKEN = "broken-"  # what the name of one that was set aside begins with
WAITS = (1.0, 3.0, 10.0)  # seconds before a file is tried again: a server restarts, a node's list is old
T = TypeVar("T")
_NAME = re.compile(r"step-(\d{8,})")


def newest_first(folder: Path) -> list[Path]:
    """The published checkpoints of a `checkpoints` folder."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True
    )


def published(folder: Path) -> list[Path]:
    """The same, with the one that `latest` names: the node that saved it may have been another."""
    found = newest_first(folder)
    with contextlib.suppress(FileNotFoundError):
        last = folder / (folder / "latest").read_text().strip()
        expected = _NAME.fullmatch(last.name) and last not in found
        if expected and not any(folder.glob(f"{BROKEN}{last.name}-*")) and appears(last):
            found.append(last)
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(run_folder: Path) -> Path | None:
    """The newest published checkpoint of a run."""
    return next(iter(newest_first(run_folder / "checkpoints")), None)


def newest(run_folder: Path) -> Path:
    """The same of a run that has to have one.

    Raises:
        UserError: if it has none, or there is no such run.
    """
    if (found := latest(run_folder)) is None:
        there = "holds no checkpoint" if run_folder.is_dir() else "is no folder"
        raise UserError(f"{run_folder} {there}; give the folder of a run that has saved one")
    return found


def broken_file(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first file that differs from the manifest, with what is wrong; None if there is none.

    Args:
        share: (i, n) looks at every n-th file from the i-th on.

    Raises:
        UserError: if a file cannot be read, which says nothing of what it holds.
    """
    from pipeline.checkpoint.writer import digest

    return _first_unlike(checkpoint, share=share, look=digest)


def manifest_sums(run_folder: Path) -> dict[Path, str]:
    """sha256 of the files of a run's checkpoints, from the manifests; only their sizes are looked at.

    Raises:
        UserError: if a file is missing, or has another size.
    """
    sums: dict[Path, str] = {}
    for checkpoint in newest_first(run_folder / "checkpoints"):
        if broken := _first_unlike(checkpoint, look=lambda path: {"bytes": path.stat().st_size}):
            raise UserError(
                f"checkpoint {checkpoint} is broken ({broken}): remove it and give the same command again, "
                "which goes on from the newest of the others"
            )
        sums |= {checkpoint / name: entry["sha256"] for name, entry in _manifest(checkpoint).items()}
    return sums


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    from pipeline.checkpoint.writer import vouched

    return {
        name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in vouched(checkpoint).items()
    }


def _first_unlike(
    checkpoint: Path, *, look: Callable[[Path], dict[str, Any]], share: tuple[int, int] = (0, 1)
) -> str | None:
    """The first file of which `look` sees anything but what the manifest says."""
    try:
        files = _patiently(_manifest, checkpoint)
    except FileNotFoundError:
        return "manifest.json is missing"
    except OSError as error:
        raise _unreadable(checkpoint / "manifest.json", error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read: {error}"
    for name in (".metadata", "state.json"):
        if name not in files:  # what is read must be what the manifest vouches for
            return f"{name} is not in the manifest"
    for name in sorted(files)[share[0] :: share[1]]:
        try:
            if files[name] | _patiently(look, checkpoint / name) != files[name]:
                return f"{name} is not as it was written"
        except (FileNotFoundError, IsADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            raise _unreadable(checkpoint / name, error) from error
    return None


def _patiently(look: Callable[[Path], T], path: Path) -> T:
    for wait in WAITS:
        try:
            return look(path)
        except IsADirectoryError:
            raise
        except OSError:
            time.sleep(wait)
    return look(path)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read on {node_name()} ({error.strerror or error}), which says nothing of what it "
        "holds, so nothing was changed: give the same command again once that node reads it, or without it"
    )


def read_tensors(checkpoint: Path, *, prefix: str) -> dict[str, Tensor]:
    """Some of the method's tensors, on the CPU, in one process; for example with prefix "trunk.".

    Args:
        checkpoint: whoever's: see `pipeline.checkpoint.metadata`.
        prefix: of the names in the method's state; left out of the names returned.

    Raises:
        UserError: if there is no whole checkpoint, or it holds something else than tensors.
    """
    import torch

    from pipeline.checkpoint.metadata import TensorReader

    if not (checkpoint / "manifest.json").is_file():
        raise UserError(f"{checkpoint} is not a checkpoint: it has no manifest.json")
    if broken := broken_file(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is broken: {broken}; use an older one")
    reader = TensorReader(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.tensors.items()
        if name.startswith(METHOD + prefix)
    }
    reader.load(tensors)
    return {name.removeprefix(METHOD + prefix): tensor for name, tensor in tensors.items()}
