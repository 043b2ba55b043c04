"""What SLURM says of its nodes: what a site file need not say, and what `submit init-site` writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import UserError
from cluster.site import Site
from cluster.slurm.command import call
from cluster.wording import several

PATIENCE = 20.0  # seconds
FIELDS = "%P|%D|%c|%m|%G|%l|%h|%M|%f"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes of a partition that are alike.

    Attributes:
        default: of the partition: jobs that name none go there.
        count, cores, memory_mb, gpus: how many nodes, and what each has.
        gpu_type: empty if SLURM names none.
        limit: of a job's time; empty if there is none.
        shared: whether several jobs may have a node.
        preempt: what becomes of jobs that make room for others: "REQUEUE", "CANCEL", ... or "OFF".
        features: that jobs may ask for by a constraint.
    """

    partition: str
    default: bool
    count: int
    cores: int
    memory_mb: int
    gpus: int = 0
    gpu_type: str = ""
    limit: str = ""
    shared: bool = True
    preempt: str = "OFF"
    features: tuple[str, ...] = ()


def all_nodes() -> list[Nodes]:
    """Every kind of node of every partition.

    Raises:
        UserError: if SLURM does not answer.
    """
    answer = call(["sinfo", "--exact", "--noheader", f"--format={FIELDS}"], patience=PATIENCE)
    if answer.returncode != 0:
        why = answer.stderr.strip().removeprefix("slurm_load_partitions: ")
        raise UserError(f"SLURM is installed here, and does not say what nodes there are: {why}")
    rows = [line.strip().split("|") for line in answer.stdout.splitlines()]
    return [_nodes(row) for row in rows if len(row) == FIELDS.count("|") + 1]


def _nodes(row: Sequence[str]) -> Nodes:
    partition, count, cores, memory, gres, limit, shared, preempt, features = row
    kind, gpus = _gpus(gres)
    return Nodes(
        partition=partition.removesuffix("*"),
        default=partition.endswith("*"),
        count=int(count),
        cores=int(cores.rstrip("+")),
        memory_mb=int(memory.rstrip("+")),
        gpus=gpus,
        gpu_type=kind,
        limit="" if limit == "infinite" else limit,
        shared=not shared.startswith("EXCL"),
        preempt=preempt,
        features=() if features == "(null)" else tuple(features.split(",")),
    )


def _gpus(gres: str) -> tuple[str, int]:
    """Type and number of a node's GPUs: of "gpu:h100:8(S:0-1),nvme:1", h100 and 8."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))(?=[(,]|$)", gres)
    kinds = {kind for kind, _ in found}
    return kinds.pop() if len(kinds) == 1 else "", sum(int(number) for _, number in found)


def with_nodes_of_slurm(site: Site, *, ranks: int | None = None, memory: bool = True) -> tuple[Site, str]:
    """The site with what its nodes have, where it says nothing of it and SLURM knows; and both in a sentence.

    Args:
        ranks: on a node, each with a GPU; None: one for each GPU.
        memory: ask for their share of the node's, too.

    Raises:
        UserError: if SLURM does not answer, or has no such partition.
    """
    try:
        known = all_nodes()
    except UserError as error:
        raise UserError(
            f"{error}; ask again later, say gpus_per_node, cpus_per_rank and memory_gb in the site file, or "
            "run on this machine by --executor local"
        ) from error
    where = [nodes for nodes in known if _fits(nodes, site)]
    if not where:
        there = ", ".join(sorted({nodes.partition for nodes in known}))
        wanted = f"partition {site.partition}" if site.partition else "default partition"
        raise UserError(
            f"SLURM has no nodes of the {wanted} that are as the site file says; its partitions: {there}"
        )
    nodes = max(where, key=lambda each: (each.gpus > 0, each.count))
    gpus = nodes.gpus if site.gpus_per_node is None else site.gpus_per_node
    found: dict[str, int] = {}
    if site.gpus_per_node is None:
        found["gpus_per_node"] = gpus
    share = min(1.0, (ranks or gpus) / nodes.gpus) if nodes.gpus and gpus else 0.0
    if share and site.cpus_per_rank is None:
        found["cpus_per_rank"] = max(1, nodes.cores // nodes.gpus)
    if memory and share and site.memory_gb is None:
        found["memory_gb"] = 0 if share == 1.0 else int(nodes.memory_mb * share) >> 10
    told = ", ".join(f"{name} {value}" for name, value in found.items())
    words = (
        f"{told}: the site file does not say, and of partition {nodes.partition} SLURM says "
        f"{several(nodes.count, 'node')} of {gpus_in_words(nodes)}, {nodes.cores} cores and "
        f"{nodes.memory_mb >> 10} GB"
    )
    return site.model_copy(update=found), words


def gpus_in_words(nodes: Nodes) -> str:
    """What a node has: "8 GPUs h100"."""
    return several(nodes.gpus, "GPU") + (f" {nodes.gpu_type}" if nodes.gpu_type else "")


def _fits(nodes: Nodes, site: Site) -> bool:
    in_partition = nodes.partition in site.partition.split(",") if site.partition else nodes.default
    of_type = site.gpu_type is None or site.gpu_type == nodes.gpu_type
    constraint = site.constraint or ""
    plain = re.fullmatch(r"[A-Za-z0-9_.-]+", constraint) is not None  # others are SLURM's own to read
    return in_partition and of_type and (not plain or constraint in nodes.features)
