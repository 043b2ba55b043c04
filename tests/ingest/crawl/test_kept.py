"""What was fetched for units that are not committed survives a kill: nobody asks for it again."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from full_disk import files_end_at
from picture_server import NETWORK, PictureServer

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_plan, crawl_shards, plan_shards
from ingest.crawl.kept import Kept
from ingest.crawl.on_this_machine import crawl_here
from ingest.crawl.results import Memory, Result
from ingest.dataset import layout
from ingest.dataset.gc import find_garbage
from ingest.image.check import Checked
from ingest.plan.plan import read_plans
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.store.open import open_store
from ingest.web.settings import FetchSettings

FETCH = FetchSettings(contact="test@example.org", allow_private=(NETWORK,), deadline=60.0)
SETTINGS = CrawlSettings(unit_rows=5, fetch=FETCH)
QUICK, SLOW = 100, 12


def quietly(counts: Counts) -> None:
    """Tell nobody."""


@pytest.fixture
def at_once(monkeypatch):
    """Units are kept as soon as they are begun."""
    monkeypatch.setattr("ingest.crawl.make_units._KEEP_AFTER_S", 0.0)
    monkeypatch.setattr("ingest.crawl.make_units._KEEP_EVERY_S", 0.0)


@pytest.fixture
def servers():
    with PictureServer() as quick, PictureServer() as slow:
        yield quick, slow


@pytest.fixture
def urls(tmp_path, servers):
    """Of many quick sites and one that is slow, which stands everywhere in its lane."""
    quick, slow = servers
    text = quick.write_list(tmp_path / "urls.txt", QUICK).read_text()
    text += slow.write_list(tmp_path / "urls.txt", SLOW, ["127.0.2.77"]).read_text()
    (tmp_path / "urls.txt").write_text(text)
    return tmp_path / "urls.txt"


def whole(urls: Path, output: Path):
    return crawl_shards([str(urls)], output, SETTINGS, workers=1, progress=quietly)


def dataset_bytes(output):
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).digest()
        for path in output.rglob("*")
        if path.parent.parent.name != "plan" and path.is_file() and not path.name.startswith(".")
    }


def kept_rows(output: Path) -> int:
    """Rows without a commit whose results are there."""
    plans = read_plans(open_store(output))
    if not plans:
        return 0
    committed = {int(path.stem) for path in output.glob("commits/*.json")}
    kept, found = Kept(plans[0], plans[0].units), 0
    for unit in set(plans[0].units) - committed:
        results = kept.results(unit, len(plans[0].table(unit)), Memory(0))
        found += len(list(results.load(kept.files(unit))))
        results.close()
    return found + sum(len(plans[0].table(unit)) for unit in committed)


def kill_when(urls: Path, output: Path, parts: int, done) -> None:
    """Crawl in another process until that is true, and kill it with all that it has started."""
    words = ["crawl-shards", str(urls), "--output", str(output), "--parts", str(parts), "--unit-rows", "5"]
    words += ["--contact", "test@example.org", "--allow-private", NETWORK, "--deadline", "60"]
    at_once = "from ingest.crawl import make_units as m; m._KEEP_AFTER_S = m._KEEP_EVERY_S = 0.0"
    command = [sys.executable, "-c", f"{at_once}; from ingest.cli import main; main()", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not done():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pictures(asked: Counter[str]) -> Counter[str]:
    return Counter({path: times for path, times in asked.items() if path != "/robots.txt"})


@pytest.mark.slow
def test_D1_D3_what_was_kept_is_not_asked_for_again_whatever_kills_and_parts(tmp_path, servers, urls):
    quick, slow = servers
    expected = whole(urls, tmp_path / "whole")
    for server in servers:
        server.asked.clear()
    slow.answering.clear()
    output = tmp_path / "out"
    kill_when(urls, output, 1, lambda: kept_rows(output) == QUICK)
    assert list(output.glob("waiting/*.results"))
    assert len(list(output.glob("commits/*.json"))) < expected.counts.units
    begun = slow.waiting
    kill_when(urls, output, 3, lambda: slow.waiting > begun)
    slow.answering.set()
    counts = Counts()
    (plan,) = read_plans(open_store(output))
    report = crawl_here(plan, fetch=FETCH, workers=1, parts=7, progress=quietly, counts=counts)
    assert report.root == expected.root
    assert set(pictures(quick.asked).values()) == {1}
    assert (counts.done, counts.resumed) == (QUICK + SLOW, QUICK)
    assert dataset_bytes(output) == dataset_bytes(tmp_path / "whole")
    assert not (output / "waiting").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kept_from", [0, 70])
def test_D1_D3_what_came_before_a_mistake_is_not_asked_for_again(
    tmp_path, servers, urls, at_once, monkeypatch, kept_from
):
    quick, slow = servers
    settings = CrawlSettings(unit_rows=60, fetch=FETCH)
    expected = crawl_shards([str(urls)], tmp_path / "whole", settings, workers=1, progress=quietly)
    for server in servers:
        server.asked.clear()
    slow.answering.clear()
    monkeypatch.setattr("ingest.crawl.make_units._KEEP_AFTER_S", 1e9)

    def progress(counts: Counts) -> None:
        if counts.done >= kept_from:
            monkeypatch.setattr("ingest.crawl.make_units._KEEP_AFTER_S", 0.0)
        if counts.done == QUICK and kept_rows(tmp_path / "out") == QUICK:
            slow.answering.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crawl_shards([str(urls)], tmp_path / "out", settings, workers=1, progress=progress)
    report = crawl_shards([str(urls)], tmp_path / "out", settings, workers=1, progress=quietly)
    assert report.root == expected.root
    assert report.counts.resumed == QUICK and set(pictures(quick.asked).values()) == {1}
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_D1_D3_what_went_to_a_bucket_is_not_asked_for_again(
    tmp_path, servers, urls, at_once, bucket, monkeypatch
):
    quick, slow = servers
    monkeypatch.setattr("ingest.crawl.make_units._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("ingest.crawl.results._MOST_PIECE", 2000)
    settings = CrawlSettings(unit_rows=200, fetch=FETCH)
    expected = crawl_shards([str(urls)], tmp_path / "whole", settings, workers=1, progress=quietly)
    for server in servers:
        server.asked.clear()
    slow.answering.clear()
    (store, files) = open_store(f"{bucket}/set"), 0

    def progress(counts: Counts) -> None:
        nonlocal files
        if counts.done >= QUICK:  # told now and then while the slow site is waited for
            found = len(list(store.list("waiting")))
            if files == found > 3:
                slow.answering.set()
                raise ZeroDivisionError
            files = found

    with pytest.raises(ZeroDivisionError):
        crawl_shards([str(urls)], store.root, settings, workers=1, progress=progress)
    (plan,) = read_plans(store)
    (descriptor,) = Kept(plan, [0]).files(0)  # there may be more objects than a process can open files
    os.close(descriptor)
    counts = Counts()
    report = crawl_plan(plan, fetch=FETCH, workers=1, progress=quietly, counts=counts)
    assert report.root == expected.root
    assert counts.resumed == QUICK and set(pictures(quick.asked).values()) == {1}
    assert list(store.list("waiting")) == []


@pytest.mark.slow
def test_D1_another_crawler_that_ends_first_takes_nothing_away(tmp_path, urls, at_once):
    expected = whole(urls, tmp_path / "whole")
    gone = 0

    def progress(counts: Counts) -> None:
        nonlocal gone
        for path in tmp_path.glob("out/waiting/*"):
            path.unlink()
            gone += 1

    report = crawl_shards([str(urls)], tmp_path / "out", SETTINGS, workers=1, progress=progress)
    assert gone and report.root == expected.root


@pytest.mark.slow
def test_D1_a_crawl_goes_on_after_a_full_disk_and_with_what_was_torn(tmp_path, servers, urls, at_once):
    quick, _ = servers
    settings = CrawlSettings(unit_rows=200, fetch=FETCH)
    expected = crawl_shards([str(urls)], tmp_path / "whole", settings, workers=1, progress=quietly)
    quick.asked.clear()
    plan = plan_shards([str(urls)], tmp_path / "out", settings, progress=quietly, counts=Counts())
    with files_end_at(20_000), pytest.raises(UserError, match=r"cannot write .*out"):
        crawl_plan(plan, fetch=FETCH, workers=1, progress=quietly, counts=Counts())
    (kept,) = tmp_path.glob("out/waiting/*.results")
    assert kept.stat().st_size == 20_000
    counts = Counts()
    report = crawl_plan(plan, fetch=FETCH, workers=1, progress=quietly, counts=counts)
    assert report.root == expected.root
    assert counts.resumed > 10
    assert pictures(quick.asked).total() + counts.resumed < 2 * QUICK + SLOW


def left_by_killed_crawlers(urls, out):
    """A plan, and for each row of its first unit a file of a crawler that was killed while it wrote."""
    plan = plan_shards([str(urls)], out, SETTINGS, progress=quietly, counts=Counts())
    rows = len(plan.table(0))
    for row in range(rows):
        results = Kept(plan, [0]).results(0, rows, Memory(0))
        results.keep(())
        list(results.put(row, Result(Checked(status="failed", reason="reset")), b""))
        results.close()
        newest = max((out / "waiting").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        with newest.open("ab") as file:
            file.write(b"torn")
    return plan, rows


def files_and_rows_kept(plan, rows):
    kept = Kept(plan, [0])
    results = kept.results(0, rows, Memory(0))
    descriptors = list(kept.files(0))
    found = len(list(results.load(descriptors)))
    results.close()
    return len(descriptors), found


def test_what_many_killed_crawlers_have_left_of_a_unit_becomes_one_file(tmp_path, urls):
    plan, rows = left_by_killed_crawlers(urls, tmp_path / "out")
    for _ in range(2):
        assert files_and_rows_kept(plan, rows) == (1, rows)
        assert len(list((tmp_path / "out" / "waiting").iterdir())) == 1


@pytest.mark.parametrize("call", ["write", "fsync", "unlink"])
def test_D1_a_kill_while_files_become_one_takes_nothing_away(tmp_path, urls, monkeypatch, call):
    for calls in range(SETTINGS.unit_rows):
        plan, rows = left_by_killed_crawlers(urls, tmp_path / str(calls))
        with monkeypatch.context() as patch:
            left, real = [calls], getattr(os, call)

            def killed(*arguments, left=left, real=real):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real(*arguments)

            patch.setattr(os, call, killed)
            with suppress(KeyboardInterrupt):
                list(Kept(plan, [0]).files(0))
        assert files_and_rows_kept(plan, rows)[1] == rows


def test_what_cannot_be_read_of_a_unit_goes_with_it(tmp_path, urls):
    plan, _ = left_by_killed_crawlers(urls, tmp_path / "out")
    kept = Kept(plan, [0])
    file, *_ = (tmp_path / "out" / "waiting").iterdir()
    file.unlink()
    file.symlink_to("/dev/zero")
    for descriptor in kept.files(0):
        os.close(descriptor)
    kept.remove(0)
    assert not list((tmp_path / "out" / "waiting").iterdir())


@pytest.mark.slow
def test_what_nobody_could_have_kept_is_neither_read_nor_removed(tmp_path, urls):
    expected = whole(urls, tmp_path / "whole")
    folder = tmp_path / "out" / "waiting"
    folder.mkdir(parents=True)
    names = [f"00000000-{number:016x}.results" for number in range(4)]
    os.mkfifo(folder / names[0])
    (folder / names[1]).symlink_to("/dev/zero")
    (folder / names[2]).mkdir()
    (folder / names[3]).write_bytes(b"no results")
    (folder / "notes.txt").write_text("mine")
    assert whole(urls, tmp_path / "out").root == expected.root
    assert {path.name for path in folder.iterdir()} == {*names[:3], "notes.txt"}


@pytest.mark.slow
def test_what_a_kill_after_a_commit_has_left_goes_when_the_dataset_is_sealed(
    tmp_path, servers, urls, at_once, monkeypatch
):
    output = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr("ingest.crawl.kept.Kept.remove", lambda kept, unit: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            whole(urls, output)
    left = [int(path.name[:8]) for path in output.glob("waiting/*.results")]
    assert any((output / layout.commit_name(unit)).is_file() for unit in left)
    (output / "waiting" / f"{9999:08d}-{1:016x}.results").write_bytes(b"")  # of no unit that is known
    (plan,) = read_plans(open_store(output))
    crawl_here(plan, fetch=FETCH, workers=1, parts=2, progress=quietly, counts=Counts())
    assert [path.name[:8] for path in output.glob("waiting/*")] == ["00009999"]


@pytest.mark.slow
def test_what_was_kept_of_a_committed_unit_is_garbage(tmp_path, urls):
    whole(urls, tmp_path / "out")
    (tmp_path / "out" / "waiting").mkdir()
    for unit in (1, 9999):  # of the other one nobody has been told
        (tmp_path / "out" / "waiting" / f"{unit:08d}-{unit:016x}.results").write_bytes(b"")
    _, garbage = find_garbage(tmp_path / "out")
    assert [entry.name for entry in garbage] == [f"waiting/00000001-{1:016x}.results"]
