"""What is kept of CMA's positives: as long as a checkpoint needs them, and alike on all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.recipe.method import CMA
from pipeline.train.branch import _positives_of
from pipeline.train.positives import Positives

NAME = "step-00000000-0123456789ab"
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)


def positives_of(run: Path, rows: range, *, samples: int) -> tuple[Positives, Any]:
    """Of a method whose bank has these rows here."""
    bank = SimpleNamespace(range=rows, samples=samples, chunk=torch.empty(len(rows), 2, 4))
    method: Any = SimpleNamespace(bank=bank, cma=CMA(positives=2), positives=None, seed=0)
    watchdog: Any = None
    return Positives(method, run=run, world=ALONE, watchdog=watchdog, steps_per_epoch=1.0), method


def test_those_of_a_checkpoint_that_is_still_written_stay(tmp_path: Path) -> None:
    positives, method = positives_of(tmp_path, range(3), samples=3)
    method.positives = torch.tensor([[1, 2], [0, 2], [0, 1]], dtype=torch.int32)
    positives._publish(0)
    saved = positives.state()  # the checkpoint is not there yet
    positives._publish(1)
    positives._publish(2)
    assert {path.name for path in (tmp_path / "positives").iterdir()} == {saved, positives.state()}


def test_a_rank_without_rows_has_positives_of_the_type_of_all(tmp_path: Path) -> None:
    folder = tmp_path / "positives" / NAME
    folder.mkdir(parents=True)
    files = {"rows-000000000000.npy": {"first": 0, "rows": 5, "sha256": "of another rank's file"}}
    (folder / "manifest.json").write_text(json.dumps({"files": files, "health": {}}))
    positives, method = positives_of(tmp_path, range(5, 5), samples=5)
    positives.load(NAME)
    assert (method.positives.shape, method.positives.dtype) == ((0, 2), torch.int32)


@pytest.mark.parametrize("name", ["../secret", "..", NAME, 7])
def test_a_branch_takes_positives_from_their_place_alone(tmp_path: Path, name: object) -> None:
    for folder in ("checkpoints/step-00000003", "positives", "secret"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="went by positives which are not at"):
        _positives_of(tmp_path / "checkpoints" / "step-00000003", {"positives": name})
