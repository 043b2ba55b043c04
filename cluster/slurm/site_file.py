"""A site file for the SLURM of this machine: what it says of itself, with comments, to go on from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import UserError
from cluster.host import user_name
from cluster.slurm.command import call
from cluster.slurm.nodes import Nodes, all_nodes, gpus_in_words
from cluster.wording import several

PREEMPTED = {
    "REQUEUE": "jobs that make room for others are started again by SLURM",
    "CANCEL": "jobs that make room for others are cancelled, and SLURM does not start them again",
    "SUSPEND": "jobs that make room for others are suspended",
    "GANG,SUSPEND": "jobs that make room for others are suspended",
}
SHORTEST = 10  # minutes
CPU_MEMORY_GB = 8  # of a job without GPUs: a crawler with its workers


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What SLURM allows; empty where it does not say.

    Attributes:
        array: `MaxArraySize`.
        accounts: of this user, with the most jobs that may be submitted under each.
    """

    array: str = ""
    accounts: Sequence[tuple[str, str]] = ()


def site_file(*, partition: str | None = None) -> tuple[str, Nodes]:
    """The text of a site file, and the nodes that it is for.

    Args:
        partition: where trainings go; None: the default one, if it has GPUs, else that with most of them.

    Raises:
        UserError: if SLURM does not answer, or has no such partition.
    """
    known = all_nodes()
    named = [nodes for nodes in known if partition in (None, nodes.partition)]
    if not named:
        there = ", ".join(sorted({nodes.partition for nodes in known}))
        raise UserError(f"SLURM has no partition {partition}; its partitions: {there or 'none'}")
    chosen = max(named, key=lambda each: (each.gpus > 0, each.default, each.gpus * each.count, each.count))
    return site_text(known, chosen, _limits()), chosen


def site_text(known: Sequence[Nodes], chosen: Nodes, limits: Limits) -> str:
    """The same of what SLURM has said."""
    ranks = max(1, chosen.gpus)
    cores = max(1, chosen.cores // ranks)
    others = [nodes for nodes in known if nodes.gpus == 0 and nodes.partition != chosen.partition]
    cpu = max(others, key=lambda each: (each.default, each.count), default=None)
    accounts = ", ".join(account for account, _ in limits.accounts)
    lines = [
        "# What SLURM said of itself, by `submit init-site`. All keys: configs/cluster/default.yaml. Nodes:",
        *(f"#   {_in_words(nodes)}" for nodes in known),
    ]
    lines += [f"# Arrays have at most {limits.array} tasks, numbered from 0."] if limits.array else []
    lines += [
        f"# Of account {account} at most {most} jobs may be submitted at a time."
        for account, most in limits.accounts
        if most
    ]
    keys = {
        "executor: slurm": "",
        f"partition: {json.dumps(chosen.partition)}": "",
        "account: null": f"yours: {accounts}; null: the default one" if accounts else "null: the default one",
        f"gpus_per_node: {chosen.gpus}": "",
        f"gpu_type: {json.dumps(chosen.gpu_type or None)}": "",
        f"cpus_per_rank: {cores}": f"of a node's {chosen.cores}, for {several(ranks, 'rank')}",
        f"memory_gb: {0 if chosen.gpus else 'null'}": "0: all that a node has",
        f"minutes: {json.dumps(_minutes(chosen.limit))}": "the partition's limit; runs go on in the next job",
        f"cpu: {_cpu_jobs(cpu)}": "crawls, deduplication, timetables, stages without GPUs",
        "modules: []": "such as [cuda/12.4]",
        "setup: []": "such as [conda activate vision]",
        "environment: {}": "such as {NCCL_SOCKET_IFNAME: ib0}",
        "sbatch: {}": "such as {reservation: vision}",
        "notify: {command: [], webhook: null}": "told when a run stops",
    }
    lines += [f"{key:<30}  # {comment}" if comment else key for key, comment in keys.items()]
    return "\n".join(lines) + "\n"


def _cpu_jobs(nodes: Nodes | None) -> str:
    if nodes is None:
        return "null"
    minutes = _minutes(nodes.limit)
    memory = max(1, min(CPU_MEMORY_GB, nodes.memory_mb >> 10))
    limit = f", minutes: {minutes}" if minutes else ""
    return f"{{partition: {json.dumps(nodes.partition)}, memory_gb: {memory}{limit}}}"


def _in_words(nodes: Nodes) -> str:
    gpus = f"{gpus_in_words(nodes)}, " if nodes.gpus else ""
    preempted = PREEMPTED.get(nodes.preempt.upper())
    return "; ".join(
        [
            f"{nodes.partition}{' (default)' if nodes.default else ''}: {several(nodes.count, 'node')} of "
            f"{gpus}{nodes.cores} cores, {nodes.memory_mb >> 10} GB",
            f"limit {nodes.limit or 'none'}",
            "shared by jobs" if nodes.shared else "a job has whole nodes",
            *([preempted] if preempted else []),
            *([f"constraints {', '.join(nodes.features)}"] if nodes.features else []),
        ]
    )


def _minutes(limit: str) -> int | None:
    """Of "2-00:00:00" or "30:00"; None of one so short that no job could be asked to save before it."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if found is None:
        return None
    days, hours, minutes, _ = (int(number or 0) for number in found.groups())
    total = (days * 24 + hours) * 60 + minutes
    return total if total >= SHORTEST else None


def _limits() -> Limits:
    """What can be had of them: many sites have no accounting."""
    config = call(["scontrol", "show", "config"]).stdout
    array = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    accounts: list[tuple[str, str]] = []
    if shutil.which("sacctmgr") is not None:
        words = ["--noheader", "--parsable2", "--readonly", "show", "associations"]
        of_mine = ["where", f"user={user_name()}", "format=Account,MaxSubmitJobs"]
        try:
            answer = call(["sacctmgr", *words, *of_mine], patience=20.0)
        except UserError:  # with a broken accounting daemon it hangs
            answer = None
        rows = [] if answer is None or answer.returncode else answer.stdout.splitlines()
        accounts = sorted({(row.split("|")[0], row.split("|")[1]) for row in rows if row.count("|") == 1})
    return Limits(array="" if array is None else array[1], accounts=accounts)
