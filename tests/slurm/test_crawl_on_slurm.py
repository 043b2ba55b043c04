"""A crawl as jobs of SLURM: every part is made, whatever becomes of its jobs and their nodes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import SITES, SlurmLab, wait_until

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.restarts import read_restarts
from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.web.settings import FetchSettings
from tests.clips import clip_bytes, write_clips

sys.path.insert(0, str(Path(__file__).parents[1] / "ingest"))
from picture_server import PictureServer

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# The login machine has all of these addresses, and each must be allowed by its own.
NETWORKS = tuple(SITES)
COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()", "crawl-shards"]


def crawl(
    lab: SlurmLab, folder: Path, *words: Any, source: str = "list.txt", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """The command on the login machine, in three parts."""
    site = folder / "site.yaml"
    site.write_text(yaml.safe_dump({"cpus_per_rank": 1, "signal_seconds": 30}))
    options = ["--executor", "slurm", "--parts", "3", "--cluster", site, "--runs", folder / "runs"]
    options += ["--unit-rows", "5", "--contact", "test@example.org"]
    options += [word for network in NETWORKS for word in ("--allow-private", network)]
    command = [*COMMAND, folder / source, "--output", folder / "out", *options, *words]
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | lab.environment | {"PYTHONPATH": os.pathsep.join(sys.path[1:])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def expected_root(folder: Path) -> str:
    fetch = FetchSettings(contact="test@example.org", allow_private=NETWORKS, per_host=8)
    settings = CrawlSettings(unit_rows=5, fetch=fetch)
    source = str(folder / "list.txt")
    whole = folder / "whole"
    return crawl_shards([source], whole, settings, workers=1, progress=lambda counts: None).root


def units_done(folder: Path) -> int:
    return len(list(folder.glob("out/commits/*.json")))


def test_D1_C1_requeued_parts_and_a_lost_node_change_nothing(slurm: SlurmLab, tmp_path: Path) -> None:
    with PictureServer() as server:
        server.write_list(tmp_path / "list.txt", 180, SITES)
        root = expected_root(tmp_path)
        server.seconds = 1.0

        said = crawl(slurm, tmp_path).stderr
        runs = [RunFolder(path.parent) for path in sorted((tmp_path / "runs").glob("*/*/status.json"))]
        jobs = [(run.path / "slurm-job").read_text().strip() for run in runs]
        assert len(runs) == 3
        assert all(
            f"{run.path.name}: submitted as slurm job {job}" in said
            for run, job in zip(runs, jobs, strict=True)
        )

        wait_until(lambda: units_done(tmp_path) >= 3, "three units", 60)
        server.seconds = 15.0  # nobody is done before all has happened
        slurm.run("scontrol", "requeue", jobs[0])
        wait_until(runs[0].requeue_mark(0).exists, "the first part has stopped as it was asked to")
        node = runs[1].read_status().nodes
        assert node is not None
        slurm.kill_node(int(node.removeprefix("node")))
        # The same command again: what is going on is left alone.
        assert crawl(slurm, tmp_path).stderr.count("is going on as slurm job") == 3
        other = crawl(slurm, tmp_path, "--parts", "2", check=False)
        assert (other.returncode, "going on in other parts" in other.stderr) == (2, True)
        server.seconds = 0.02
        wait_until((tmp_path / "out" / "DATASET.json").is_file, "the dataset is sealed", 90)
        for run in runs:
            wait_until(
                lambda run=run: run.read_status().state is State.COMPLETED, f"{run.path.name} ended", 60
            )

    assert f'"sealed":"{root}"' in (tmp_path / "out" / "DATASET.json").read_text()
    assert [str(restart.cause) for restart in read_restarts(runs[0])][:1] == ["preempted"]
    assert "lost" in [str(restart.cause) for restart in read_restarts(runs[1])]
    again = crawl(slurm, tmp_path, "--wait", "--json")
    assert root in again.stdout


def test_waiting_for_the_jobs_ends_with_the_report(slurm: SlurmLab, tmp_path: Path) -> None:
    with PictureServer() as server:
        server.write_list(tmp_path / "list.txt", 30, SITES)
        root = expected_root(tmp_path)
        done = crawl(slurm, tmp_path, "--wait")
    assert f"root      {root}" in done.stdout
    assert "planned   30 files" in done.stdout


def test_D1_C1_parts_of_videos_make_the_dataset_that_is_made_here(slurm: SlurmLab, tmp_path: Path) -> None:
    paths = write_clips(tmp_path / "films", 7, seconds=1.0)
    paths[0].write_bytes(clip_bytes(0, seconds=13))
    done = crawl(slurm, tmp_path, "--video", "--wait", source="films")
    fetch = FetchSettings(contact="test@example.org", allow_private=NETWORKS)
    settings = replace(VIDEOS, unit_rows=5, fetch=fetch)
    report = crawl_shards(
        [str(tmp_path / "films")], tmp_path / "whole", settings, workers=1, progress=lambda counts: None
    )
    assert (report.counts.kept, report.counts.units) == (8, 2)
    assert f"root      {report.root}" in done.stdout
