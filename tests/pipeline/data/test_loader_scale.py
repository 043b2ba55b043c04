"""The smallest rows of `benchmarks/loader_scale.py` by count: real indices, default windows and batches."""

import sys
import tempfile
from pathlib import Path

import pytest

from ingest.dataset.open import Dataset

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import loader_scale

SIZES = (50_000, 300_000)  # of the second, each lane has one window of 150,000 rows, not of 131,072


def test_each_units_metadata_is_read_once_by_one_worker_and_never_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    whole = Dataset.unit_rows

    def counted(dataset: Dataset, unit_index: int) -> object:
        reads.append(unit_index)
        return whole(dataset, unit_index)

    monkeypatch.setattr(Dataset, "unit_rows", counted)
    roots = loader_scale.make_datasets(tmp_path, SIZES, images=100)
    for size in SIZES:
        for rank, world in loader_scale.RANKS:
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / f"{size}-{rank}"))
            needed: set[int] = set()
            for reader in ("the first worker", "another"):
                make = loader_scale.open_batches(tmp_path, roots[size], rank, world)
                for step in range(2):
                    make.fill(step, {}, lambda place, draws, out: None)
                    needed |= {unit for unit, _ in make.places(step)}
                assert sorted(reads) == (sorted(needed) if reader == "the first worker" else [])
                reads.clear()
