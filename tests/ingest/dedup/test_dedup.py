"""What dedup keeps, against an oracle that compares each sample with each before it."""

import hashlib
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed_rows import seal_rows

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest.dataset.open import open_dataset
from ingest.dataset.view import read_view, view_names, write_view
from ingest.dedup import duplicates
from ingest.dedup import tasks as dedup_tasks
from ingest.dedup.dedup import dedup
from ingest.dedup.partition import read_partition


def first_come(samples, radius, first_own):
    """{dropped id: kept ids that it equals or is like}; of (id, bytes, hash or None), ids ascending."""
    kept, dropped = [], {}
    for number, (sample, data, phash) in enumerate(samples):
        equal = any(data == other for _, other, _ in samples[:number])
        usable = phash is not None and phash.bit_count() >= duplicates.FLAT_BITS
        like = [
            other
            for other, other_data, other_hash in kept
            if data == other_data
            or (usable and other_hash is not None and (phash ^ other_hash).bit_count() <= radius)
        ]
        if sample >= first_own and (equal or like):
            dropped[sample] = like
        else:
            flat = phash is None or phash.bit_count() < duplicates.FLAT_BITS
            kept.append((sample, data, None if flat else phash))
    return dropped


@st.composite
def samples(draw):
    """(id, bytes, phash): chains, clusters, flat and missing hashes; equal bytes have equal hashes."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    count = draw(st.integers(0, 25))
    rng = random.Random(draw(st.integers(0, 2**32)))
    made = []
    for number in range(count):
        kind = rng.random()
        if made and kind < 0.3:
            _, data, phash = rng.choice(made)
            if rng.random() < 0.5:
                data = b"%d" % number
        elif kind < 0.4:
            data, phash = b"%d" % number, rng.choice([None, 0, 1 << 63, 0xFF])
        else:
            start = rng.choice([phash for _, _, phash in made if phash is not None] or centres)
            bits = rng.sample(range(64), rng.randrange(6))
            data, phash = b"%d" % number, start ^ sum(1 << bit for bit in bits)
        made.append((number * 7 + 3, data, phash))
    return made


def search(samples, radius, first_own, folder, *, partitions, files):
    """DROPS through the functions that the tasks call."""
    paths = []
    for number in range(files):
        part = samples[len(samples) * number // files : len(samples) * (number + 1) // files]
        paths.append((folder / f"d{number}", folder / f"h{number}"))
        ids = np.array([sample for sample, _, _ in part], np.uint64)
        digests = b"".join(hashlib.sha256(data).digest() for _, data, _ in part)
        duplicates.scatter_digests(
            paths[-1][0], np.frombuffer(digests, np.uint8).reshape(-1, 32), ids, partitions
        )
        there = np.array([phash is not None for _, _, phash in part], bool)
        hashes = np.array([phash or 0 for _, _, phash in part], np.uint64)
        usable = there & ~duplicates.is_flat(hashes)
        duplicates.scatter_hashes(
            paths[-1][1], hashes[usable], ids[usable], radius=radius, partitions=partitions
        )
    exact, same, alike = [], [], []
    for partition in range(partitions):
        records = read_partition([path for path, _ in paths], partition, partitions, duplicates.DIGESTS)
        exact.append(duplicates.exact_duplicates(records, first_own=first_own))
    for place in range((radius + 1) * partitions):
        records = read_partition(
            [path for _, path in paths], place, (radius + 1) * partitions, duplicates.HASHES
        )
        near = duplicates.near_duplicates(
            records, radius=radius, band=place // partitions, first_own=first_own
        )
        same.append(near.same)
        alike.append(near.alike)
    kept_first = duplicates.first_come(np.concatenate(alike))
    return duplicates.settle(np.concatenate(exact), np.concatenate(same), kept_first)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    samples=samples(),
    radius=st.integers(0, 6),
    evaluations=st.integers(0, 5),
    partitions=st.integers(1, 5),
    files=st.integers(1, 4),
)
def test_D1_dropped_is_what_the_oracle_drops_in_any_partition(
    tmp_path_factory, samples, radius, evaluations, partitions, files
):
    first_own = evaluations * 7
    drops = search(
        samples, radius, first_own, tmp_path_factory.mktemp("s"), partitions=partitions, files=files
    )
    expected = first_come(samples, radius, first_own)
    assert drops["id"].tolist() == sorted(expected)
    known = {sample: (data, phash) for sample, data, phash in samples}
    for sample, winner, distance, exact in drops.tolist():
        assert winner < sample
        assert winner not in expected
        assert exact == (known[sample][0] == known[winner][0])
        if not exact:
            assert distance == (known[sample][1] ^ known[winner][1]).bit_count() <= radius


BASE = 0x0F1E2D3C4B5A6978


def flipped(*bits):
    return BASE ^ sum(1 << bit for bit in bits)


def kept_keys(path, view):
    opened = open_dataset(path, view=view)
    return [key for index in range(len(opened.units)) for key in opened.unit_keys(index).tolist()]


def run(path, name, **options):
    with processes(options.pop("workers", 1)) as map_tasks:
        return dedup(path, name, **{"radius": 3} | options, map_tasks=map_tasks)


@pytest.fixture
def planted(tmp_path):
    """Three units: a copy, two near ones and a chain, one too far, two flat ones, one without a hash."""
    units = [
        [{"data": b"a", "phash": BASE}, {"phash": flipped(1, 20, 40)}, {}],
        [{"data": b"a", "phash": BASE}, {"phash": flipped(1, 20, 40, 60)}, {"phash": flipped(1, 2, 3, 4, 5)}],
        [{"phash": 1 << 63}, {"phash": 1 << 63}, {"phash": None}],
    ]
    seal_rows(tmp_path / "out", units)
    return tmp_path / "out"


def test_planted_duplicates_leave_the_first_and_chains_do_not_form(planted):
    report = run(planted, "clean")
    # 1 is 3 bits from 0. 100001 is 4 bits from 0, and 1 bit from 1, which is not kept: so it stays.
    assert kept_keys(planted, "clean") == [0, 2, 100_001, 100_002, 200_000, 200_001, 200_002]
    assert (report.samples, report.kept, report.exact, report.near, report.groups) == (9, 7, 1, 1, 1)
    assert (report.unhashed, report.flat, report.evaluation, report.evaluation_unhashed) == (1, 2, 0, 0)
    assert report.hot.buckets == 0


def test_clips_are_alike_if_they_also_are_as_long(tmp_path):
    hashes = [0x0123456789ABCDEF, 0x0123456789ABCDEE]
    lengths = [10_000, 10_400, 8_000, 8_300, 3_000]
    rows = [
        {"data": b"%d" % number, "phash": hashes[number % 2], "media": "video", "duration_ms": length}
        for number, length in enumerate(lengths)
    ]
    columns = pa.schema([pa.field("media", pa.string()), pa.field("duration_ms", pa.uint32())])
    seal_rows(tmp_path / "clips", [rows], extra=columns)
    assert run(tmp_path / "clips", "once", radius=3).near == 2
    assert kept_keys(tmp_path / "clips", "once") == [0, 2, 4]


def test_list_of_duplicates_stands_beside_the_view(planted):
    report = run(planted, "clean")
    table = pq.read_table(planted / "views" / "clean.duplicates.parquet")
    assert table.to_pylist() == [
        {"winner": 0, "key": 1, "distance": 3, "exact": False, "evaluation": None},
        {"winner": 0, "key": 100_000, "distance": 0, "exact": True, "evaluation": None},
    ]
    assert table.schema.metadata[b"root"].decode() == report.root
    assert json.loads(table.schema.metadata[b"settings"]) == {"hamming": 3, "against": []}
    assert view_names(planted) == ["clean"]
    with pytest.raises(UserError, match="is for the list of its duplicates"):
        run(planted, "clean.duplicates")


def test_exact_looks_at_bytes_only(planted):
    report = run(planted, "same", radius=None)
    assert kept_keys(planted, "same") == [0, 1, 2, 100_001, 100_002, 200_000, 200_001, 200_002]
    assert (report.exact, report.near, report.flat, report.unhashed, report.compared) == (1, 0, 0, 0, 0)


def test_evaluation_images_go_and_all_that_is_like_any_of_them(planted, tmp_path):
    # The two evaluation images are like each other: the second still drops what only it is like.
    seal_rows(
        tmp_path / "eval", [[{"data": b"e", "phash": flipped(1)}, {"data": b"f", "phash": flipped(1, 2, 3)}]]
    )
    seal_rows(tmp_path / "other", [[{"data": b"0 2"}, {"data": b"g", "phash": 0}]])
    report = run(planted, "clean", against=[str(tmp_path / "eval"), str(tmp_path / "other")])
    assert kept_keys(planted, "clean") == [200_000, 200_001, 200_002]
    assert (report.evaluation, report.evaluation_unhashed, report.groups) == (6, 1, 3)
    table = pq.read_table(planted / "views" / "clean.duplicates.parquet").to_pylist()
    assert [(row["evaluation"], row["winner"], row["key"], row["distance"]) for row in table] == [
        (0, 0, 0, 1),
        (0, 0, 1, 2),
        (0, 0, 100_000, 1),
        (0, 0, 100_001, 3),
        (0, 1, 100_002, 2),
        (1, 0, 2, 0),
    ]
    roots = [open_dataset(tmp_path / name).root for name in ("eval", "other")]
    metadata = pq.read_schema(planted / "views" / "clean.duplicates.parquet").metadata
    assert json.loads(metadata[b"settings"])["against"] == roots


def test_the_dataset_is_no_evaluation_of_itself(planted):
    with pytest.raises(UserError, match="is the dataset itself"):
        run(planted, "clean", against=[str(planted)])


def test_within_a_view_only_its_samples_count(planted):
    root = open_dataset(planted).root
    keeps = {0: np.array([0, 1, 1], bool), 1: np.array([1, 1, 0], bool)}
    write_view(planted, "some", root=root, keeps=keeps)
    report = run(planted, "clean", within="some")
    # Without 0, sample 1 is the first of its kind.
    assert kept_keys(planted, "clean") == [1, 2]
    assert (report.samples, report.kept) == (4, 2)
    view = read_view(planted, "clean", root=root)
    assert view.units.tolist() == [0, 1, 2]
    assert view.slots.tolist() == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows_per_task", "rows_per_partition", "workers"), [(1, 1, 1), (4, 3, 2), (9, 2, 1)]
)
def test_D1_view_does_not_depend_on_tasks_partitions_or_workers(
    tmp_path, monkeypatch, rows_per_task, rows_per_partition, workers
):
    rng = random.Random(5)
    units = [
        [
            {"data": b"%d" % rng.randrange(80), "phash": flipped(*rng.sample(range(64), rng.randrange(5)))}
            for _ in range(rng.randrange(1, 9))
        ]
        for _ in range(12)
    ]
    for name in ("one", "two"):
        seal_rows(tmp_path / name, units)
    run(tmp_path / "one", "clean")
    monkeypatch.setattr(dedup_tasks, "ROWS_PER_TASK", rows_per_task)
    monkeypatch.setattr("ingest.dedup.dedup.ROWS_PER_PARTITION", rows_per_partition)
    run(tmp_path / "two", "clean", workers=workers)
    for file in ("clean.parquet", "clean.duplicates.parquet"):
        ours, theirs = (tmp_path / name / "views" / file for name in ("one", "two"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert 0 < len(open_dataset(tmp_path / "one", view="clean")) < sum(map(len, units))


def test_hot_buckets_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.dedup.hamming.close_pairs.__kwdefaults__", {"reach": 5})
    seal_rows(tmp_path / "out", [[{"phash": (BASE & ~0xFFF) | number} for number in range(0, 300, 5)]])
    report = run(tmp_path / "out", "clean")
    assert report.hot.buckets > 0
    assert report.hot.members >= 60
    assert report.hot.not_compared > 0


def test_the_same_again_changes_nothing_and_another_is_refused(planted):
    run(planted, "clean")
    before = {path.name: path.read_bytes() for path in (planted / "views").iterdir()}
    run(planted, "clean")
    with pytest.raises(UserError, match="another name"):
        run(planted, "clean", radius=None)
    assert {path.name: path.read_bytes() for path in (planted / "views").iterdir()} == before


def test_a_name_that_another_root_has_is_refused_before_any_work(planted):
    write_view(planted, "clean", root="0" * 64, keeps={0: np.ones(3, bool)})

    def no_work(function, tasks):
        raise AssertionError("work was begun")

    with pytest.raises(UserError, match=r"view clean was made for root 000000000000 .* under another name"):
        dedup(planted, "clean", radius=3, map_tasks=no_work)


def test_scratch_is_used_and_left_empty(planted, tmp_path):
    (tmp_path / "scratch").mkdir()
    run(planted, "clean", scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    with pytest.raises(UserError, match="is not a folder"):
        run(planted, "other", scratch=tmp_path / "none")


def test_an_empty_dataset_has_an_empty_view(tmp_path):
    seal_rows(tmp_path / "out", [[]])
    report = run(tmp_path / "out", "clean")
    assert (report.samples, report.kept) == (0, 0)
    assert len(open_dataset(tmp_path / "out", view="clean")) == 0


def test_dedup_of_a_dataset_on_s3(bucket):
    seal_rows(f"{bucket}/out", [[{"data": b"a"}, {"data": b"a"}], [{"data": b"b"}, {"data": b"a"}]])
    report = run(f"{bucket}/out", "clean")
    assert kept_keys(f"{bucket}/out", "clean") == [0, 100_000]
    assert report.exact == 2
    assert view_names(f"{bucket}/out") == ["clean"]
