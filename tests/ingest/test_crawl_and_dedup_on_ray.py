"""Crawls and deduplication on one Ray cluster: as at home, though workers are killed and a node is lost."""

import contextlib
import json
import math
import random
import threading
import time

import psutil
import pytest
from picture_server import NETWORK, PictureServer
from sealed_rows import seal_rows
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.map.on_ray import on_ray
from cluster.site import Site
from ingest import cli
from ingest.crawl.crawl import crawl_plan, plan_shards
from ingest.crawl.on_ray import crawl_on_ray
from ingest.dedup import tasks as dedup_tasks
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.web.settings import FetchSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FETCH = FetchSettings(contact="test@example.org", allow_private=(NETWORK,))
BASE = 0x0F1E2D3C4B5A6978


def test_D1_C1_a_view_made_on_ray_equals_one_made_here(ray_cluster, tmp_path, monkeypatch):
    rng = random.Random(3)
    units = [
        [
            {"data": b"%d" % rng.randrange(60), "phash": BASE ^ (1 << rng.randrange(40)) ^ rng.randrange(16)}
            for _ in range(8)
        ]
        for _ in range(6)
    ]
    for name in ("here", "ray"):
        seal_rows(tmp_path / name, units)
    seal_rows(tmp_path / "eval", [units[3][:2]])
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(dedup_tasks, "ROWS_PER_TASK", 16)
    monkeypatch.setattr("ingest.dedup.dedup.ROWS_PER_PARTITION", 10)
    monkeypatch.chdir(tmp_path)  # the workers have other working directories
    (tmp_path / "site.yaml").write_text(json.dumps({"ray_address": ray_cluster.address}))
    answers = []
    for where in (
        ["here", "--workers", "1"],
        ["ray", "--executor", "ray", "--parts", "2", "--scratch", "scratch", "--cluster", "site.yaml"],
    ):
        command = ["dedup", *where, "--name", "clean", "--against", "eval", "--json"]
        result = CliRunner().invoke(cli.app(), command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout))
    assert answers[1] == answers[0] | {"path": "ray"}
    assert min(answers[0][reason] for reason in ("kept", "exact", "near", "evaluation")) > 0
    for file in ("clean.parquet", "clean.duplicates.parquet"):
        here, ray = ((tmp_path / name / "views" / file).read_bytes() for name in ("here", "ray"))
        assert here == ray
    assert list((tmp_path / "scratch").iterdir()) == []


def test_answers_come_in_the_order_of_the_tasks(ray_cluster):
    tasks = [200_000, 3, 4, 5]  # the first is done last
    spread = on_ray(Site(ray_address=ray_cluster.address), parts=2)
    assert list(spread(math.factorial, tasks)) == [math.factorial(task) for task in tasks]


def planned(source, output):
    counts = Counts()
    settings = CrawlSettings(unit_rows=5, fetch=FETCH)
    return plan_shards([str(source)], output, settings, progress=lambda counts: None, counts=counts), counts


def workers():
    """The processes that make a part now."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::ingest.crawl.part:crawl_call" in " ".join(process.info["cmdline"] or [])
    ]


def test_D1_C1_killed_workers_and_a_lost_node_change_nothing(ray_cluster, tmp_path):
    with PictureServer(seconds=0.02) as server:
        source = server.write_list(tmp_path / "list.txt", 120)
        plan, counts = planned(source, tmp_path / "whole")
        expected = crawl_plan(plan, fetch=FETCH, workers=1, progress=lambda counts: None, counts=counts)
        events = []

        def kill_at_work():
            """Whoever waits for a picture is in the middle of a part; the others get theirs afterwards."""
            deadline = time.monotonic() + 15
            while not server.waiting and time.monotonic() < deadline:
                time.sleep(0.01)
            struck = workers()
            for process in struck:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if struck:
                events.append("killed")
            server.answering.set()

        def strike(counts):
            if counts.units_done >= 2 and server.answering.is_set() and not events:
                server.answering.clear()
                threading.Thread(target=kill_at_work, daemon=True).start()
            if counts.units_done >= 8 and events == ["killed"]:
                ray_cluster.remove_node(ray_cluster.list_all_nodes()[-1], allow_graceful=False)
                events.append("lost")

        plan, counts = planned(source, tmp_path / "out")
        report = crawl_on_ray(
            plan,
            fetch=FETCH,
            workers=1,
            crawlers=2,
            site=Site(ray_address=ray_cluster.address),
            progress=strike,
            counts=counts,
        )
    ray_cluster.add_node(num_cpus=1)
    assert events == ["killed", "lost"]
    assert report.root == expected.root
    assert report.counts.done == report.counts.planned == 120
    assert (report.counts.kept, report.counts.units_done) == (expected.counts.kept, len(plan.units))


def test_a_mistake_that_a_worker_finds_is_told(ray_cluster, tmp_path):
    with PictureServer() as server:
        plan, counts = planned(server.write_list(tmp_path / "list.txt", 10), tmp_path / "out")
        (tmp_path / "out" / "shards").touch()
        with pytest.raises(UserError, match=r"cannot write .*out: "):
            crawl_on_ray(
                plan,
                fetch=FETCH,
                workers=1,
                crawlers=2,
                site=Site(ray_address=ray_cluster.address),
                progress=lambda counts: None,
                counts=counts,
            )
