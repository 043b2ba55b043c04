"""What a site with GPUs needs besides what every machine does, and how to mend what is missing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cluster.doctor import COMMAND_TIMEOUT_S, Finding, load
from cluster.errors import UserError
from cluster.site import load_site

FEWEST_FILES = 65_536  # a rank of a large job has a connection to every other in each of its groups
INFINIBAND = Path("/sys/class/infiniband")


def site_findings() -> list[Finding]:
    """The rows that `submit doctor` adds; those about GPUs where there are some, here or on SLURM's nodes."""
    torch, _ = load("torch")
    gpus_of_slurm = slurm_gpus()
    here = torch is not None and torch.cuda.is_available()
    rows = [site_file_check(bool(shutil.which("sbatch"))), open_files_check(), *infiniband_checks()]
    if gpus_of_slurm or here:
        rows.append(cuda_build_check(torch, gpus_of_slurm))
    return rows


def slurm_gpus() -> str:
    """What SLURM's nodes have of GPUs, such as gpu:h100:8; empty if none, or if SLURM does not say."""
    if shutil.which("sinfo") is None:
        return ""
    try:
        asked = ["sinfo", "--noheader", "--format=%G"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    kinds = {kind.split("(")[0] for line in done.stdout.split() for kind in line.split(",")}
    return ", ".join(sorted(kind for kind in kinds if kind.startswith("gpu")))


def cuda_build_check(torch: Any, gpus_of_slurm: str) -> Finding:
    """Whether torch was built for GPUs, with NCCL."""
    install = "install a CUDA build of torch (https://pytorch.org/get-started)"
    where = f"SLURM's nodes have {gpus_of_slurm}" if gpus_of_slurm else "there are GPUs here"
    if torch is None or not torch.version.cuda:
        detail = f"{where}, and torch is a build for CPUs"
        return Finding(name="CUDA", status="warning", detail=detail, remedy=install)
    if not torch.distributed.is_nccl_available():
        detail = f"CUDA {torch.version.cuda}, without NCCL"
        return Finding(name="CUDA", status="warning", detail=detail, remedy=f"{install} that has NCCL")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding(name="CUDA", status="ok", detail=f"CUDA {torch.version.cuda}, NCCL {nccl}")


def site_file_check(on_slurm: bool) -> Finding:
    """Whether there is a site file, and whether it can be read."""
    named = os.environ.get("SUBMIT_CLUSTER", "")
    if not named and not on_slurm:
        return Finding(name="site file", status="ok", detail="none; nothing to do on a single machine")
    if not named:
        remedy = "submit init-site --output site.yaml; export SUBMIT_CLUSTER=$PWD/site.yaml"
        return Finding(name="site file", status="warning", detail="SUBMIT_CLUSTER is not set", remedy=remedy)
    try:
        load_site(named)
    except UserError as error:
        return Finding(
            name="site file", status="warning", detail=str(error), remedy="mend it, or name another"
        )
    return Finding(name="site file", status="ok", detail=named)


def open_files_check() -> Finding:
    """How many files and connections a process may have open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= FEWEST_FILES:
        detail = "unlimited" if most == resource.RLIM_INFINITY else f"{most:,} at most"
        return Finding(name="open files", status="ok", detail=detail)
    remedy = f"for jobs of hundreds of ranks: have the hard limit raised to {FEWEST_FILES:,} (ulimit -Hn)"
    return Finding(name="open files", status="warning", detail=f"{most:,} at most", remedy=remedy)


def infiniband_checks(devices: Path = INFINIBAND) -> list[Finding]:
    """Where there is InfiniBand: whether memory may be locked for it."""
    names = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    if not names:
        return []
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    detail = ", ".join(names)
    if most == resource.RLIM_INFINITY:
        return [Finding(name="InfiniBand", status="ok", detail=detail)]
    detail = f"{detail}; {most >> 10:,} KiB of memory may be locked, which NCCL needs more of"
    remedy = "have `ulimit -l unlimited` allowed, also for jobs (slurmd's LimitMEMLOCK=infinity)"
    return [Finding(name="InfiniBand", status="warning", detail=detail, remedy=remedy)]
