"""The site file that is made of what SLURM says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.site import CpuJobs, Site, load_site
from cluster.slurm.nodes import Nodes
from cluster.slurm.site_file import Limits, site_text
from pipeline.cli import app

GPU = Nodes(
    partition="gpu",
    default=True,
    count=64,
    cores=96,
    memory_mb=1031000,
    gpus=8,
    gpu_type="h100",
    limit="2-00:00:00",
    shared=False,
    preempt="CANCEL",
)
CPU = Nodes(partition="on", default=False, count=9, cores=64, memory_mb=256000, limit="12:00:00")


def load(folder: Path, text: str) -> Site:
    (folder / "site.yaml").write_text(text)
    return load_site(str(folder / "site.yaml"))


def test_what_slurm_says_becomes_keys_and_comments(tmp_path: Path) -> None:
    text = site_text([GPU, CPU], GPU, Limits(array="1001", accounts=[("vision", "200")]))
    assert load(tmp_path, text) == Site(
        executor="slurm",
        partition="gpu",
        gpus_per_node=8,
        gpu_type="h100",
        cpus_per_rank=12,
        memory_gb=0,
        minutes=2880,
        cpu=CpuJobs(partition="on", memory_gb=8, minutes=720),
    )
    told = (
        "gpu (default): 64 nodes of 8 GPUs h100, 96 cores, 1006 GB; limit 2-00:00:00; a job has whole nodes; "
        "jobs that make room for others are cancelled, and SLURM does not start them again"
    )
    assert f"#   {told}\n" in text
    assert "Of account vision at most 200 jobs" in text


def test_without_gpus_limits_and_a_second_partition_it_says_so(tmp_path: Path) -> None:
    site = load(tmp_path, site_text([CPU], CPU, Limits()))
    assert site == Site(executor="slurm", partition="on", gpus_per_node=0, cpus_per_rank=64, minutes=720)


def test_no_file_is_written_over_and_without_slurm_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'main*|4|4|4000|gpu:2|infinite|NO|REQUEUE|(null)'\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize = 1001'\n")
    for name in ("sinfo", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    output = tmp_path / "site.yaml"
    made = CliRunner().invoke(app, ["init-site", "--output", str(output)])
    assert f"submit preflight --nodes 2 --cluster {output}" in made.output, made.output
    before = output.read_text()
    assert "gpus_per_node: 2\n" in before
    again = CliRunner().invoke(app, ["init-site", "--output", str(output)])
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert output.read_text() == before
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    gone = CliRunner().invoke(app, ["init-site", "--output", str(tmp_path / "other.yaml")])
    assert (gone.exit_code, "there is no SLURM here" in gone.stderr) == (2, True)
