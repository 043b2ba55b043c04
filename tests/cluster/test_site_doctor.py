"""What `submit doctor` says about a site with GPUs."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.site_doctor import (
    cuda_build_check,
    infiniband_checks,
    open_files_check,
    site_file_check,
    slurm_gpus,
)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_build_for_cpus_is_told_where_nodes_have_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_gpus() == ""
    program(tmp_path, "sinfo", "echo 'gpu:h100:8(S:0-1),lscratch:1'; echo '(null)'; echo 'gpu:a100:4'")
    assert slurm_gpus() == "gpu:a100:4, gpu:h100:8"
    told = cuda_build_check(SimpleNamespace(version=SimpleNamespace(cuda=None)), slurm_gpus())
    assert (told.status, told.detail.split(",")[0]) == ("warning", "SLURM's nodes have gpu:a100:4")
    assert "CUDA build" in told.remedy
    program(tmp_path, "sinfo", "exit 1")
    assert slurm_gpus() == ""


def test_a_site_file_is_looked_for_where_there_is_a_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUBMIT_CLUSTER", raising=False)
    assert site_file_check(on_slurm=False).status == "ok"
    assert "submit init-site" in site_file_check(on_slurm=True).remedy
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_nodes: 8\n")
    monkeypatch.setenv("SUBMIT_CLUSTER", str(site))
    told = site_file_check(on_slurm=True)
    assert (told.status, "gpus_per_node" in told.detail) == ("warning", True)
    site.write_text("gpus_per_node: 8\n")
    assert site_file_check(on_slurm=True).status == "ok"


@pytest.mark.parametrize(("limit", "status"), [(1024, "warning"), (resource.RLIM_INFINITY, "ok")])
def test_limits_that_large_jobs_run_into(
    limit: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert open_files_check().status == status
    assert infiniband_checks(tmp_path / "none") == []
    (tmp_path / "mlx5_0").mkdir()
    (told,) = infiniband_checks(tmp_path)
    assert (told.status, told.detail.split(";")[0]) == (status, "mlx5_0")
