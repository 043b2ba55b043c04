"""Frozen units, the fingerprint, and the refusal of other work."""

import hashlib
import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.image.check import Treatment
from ingest.image.decode import ImageLimits
from ingest.plan import settings as crawl_settings
from ingest.plan.freeze import freeze
from ingest.plan.plan import items_of
from ingest.plan.settings import CrawlSettings
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns
from ingest.store.posix import PosixStore


def frozen(output, *sources, listed=lambda items: None, **settings):
    opened = [open_listing(str(source), Columns()) for source in sources]
    return freeze(PosixStore(output), opened, CrawlSettings(**settings), listed=listed)


def test_units_hold_every_item_in_order_and_one_row_group_each(tmp_path, folder):
    source = folder(count=10)
    listed = []
    plan = frozen(tmp_path / "out", source, unit_rows=4, listed=listed.append)
    assert (plan.units, plan.rows, listed) == (range(3), 11, [11])
    paths = [item.path for unit in plan.units for _, item in items_of(plan.table(unit))]
    assert paths == sorted(os.fsencode(path.relative_to(source)) for path in source.rglob("*.*"))
    listing = plan.record.items.name
    metadata = pq.ParquetFile(tmp_path / "out" / listing).metadata
    assert [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)] == [4, 4, 3]
    files = sorted((tmp_path / "out").rglob("*.*"))
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == ["plan/0/plan.json", listing]
    said = json.loads(files[0].read_bytes())["items"]
    assert said == {"name": listing, "sha256": hashlib.sha256(files[1].read_bytes()).hexdigest()}


def test_sources_follow_each_other_as_given(tmp_path, folder):
    first, second = folder("zebra", 3), folder("ant", 3)
    plan = frozen(tmp_path / "out", first, second, unit_rows=3)
    assert [number for unit in plan.units for number, _ in items_of(plan.table(unit))] == [0] * 4 + [1] * 4
    swapped = frozen(tmp_path / "other", second, first, unit_rows=3)
    assert swapped.fingerprint != plan.fingerprint


def test_D1_fingerprint_depends_on_content_names_and_settings_only(tmp_path, folder):
    source = folder()
    fingerprint = frozen(tmp_path / "out", source).fingerprint
    moved = tmp_path / "elsewhere" / source.name
    shutil.copytree(source, moved, copy_function=shutil.copyfile)
    os.utime(next(moved.rglob("*.png")), (1, 1))
    assert frozen(tmp_path / "out2", moved).fingerprint == fingerprint
    limits = ImageLimits(max_bytes=10_000_000)
    others = [
        {"unit_rows": 5},
        {"treatment": Treatment(resize=64)},
        {"treatment": Treatment(quality=90)},
        {"treatment": Treatment(crop="center")},
        {"treatment": Treatment(encoding="webp")},
        {"treatment": Treatment(phash=False)},
        {"treatment": Treatment(limits=limits)},
        {"treatment": Treatment(limits=ImageLimits(max_pixels=1_000_000))},
        {"seconds": 9.0},
        {"memory_mb": 500},
    ]
    found = {
        frozen(tmp_path / f"s{number}", source, **settings).fingerprint
        for number, settings in enumerate(others)
    }
    (moved / "cat" / "more.png").write_bytes(b"x")
    found.add(frozen(tmp_path / "out3", moved).fingerprint)
    assert len(found | {fingerprint}) == len(others) + 2


def test_the_same_work_goes_on_with_the_same_plan(tmp_path, folder):
    source = folder()
    first = frozen(tmp_path / "out", source)
    before = (tmp_path / "out" / "plan" / "0" / "plan.json").read_bytes()
    assert frozen(tmp_path / "out", source) == first
    assert (tmp_path / "out" / "plan" / "0" / "plan.json").read_bytes() == before


def refusal(output, *sources, **settings):
    with pytest.raises(UserError) as error:
        frozen(output, *sources, **settings)
    return str(error.value).replace(str(output), "out")


def test_other_work_is_refused_with_the_difference_in_one_sentence(tmp_path, folder, monkeypatch):
    source, out = folder(count=4), tmp_path / "out"
    frozen(out, source, treatment=Treatment(resize=512))
    assert refusal(out, source, treatment=Treatment(resize=256)) == (
        "out was planned with --resize 512, not 256: use --resize 512 to go on with it, or another --output"
    )
    assert refusal(out, source) == (
        "out was planned with --resize 512, not without --resize: "
        "use --resize 512 to go on with it, or another --output"
    )
    frozen(tmp_path / "plain", source)
    assert refusal(tmp_path / "plain", source, unit_rows=8, treatment=Treatment(resize=9)).endswith(
        "was planned with --unit-rows 16384 and without --resize, not with --unit-rows 8 --resize 9: "
        "use --unit-rows 16384 and leave out --resize to go on with it, or another --output"
    )
    assert refusal(out, source, unit_rows=8, treatment=Treatment(resize=256)) == (
        "out was planned with --unit-rows 16384 --resize 512, not with --unit-rows 8 --resize 256: "
        "use --unit-rows 16384 --resize 512 to go on with it, or another --output"
    )
    assert refusal(tmp_path / "plain", source, treatment=Treatment(phash=False)).endswith(
        "was planned without --no-phash, not with --no-phash: "
        "leave out --no-phash to go on with it, or another --output"
    )
    same = {"treatment": Treatment(resize=512)}
    with monkeypatch.context() as patch:
        patch.setattr(crawl_settings, "FORMAT", crawl_settings.FORMAT + 1)
        assert "was planned in format 3, not 4: use the version that made it" in refusal(out, source, **same)
    assert refusal(out, folder("others", 3), **same) == (
        "out was planned from pictures (5 files), not from others (4 files): "
        "give it the same sources to go on with it, or another --output; --extend adds to it"
    )
    note = source / "dog" / "note.jpg"
    note.write_text("a longer text")
    assert "names or sizes have changed since: restore them" in refusal(out, source, **same)
    note.write_text("no picture")
    monkeypatch.setattr(crawl_settings.PIL, "__version__", "1.0")
    message = refusal(out, source, **same)
    assert "with pillow" in message
    assert "and here is pillow 1.0, which makes other bytes" in message


def test_of_two_plans_at_once_the_first_wins(tmp_path, folder):
    source, out = folder(), tmp_path / "out"
    other = []

    def meanwhile(items):
        if not other:
            other.append(None)
            other[0] = frozen(out, source, unit_rows=4)

    assert frozen(out, source, unit_rows=4, listed=meanwhile) == other[0]
    other.clear()
    shutil.rmtree(out)
    with pytest.raises(UserError, match="planned with --unit-rows 4, not 5"):
        frozen(out, source, unit_rows=5, listed=meanwhile)
    assert {entry.name[:5] for entry in (out / "plan" / "0").iterdir()} == {"plan.", "units"}
    again = frozen(out, source, unit_rows=4)
    assert [len(again.table(unit)) for unit in again.units] == [4, 4, 3]
    assert json.loads((out / "plan" / "0" / "plan.json").read_bytes())["settings"]["--unit-rows"] == 4


def test_nothing_to_ingest_leaves_nothing_behind(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="nothing to ingest in in"):
        frozen(tmp_path / "out", tmp_path / "in")
    assert not (tmp_path / "out" / "plan").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"unit_rows": 0},
        {"unit_rows": 100_001},
        {"treatment": Treatment(resize=0)},
        {"treatment": Treatment(resize=9, quality=101)},
        {"treatment": Treatment(resize=9, crop="middle")},
        {"treatment": Treatment(resize=9, encoding="png")},
        {"seconds": 0},
        {"memory_mb": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match="must be"):
        CrawlSettings(**settings)
