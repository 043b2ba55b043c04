"""CMA's positives during a run: sought at fixed steps, and kept in files, so that a run that goes on seeks
none.

RUN/positives/step-00000300-0a1b2c3d4e5f/   rows-000000000000.npy …   (rows, P), from that row on
                                            manifest.json             what they are of, bytes and sha256 of
                                            each

They are a function of the bank at that step, which no checkpoint has any more: a checkpoint names the folder
that its steps went by, and those that no checkpoint names are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.hang.watchdog import Watchdog
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import newest_first
from pipeline.checkpoint.writer import digest, sync_folder
from pipeline.methods.bank_health import kept_share, mean_cosines, mutual_share, shared_neighbourhoods
from pipeline.methods.method import HasPositives
from pipeline.methods.nearest import nearest_in_two_stages, nearest_of_all, row_type

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class Positives:
    """The positives of one run, as one rank sees them; all ranks call its methods together.

    Args:
        method: whose `positives` are filled in.
        run: the run folder.
        steps_per_epoch: of the optimizer; they are sought before the first step, and again every so many
            epochs.

    Attributes:
        health: numbers of the bank and of the positives, as they were when these were sought.
    """

    def __init__(
        self, method: HasPositives, *, run: Path, world: World, watchdog: Watchdog, steps_per_epoch: float
    ) -> None:
        if method.cma is None:
            raise ValueError("this method has no positives")
        self._method, self._section = method, method.cma
        self._every = max(1, int(method.cma.refresh_epochs * steps_per_epoch))
        self._run, self._folder = run, run / "positives"
        self._world, self._watchdog = world, watchdog
        self._name: str | None = None
        self._saved: str | None = None  # that of the last checkpoint
        self.health: dict[str, float] = {}

    def before(self, step: int) -> None:
        """Seek them, if it is time.

        Raises:
            UserError: at the start, if the bank has no neighbourhoods to seek in; or if they cannot be kept.
        """
        if step % self._every and self._method.positives is not None:
            return
        method, section, bank = self._method, self._section, self._method.bank
        tiles = 0

        def progress() -> None:
            nonlocal tiles
            tiles += 1
            self._watchdog.busy(f"seeking positives, tile {tiles}")

        progress()
        shared = shared_neighbourhoods(bank, count=section.positives, seed=method.seed)
        least = section.least_agreement
        if self._name is None and max(shared, 0.0) < least:
            cosines = ", ".join(
                f"{name} {value:.2f}" for name, value in mean_cosines(bank, seed=method.seed).items()
            )
            raise UserError(
                f"CMA cannot start: what is near in one modality is alike in the other by {shared:.2f} "
                f"standard deviations, below method.cma.least_agreement {least:g}, so the bank has no "
                f"neighbourhoods to find positives in ({cosines}): start from a run of AVID "
                "(train.init_from), trained longer or with a lower optim.lr; another --run with "
                "method.cma.least_agreement=0 starts all the same"
            )
        progress()
        how, count = section.agreement, section.positives
        self.health = {"bank_agreement": shared}
        if bank.samples <= section.exact_below:
            found = nearest_of_all(bank, how=how, count=count, progress=progress)
        else:
            found, self.health["positives_certified"] = nearest_in_two_stages(
                bank,
                how=how,
                count=count,
                seed=method.seed,
                again=section.search_uncertified,
                progress=progress,
            )
        self.health["positives_mutual"] = mutual_share(found, bank, seed=method.seed)
        if method.positives is not None:
            self.health["positives_kept"] = kept_share(method.positives, found, bank, seed=method.seed)
        method.positives = found
        self._publish(step)
        if self._world.is_first:
            told = ", ".join(f"{name} {value:.3f}" for name, value in self.health.items())
            logger.info("positives of step %d: %s", step, told)

    def state(self) -> str | None:
        """For a checkpoint: the name of the folder."""
        self._saved = self._name
        return self._name

    def load(self, name: str | None) -> None:
        """Go on with those that a checkpoint names.

        Raises:
            UserError: if they are not there, or not as they were written.
        """
        self._name, self._given, self._method.positives, self.health = name, name, None, {}
        if name is None:
            return
        folder, here = self._folder / Path(name).name, self._method.bank.range
        wrong = None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            parts = [
                _read(folder / Path(file).name, entry, here)
                for file, entry in sorted(manifest["files"].items())
            ]
            none = np.empty((0, self._section.positives), np.int64)
            found = np.concatenate([part for part in parts if len(part)] or [none])
            if found.shape != (len(here), self._section.positives):
                raise ValueError(f"they are {found.shape}, not {(len(here), self._section.positives)}")
            # Of one type on all ranks, for they pass rows on: one whose chunk is empty has read no file.
            kept_in = row_type(self._method.bank.samples)
            self._method.positives = torch.from_numpy(found).to(self._method.bank.chunk.device, kept_in)
            self.health = {key: float(value) for key, value in manifest["health"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if broken := next((each for each in self._world.gather(wrong) if each is not None), None):
            raise UserError(
                f"the positives in {folder}, by which the checkpoint's steps went, cannot be read "
                f"({broken}): start a new run from it with train.init_from"
            )

    def _publish(self, step: int) -> None:
        """Write them all, from all ranks; then remove what no checkpoint needs."""
        found, here = self._method.positives, self._method.bank.range
        assert found is not None
        temporary = self._folder / f".saving-step-{step:08d}"
        entry: tuple[str, dict[str, Any]] | str
        if self._world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        self._world.barrier()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            path = temporary / f"rows-{here.start:012d}.npy"
            with path.open("wb") as file:
                np.save(file, found.cpu().numpy(), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())  # checkpoints that are on the disk name it
            entry = path.name, {"first": here.start, "rows": len(here), **digest(path)}
        except OSError as error:
            entry = f"{error.strerror}"
        everyone = self._world.gather(entry)
        self._refuse_unkept(step, next((each for each in everyone if isinstance(each, str)), None))
        files = {name: entry for name, entry in everyone if entry["rows"]}
        manifest = {"step": step, "samples": self._method.bank.samples, "health": self.health, "files": files}
        text = json.dumps(manifest, indent=2) + "\n"
        self._name = f"step-{step:08d}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        wrong = None
        if self._world.is_first:
            try:
                write_atomically(temporary / MANIFEST, text)
                sync_folder(temporary)
                shutil.rmtree(self._folder / self._name, ignore_errors=True)
                temporary.rename(self._folder / self._name)
                sync_folder(self._folder)
            except OSError as error:
                wrong = f"{error.strerror}"
            self._remove_unnamed({self._name, self._saved})
        self._refuse_unkept(step, self._world.gather(wrong)[0])

    def _refuse_unkept(self, step: int, wrong: str | None) -> None:
        if wrong is not None:
            raise UserError(
                f"the positives of step {step} cannot be kept in {self._folder} ({wrong}): free some "
                "space there and give the same command again"
            )

    def _remove_unnamed(self, needed: set[str | None]) -> None:
        """`needed` has that of the checkpoint which may still be being written: there is one at most."""
        for checkpoint in newest_first(self._run / "checkpoints"):
            try:
                needed.add(json.loads((checkpoint / "state.json").read_text()).get("positives"))
            except FileNotFoundError:
                continue  # the writer removes old ones at any time
            except (OSError, ValueError):
                return  # who knows what it names
        for old in self._folder.glob("step-*"):
            if old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)


def _read(path: Path, entry: dict[str, Any], here: range) -> np.ndarray[Any, np.dtype[Any]]:
    """The part of a file that lies in a range of rows."""
    first, rows = int(entry["first"]), int(entry["rows"])
    start, stop = max(first, here.start), min(first + rows, here.stop)
    if start >= stop:
        return np.empty((0, 0))
    if digest(path)["sha256"] != entry["sha256"]:
        raise ValueError(f"{path.name} is not as it was written")
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.array(whole[start - first : stop - first])
