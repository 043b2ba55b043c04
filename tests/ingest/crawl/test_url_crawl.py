"""Crawls of lists of URLs over real HTTP: same bytes whatever the web does with time, a row for every URL."""

import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import ALLOWED as HOSTILE_NETWORK
from hostile_server import HostileServer
from picture_server import NETWORK, PictureServer
from replay_server import ALLOWED, ReplayServer, expected

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_plan, crawl_shards, plan_shards
from ingest.crawl.make_units import _Crawl
from ingest.crawl.on_this_machine import crawl_here
from ingest.dataset.open import open_dataset, sealed_units
from ingest.image.check import Treatment
from ingest.image.decode import ImageLimits
from ingest.plan.plan import read_plans
from ingest.plan.retry import plan_retry
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.sources.url_list import Columns
from ingest.store.open import open_store
from ingest.store.posix import PosixStore
from ingest.web.settings import FetchSettings

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from crawl_soak import soak
from peak_memory import PeakMemory

KEEP_BYTES = Treatment()
CONTACT = "https://example.org/crawl"


@pytest.fixture
def server():
    with ReplayServer() as server:
        yield server


def url_crawl(
    source, output, *, extend=False, workers=2, unit_rows=32, treatment=KEEP_BYTES, per_site=None, **fetch
):
    return crawl_shards(
        [str(source)],
        output,
        CrawlSettings(
            unit_rows=unit_rows,
            treatment=treatment,
            per_site=per_site,
            fetch=FetchSettings(**{"contact": CONTACT, "allow_private": ALLOWED, "tries": 1} | fetch),
        ),
        workers=workers,
        progress=lambda counts: None,
        columns=Columns(),
        extend=extend,
    )


def rows_of(report):
    metas = sealed_units(report.output, report.root)["meta"].to_pylist()
    return [row for meta in metas for row in pq.read_table(report.output / meta).to_pylist()]


def write_list(path, urls):
    path.write_text("".join(f"{url}\n" for url in urls))
    return path


def test_D2_rows_of_lists_without_an_address_are_rows_and_one_address_is_one_row(tmp_path, server):
    one, two = server.urls(2)
    spelled = one.replace("http://", "HTTP://me:secret@").replace("/0", "/%30") + "#x"
    (tmp_path / "a.csv").write_text(f"url,caption\n{one},first\n,none\n{spelled},same\n,none\n{two},a,b\n")
    report = url_crawl(tmp_path / "a.csv", tmp_path / "out")
    rows = {row["url"]: (row["reason"], row["caption"], row["retryable"]) for row in rows_of(report)}
    assert rows.pop(one)[1] == "first"
    assert rows == {
        "a.csv row 2": ("no_url", "none", False),
        "a.csv row 4": ("no_url", "none", False),
        "a.csv line 6": ("malformed_row", None, False),
    }
    assert (report.counts.planned, report.counts.merged) == (4, 1)
    write_list(tmp_path / "b.txt", [spelled, two])
    more = url_crawl(tmp_path / "b.txt", tmp_path / "out", extend=True)
    assert (more.counts.planned, more.counts.known) == (1, 1)


@pytest.mark.slow
def test_D1_same_root_for_any_order_of_arrival_and_number_of_workers(tmp_path, server):
    urls = write_list(tmp_path / "urls.txt", server.urls(200))
    treatment = Treatment(resize=12)
    roots = {url_crawl(urls, tmp_path / "quick", treatment=treatment).root}
    server.delay = 0.01
    roots.add(url_crawl(urls, tmp_path / "one", treatment=treatment, workers=1, per_host=16).root)
    roots.add(url_crawl(urls, tmp_path / "many", treatment=treatment, workers=3, connections=5).root)
    assert len(roots) == 1


def test_D2_every_url_has_its_row_with_all_that_the_list_says_of_it(tmp_path, server):
    urls = [*server.urls(120), "ftp://example.org/a.jpg", "no url", "http://10.0.0.1/a.jpg"]
    given = {
        url: {
            "url": url,
            "caption": f"alt text {n}" if n % 3 else None,
            "labels": ["sea", f"n{n}"] if n % 2 else [],
            "score": n / 8,
            "page": f"https://example.org/{n}",
        }
        for n, url in enumerate(urls)
    }
    listed = pa.Table.from_pylist(list(given.values())).rename_columns(
        ["url", "alt", "tags", "score", "page"]
    )
    pq.write_table(listed, tmp_path / "urls.parquet")
    report = url_crawl(tmp_path / "urls.parquet", tmp_path / "out")
    rows = rows_of(report)
    assert {row["url"]: {name: row[name] for name in given[row["url"]]} for row in rows} == given
    assert len(rows) == report.counts.planned == report.counts.done == len(urls)
    verdicts = {row["url"]: (row["status"], row["reason"], row["http_status"]) for row in rows}
    assert verdicts == {url: tuple(expected(url)) for url in urls[:120]} | {
        "ftp://example.org/a.jpg": ("rejected", "not_http_url", None),
        "no url": ("rejected", "not_http_url", None),
        "http://10.0.0.1/a.jpg": ("rejected", "private_address", None),
    }
    assert [row["reason"] for row in rows if row["retryable"]] == ["http_500"] * 6


@pytest.mark.slow
def test_D4_a_hostile_web_is_crawled_to_its_end(tmp_path, monkeypatch):
    with HostileServer(tmp_path) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
        cases = server.cases()
        urls = write_list(tmp_path / "urls.txt", cases)
        limits = ImageLimits(max_bytes=4 << 20)
        # Pages that are shared count once: a child is for a moment all of this process, before it is another.
        here = [psutil.Process(), *psutil.Process().children(recursive=True)]
        before = sum(process.memory_full_info().pss for process in here)
        started = time.monotonic()
        with PeakMemory(every=0.05) as memory:
            report = url_crawl(
                urls,
                tmp_path / "out",
                treatment=Treatment(limits=limits),
                allow_private=HOSTILE_NETWORK,
                deadline=1.5,
                tries=2,
            )
        assert time.monotonic() - started < 20
        assert memory.peak - before < 500 << 20
        assert server.trespasses == 0
    reasons = {url: reason or None for url, reason in cases.items()} | {server.url("empty"): "empty"}
    rows = rows_of(report)
    assert {row["url"]: row["reason"] for row in rows} == reasons
    assert {row["status"] for row in rows if row["reason"] is None} == {"kept"}
    assert len(rows) == len(cases)


@pytest.mark.slow
def test_D1_D3_killed_at_random_until_sealed(tmp_path):
    result = soak(tmp_path, images=900, kills=4, unit_rows=20, pauses=(0.1, 0.5), seed=0)
    assert result.kills.total() == 4
    assert result.crawls >= 1
    assert (result.different, result.lost, result.doubled, result.wrong, result.damages) == (0, 0, 0, 0, 0)
    assert result.passed


def test_extending_fetches_only_what_is_new_and_the_old_root_still_opens(tmp_path, server):
    first = url_crawl(write_list(tmp_path / "a.txt", server.urls(60)), tmp_path / "out")
    asked = server.answered
    more = write_list(tmp_path / "b.txt", server.urls(100))
    second = url_crawl(more, tmp_path / "out", extend=True)
    assert second.counts.planned == 40
    assert server.answered - asked == 40 + 2  # of the new ones, two lead elsewhere first
    plans = read_plans(open_store(tmp_path / "out"))
    assert [plan.generation for plan in plans] == [0, 1]
    assert plans[1].record.known == 60
    assert second.root != first.root
    old, new = open_dataset(tmp_path / "out", sealed=first.root), open_dataset(tmp_path / "out")
    assert (old.root, new.root) == (first.root, second.root)
    assert len(new) == len(old) + second.counts.kept
    assert sorted(row["url"] for row in rows_of(second)) == sorted(server.urls(100))
    assert url_crawl(more, tmp_path / "out", extend=True).root == second.root
    # The first crawl, run once more, takes nothing away.
    assert url_crawl(tmp_path / "a.txt", tmp_path / "out").root == first.root
    assert open_dataset(tmp_path / "out").root == second.root
    with pytest.raises(UserError, match=r"there is nothing new in a2\.txt"):
        url_crawl(write_list(tmp_path / "a2.txt", server.urls(50)), tmp_path / "out", extend=True)


def test_a_site_is_planned_up_to_a_bound_of_which_the_plan_tells(tmp_path, server):
    first = url_crawl(write_list(tmp_path / "a.txt", server.urls(60)), tmp_path / "out", per_site=4)
    planned = first.counts.planned
    assert first.counts.over_per_site == 60 - planned > 0
    assert read_plans(open_store(tmp_path / "out"))[0].record.over_per_site == 60 - planned
    sites = Counter(urlsplit(row["url"]).hostname for row in rows_of(first))
    assert max(sites.values()) == 4
    with pytest.raises(UserError, match=r"with --per-site 4, not 5: use --per-site 4 to go on"):
        url_crawl(tmp_path / "a.txt", tmp_path / "out", per_site=5)
    with pytest.raises(UserError, match=r"nothing new in a\.txt: \d+ rows left out, .*--per-site"):
        url_crawl(tmp_path / "a.txt", tmp_path / "out", per_site=1, extend=True)
    more = url_crawl(tmp_path / "a.txt", tmp_path / "out", per_site=5, extend=True)
    assert more.counts.planned == len(sites)


def test_what_was_given_up_is_a_row_and_is_taken_up_by_a_retry(tmp_path, server):
    given_up = url_crawl(write_list(tmp_path / "a.txt", server.urls(20)), tmp_path / "out", give_up_at=1.0)
    assert given_up.counts.failed == {"given_up": 20} and server.answered == 0
    plan = plan_retry(open_store(tmp_path / "out"), deadline=None, tries=None)
    fetch = replace(plan.settings.fetch, contact=CONTACT)
    counts = Counts()
    crawl_plan(plan, fetch=fetch, workers=1, progress=lambda counts: None, counts=counts)
    whole = url_crawl(tmp_path / "a.txt", tmp_path / "whole")
    assert (counts.kept, counts.failed) == (whole.counts.kept, whole.counts.failed)


def test_a_plan_without_lanes_is_extended_and_read_if_it_is_made_and_else_refused(tmp_path, server):
    urls = write_list(tmp_path / "a.txt", server.urls(40))
    made = url_crawl(urls, tmp_path / "out")
    record = tmp_path / "out" / "plan" / "0" / "plan.json"
    before = json.loads(record.read_text())
    del before["lanes"]
    record.write_text(json.dumps(before))
    assert url_crawl(urls, tmp_path / "out").root == made.root
    more = url_crawl(write_list(tmp_path / "b.txt", server.urls(50)), tmp_path / "out", extend=True)
    assert (more.counts.planned, more.counts.known) == (10, 40)
    assert open_dataset(tmp_path / "out").root == more.root

    part = tmp_path / "part"
    shutil.copytree(tmp_path / "out" / "plan" / "0", part / "plan" / "0")
    for crawlers in (1, 2):
        (plan,) = read_plans(open_store(part))
        fetch = FetchSettings(contact=CONTACT)
        with pytest.raises(UserError, match=r"part is of an earlier version.*another --output"):
            crawl_here(
                plan, fetch=fetch, workers=1, parts=crawlers, progress=lambda counts: None, counts=Counts()
            )
    assert not (part / "commits").exists()


@pytest.mark.slow
def test_the_slowest_host_is_told_with_all_its_urls_that_are_known(tmp_path, server, monkeypatch):
    monkeypatch.setattr("ingest.crawl.make_units._HOSTS_EVERY_S", 0)
    server.delay = 0.005
    fetch = FetchSettings(contact=CONTACT, allow_private=ALLOWED, tries=1)
    quiet = {"progress": lambda counts: None, "counts": Counts()}
    first, *_ = every = server.urls(1200)
    of_one = [url for url in every if url.split("/")[2] == first.split("/")[2]]
    urls = write_list(tmp_path / "a.txt", of_one)
    plan = plan_shards([str(urls)], tmp_path / "out", CrawlSettings(fetch=fetch), **quiet)
    waiting = set()

    def progress(counts):
        waiting.update(host.waiting for host in counts.slowest_hosts)

    crawl_plan(plan, fetch=fetch, workers=1, progress=progress, counts=Counts())
    assert 100 < max(waiting) < len(of_one)


@pytest.mark.parametrize(("before", "now", "lacks"), [(40, 11, False), (40, 9, True), (1000, 17, False)])
def test_room_lacks_where_it_was_small_or_is_nearly_gone(mixed_plan, monkeypatch, before, now, lacks):
    plan, fetch = mixed_plan
    frees = iter([before << 30, now << 30])
    monkeypatch.setattr(
        "ingest.crawl.make_units.shutil.disk_usage", lambda place: SimpleNamespace(free=next(frees))
    )
    monkeypatch.setattr("ingest.crawl.make_units._ROOM_EVERY_S", 0)
    crawl = _Crawl(
        plan=plan, units=plan.units, sources={}, fetch=fetch, counts=Counts(), progress=lambda counts: None
    )
    assert [crawl._lacks_room(), crawl._lacks_room()] == [False, lacks]


def test_D1_a_disk_that_fills_with_what_waits_slows_a_crawl_down_and_no_more(tmp_path, server, monkeypatch):
    urls = write_list(tmp_path / "a.txt", server.urls(60))
    root = url_crawl(urls, tmp_path / "whole").root
    frees = chain([100], repeat(20))
    monkeypatch.setattr(
        "ingest.crawl.make_units.shutil.disk_usage", lambda place: SimpleNamespace(free=next(frees))
    )
    monkeypatch.setattr("ingest.crawl.make_units._ROOM_EVERY_S", 0)
    assert url_crawl(urls, tmp_path / "full").root == root
    assert next(frees) == 20


def test_a_url_that_is_listed_twice_is_asked_for_once_and_keeps_its_first_caption(tmp_path, server):
    urls = server.urls(3)
    lines = [f"{url},{caption}" for url, caption in zip([*urls, *urls], "abcdef", strict=True)]
    (tmp_path / "urls.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    report = url_crawl(tmp_path / "urls.csv", tmp_path / "out")
    assert server.answered == 3
    assert {row["url"]: row["caption"] for row in rows_of(report)} == dict(zip(urls, "abc", strict=True))
    (plan,) = read_plans(open_store(tmp_path / "out"))
    assert (plan.rows, plan.record.repeated) == (3, 3)


def test_without_a_contact_nobody_is_asked(tmp_path, server):
    urls = write_list(tmp_path / "urls.txt", server.urls(3))
    with pytest.raises(UserError, match=r"webmasters must be able to reach you: .* with --contact"):
        url_crawl(urls, tmp_path / "out", contact=None)
    assert server.answered == 0
    assert not (tmp_path / "out").exists()


def test_other_work_for_the_same_output_is_refused_with_the_way_out(tmp_path, server):
    urls = write_list(tmp_path / "urls.txt", server.urls(5))
    output = tmp_path / "out"
    root = url_crawl(urls, output).root
    with pytest.raises(UserError, match=r"planned with --deadline 20\.0, not 5\.0: use --deadline 20\.0 to"):
        url_crawl(urls, output, deadline=5.0)
    with pytest.raises(UserError, match=r"planned without --ignore-robots.*leave out --ignore-robots to"):
        url_crawl(urls, output, robots=False)
    other = write_list(tmp_path / "others.txt", server.urls(6))
    with pytest.raises(UserError, match=r"from urls\.txt .* not from others\.txt .*; --extend adds to it"):
        url_crawl(other, output)
    write_list(urls, server.urls(7))
    with pytest.raises(UserError, match=r"from urls\.txt \(sha256 \w+\), not from urls\.txt \(sha256 \w+\)"):
        url_crawl(urls, output)
    with pytest.raises(UserError, match=r"nothing to ingest in none\.txt"):
        url_crawl(write_list(tmp_path / "none.txt", ["# nothing"]), tmp_path / "other")
    assert open_dataset(output).root == root


@dataclass(frozen=True)
class _Watched(PosixStore):
    """Calls `opened` before a file is opened."""

    opened: Callable[[str], None]

    def open(self, name):
        self.opened(name)
        return super().open(name)


def _watched_crawl(plan, fetch, opened):
    counts = Counts()
    watched = replace(plan, store=_Watched(plan.store.root, opened))
    crawl_plan(watched, fetch=fetch, workers=1, progress=lambda counts: None, counts=counts)
    return counts


@pytest.fixture
def mixed_plan(tmp_path, server, folder):
    """Units of files, and of URLs."""
    sources = [str(folder(count=6)), str(write_list(tmp_path / "urls.txt", server.urls(43)))]
    fetch = FetchSettings(contact=CONTACT, allow_private=ALLOWED, tries=1)
    settings = CrawlSettings(unit_rows=5, fetch=fetch)
    plan = plan_shards(sources, tmp_path / "out", settings, progress=lambda counts: None, counts=Counts())
    return plan, fetch


def test_units_that_others_make_meanwhile_are_counted_once(mixed_plan):
    plan, fetch = mixed_plan
    opens = 0

    def opened(name):
        nonlocal opens
        opens += 1
        if opens == 2:  # this crawl has seen that nothing is done, and begins with the first unit
            crawl_plan(plan, fetch=fetch, workers=1, progress=lambda counts: None, counts=Counts())

    counts = _watched_crawl(plan, fetch, opened)
    assert counts.done == counts.planned == 50
    assert counts.units_done == counts.units == len(plan.units)


def test_looking_for_files_reads_no_units_of_urls(mixed_plan):
    plan, fetch = mixed_plan
    opens = Counter()
    _watched_crawl(plan, fetch, lambda name: opens.update([name]))
    # Its footer, and each unit once. At the end its footer again and the columns of labels, all at once.
    assert opens[plan.record.items.name] == 1 + len(plan.units) + 2


def test_more_hosts_at_a_time_than_the_usual_limit_of_open_files(tmp_path):
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with PictureServer(seconds=0.5) as pictures:
        sites = [f"127.0.2.{number}" for number in range(1, 101)]
        urls = pictures.write_list(tmp_path / "urls.txt", 100, sites)
        # The server's side of the connections counts, too; it has them after ours.
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, files[1]))  # noqa: PTH208
        try:
            report = url_crawl(urls, tmp_path / "out", allow_private=[NETWORK], robots=False)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert set(report.counts.failed) == {"http_404"}


@pytest.mark.slow
def test_few_units_are_open_though_each_waits_for_a_slow_site(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.crawl.lanes._AHEAD", 10)
    monkeypatch.setattr("ingest.crawl.lanes.WINDOW", 128)
    monkeypatch.setattr("ingest.crawl.make_units.WINDOW", 128)
    monkeypatch.setattr("ingest.image.check_pool._BATCH_IMAGES", 1)
    most_open = 0

    def progress(counts):
        nonlocal most_open
        most_open = max(most_open, len(list((tmp_path / "out").glob("shards/*/.*.tmp"))))

    with PictureServer() as quick, PictureServer(seconds=1.5) as slow:
        slow_sites, quick_sites = ([f"127.0.2.{n}" for n in range(first, 61, 2)] for first in (1, 2))
        urls = slow.write_list(tmp_path / "slow.txt", 30, slow_sites).read_text()
        urls += quick.write_list(tmp_path / "quick.txt", 270, quick_sites).read_text()
        (tmp_path / "urls.txt").write_text(urls)
        fetch = FetchSettings(contact=CONTACT, allow_private=(NETWORK,), tries=1, robots=False)
        report = crawl_shards(
            [str(tmp_path / "urls.txt")],
            tmp_path / "out",
            CrawlSettings(unit_rows=10, fetch=fetch),
            workers=1,
            progress=progress,
        )
    assert report.counts.done == 300
    assert most_open < 20  # of 30
