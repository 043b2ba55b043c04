"""Images that are kept on the device: the batches are those that are read and cut one by one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loader import CROPS, assert_same, damage, joined, make_loader, take

from cluster.errors import UserError
from pipeline.data import resident
from pipeline.data.loader import Loader
from pipeline.recipe.data import Data


@pytest.fixture(scope="session")
def one_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 JPEGs and PNGs of 13 x 11 pixels in seven shards; never written to."""
    from small_pictures import make_dataset

    return make_dataset(tmp_path_factory.mktemp("one_size"), images=45, unit_rows=7, size=(13, 11))


@pytest.mark.parametrize("workers", [0, 2])
def test_L1_resident_batches_are_the_streamed_ones(one_size: Path, workers: int) -> None:
    """Over two epochs: crops, colours and keys; and from any step."""
    streamed = take(make_loader(one_size), 0, 7)
    loader = make_loader(one_size, workers=workers, resident=True)
    got = take(loader, 0, 7)
    for (step, ours), (number, theirs) in zip(got, streamed, strict=True):
        assert step == number
        assert_same(ours, theirs)
        for name, expected in loader.augment(theirs).views.items():
            assert ours.views[name].stride() == theirs.views[name].stride()
            assert torch.equal(loader.augment(ours).views[name], expected)
    assert_same(take(make_loader(one_size, workers=workers, resident=True), 5, 1)[0][1], streamed[5][1])
    loader.check_state(make_loader(one_size).state())  # a run may go on either way


def test_L1_resident_batches_do_not_depend_on_ranks(one_size: Path) -> None:
    whole = take(make_loader(one_size), 0, 3)
    ranks = [take(make_loader(one_size, rank=r, world=3, resident=True), 0, 3) for r in range(3)]
    for number in range(3):
        assert_same(joined([batches[number][1] for batches in ranks]), whole[number][1])


def test_L1_a_bad_sample_has_the_same_substitute_when_resident(
    own_dataset: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = own_dataset(images=45, unit_rows=7, size=(13, 11))
    clean = [batch for _, batch in take(make_loader(root), 0, 3)]
    bad = [0, int(clean[0].keys[1]), int(clean[1].keys[5])]  # one of them the dataset's first
    damage(root, bad)
    streamed = take(make_loader(root), 0, 4)
    before = [record.message for record in caplog.records]
    caplog.clear()
    for (_, ours), (_, theirs) in zip(take(make_loader(root, resident=True), 0, 4), streamed, strict=True):
        assert_same(ours, theirs)
    assert [record.message for record in caplog.records if "is bad" in record.message] == before
    assert len(before) >= 3


def test_images_that_cannot_be_resident_are_named(
    small_dataset: Path, one_size: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match=r"the first of .* has 20 x 16 pixels, .*\.tar:\d{13} has 21 x 17: ingest them with --resize",
    ):
        make_loader(small_dataset, resident=True, crops=[{**CROPS[0], "size": 12}])
    with pytest.raises(UserError, match=r"13 x 11 pixels, the largest of data.crops has 5: .* --resize 9 --"):
        make_loader(one_size, resident=True, crops=CROPS[1:])
    monkeypatch.setattr(resident, "devices", lambda **_: SimpleNamespace(free_gib=1e-6))
    with pytest.raises(UserError, match=r"45 images of 13 x 11 .* cpu has 0\.0 GiB free: use run\.resident="):
        make_loader(one_size, resident=True)


def test_resident_images_have_the_positions_of_the_streamed_ones(one_size: Path) -> None:
    def positions(*, resident: bool) -> list[list[int]]:
        data = Data.model_validate({"root": str(one_size), "batch_size": 12, "window": 8, "crops": CROPS})
        place: dict[str, Any] = {"seed": 3, "rank": 1, "world_size": 2, "workers": 0}
        loader = Loader(data, **place, device=torch.device("cpu"), resident=resident, positions=True)
        batches = [loader.augment(batch).positions for _, batch in take(loader, 0, 7)]
        return [batch.tolist() for batch in batches if batch is not None]

    streamed = positions(resident=False)
    assert positions(resident=True) == streamed
    assert len(streamed) == 7
