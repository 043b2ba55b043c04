"""The measurements of a preflight: each looks at one thing for a bounded time and returns numbers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.preflight.report import Devices, Disk

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from cluster.rank.torch_dist import World

GIB = 1 << 30
NVIDIA_SMI_SECONDS = 10
MATMUL_SECONDS = 2.0
PROBE_BYTES = 64 << 10
PROBE_PATIENCE = 15.0  # seconds; NFS may remember for some that a file is not there
CLOCK_ROUNDS = 5
REPEATS = 5
NEIGHBOURS = 2  # on each side: with one on each, a node with two slow links and its neighbours look alike

# "Yes", "Active" or a number above 0 is a fault. Xids are in the kernel's log alone, which needs root.
GPU_FAULTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrectable memory errors since boot",
    "retired_pages.pending": "memory pages wait to be retired at the next reset",
    "remapped_rows.pending": "memory rows wait to be remapped at the next reset",
    "remapped_rows.failure": "memory rows could not be remapped",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by the power supply",
}


def devices(*, gpus: int, local_rank: int) -> Devices:
    """What this rank computes on.

    Args:
        gpus: that the node should have; 0 means that it computes on the CPU.
        local_rank: the GPU that is this rank's.
    """
    cores = len(os.sched_getaffinity(0))
    if gpus == 0:
        sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(sizes[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        name = platform.processor() or platform.machine()
        return Devices(expected=0, found=0, name=name, free=free / total, free_gib=free / GIB, cores=cores)
    import torch

    faults = tuple(gpu_faults()) if local_rank == 0 else ()
    found = torch.cuda.device_count()
    if local_rank >= found:
        return Devices(
            expected=gpus, found=found, name="none", free=0, free_gib=0, cores=cores, faults=faults
        )
    free, total = torch.cuda.mem_get_info(local_rank)
    return Devices(
        expected=gpus,
        found=found,
        name=torch.cuda.get_device_name(local_rank),
        free=free / total,
        free_gib=free / GIB,
        cores=cores,
        faults=faults,
    )


def gpu_faults() -> list[str]:
    """What nvidia-smi says is broken; nothing where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    deadline = time.monotonic() + NVIDIA_SMI_SECONDS
    faults: list[str] = []
    for field in GPU_FAULTS:  # one by one: a driver that does not know one of them answers none
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu=index,{field}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=max(1.0, deadline - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [*faults, f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS} s"]
        if done.returncode == 0:
            faults += faults_in(done.stdout, field)
        elif "not a valid field" not in done.stdout + done.stderr:
            return [*faults, f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())[:200]}"]
    return faults


def faults_in(answer: str, field: str) -> list[str]:
    """The faults in nvidia-smi's "index, value" lines for one field."""
    faults = []
    for line in answer.splitlines():
        index, _, value = (part.strip() for part in line.partition(","))
        if value in ("Yes", "Active") or (value.isdigit() and int(value) > 0):
            count = f" ({value})" if value.isdigit() else ""
            faults.append(f"GPU {index}: {GPU_FAULTS[field]}{count}")
    return faults


def matmul_tflops(device: torch.device, *, seconds: float = MATMUL_SECONDS) -> float:
    """TFLOP/s of one matrix product: bfloat16 on a GPU, float32 on the CPU. The median over `seconds`, for a
    device that is too hot slows down only after a while.
    """
    import torch

    on_gpu = device.type == "cuda"
    size, repeats = (8192, 20) if on_gpu else (1024, 4)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    _synchronize(device)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, a, out=out)
        _synchronize(device)
        rates.append(repeats * 2 * size**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(rates)


def disk(folder: Path) -> Disk:
    """Free space for runs, for temporary files, and for the loader's batches."""
    memory = Path("/dev/shm")
    return Disk(
        run_gib=shutil.disk_usage(folder).free / GIB,
        temporary_gib=shutil.disk_usage(tempfile.gettempdir()).free / GIB,
        shared_memory_gib=shutil.disk_usage(memory).free / GIB if memory.is_dir() else 0.0,
    )


def write_probe(folder: Path, node: str) -> str:
    """Write bytes that nobody has written before into the shared folder; their sha256. Of a node's ranks one
    does it, and the others return an empty text.
    """
    content = os.urandom(PROBE_BYTES)
    with contextlib.suppress(FileExistsError), _probe(folder, node).open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return hashlib.sha256(content).hexdigest()
    return ""


def unseen_probes(
    folder: Path, digests: Mapping[str, str], *, patience: float = PROBE_PATIENCE
) -> tuple[list[str], float]:
    """Wait until the files of other nodes are here.

    Args:
        folder: where `write_probe` wrote on each node.
        digests: what it returned, by node.
        patience: seconds.

    Returns:
        The nodes whose file is not here or has other bytes, and the seconds it took.
    """
    began, missing = time.monotonic(), sorted(digests)
    while True:
        missing = [node for node in missing if _digest(_probe(folder, node)) != digests[node]]
        took = time.monotonic() - began
        if not missing or took > patience:
            return missing, took
        time.sleep(0.05)


def _probe(folder: Path, node: str) -> Path:
    start = os.environ.get("SUBMIT_START", "0")  # the one before may have left its own
    return folder / f"probe-{node}.{start}"


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def clock_offset(world: World, leaders: Sequence[int]) -> float | None:
    """Seconds that this rank's clock is ahead of rank 0's, to within half a round trip.

    Args:
        world: all ranks.
        leaders: the ranks that ask, one for each node; rank 0 is the first.

    Returns:
        None on a rank that does not ask.
    """
    import torch
    import torch.distributed as dist

    if world.rank not in leaders:
        return None
    message = torch.zeros(1, dtype=torch.float64)
    if world.rank == 0:
        for leader in leaders[1:]:
            for _ in range(CLOCK_ROUNDS):
                dist.recv(message, src=leader, group=world.control)
                message.fill_(time.time())
                dist.send(message, dst=leader, group=world.control)
        return 0.0
    answers = []
    for _ in range(CLOCK_ROUNDS):
        began = time.time()
        dist.send(message, dst=0, group=world.control)
        dist.recv(message, src=0, group=world.control)
        ended = time.time()
        answers.append((ended - began, (began + ended) / 2 - float(message)))
    return min(answers)[1]  # the shortest round trip bounds the error best


def all_reduce_gb_per_s(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bus bandwidth, which does not depend on the number of ranks: bytes x 2(n - 1)/n / time."""
    import torch.distributed as dist

    tensor, size = _message(device), dist.get_world_size(group)
    dist.all_reduce(tensor, group=group)  # connects
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor, group=group)
    _synchronize(device)
    return 2 * (size - 1) / size * REPEATS * tensor.nbytes / (time.perf_counter() - began) / 1e9


def exchange_gb_per_s(world: World, peer: int) -> float:
    """GB/s in each direction while this rank and another send to each other."""
    import torch.distributed as dist

    sent = _message(world.device)
    received = sent.clone()

    def exchange() -> None:
        works = [
            dist.P2POp(dist.isend, sent, peer, group=world.group),
            dist.P2POp(dist.irecv, received, peer, group=world.group),
        ]
        for work in dist.batch_isend_irecv(works):
            work.wait()

    exchange()  # connects
    _synchronize(world.device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        exchange()
    _synchronize(world.device)
    return REPEATS * sent.nbytes / (time.perf_counter() - began) / 1e9


def link_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Which nodes exchange with which, a list for each round: in a round a node is in one pair at most."""
    pairs = {
        (min(a, b), max(a, b))
        for a in range(nodes)
        for b in ((a + distance) % nodes for distance in range(1, NEIGHBOURS + 1))
        if a != b
    }
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted(pairs):
        free = (each for each in rounds if not any(set(pair) & set(other) for other in each))
        chosen = next(free, None)
        if chosen is None:
            rounds.append(chosen := [])
        chosen.append(pair)
    return rounds


def _message(device: torch.device) -> torch.Tensor:
    import torch

    return torch.zeros((64 if device.type == "cuda" else 8) << 18, device=device)  # 64 or 8 MiB


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
