"""What a recipe takes on so many GPUs: memory, communication, time, checkpoints. Counted where it can be.

FLOPs and bytes are counts (`pipeline.plan.step_count`). Time is a model with stated assumptions: every GPU
reaches a share of its peak, communication is hidden behind it as far as it fits, and rings use all links of a
node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import UserError
from pipeline.checkpoint.period import young_daly
from pipeline.plan.bank_cost import bank_cost
from pipeline.plan.step_count import StepCount
from pipeline.recipe.pretrain import PretrainRecipe

# BatchNorm's sums are two numbers per channel: what they cost is that they are waited for.
_SMALL_REDUCTION_S = 30e-6
_CHECKPOINT_BYTES_PER_S = 1e9  # to host memory and a shared file system, of each node
_COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, by its data sheet.

    Attributes:
        flops: per second, dense, in 16 bits; and in 32.
        memory: bytes.
        nvlink, network: bytes per second and direction, of one GPU, within a node and out of it.
    """

    name: str
    flops: float
    flops_fp32: float
    memory: float
    nvlink: float
    network: float


# NVIDIA's data sheets of V100 SXM2, A100 SXM4, H100 SXM5, H200 SXM; memory as the driver shows it. Networks
# are what such nodes usually have: 200 and 400 Gb/s for each GPU; V100s, 100 Gb/s for all eight.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="v100-32", flops=125e12, flops_fp32=15.7e12, memory=31.7e9, nvlink=150e9, network=1.6e9),
        Gpu(name="a100-40", flops=312e12, flops_fp32=19.5e12, memory=39.6e9, nvlink=300e9, network=25e9),
        Gpu(name="a100-80", flops=312e12, flops_fp32=19.5e12, memory=79.3e9, nvlink=300e9, network=25e9),
        Gpu(name="h100", flops=989e12, flops_fp32=67e12, memory=79.6e9, nvlink=450e9, network=50e9),
        Gpu(name="h200", flops=989e12, flops_fp32=67e12, memory=140e9, nvlink=450e9, network=50e9),
    )
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One recipe on one number of GPUs.

    Attributes:
        gpus, nodes, rank_rows: and images per GPU and micro-batch.
        memory: bytes per GPU at the fullest moment, by kind.
        moved: bytes that leave a GPU in one step, by the link that carries them and what they are.
        seconds: of one step, by what takes them; the longest hides the others, but for "batch norm".
        step_seconds, bottleneck: their outcome.
        days, gpu_hours: of the whole run.
        checkpoint_bytes, checkpoint_seconds, checkpoint_period: size, time to write, seconds between two.
        failures: expected in the whole run.
    """

    gpus: int
    nodes: int
    rank_rows: int
    memory: dict[str, float]
    fits: bool
    moved: dict[str, float]
    seconds: dict[str, float]
    step_seconds: float
    bottleneck: str
    images_per_second: float
    days: float
    gpu_hours: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    checkpoint_period: float
    failures: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def estimate(
    recipe: PretrainRecipe,
    *,
    gpus: int,
    gpus_per_node: int,
    gpu: Gpu,
    mfu: float,
    steps: int,
    failures_per_node_day: float,
    count: Callable[[int], StepCount],
    samples: int | None = None,
) -> Estimate:
    """What a recipe takes on `gpus` ranks.

    Args:
        gpus_per_node: of a full node.
        mfu: the share of the GPU's peak that it reaches, in forward and backward FLOPs counted.
        steps: optimizer steps of the run.
        count: a step of so many rows per rank (`step_count.step_counter`).
        samples: of the dataset, for a method that remembers each.

    Raises:
        UserError: if the ranks do not divide the batch, or the strategy or precision does not fit them.
    """
    if recipe.train.precision == "bf16" and gpu.name.startswith("v100"):
        raise UserError("a V100 has no bf16: give train.precision=fp16")
    if recipe.data.batch_size % gpus:
        raise UserError(f"data.batch_size {recipe.data.batch_size} does not divide over {gpus} GPUs")
    rows, nodes = recipe.data.batch_size // gpus, -(-gpus // gpus_per_node)
    counted = count(rows)
    per_node = min(gpus, gpus_per_node)
    moved = _moved(recipe, counted, gpus=gpus, per_node=per_node)
    memory = _memory(recipe, counted, gpus=gpus)
    bank = bank_cost(recipe, samples=samples, rank_rows=rows)
    if bank.whole:
        memory |= {"bank": bank.whole / gpus, "positives": bank.positives / gpus}
        travel = bank.fetched + bank.gathered
        moved |= {
            "NVLink: bank": travel * (per_node - 1) / gpus,
            "network: bank": travel * (gpus - per_node) / gpus,
        }
    accumulate = recipe.train.accumulate
    peak = gpu.flops if recipe.train.precision in {"bf16", "fp16"} else gpu.flops_fp32
    seconds = {
        "compute": accumulate * rows * counted.flops / (peak * mfu),
        "NVLink": sum(size for what, size in moved.items() if what.startswith("NVLink")) / gpu.nvlink,
        "network": sum(size for what, size in moved.items() if what.startswith("network")) / gpu.network,
        "batch norm": 0.0 if gpus == 1 else accumulate * 2 * counted.batch_norms * _SMALL_REDUCTION_S,
    }
    hidden = {what: each for what, each in seconds.items() if what != "batch norm"}
    bottleneck = max(hidden, key=lambda what: hidden[what])
    step_seconds = hidden[bottleneck] + seconds["batch norm"]
    state = 2 if recipe.optim.name in {"adam", "adamw"} else 1
    frozen = counted.frozen_matrices + counted.frozen_vectors  # a teacher, of which no optimizer knows
    checkpoint = 4.0 * ((1 + state) * (counted.matrices + counted.vectors) - state * frozen)
    checkpoint += bank.whole
    checkpoint_seconds = checkpoint / (_CHECKPOINT_BYTES_PER_S * nodes)
    days = steps * step_seconds / 86_400
    return Estimate(
        gpus=gpus,
        nodes=nodes,
        rank_rows=rows,
        memory=memory,
        fits=sum(memory.values()) <= gpu.memory,
        moved=moved,
        seconds=seconds,
        step_seconds=step_seconds,
        bottleneck=bottleneck,
        images_per_second=accumulate * recipe.data.batch_size / step_seconds,
        days=days,
        gpu_hours=24 * days * gpus,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_period=young_daly(
            save_seconds=checkpoint_seconds, failures_per_node_day=failures_per_node_day, nodes=nodes
        ),
        failures=failures_per_node_day * nodes * days,
    )


def _memory(recipe: PretrainRecipe, counted: StepCount, *, gpus: int) -> dict[str, float]:
    compute = _gathered_bytes(recipe)
    memory = {
        "weights": float(counted.weights),
        "gradients": float(counted.gradients),
        "optimizer": float(counted.optimizer),
        "activations": float(counted.activations),
        "buffers": float(counted.buffers),
        "gathered": 0.0,
        "whole gradients": 0.0,
    }
    shards = _shards(recipe, gpus)
    if shards > 1:
        share = (counted.matrices / shards + counted.vectors) / (counted.matrices + counted.vectors)
        # While micro-batches add up, gradients stay whole on every rank.
        for kind in (
            ("weights", "optimizer") if recipe.train.accumulate > 1 else ("weights", "gradients", "optimizer")
        ):
            memory[kind] *= share
        two, one = counted.largest_blocks
        # Two blocks are gathered at a time; the gradients of one are whole until they are reduced.
        memory["gathered"] = compute * two + (compute + 4) * one
        if _gradients_wait(recipe, counted):
            memory["whole gradients"] = float(compute * (counted.matrices - counted.frozen_matrices))
    return memory


def _moved(recipe: PretrainRecipe, counted: StepCount, *, gpus: int, per_node: int) -> dict[str, float]:
    """Bytes that leave one GPU in a step. A ring of N sends (N - 1) / N of what it gathers or scatters.
    Heads, which run once, are counted as often as the trunk.
    """
    if gpus == 1:
        return {}
    shards, width = _shards(recipe, gpus), 8 if recipe.train.precision == "fp64" else 4
    learned = counted.matrices - counted.frozen_matrices
    if shards == 1:
        everything = width * (learned + counted.vectors - counted.frozen_vectors)
        return _by_link("gradients", 2 * everything, ranks=gpus, per_node=per_node)
    gathered = counted.passes * (counted.matrices + learned)  # forward and backward
    weights = recipe.train.accumulate * _gathered_bytes(recipe) * gathered
    moved = _by_link("weights", weights, ranks=shards, per_node=per_node)
    reductions = 1 if _gradients_wait(recipe, counted) else counted.passes
    if recipe.train.strategy == "fsdp2" and recipe.train.accumulate > 1:
        reductions += 1  # of what earlier micro-batches left, before the last one's passes
    reduced = width * learned * reductions
    moved |= _by_link("gradients", reduced, ranks=shards, per_node=per_node)
    copies = gpus // shards
    if copies > 1:  # each copy's pieces are averaged between nodes
        moved["network: gradients of copies"] = 2 * (copies - 1) / copies * reduced / shards
    return moved


def _gradients_wait(recipe: PretrainRecipe, counted: StepCount) -> bool:
    """Whether autograd adds up the whole gradients of a trunk's passes before they may be reduced. FSDP2 has
    a backward pass for each; so has FairScale where all blocks are recomputed.
    """
    return (
        recipe.train.strategy == "fairscale"
        and recipe.train.activation_checkpointing != "full"
        and counted.passes > 1
    )


def _by_link(what: str, size: float, *, ranks: int, per_node: int) -> dict[str, float]:
    sent = size * (ranks - 1) / ranks
    moved = {f"NVLink: {what}": sent}
    if ranks > per_node:  # what crosses into a node is shared by all its GPUs' links
        moved[f"network: {what}"] = sent / per_node
    return moved


def _gathered_bytes(recipe: PretrainRecipe) -> int:
    """Of each weight; FairScale's are gathered as they are kept."""
    return 4 if recipe.train.strategy == "fairscale" else _COMPUTE_BYTES[recipe.train.precision]


def _shards(recipe: PretrainRecipe, gpus: int) -> int:
    if recipe.train.strategy == "ddp" or gpus == 1:
        return 1
    shards = recipe.train.shard_ranks or gpus
    if gpus % shards:
        raise UserError(f"train.shard_ranks {shards} does not divide {gpus} GPUs: use the GPUs of a node")
    return shards
