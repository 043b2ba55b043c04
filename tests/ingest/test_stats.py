"""Counts of a dataset: nothing disappears, and percentiles are those of the values."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.stats import URLS_KEPT_PER_REASON, Histogram, count


def silent(done, total):
    pass


@given(st.lists(st.lists(st.integers(0, 5000), max_size=30), max_size=5), st.integers(0, 100))
def test_percentiles_are_those_of_the_sorted_values(parts, percent):
    histogram = Histogram(cell=1)
    for part in parts:
        histogram.add(np.array(part, np.int64))
    values = sorted(value for part in parts for value in part)
    if not values:
        assert histogram.percentile(percent) == 0
        return
    enough = [
        value for value in values if sum(other <= value for other in values) * 100 >= percent * len(values)
    ]
    assert histogram.percentile(percent) == enough[0]
    assert (histogram.smallest, histogram.largest, histogram.total) == (values[0], values[-1], sum(values))
    assert histogram.counts.sum() == len(values)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50), st.sampled_from([5, 50, 95]))
def test_percentiles_are_exact_to_a_cell(values, percent):
    coarse, fine = Histogram(cell=8), Histogram(cell=1)
    for histogram in (coarse, fine):
        histogram.add(np.array(values, np.int64))
    assert abs(coarse.percentile(percent) - fine.percentile(percent)) < 8
    assert min(values) <= coarse.percentile(percent) <= max(values)


def test_D2_statuses_add_up_to_the_plan_over_all_units(folder, crawl, tmp_path):
    source = folder(count=10)
    (source / "cat" / "empty.jpg").touch()
    png = (source / "dog" / "001.png").read_bytes()
    (source / "dog" / "half.png").write_bytes(png[: len(png) // 2])
    report = crawl([source], tmp_path / "out", unit_rows=4)
    told = []
    stats = count(tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert stats.root == report.root
    assert stats.units == 4
    assert told[-1] == (4, 4)
    assert (stats.planned, stats.kept, stats.rejected, stats.failed) == (13, 10, 2, 1)
    assert {(loss.status, loss.reason): loss.count for loss in stats.losses} == {
        ("rejected", "empty"): 1,
        ("rejected", "not_an_image"): 1,
        ("failed", "truncated"): 1,
    }
    assert [url for loss in stats.losses for url in loss.first_urls if "half" in url] == [
        "pictures/dog/half.png"
    ]
    assert stats.formats == {"jpeg": 4, "png": 3, "webp": 3}
    assert stats.labels == {"cat": 5, "dog": 5}
    assert stats.widths.summary() == dict.fromkeys(["min", "p5", "p25", "p50", "p75", "p95", "max"], 24)
    assert stats.short_sides.largest == 16
    assert stats.long_sides.smallest == 24


def test_bytes_are_those_on_disk(folder, crawl, tmp_path):
    output = tmp_path / "out"
    crawl([folder()], output, unit_rows=4)
    stats = count(output, progress=silent)
    assert stats.shard_bytes == sum(path.stat().st_size for path in output.rglob("*.tar"))
    metas = list((output / "meta").rglob("*.parquet"))
    assert stats.meta_bytes == sum(path.stat().st_size for path in metas)
    sizes = [size for path in metas for size in pq.read_table(path)["size"].to_pylist() if size is not None]
    assert stats.image_bytes == sum(sizes)
    assert (stats.sizes.smallest, stats.sizes.largest) == (min(sizes), max(sizes))


def test_dataset_without_one_image_counts_too(tmp_path, crawl):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(URLS_KEPT_PER_REASON + 5):
        (source / f"{number:03}.jpg").write_text("no picture")
    crawl([source], tmp_path / "out")
    stats = count(tmp_path / "out", progress=silent)
    assert (stats.kept, stats.rejected, stats.labels, stats.formats) == (0, URLS_KEPT_PER_REASON + 5, {}, {})
    assert len(stats.losses[0].first_urls) == URLS_KEPT_PER_REASON
    json.dumps(stats.as_json())


def test_json_holds_every_number(folder, crawl, tmp_path):
    crawl([folder()], tmp_path / "out")
    answer = json.loads(json.dumps(count(tmp_path / "out", progress=silent).as_json()))
    assert answer["planned"] == answer["kept"] + answer["rejected"] + answer["failed"] == 11
    assert answer["reasons"] == [{"status": "rejected", "reason": "not_an_image", "count": 1}]
    assert answer["width"]["p50"] == 24


def test_unreadable_metadata_is_one_sentence(folder, crawl, tmp_path):
    crawl([folder()], tmp_path / "out")
    meta = next((tmp_path / "out" / "meta").rglob("*.parquet"))
    meta.write_bytes(b"gone")
    with pytest.raises(UserError, match=f"{meta.name} cannot be read: .* `ingest verify"):
        count(tmp_path / "out", progress=silent)
