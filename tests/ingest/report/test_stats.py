"""Counts of a dataset: nothing disappears, and percentiles are those of the values."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_web import MARKUP, crawl_small_web

from cluster.errors import UserError
from ingest.dataset.cells import cells_of, starts_of
from ingest.report.frequent import Frequent
from ingest.report.histogram import Histogram
from ingest.report.lost_samples import SAMPLES_PER_REASON, sample_losses
from ingest.report.stats import count


def silent(done, total):
    pass


def add(histogram, values):
    found, times = np.unique(values, return_counts=True)
    histogram.add(found, times, smallest=min(values), largest=max(values), total=sum(values))


@given(st.lists(st.lists(st.integers(0, 5000), max_size=30), max_size=5), st.integers(0, 100))
def test_percentiles_are_those_of_the_sorted_values(parts, percent):
    histogram = Histogram()
    for part in filter(None, parts):
        add(histogram, part)
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


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.sampled_from([5, 50, 95]))
def test_percentiles_of_large_values_are_right_to_a_thousandth_and_need_no_more_memory(values, percent):
    histogram = Histogram()
    add(histogram, values)
    exact = sorted(values)[-(-len(values) * percent // 100) - 1]
    assert exact * (1 - 1 / 4096) <= histogram.percentile(percent) <= exact
    assert len(histogram.counts) < 4096 * 40


@given(st.lists(st.integers(0, 2**53 - 1), max_size=50))
def test_cells_are_in_the_order_of_their_values_and_begin_at_their_smallest(values):
    found = np.array(sorted(values), np.int64)
    cells = cells_of(found)
    assert (np.diff(cells) >= 0).all()
    assert (starts_of(cells) <= found).all()
    assert (starts_of(cells + 1) > found).all()
    assert (cells_of(starts_of(cells)) == cells).all()


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
    assert [lost.url for samples in sample_losses(stats) for lost in samples if "half" in lost.url] == [
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
    for number in range(SAMPLES_PER_REASON + 5):
        (source / f"{number:03}.jpg").write_text("no picture")
    crawl([source], tmp_path / "out")
    stats = count(tmp_path / "out", progress=silent)
    assert (stats.kept, stats.rejected, stats.labels, stats.formats) == (0, SAMPLES_PER_REASON + 5, {}, {})
    assert [len(samples) for samples in sample_losses(stats)] == [SAMPLES_PER_REASON]
    json.dumps(stats.as_json())


def test_json_holds_every_number(folder, crawl, tmp_path):
    crawl([folder()], tmp_path / "out")
    answer = json.loads(json.dumps(count(tmp_path / "out", progress=silent).as_json()))
    assert answer["planned"] == answer["kept"] + answer["rejected"] + answer["failed"] == 11
    assert answer["reasons"] == [{"status": "rejected", "reason": "not_an_image", "count": 1, "retryable": 0}]
    assert answer["width"]["p50"] == 24


def test_unreadable_metadata_is_one_sentence(folder, crawl, tmp_path):
    crawl([folder()], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "counts")
    meta = next((tmp_path / "out" / "meta").rglob("*.parquet"))
    meta.write_bytes(b"gone")
    with pytest.raises(UserError, match=f"{meta.name} is damaged, .* `ingest verify"):
        count(tmp_path / "out", progress=silent)


def test_crawl_of_the_web_is_counted_by_host_answer_and_reason(tmp_path):
    crawl_small_web(tmp_path)
    answer = json.loads(json.dumps(count(tmp_path / "web", progress=silent).as_json()))
    assert (answer["planned"], answer["kept"], answer["rejected"], answer["failed"]) == (16, 8, 5, 3)
    assert answer["retryable"] == 1
    assert {each["reason"]: (each["count"], each["retryable"]) for each in answer["reasons"]} == {
        "robots_disallowed": (2, 0), "x_robots_tag": (2, 0), "not_an_image": (1, 0), "http_404": (2, 0),
        "http_503": (1, 1),
    }  # fmt: skip
    assert answer["http_statuses"] == {"200": 11, "404": 2, "503": 1}, "robots.txt is no answer to a URL"
    hosts = answer["hosts"]
    assert (hosts["hosts"], hosts["missing_at_most"]) == (3, 0)
    assert hosts["most_attempts"] == [
        {"host": "127.0.0.1", "attempts": 8, "rejected": 1, "failed": 1},
        {"host": "127.0.0.2", "attempts": 4, "rejected": 0, "failed": 2},
        {"host": "127.0.0.3", "attempts": 4, "rejected": 4, "failed": 0},
    ]
    assert [host["host"] for host in hosts["most_failed"]] == ["127.0.0.2", "127.0.0.1"]
    assert answer["columns"] == ["<i>score", "page"]


def test_samples_of_what_was_lost_come_from_everywhere_and_are_always_the_same(tmp_path, crawl):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6 * SAMPLES_PER_REASON):
        (source / f"{number:03}.jpg").write_text("no picture")
    crawl([source], tmp_path / "out", unit_rows=SAMPLES_PER_REASON)
    stats = count(tmp_path / "out", progress=silent)
    (samples,), (again,) = sample_losses(stats), sample_losses(stats)
    assert samples == again
    assert len(set(samples)) == SAMPLES_PER_REASON
    units = Counter(int(lost.url[-7:-4]) // SAMPLES_PER_REASON for lost in samples)
    assert len(units) == 6, "of every unit, not of the first"


def test_samples_have_url_and_http_status(tmp_path):
    crawl_small_web(tmp_path)
    stats = count(tmp_path / "web", progress=silent)
    samples = dict(zip([loss.reason for loss in stats.losses], sample_losses(stats), strict=True))
    assert {reason: len(lost) for reason, lost in samples.items()} == {
        loss.reason: loss.count for loss in stats.losses
    }
    assert {lost.http_status for lost in samples["http_404"]} == {404}
    assert any(lost.url.endswith(MARKUP) for lost in samples["http_404"])
    assert {lost.http_status for lost in samples["robots_disallowed"]} == {None}


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.integers(1, 9)), max_size=200), st.integers(1, 8)
)
def test_frequent_names_are_never_lost_and_counts_lack_no_more_than_is_said(added, capacity):
    frequent, truth = Frequent(capacity=capacity), Counter()
    for name, times in added:
        frequent.add(name, times, 1)
        truth[name] += times
        assert len(frequent.counts) <= 2 * capacity
    for name, times in truth.items():
        there = frequent.counts.get(name, (0, 0))[0]
        assert times - frequent.missing <= there <= times
    if len(truth) <= 2 * capacity:
        assert frequent.missing == 0
        assert [(name, parts[0]) for name, parts in frequent.top()] == sorted(
            truth.items(), key=lambda item: (-item[1], item[0])
        )
