"""Deduplication on Ray: the same view as at home."""

import json
import math
import random

import pytest
from sealed_rows import seal_rows
from typer.testing import CliRunner

from cluster.map.on_ray import on_ray
from cluster.site import Site
from ingest import cli
from ingest.dedup import tasks as dedup_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow]

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
