"""A sealed picture of too many scans is a sample that cannot be used, and each of its readers says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from ingest.image import decode as decoding
from pipeline.data.evaluation import Preprocessing, image_batches
from pipeline.report.gallery import Samples
from tests.pipeline.data.test_loader import assert_same, damage, joined, make_loader, take


@pytest.fixture
def slow(own_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A dataset, and the key of one of its pictures, which a crawl would not keep any more."""
    root = own_dataset(images=45, unit_rows=7)
    dataset = open_dataset(root)
    row = next(row for row in dataset.unit_rows(2))
    data = dataset.read_shard(2, int(row["offset"]), int(row["size"]))
    assert data.startswith(b"\xff\xd8")
    monkeypatch.setattr(decoding, "_has_too_many_scans", lambda found, *_: found == data)
    return root, int(dataset.unit_keys(2)[0])


def test_L1_training_takes_the_substitute_on_any_world_size(
    slow: tuple[Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    root, key = slow
    whole = take(make_loader(root), 0, 7)
    assert f"{key:013d} is bad: rejected: too_many_scans; the next row" in caplog.text
    assert not any(key in batch.keys.tolist() for _, batch in whole)
    ranks = [take(make_loader(root, rank=rank, world=3), 0, 7) for rank in range(3)]
    damage(root, [key])
    for number, (_, batch) in enumerate(take(make_loader(root), 0, 7)):
        assert_same(batch, whole[number][1])
        assert_same(joined([batches[number][1] for batches in ranks]), batch)


def test_an_evaluation_names_the_sample(slow: tuple[Path, int]) -> None:
    root, key = slow
    preprocessing = Preprocessing(image_size=8, resize=8, mean=(0, 0, 0), std=(1, 1, 1))
    batches = image_batches(open_dataset(root), np.arange(45), preprocessing=preprocessing, workers=0)
    with pytest.raises(UserError, match=rf"{key:013d} cannot be evaluated \(rejected: too_many_scans\)"):
        list(islice(batches, 1))


def test_a_report_shows_it_grey(slow: tuple[Path, int], caplog: pytest.LogCaptureFixture) -> None:
    root, key = slow
    samples = Samples(open_dataset(root))
    assert samples.image(key).getcolors() == [(64 * 64, (211, 211, 211))]
    assert f"{key:013d} cannot be shown: rejected: too_many_scans" in caplog.text
    assert len(samples.image(key + 1).getcolors(1 << 20) or ()) > 1
    samples.close()
