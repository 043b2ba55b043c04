"""`ingest gc` takes what committed units left behind, and nothing else."""

import json
import os
import time
from pathlib import PurePath

import boto3
import pytest
from typer.testing import CliRunner

from ingest import cli
from ingest.dataset import gc
from ingest.dataset.commit import commit, read_commit
from ingest.dataset.layout import counts_name, meta_name, shard_name
from ingest.dataset.open import open_dataset
from ingest.store.open import open_store

OTHER = "f" * 64


def run(*arguments):
    result = CliRunner().invoke(cli.app(), ["gc", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(params=["posix", "s3"])
def dataset(request, tmp_path, folder, crawl):
    """Three sealed units; unit 1 was also made by a loser, unit 3 is made and not yet committed."""
    path = tmp_path / "out" if request.param == "posix" else f"{request.getfixturevalue('bucket')}/set"
    crawl([folder(count=10)], path, unit_rows=4)
    store = open_store(path)
    for name in (shard_name(1, OTHER), meta_name(1, OTHER), counts_name(1, OTHER)):
        store.replace(name, b"loser")
    for name in (shard_name(3, OTHER), meta_name(3, OTHER), counts_name(3, OTHER)):
        store.replace(name, b"about to be committed")
    return path


def names(path):
    store = open_store(path)
    return {
        entry.name
        for folder in ("plan", "shards", "meta", "counts", "commits", "sealed")
        for entry in store.list(folder)
    }


def test_only_what_no_commit_of_the_unit_names_is_deleted(dataset):
    before, losers = names(dataset), {shard_name(1, OTHER), meta_name(1, OTHER), counts_name(1, OTHER)}
    told = run(dataset, "--dry-run")
    assert told.splitlines()[-1] == f"3 files, 15 B, would be deleted from {dataset}"
    assert all(f"{name}  5 B" in told for name in losers)
    assert names(dataset) == before
    answer = json.loads(run(dataset, "--json"))
    assert (answer["deleted"], answer["bytes"]) == (True, 15)
    assert {file["name"] for file in answer["files"]} == losers
    assert names(dataset) == before - losers
    assert run(dataset) == f"0 files, 0 B, deleted from {dataset}\n"
    assert len(open_dataset(dataset)) == 10
    assert CliRunner().invoke(cli.app(), ["verify", str(dataset)]).exit_code == 0


def test_unit_that_is_committed_later_is_cleaned_later(dataset):
    store = open_store(dataset)
    run(dataset)
    assert store.exists(shard_name(3, OTHER))
    record = read_commit(store, 0)
    shard = record.shard.model_copy(update={"name": shard_name(3, "0" * 64)})
    commit(store, record.model_copy(update={"unit": 3, "shard": shard}))
    assert {file["name"] for file in json.loads(run(dataset, "--json"))["files"]} == {
        shard_name(3, OTHER),
        meta_name(3, OTHER),
        counts_name(3, OTHER),
    }


def leave(path, name):
    """An unfinished write of a killed process."""
    if isinstance(path, str):
        bucket, _, prefix = path.removeprefix("s3://").partition("/")
        boto3.client("s3").create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{name}")
    else:
        store = open_store(path)
        stem = PurePath(name).name.partition("-")[0]
        store.replace(f"{PurePath(name).parent}/.{stem}-0123456789abcdef.tmp", b"half")


def test_unfinished_writes_of_committed_units_are_deleted_when_they_are_old(dataset, monkeypatch):
    run(dataset)
    for unit in (2, 3):
        leave(dataset, shard_name(unit, OTHER))
    if isinstance(dataset, str):
        monkeypatch.setattr(gc, "STALE_SECONDS", 1e9)  # moto says that every upload began in 2010
    assert json.loads(run(dataset, "--json"))["files"] == []
    monkeypatch.setattr(gc, "STALE_SECONDS", -60)
    (file,) = json.loads(run(dataset, "--json"))["files"]
    assert "00000002-" in file["name"]
    left = [entry.name for entry in open_store(dataset).unfinished("shards")]
    assert len(left) == 1
    assert "00000003-" in left[0]


def test_a_draft_of_yesterday_is_old(tmp_path, folder, crawl):
    crawl([folder(count=3)], tmp_path / "out")
    leave(tmp_path / "out", shard_name(0, OTHER))
    (draft,) = (tmp_path / "out").rglob(".*")
    yesterday = time.time() - 25 * 3600
    os.utime(draft, (yesterday, yesterday))
    assert "1 file, 4 B, deleted" in run(tmp_path / "out")
    assert not draft.exists()


def test_leftovers_beside_the_units_are_taken_when_they_are_old(tmp_path, folder, crawl):
    path = tmp_path / "out"
    crawl([folder(count=3)], path)
    drafts = [
        f"{place}.{stem}-0123456789abcdef.tmp"
        for place, stem in (
            ("", "DATASET"),
            ("plan/0/", "units"),
            ("sealed/", "x"),
            ("views/", "clean"),
            ("plan/1/", "units"),
        )
    ]
    second = f"plan/0/units-{'0' * 16}.parquet"
    store = open_store(path)
    for name in [*drafts, second]:
        store.replace(name, b"half")
    assert run(path) == f"0 files, 0 B, deleted from {path}\n"
    for name in [*drafts, second]:
        os.utime(path / name, (1, 1))
    assert {file["name"] for file in json.loads(run(path, "--json"))["files"]} == {*drafts, second}
    assert len(open_dataset(path)) == 3


def test_what_is_no_dataset_is_refused(tmp_path):
    result = CliRunner().invoke(cli.app(), ["gc", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not a dataset: check the path" in result.output
