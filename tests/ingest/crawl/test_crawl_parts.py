"""A crawl by several crawlers on this machine: the same dataset, whatever their number and their fate."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_server import NETWORK, PictureServer
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.run.folder import RunFolder
from ingest import cli
from ingest.crawl.crawl import plan_shards
from ingest.crawl.divide import divide, in_parts, together
from ingest.crawl.on_this_machine import crawl_here
from ingest.crawl.part import Part, _Report, counts_json, read_report, sum_into
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.web.domain import domain_hashes
from ingest.web.host_limits import HostLimit
from ingest.web.host_queues import SlowHost
from ingest.web.opt_outs import OptOut
from ingest.web.settings import FetchSettings
from pipeline.train.look import read_latest_step

FETCH = FetchSettings(contact="test@example.org", allow_private=(NETWORK,))
SETTINGS = CrawlSettings(unit_rows=5, fetch=FETCH)
COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()"]


@pytest.fixture
def server():
    with PictureServer() as server:
        yield server


def dataset_bytes(output):
    """Every file that readers can see, and its digest."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).digest()
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.parent.parent.name != "plan"
    }


def test_a_site_is_asked_by_one_crawler(tmp_path):
    urls = [f"http://127.0.2.{1 + n % 4}:9/{n}.png" for n in range(40)]
    urls += [f"http://127.0.2.9:9/{n}.png" for n in range(80)]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    quiet = {"progress": lambda counts: None, "counts": Counts()}
    plan = plan_shards([str(tmp_path / "list.txt")], tmp_path / "out", SETTINGS, **quiet)
    assert sum(map(len, plan.lanes)) == len(plan.units) and not plan.local_units
    sites = {
        unit: set(domain_hashes(plan.table(unit)["path"].cast("string")).tolist()) for unit in plan.units
    }
    for parts in (2, 3, 7):
        divided = divide(together(plan, plan.units), parts)
        asked = [set().union(*(sites[unit] for unit in part)) for part in divided]
        assert len(set().union(*asked)) == sum(map(len, asked)) == 5


def crawl(source, output, parts, progress=lambda counts: None):
    counts = Counts()
    plan = plan_shards([str(source)], output, SETTINGS, progress=progress, counts=counts)
    return crawl_here(plan, fetch=FETCH, workers=2, parts=parts, progress=progress, counts=counts)


def crawlers(rank):
    """The crawler of that number, if it has been started."""
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    ranks = [child for child in living if "cluster.rank" in child.cmdline()]
    return [process for process in ranks if process.environ().get("RANK") == str(rank)]


@given(sizes=st.lists(st.integers(1, 9), max_size=30), parts=st.integers(1, 40))
def test_parts_are_of_whole_pieces_even_and_complete(sizes, parts):
    units = iter(range(100, 1000))
    pieces = [[next(units) for _ in range(size)] for size in sizes]
    made = divide(pieces, parts)
    assert [unit for part in made for unit in part] == [unit for piece in pieces for unit in piece]
    assert len(made) == min(parts, len(pieces)) and all(made)
    for part in made:
        assert all(set(piece) <= set(part) or not set(piece) & set(part) for piece in pieces)
        # No longer than an even share and half of the longest piece at either end.
        assert len(part) <= sum(sizes) / len(made) + max(sizes)


def test_the_parts_beside_a_giant_are_even():
    pieces = [[unit] for unit in range(400)]
    pieces.insert(200, list(range(400, 600)))
    made = divide(pieces, 16)
    assert sorted(map(len, made))[-2] <= 30 and max(map(len, made)) <= 225


def test_fewer_parts_than_asked_for_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "list.txt").write_text("\n".join(f"http://127.0.2.1:9/{n}.png" for n in range(40)))
    quiet = {"progress": lambda counts: None, "counts": Counts()}
    plan = plan_shards([str(tmp_path / "list.txt")], tmp_path / "out", SETTINGS, **quiet)
    assert in_parts(plan, plan.units, 1) == in_parts(plan, plan.units, 7) == [list(plan.units)]
    assert [record.message for record in caplog.records if "part" in record.message] == [
        "1 part, not 7: no more lanes, or units without URLs, are there"
    ]


@given(count=st.integers(0, 3000), parts=st.integers(1, 50))
def test_units_without_urls_are_divided_evenly(count, parts):
    made = divide([[unit] for unit in range(count)], parts)
    assert len(made) == min(parts, count)
    lengths = {len(part) for part in made}
    assert not lengths or max(lengths) - min(lengths) <= 1


@given(
    units=st.lists(st.integers(0, 300), unique=True, min_size=1).map(sorted), rate=st.none() | st.just(0.5)
)
def test_what_a_crawler_is_given_survives_as_json(units, rate):
    fetch = replace(
        FETCH,
        per_host_rate=rate,
        host_limits=(HostLimit(name="a", rate=rate),),
        heeded=frozenset([OptOut.CONTENT_USAGE, OptOut.X_ROBOTS_TAG]),
    )
    part = Part(output="s3://a/b", generation=2, units=units, fetch=fetch, workers=3)
    assert Part.from_json(part.to_json()) == part


@pytest.mark.slow
def test_D1_D2_any_number_of_parts_makes_the_same_dataset(tmp_path, server):
    source = server.write_list(tmp_path / "list.txt", 60)
    told = []
    reports = [
        crawl(source, tmp_path / str(parts), parts, lambda counts: told.append(replace(counts)))
        for parts in (1, 3)
    ]
    assert len({report.root for report in reports}) == 1
    assert dataset_bytes(tmp_path / "3") == dataset_bytes(tmp_path / "1")
    for report in reports:
        assert report.counts == reports[0].counts
        assert report.counts.done == report.counts.planned == 60
        assert (report.counts.units, report.counts.resumed) == (report.counts.units_done, 0)
    assert {server.asked[f"/{n}.png"] for n in range(60)} == {2}
    again = crawl(source, tmp_path / "3", 4)
    assert (again.root, again.counts.resumed) == (reports[0].root, 60)


@pytest.mark.slow
def test_D1_a_crawler_that_is_killed_is_named_and_others_go_on_with_its_units(tmp_path, server):
    source = server.write_list(tmp_path / "list.txt", 100)
    expected = crawl(source, tmp_path / "whole", 1)
    server.seconds = 0.1
    output = tmp_path / "out"

    second, killed, before = [], [], set(psutil.Process().children(recursive=True))

    def kill_the_second(counts):
        """Stopped at once, so that it cannot be done already when it is killed."""
        if not second:
            second.extend(crawlers(1))
            for process in second:
                process.suspend()
        elif counts.units_done >= 3 and not killed:
            killed.append(second[0].kill())

    with pytest.raises(
        UserError,
        match=r"^crawl: rank 1 of 3 failed first: Killed: killed by SIGKILL.*same command again",
    ):
        crawl(source, output, 3, kill_the_second)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not (output / "DATASET.json").exists()
    server.seconds = 0.0
    report = crawl(source, output, 1)
    assert report.root == expected.root
    assert report.counts.resumed >= 15
    assert dataset_bytes(output) == dataset_bytes(tmp_path / "whole")


def test_a_mistake_that_a_crawler_finds_is_told_as_a_sentence(tmp_path, server):
    source = server.write_list(tmp_path / "list.txt", 20)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards").touch()
    with pytest.raises(UserError, match=r"^cannot write .*out: "):
        crawl(source, tmp_path / "out", 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_no_process_and_is_gone_on_with(tmp_path, server, number):
    server.seconds = 0.1
    source = server.write_list(tmp_path / "list.txt", 60)
    words = ["crawl-shards", str(source), "--output", str(tmp_path / "out"), "--parts", "2"]
    words += ["--unit-rows", "5", "--contact", "test@example.org", "--allow-private", NETWORK]
    process = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("out/commits/*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=10)[1] == []
    if number == signal.SIGINT:
        assert process.returncode == 130
        # Before it, a line for every ten seconds that a busy machine took.
        assert said.splitlines()[-1] == (
            "ingest: interrupted; run the same command again to go on where it stopped"
        )
        server.seconds = 0.0
        again = CliRunner().invoke(cli.app(), words)
        assert again.exit_code == 0, again.output
        assert crawl(source, tmp_path / "whole", 1).root == crawl(source, tmp_path / "out", 1).root


def test_a_crawler_s_counts_are_read_as_written_or_told_with_their_file(tmp_path):
    counts = Counts(planned=3, kept=1, rejected=Counter(too_small=2))
    report = tmp_path / "counts-0.json"
    report.write_text(json.dumps(counts_json(counts) | {"of_a_later_version": 1}))
    assert read_report(tmp_path, 0) == counts
    assert read_report(tmp_path, 1) == Counts()
    for damage in ("{", "[]", '{"kept": "many"}', '{"rejected": {"too_small": "two"}}'):
        report.write_text(damage)
        with pytest.raises(UserError, match=r"counts-0\.json is damaged: .*; remove it"):
            read_report(tmp_path, 0)


def test_what_a_crawler_waits_for_is_told_to_whoever_asks(tmp_path):
    report = _Report(tmp_path, 0)
    report.begin(1000)
    giants = [SlowHost("a.example", 300, 2.0), SlowHost("b.example", 10, 1.0)]
    report.write(Counts(kept=100, slowest_hosts=giants))
    total = Counts()
    sum_into(total, [read_report(tmp_path, 0), Counts(slowest_hosts=[SlowHost("c.example", 100, 3.0)])])
    assert [host.name for host in total.slowest_hosts] == ["a.example", "c.example", "b.example"]
    latest = read_latest_step(RunFolder(tmp_path))
    assert (latest.step, latest.total_steps) == (100, 1000)
    assert latest.waits_for == "300 URLs of a.example, 2.0 s each"
    assert latest.seconds_left == 600.0
