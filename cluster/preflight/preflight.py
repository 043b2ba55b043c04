"""Is every node fit for a large run? A short job that looks at all of them, alone and together.

`{folder}/preflight/rank-N.jsonl` is what rank N has found, a row after each check. The judgement is made from
these files, by whoever submitted the job: also when the job failed, which is when it matters.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import statistics
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.executors import Executor
from cluster.host import node_name
from cluster.job import Handle, Job, Resources, State
from cluster.preflight import measure
from cluster.preflight.report import REPORTS, WHOLE_SECONDS, Report, Reporter, read_reports
from cluster.preflight.verdict import Verdict, judge
from cluster.run.folder import RunFolder
from cluster.run.status import explain
from cluster.site import Thresholds
from cluster.submit import submit

if TYPE_CHECKING:
    from cluster.rank.torch_dist import World

FUNCTION = "cluster.preflight.preflight:run_checks"
GROUP_SECONDS = 60.0  # that a collective may wait for a rank
LATE_SECONDS = 60.0  # that ranks may start after the first one
END_SECONDS = 10.0  # for a cancelled job to end
MINUTES = 10  # of the scheduler: a job that hangs in the kernel ends by nothing else
SCONTROL_SECONDS = 10
logger = logging.getLogger(__name__)


def preflight(
    executor: Executor,
    resources: Resources,
    folder: Path,
    *,
    thresholds: Thresholds | None = None,
    function: str = FUNCTION,
) -> list[Verdict]:
    """Look at the nodes that a job of these resources gets.

    Args:
        executor: what starts the ranks.
        resources: nodes, ranks and GPUs, as the large run will have them.
        folder: the run folder of this job, on the file system that all nodes share.
        thresholds: what counts as fit.
        function: the job's function, called as `run_checks` is.

    Returns:
        A verdict for each node.

    Raises:
        UserError: if no rank reported at all, or somebody cancelled the job.
    """
    reports = folder.absolute() / "preflight"
    reports.mkdir(parents=True, exist_ok=True)
    for path in [*reports.glob(REPORTS), *reports.glob("probe-*")]:
        path.unlink(missing_ok=True)
    job = Job(
        name="preflight",
        function=function,
        arguments={
            "folder": str(folder.absolute()),
            "gpus_per_node": resources.gpus_per_rank * resources.ranks_per_node,
        },
        resources=Resources(
            nodes=resources.nodes,
            ranks_per_node=resources.ranks_per_node,
            gpus_per_rank=resources.gpus_per_rank,
            cpus_per_rank=resources.cpus_per_rank,
            minutes=resources.minutes or MINUTES,
        ),
        folder=folder.absolute(),
        max_crashes=1,  # what failed is what was to be found out
    )
    handle = submit(job, executor)
    try:
        ended = _wait(handle, reports)
    except BaseException:
        handle.cancel()
        raise
    found = read_reports(reports)
    if ended is State.CANCELLED:
        raise UserError("the preflight was cancelled; give the same command again")
    if not found:
        raise UserError(
            f"the preflight ended before any rank reported: {explain(RunFolder.open(job.folder).status())}"
        )
    for path in reports.glob("probe-*"):
        path.unlink(missing_ok=True)
    return judge(
        found,
        nodes=resources.nodes,
        ranks_per_node=resources.ranks_per_node,
        thresholds=thresholds or Thresholds(),
        names=_expand(next((report.nodelist for report in found if report.nodelist), "")),
    )


def _wait(handle: Handle, reports: Path) -> State | None:
    """Wait in the queue as long as it takes, but not for ranks that hang.

    Returns:
        How the job ended; None if it did not by itself.
    """
    deadline, pause = None, 0.05
    while not (state := handle.state()).ended:
        if deadline is None:
            if any(reports.glob(REPORTS)):
                deadline = time.monotonic() + WHOLE_SECONDS + LATE_SECONDS
        elif state is State.PENDING or time.monotonic() > deadline:
            # A scheduler may be about to start a failed job again; it has told what it can.
            handle.cancel()
            end = time.monotonic() + END_SECONDS
            while not handle.state().ended and time.monotonic() < end:
                time.sleep(0.5)
            return None
        time.sleep(pause)
        pause = min(2.0, pause * 1.2)
    return state


def _expand(nodelist: str) -> list[str]:
    """SLURM's "node[1-3]" as names, in the order of the ranks."""
    if not nodelist or shutil.which("scontrol") is None:
        return []
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            check=False,
        )
        return done.stdout.split() if done.returncode == 0 else []
    return []


def run_checks(folder: str, gpus_per_node: int = 0) -> None:
    """All checks of one rank, one report.

    Args:
        folder: the run folder; all nodes share it.
        gpus_per_node: that a node should have; 0 means that the run computes on the CPU.

    Raises:
        UserError: if a check could not be made, on this rank or for want of another.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    report = Report(
        rank=rank,
        node=node_name(),
        start=int(os.environ.get("SUBMIT_START", "0")),
        nodelist=os.environ.get("SLURM_JOB_NODELIST", ""),
    )
    reports = Path(folder) / "preflight"
    reports.mkdir(parents=True, exist_ok=True)
    with Reporter(reports, report) as reporter:
        try:
            reporter.sign_in(size)
            digest = _check_alone(reporter, reports, gpus_per_node)
            _check_together(reporter, reports, digest, gpus_per_node)
        except Exception as error:
            logger.exception("%s", report.current.name)
            raise UserError(
                f"preflight of {report.node} stopped at {report.current.name!r}: {report.error}"
            ) from error
    logger.info("%s: all checks done", report.node)


def _check_alone(reporter: Reporter, reports: Path, gpus: int) -> str:
    """What needs no other rank, before joining them; the digest of the node's file, if this rank wrote it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    with reporter.check("devices") as report:
        report.devices = measure.devices(gpus=gpus, local_rank=local_rank)
    with reporter.check("loading torch"):
        import torch
    with reporter.check("matmul") as report:
        device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
        report.tflops = measure.matmul_tflops(device)
    with reporter.check("disk") as report:
        report.disk = measure.disk(reports)
    with reporter.check("writing to the shared folder") as report:
        return measure.write_probe(reports, report.node)


def _check_together(reporter: Reporter, reports: Path, digest: str, gpus: int) -> None:
    """What needs the other ranks."""
    from cluster.rank.interface import choose_interface
    from cluster.rank.torch_dist import distributed

    with contextlib.ExitStack() as stack:
        with reporter.check("joining") as report:
            report.interface = choose_interface()
            timeout = timedelta(seconds=GROUP_SECONDS)
            world = stack.enter_context(distributed("cuda" if gpus else "cpu", timeout=timeout))
            peers: list[tuple[str, str]] = world.gather((report.node, digest))
        ranks: dict[str, list[int]] = {}
        for rank, (node, _) in enumerate(peers):
            ranks.setdefault(node, []).append(rank)
        with reporter.check("reading the shared folder") as report:
            written = {node: digest for node, digest in peers if digest}
            report.unseen, report.shared_seconds = measure.unseen_probes(reports, written)
        with reporter.check("clock") as report:
            report.clock_offset = measure.clock_offset(world, [mine[0] for mine in ranks.values()])
        _check_network(reporter, world, ranks)
        reporter.finish()


def _check_network(reporter: Reporter, world: World, ranks: dict[str, list[int]]) -> None:
    """Bandwidth in this node; to each neighbour; across all nodes. Across nodes every rank talks to those of
    its own place in the others, all at the same time, as in training: each GPU's network card has its turn.

    Args:
        reporter: this rank's report.
        world: all ranks.
        ranks: of every node, in the order of their first ranks.
    """
    import torch.distributed as dist

    names, node = list(ranks), reporter.report.node
    place, me = ranks[node].index(world.rank), names.index(node)
    timeout = timedelta(seconds=GROUP_SECONDS)
    # Every rank makes the group of its node first, then the one across nodes: NCCL splits all ranks at once.
    with reporter.check("all-reduce in the node") as report:
        if len({len(mine) for mine in ranks.values()}) > 1:
            counts = ", ".join(f"{name} has {len(mine)}" for name, mine in ranks.items())
            raise UserError(f"every node must have as many ranks as the others: {counts}")
        if len(ranks[node]) > 1:
            group = dist.new_group(ranks[node], timeout=timeout, use_local_synchronization=True)
            report.node_gb_per_s = measure.all_reduce_gb_per_s(group, world.device)
    with reporter.check("links") as report:
        for pair in (pair for each in measure.link_rounds(len(names)) for pair in each if me in pair):
            peer = names[sum(pair) - me]
            report.links[peer] = measure.exchange_gb_per_s(world, ranks[peer][place])
    with reporter.check("all-reduce across nodes") as report:
        if len(names) > 1:
            rail = [mine[place] for mine in ranks.values()]
            group = dist.new_group(rail, timeout=timeout, use_local_synchronization=True)
            report.across_gb_per_s = measure.all_reduce_gb_per_s(group, world.device)
    if reporter.report.links:
        logger.info("median link: %.2f GB/s", statistics.median(reporter.report.links.values()))
