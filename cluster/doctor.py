"""What is installed and active on this machine, and how to mend what is not.

Shared by `submit doctor` and `ingest doctor`.

Checks are plain values. A check never raises because of what it looks at: a package that is broken, a command
that hangs, a file that is absent each become that check's row.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from cluster.rank.process import MALLOC_SETTINGS

OLDEST_TORCH = (2, 10)
OLDEST_PYTHON = (3, 11)
NEWEST_TESTED_PYTHON = (3, 13)
COMMAND_TIMEOUT_S = 10
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report.

    Attributes:
        name: what was looked at.
        status: ok; warning (works, but worse than it could); missing (not there or does not work).
        detail: what was found, one line.
        remedy: a command or a sentence that mends it; empty if there is nothing to do.
        required: nothing runs without it; the commands exit with 1 if such a row is missing.
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    detail: str
    remedy: str = ""
    required: bool = False


def doctor_report(folder: Path = Path()) -> list[Finding]:
    """The checks every floor shares; `folder` is where runs or datasets would be written."""
    return [
        python_check(sys.version_info[:2]),
        *torch_checks(),
        slurm_check(),
        package_check("submitit", remedy="pip install 'submitit>=1.5'", purpose="jobs on SLURM"),
        package_check("ray", remedy="pip install 'seer-pipeline[ray]'", purpose="jobs on Ray"),
        package_check(
            "fairscale", remedy="pip install 'seer-pipeline[fairscale]'", purpose="the fairscale strategy"
        ),
        cpu_check(),
        memory_check(),
        disk_check(folder),
        shared_memory_check(),
        malloc_check(),
    ]


def doctor_table(checks: Sequence[Finding]) -> Table:
    """The checks as a table for a terminal; what to do about a row stands under its detail."""
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for check in checks:
        # Not required and absent is a choice, not a fault.
        colour = "yellow" if check.status == "missing" and not check.required else colours[check.status]
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n→ {check.remedy}", style="cyan")
        table.add_row(Text(check.status, style=colour), Text(check.name, style="bold"), detail)
    return table


def load(module: str) -> tuple[Any, str]:
    """A package's module and version; or None and one line why not, whatever importing it raised."""
    try:
        if importlib.util.find_spec(module) is None:
            return None, "not installed"
        loaded = importlib.import_module(module)
    except Exception as error:  # a broken install can raise anything, and it is a finding here, not a fault
        reason = str(error).strip().splitlines() or [""]
        return None, f"installed, but cannot be imported: {type(error).__name__}: {reason[0][:200]}"
    try:
        return loaded, importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return loaded, str(getattr(loaded, "__version__", "version unknown"))


def package_check(module: str, *, remedy: str, purpose: str, required: bool = False) -> Finding:
    """Whether a package can be imported, and its version."""
    loaded, found = load(module)
    if loaded is None:
        detail = f"{found} (used for {purpose})"
        return Finding(name=module, status="missing", detail=detail, remedy=remedy, required=required)
    return Finding(name=module, status="ok", detail=found, required=required)


def python_check(version: tuple[int, ...]) -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}, {platform.platform(terse=True)}"
    if version < OLDEST_PYTHON:
        remedy = "install Python 3.11, 3.12 or 3.13"
        return Finding(name="Python", status="missing", detail=detail, remedy=remedy, required=True)
    if version > NEWEST_TESTED_PYTHON:
        remedy = "tested with Python 3.11 to 3.13: use one of these if something breaks"
        return Finding(name="Python", status="warning", detail=detail, remedy=remedy, required=True)
    return Finding(name="Python", status="ok", detail=detail, required=True)


def torch_checks() -> list[Finding]:
    """The build of torch, and the devices it sees."""
    torch, found = load("torch")
    if torch is None:
        remedy = "pip install 'torch>=2.10' (or the build your GPU needs: https://pytorch.org/get-started)"
        return [Finding(name="torch", status="missing", detail=found, remedy=remedy, required=True)]
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    distributed = [name for name in ("gloo", "nccl") if _has_backend(torch, name)]
    detail = (
        f"{torch.__version__}, {build}, {torch.get_num_threads()} threads, "
        f"torch.distributed: {', '.join(distributed) or 'none'}"
    )
    if version < OLDEST_TORCH:
        remedy = "torch 2.10 or newer is needed: pip install --upgrade 'torch>=2.10'"
        return [Finding(name="torch", status="missing", detail=detail, remedy=remedy, required=True)]
    return [Finding(name="torch", status="ok", detail=detail, required=True), device_check(torch)]


def _has_backend(torch: Any, name: str) -> bool:
    if not torch.distributed.is_available():
        return False
    return bool(getattr(torch.distributed, f"is_{name}_available")())


def device_check(torch: Any, driver: Path = Path("/proc/driver/nvidia/version")) -> Finding:
    """GPUs that torch can use; `driver` exists where an NVIDIA driver is loaded."""
    try:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # a driver older than the build raises here; it is the finding
        return Finding(name="GPU", status="warning", detail=f"{type(error).__name__}: {error}"[:200])
    if devices:
        names = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
        return Finding(name="GPU", status="ok", detail=f"{len(devices)}: {names}")
    if driver.exists():
        remedy = "install a CUDA build of torch that this driver supports (https://pytorch.org/get-started)"
        detail = "an NVIDIA driver is loaded, but torch sees no GPU"
        return Finding(name="GPU", status="warning", detail=detail, remedy=remedy)
    return Finding(name="GPU", status="ok", detail="none; training runs on the CPU")


def slurm_check() -> Finding:
    """Whether sbatch is on PATH and a controller answers."""
    if shutil.which("sbatch") is None:
        remedy = "run on a login node of the cluster; nothing to do on a single machine"
        return Finding(name="SLURM", status="missing", detail="no sbatch on PATH", remedy=remedy)
    version = _output_of(["sbatch", "--version"])
    ping = _output_of(["scontrol", "ping"])
    detail = f"{version}; {ping or 'scontrol ping says nothing'}"
    # "Slurmctld(primary) at host is UP": one line per controller; one that is up is enough.
    if " is UP" in ping:
        return Finding(name="SLURM", status="ok", detail=detail)
    remedy = "the controller does not answer: `scontrol ping`, then ask the cluster's administrators"
    return Finding(name="SLURM", status="warning", detail=detail, remedy=remedy)


def _output_of(command: list[str]) -> str:
    """What a short command says, on one line; or why it said nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer in {COMMAND_TIMEOUT_S} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return " ".join((done.stdout or done.stderr).split())


def cpu_check(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """Cores this process may run on: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} usable of {os.cpu_count()}"
    limit = _read(quota).split()
    if len(limit) == 2 and limit[0].isdigit() and int(limit[0]) < cores * int(limit[1]):
        granted = int(limit[0]) / int(limit[1])
        remedy = f"start no more than {max(1, int(granted))} workers"
        return Finding(
            name="CPU", status="warning", detail=f"{detail}, limited to {granted:g} by cgroup", remedy=remedy
        )
    return Finding(name="CPU", status="ok", detail=detail)


def memory_check(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> Finding:
    """Memory that is free, and what the container may use at most."""
    sizes = dict(line.split(":", 1) for line in _read(meminfo).splitlines() if ":" in line)
    if not sizes.keys() >= {"MemTotal", "MemAvailable"}:
        return Finding(name="memory", status="warning", detail=f"{meminfo} cannot be read")
    total, available = (int(sizes[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    detail = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    granted = _read(limit).strip()
    if granted.isdigit() and int(granted) < total:
        detail += f", at most {int(granted) / GIB:.1f} GiB by cgroup"
        available = min(available, int(granted))
    if available < 2 * GIB:
        remedy = "less than 2 GiB: use fewer workers and a smaller batch"
        return Finding(name="memory", status="warning", detail=detail, remedy=remedy)
    return Finding(name="memory", status="ok", detail=detail)


def disk_check(folder: Path) -> Finding:
    """Space where runs and datasets are written."""
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    detail = f"{usage.free / GIB:.0f} GiB free of {usage.total / GIB:.0f} GiB at {existing}"
    if usage.free < 5 * GIB:
        remedy = "less than 5 GiB: write runs and datasets to another disk"
        return Finding(name="disk", status="warning", detail=detail, remedy=remedy)
    return Finding(name="disk", status="ok", detail=detail)


def shared_memory_check(folder: Path = Path("/dev/shm")) -> Finding:
    """Loader workers hand batches over through shared memory; containers often have 64 MB of it."""
    if not folder.is_dir():
        return Finding(name="shared memory", status="warning", detail=f"no {folder}")
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if free < GIB:
        remedy = "less than 1 GiB for the loader's batches: start the container with --shm-size=8g"
        return Finding(name="shared memory", status="warning", detail=detail, remedy=remedy)
    return Finding(name="shared memory", status="ok", detail=detail)


def malloc_check() -> Finding:
    """Whether this shell pins glibc's allocator, which is worth up to half again on the CPU."""
    if platform.libc_ver()[0] != "glibc":
        return Finding(name="malloc", status="ok", detail="not glibc; nothing to pin")
    if all(name in os.environ for name in MALLOC_SETTINGS):
        return Finding(name="malloc", status="ok", detail="pinned in this shell")
    settings = " ".join(f"{name}={value}" for name, value in MALLOC_SETTINGS.items())
    detail = "not pinned in this shell; ranks that `submit` starts on a CPU pin it themselves"
    return Finding(
        name="malloc", status="ok", detail=detail, remedy=f"for your own scripts: export {settings}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
