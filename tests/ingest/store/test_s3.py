"""Crawls to buckets: the same dataset as in a folder, whatever the network and the machines do meanwhile."""

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from object_store import Proxy
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.dataset.commit import commit, read_commit
from ingest.dataset.open import open_dataset
from ingest.dataset.verify import Level, read_seal, verify_root, verify_units
from ingest.dataset.view import read_view, write_view
from ingest.plan.freeze import freeze
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.sources.expand import expand
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns
from ingest.sources.url_listing import UrlListing
from ingest.store import clients, object_requests, object_store
from ingest.store.open import open_store
from ingest.store.posix import PosixStore
from tests.clips import write_clips

UNIT_ROWS = 4
CRAWL = (
    "import sys\n"
    "from ingest.plan.settings import CrawlSettings\n"
    "from ingest.crawl.crawl import crawl_shards\n"
    "crawl_shards(sys.argv[1:2], sys.argv[2], CrawlSettings(unit_rows=4), workers=1,"
    " progress=lambda counts: None)"
)


def files(path):
    """Every visible file of a dataset, and its bytes."""
    store = open_store(path)
    found = [entry.name for entry in store.list("")] if isinstance(store, PosixStore) else listed(store)
    return {name: store.read(name) for name in found}


def listed(store):
    folders = ("plan", "shards", "meta", "counts", "commits", "sealed", "views")
    return [entry.name for folder in folders for entry in store.list(folder)] + ["DATASET.json"]


def damages(path):
    seal, found = read_seal(path)
    found += verify_root(path, seal)
    return found + [d for unit in verify_units(path, seal, Level.DECODE, workers=2) for d in unit.damages]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(object_requests, "FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(object_requests, "SILENT_SECONDS", 1)


@pytest.fixture
def behind(s3_port, monkeypatch, quick):
    """behind(fault): from now on S3 is behind a proxy with this fault."""
    proxies = []

    def behind(fault):
        proxies.append(Proxy(s3_port, fault))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].url)
        object_requests.forget_clients()
        return proxies[-1]

    yield behind
    for proxy in proxies:
        proxy.stop()
    object_requests.forget_clients()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bucket", "google_bucket", "azure_container"])
def test_D1_a_crawl_to_a_bucket_is_the_crawl_to_a_folder(tmp_path, folder, crawl, kind, request):
    source, bucket = folder(count=10), request.getfixturevalue(kind)
    local = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    remote = crawl([source], f"{bucket}/web/set", unit_rows=UNIT_ROWS)
    assert remote.root == local.root
    assert remote.output == f"{bucket}/web/set"
    assert files(f"{bucket}/web/set") == files(tmp_path / "out")
    assert damages(f"{bucket}/web/set") == []
    again = crawl([source], f"{bucket}/web/set", unit_rows=UNIT_ROWS)
    assert (again.root, again.counts.resumed, again.counts.bytes_read) == (local.root, 11, 0)
    with pytest.raises(UserError, match="was planned with --unit-rows 4, not 5"):
        crawl([source], f"{bucket}/web/set", unit_rows=5)


def test_the_pipeline_reads_samples_and_views_of_a_dataset_on_s3(tmp_path, folder, crawl, bucket):
    from pipeline.data.reader import Reader

    source = folder(count=6)
    root = crawl([source], f"{bucket}/set", unit_rows=UNIT_ROWS).root
    write_view(f"{bucket}/set", "some", root=root, keeps={0: np.array([0, 1, 1, 0], bool)})
    with pytest.raises(UserError, match="has no view named other: it has some"):
        read_view(f"{bucket}/set", "other", root=root)
    seen = open_dataset(f"{bucket}/set", view="some")
    reader = Reader(seen)
    cats = sorted((source / "cat").iterdir())
    assert [reader.read(0, row) for row in range(2)] == [path.read_bytes() for path in cats[1:3]]
    assert reader.name(0, 1) == f"{seen.shard_path(0)}:0000000000002"
    reader.close()


@pytest.mark.slow
def test_a_dataset_on_a_web_server_is_read_and_not_written(folder, crawl, bucket, behind):
    from pipeline.data.reader import Reader

    source = folder(count=6)
    root = crawl([source], f"{bucket}/set", unit_rows=UNIT_ROWS).root
    url = f"{behind(lambda method, path: None).url}/{bucket[5:]}/set"
    reader = Reader(open_dataset(url))
    assert reader.read(0, 0) == sorted((source / "cat").iterdir())[0].read_bytes()
    reader.close()
    assert damages(url) == []
    for write in (
        lambda: write_view(url, "some", root=root, keeps={0: np.array([0, 1, 1, 0], bool)}),
        lambda: crawl([source], url, unit_rows=UNIT_ROWS),
    ):
        with pytest.raises(UserError, match="is on a web server, to read only: write to a folder or a"):
            write()
    with pytest.raises(UserError, match="is on a web server, which does not tell what files it has"):
        read_view(url, "other", root=root)


def test_lists_of_urls_are_found_and_read_in_buckets(bucket, tmp_path):
    store, text = open_store(bucket), b"url\nhttp://a.org/1.jpg\n"
    for name in ("b.csv", "a.csv", "a.txt", "deep/c.csv"):
        store.replace(f"lists/{name}", text)
    assert expand(f"{bucket}/lists/*.csv") == [f"{bucket}/lists/a.csv", f"{bucket}/lists/b.csv"]
    assert expand(f"{bucket}/**/c.csv") == [f"{bucket}/lists/deep/c.csv"]
    (tmp_path / "a.csv").write_bytes(text)
    here, there = (UrlListing(f"{place}/a.csv", Columns()) for place in (tmp_path, f"{bucket}/lists"))
    assert here.describe(print) == there.describe(print)
    with pytest.raises(UserError, match=r"the list s3://.*/no\.csv cannot be opened: .*No such file"):
        UrlListing(f"{bucket}/lists/no.csv", Columns())


def test_many_ranges_at_once_survive_lost_answers(bucket, behind):
    data = random.Random(0).randbytes(50_000)
    open_store(bucket).replace("shard.tar", data)
    first = iter(["cut", "500", "refuse"] * 20)
    proxy = behind(lambda method, path: next(first, None))
    places = range(0, len(data), 500)

    async def both():
        store = open_store(bucket)
        ranges = store.read_ranges("shard.tar", places, [500] * len(places))
        whole, parts = await asyncio.gather(store.read_async("shard.tar"), ranges)
        with pytest.raises(FileNotFoundError):
            await store.read_async("nothing")
        return bytes(whole), b"".join(parts)

    assert asyncio.run(both()) == (data, data)
    assert len(proxy.faults) == 60


def test_a_signal_ends_the_waiting_for_an_answer(bucket, behind, monkeypatch):
    monkeypatch.setattr(object_requests, "SILENT_SECONDS", 60)
    behind(lambda method, path: "stall")

    def interrupt(*_):
        raise KeyboardInterrupt

    before, started = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            open_store(bucket).read("name")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10


def test_an_aws_profile_names_the_endpoint_and_credentials_that_are_renewed(
    bucket, behind, monkeypatch, tmp_path
):
    proxy = behind(lambda method, path: None)
    script = tmp_path / "credentials.py"
    script.write_text(
        "import datetime, json, pathlib, time\n"
        "soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'key{time.time_ns()}', 'SecretAccessKey': 'x',"
        " 'SessionToken': 'x', 'Expiration': soon.isoformat()}))\n"
    )
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = eu-west-1\nendpoint_url = {proxy.url}\n"
        f"credential_process = {sys.executable} {script}\n"
    )
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr(clients, "_CREDENTIALS_LAST", timedelta(0))
    store = open_store(bucket)
    for _ in range(2):
        store.replace("name", b"data")
    assert len({signer for signer in proxy.signers if signer.startswith("key")}) == 2


def test_the_commands_take_s3_urls(folder, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = CliRunner().invoke(cli.app(), [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    url = f"{bucket}/web/set"
    assert run("crawl-shards", folder(), "--output", url, "--workers", 1).startswith(f"dataset   {url}\n")
    assert f"{url} is whole" in run("verify", url, "--level", "decode")
    assert json.loads(run("stats", url, "--json"))["kept"] == 10
    assert run("show", url, "--samples", 4).startswith("set.html shows 4 images of 10")
    assert run("gc", url) == f"0 files, 0 B, deleted from {url}\n"
    result = CliRunner().invoke(cli.app(), ["stats", f"{bucket}/nothing"])
    assert f"{bucket}/nothing is not a dataset" in result.output


def test_D1_clips_in_a_bucket_are_those_of_a_folder(tmp_path, crawl, bucket):
    write_clips(tmp_path / "films", 3, seconds=1.0)
    roots = {
        crawl([tmp_path / "films"], output, **vars(VIDEOS)).root
        for output in (tmp_path / "out", f"{bucket}/set")
    }
    assert len(roots) == 1
    assert files(f"{bucket}/set") == files(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "refuse", "500", "503", "done-500", "stall", "cut"])
def test_D1_D3_an_answer_lost_at_any_request_changes_nothing(kind, folder, crawl, bucket, behind, tmp_path):
    """Each request of a crawl fails once, at its first sending; stalls for a few of them only."""
    source = folder(count=5)
    expected = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    sent = Counter()
    stalls = random.Random(0).sample(range(20), 4)

    def fault(method, path):
        sent[method, path] += 1
        chosen = kind != "stall" or len(sent) - 1 in stalls
        return kind if chosen and sent[method, path] == 1 else None

    proxy = behind(fault)
    report = crawl([source], f"{bucket}/set", unit_rows=UNIT_ROWS)
    assert len(proxy.faults) >= (3 if kind == "stall" else 15)
    assert report.root == expected.root
    assert files(f"{bucket}/set") == files(tmp_path / "out")


def test_D3_whose_create_it_was_is_told_by_reading(bucket, behind):
    lost = ["done-500", "drop", None, "drop"]
    behind(lambda method, path: lost.pop(0) if lost and method == "PUT" else None)
    store = open_store(bucket)
    assert store.create_if_absent("mine", b"mine") == b"mine"
    assert lost == ["drop"]
    open_store(bucket).create_if_absent("theirs", b"theirs")
    assert store.create_if_absent("theirs", b"mine") == b"theirs"
    assert lost == []


def test_an_upload_in_parts_survives_lost_answers(bucket, behind, monkeypatch):
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    sent = Counter()

    def fault(method, path):
        sent[method, path] += 1
        return "drop" if method in ("PUT", "POST") and sent[method, path] == 1 else None

    proxy = behind(fault)
    data = bytes(12 << 20)
    store = open_store(bucket)
    with store.draft("shards/0/x") as draft:
        draft.file.write(data)
        draft.publish("shards/0/x-1.tar", hashlib.sha256(data).hexdigest())
    assert store.read("shards/0/x-1.tar") == data
    assert len(proxy.faults) == 5  # one create, three parts, one completion


def test_a_store_without_conditional_writes_is_refused(folder, crawl, bucket, behind):
    behind(lambda method, path: "unconditional")
    with pytest.raises(UserError, match="overwrites in spite of If-None-Match"):
        crawl([folder()], f"{bucket}/set")


def test_trouble_that_stays_is_one_sentence(folder, crawl, bucket, behind, monkeypatch):
    monkeypatch.setattr(object_requests, "MOST_TRIES", 3)
    proxy = behind(lambda method, path: "503" if "commits/" in path and method == "PUT" else None)
    with pytest.raises(
        UserError,
        match=r"^cannot write s3://.*/set: put failed 3 times, at last with 503 SlowDown; mend that",
    ):
        crawl([folder()], f"{bucket}/set")
    assert proxy.faults == ["503"] * 3


@pytest.mark.slow
def test_D1_D3_two_crawls_of_one_output_at_once(tmp_path, folder, crawl, bucket):
    source = folder(count=30)
    expected = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    running = [subprocess.Popen([sys.executable, "-c", CRAWL, source, f"{bucket}/set"]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert open_dataset(f"{bucket}/set").root == expected.root
    assert files(f"{bucket}/set") == files(tmp_path / "out")


def test_of_two_plans_at_once_the_first_wins(folder, bucket):
    source, store = folder(), open_store(f"{bucket}/set")
    opened, first = [open_listing(str(source), Columns())], []

    def meanwhile(items):
        if not first:
            first.append(None)
            first[0] = freeze(store, opened, CrawlSettings(unit_rows=4), listed=lambda items: None)

    with pytest.raises(UserError, match="planned with --unit-rows 4, not 5"):
        freeze(store, opened, CrawlSettings(unit_rows=5), listed=meanwhile)
    assert [len(first[0].table(unit)) for unit in first[0].units] == [4, 4, 3]
    assert len([entry for entry in store.list("plan") if "units-" in entry.name]) == 2


@pytest.mark.slow
def test_D1_killed_at_random_moments_until_done(tmp_path, folder, crawl, bucket):
    source = folder(count=40)
    expected = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    store, killed = open_store(f"{bucket}/set"), 0
    for delay in (0.0, 0.03, 0.1):
        before = len(list(store.list("commits")))
        process = subprocess.Popen([sys.executable, "-c", CRAWL, source, f"{bucket}/set"])
        # Not while it starts: the first new commit is when its writes begin.
        while process.poll() is None and len(list(store.list("commits"))) == before:
            time.sleep(0.03)
        time.sleep(delay)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed >= 2
    assert crawl([source], f"{bucket}/set", unit_rows=UNIT_ROWS).root == expected.root
    assert files(f"{bucket}/set") == files(tmp_path / "out")
    assert damages(f"{bucket}/set") == []


def test_losers_of_a_unit_leave_the_winners_result(folder, bucket, crawl):
    url = f"{bucket}/set"
    crawl([folder()], url, unit_rows=UNIT_ROWS)
    store = open_store(url)
    record = read_commit(store, 1)
    assert commit(store, record.model_copy(update={"kept": 1})) == record
    assert read_commit(store, 1) == record
    assert Path(record.shard.name).name.startswith("00000001-")
