"""Datasets, and how far their crawls are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

from serving import serving, told
from tiny_training import make_dataset

from ingest.dataset import layout
from pipeline.serve import datasets
from pipeline.serve.datasets import Datasets


def test_a_crawl_is_seen_to_go_on_until_it_is_sealed(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "out", images=12)
    pointer = (data / layout.DATASET).read_text()
    commits = {path: path.read_bytes() for path in sorted((data / layout.COMMITS).iterdir())}
    assert len(commits) == 3
    (data / layout.DATASET).unlink()
    last = max(commits)
    last.unlink()
    found = Datasets((tmp_path / "out",))
    (row,) = found.look().told()
    assert (row["name"], row["state"]) == ("out/data", "in progress")
    assert (row["units"], row["committed"], row["planned"], row["kept"]) == (3, 2, 12, 8)
    assert row["sources"] == ["folder images"] and row["root"] == ""
    last.write_bytes(commits[last])
    (row,) = found.look().told()
    assert (row["committed"], row["kept"], row["state"]) == (3, 12, "in progress")
    (data / layout.DATASET).write_text(pointer)
    (row,) = found.look().told()
    assert (row["state"], row["committed"], row["kept"], len(row["root"])) == ("sealed", 3, 12, 64)


def test_commits_are_read_once_and_not_all_in_one_look(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "out", images=12)
    (data / layout.DATASET).unlink()
    found = Datasets((tmp_path / "out",))
    with (
        mock.patch.object(datasets, "_AT_ONCE", 2),
        mock.patch.object(datasets.CommitRecord, "read", wraps=datasets.CommitRecord.read) as read,
    ):
        for number in (2, 3, 3):
            (row,) = found.look().told()
            assert (row["committed"], row["counted"]) == (3, number)
        assert (read.call_count, row["kept"]) == (3, 12)


def test_a_damaged_commit_is_told_of_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "out", images=12)
    (data / layout.DATASET).unlink()
    commit = min((data / layout.COMMITS).iterdir())
    whole = commit.read_bytes()
    commit.write_text("{")
    found = Datasets((tmp_path / "out",))
    for _ in range(2):
        (row,) = found.look().told()
        assert row["state"] == "damaged" and commit.name in row["trouble"]
    commit.unlink()
    found.look()
    commit.write_bytes(whole)
    (row,) = found.look().told()
    assert (row["state"], row["kept"]) == ("in progress", 12)


def test_S1_what_is_no_dataset_or_damaged_hides_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, file, text in (
        ("<b>one</b>", layout.DATASET, "{"),
        ("two", layout.plan_name(0), "[]"),
        ("three", layout.DATASET, '{"format": 1, "sealed": "../../../etc/passwd"}'),
        ("none", "README.md", ""),
    ):
        (out / name / file).parent.mkdir(parents=True)
        (out / name / file).write_text(text)
    (out / "four").symlink_to(tmp_path)

    async def run() -> Any:
        async with serving(tmp_path / "out", out) as client:
            return (await told(client, "/api/datasets"))["datasets"]

    rows = asyncio.run(run())
    assert [(row["name"], row["state"]) for row in rows] == [
        ("out/<b>one</b>", "damaged"),
        ("out/three", "damaged"),
        ("out/two", "damaged"),
    ]
    assert all(row["trouble"] and "root:" not in row["trouble"] for row in rows)
