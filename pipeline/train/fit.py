"""What of a recipe does not fit its data, its ranks or its length: told before anything is submitted."""

from __future__ import annotations

import torch

from cluster.errors import UserError
from cluster.job import Resources
from ingest.dataset.open import Dataset, open_dataset
from pipeline.data.evaluation import evenly_spaced
from pipeline.data.order import plan_order, rank_rows
from pipeline.data.training_set import open_training_set
from pipeline.methods.build import assemble_method
from pipeline.models.trunk import build_trunk
from pipeline.parallel.batchnorm import synchronised_samples
from pipeline.recipe.method import SwAV
from pipeline.recipe.pretrain import PretrainRecipe, Probe
from pipeline.train.length import optimizer_steps
from pipeline.transfer.labels import classes_of

LARGEST_ON_CPU = 50e6  # parameters of a trunk; ResNet-50 has 24 million


def refuse_misfit(recipe: PretrainRecipe, *, ranks: int) -> None:
    """Refuse a training that could only fail, or be none.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    data = recipe.data
    refuse_uneven(recipe, ranks=ranks)
    training_set = open_training_set(data)
    samples, images = training_set.samples, len(training_set.dataset)
    plan_order(samples=samples, batch_size=data.batch_size, window=data.window, seed=recipe.seed)
    steps = optimizer_steps(recipe, samples=samples)
    if recipe.optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps is {recipe.optim.warmup_steps}, and the run has {steps} steps: give {steps} "
            f"at most, such as optim.warmup_steps={steps // 10}"
        )
    method = recipe.method
    if isinstance(method, SwAV) and method.queue_length > images:
        raise UserError(
            f"method.queue_length is {method.queue_length}, and the dataset has {images} images: give "
            f"{images} at most, or 0 for no queue"
        )
    with torch.device("meta"):
        assemble_method(recipe, total_steps=steps, group=None)  # refuses views that it cannot work on
    if recipe.probe is not None:
        refuse_probe(recipe.probe)


def refuse_uneven(recipe: PretrainRecipe, *, ranks: int, nodes: int = 1) -> None:
    """Refuse ranks that could not share the batch, which is arithmetic: no data is looked at.

    Args:
        ranks: in all.
        nodes: that they are on.

    Raises:
        UserError: saying what does not fit, and which numbers of nodes, or of ranks, would.
    """
    batch_size, samples = recipe.data.batch_size, recipe.train.sync_bn_samples
    if nodes > 1 and batch_size % ranks:
        each = ranks // nodes
        fit = [count for count in range(1, batch_size // each + 1) if batch_size % (count * each) == 0]
        fewer, more = (
            [count for count in fit if count < nodes][-1:],
            [count for count in fit if count > nodes][:1],
        )
        if near := [*fewer, *more]:
            raise UserError(
                f"{ranks} ranks, {nodes} nodes of {each}, cannot share data.batch_size {batch_size} evenly: "
                f"use --nodes {' or '.join(map(str, near))}, or another batch size"
            )
    rows = rank_rows(batch_size, rank=0, world_size=ranks)
    synchronised_samples(samples, ranks=ranks, rank_rows=rows.stop - rows.start)
    if (samples or batch_size) < 2:
        raise UserError(
            "BatchNorm has no deviation of a single sample: give data.batch_size and "
            "train.sync_bn_samples of 2 at least"
        )


def refuse_unfit_ranks(recipe: PretrainRecipe, resources: Resources) -> None:
    """Refuse what arithmetic alone can tell: ranks that cannot share the batch, a large trunk without GPUs.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    if resources.gpus_per_rank == 0:
        refuse_large_on_cpu(recipe)
    refuse_uneven(recipe, ranks=resources.ranks, nodes=resources.nodes)


def refuse_large_on_cpu(recipe: PretrainRecipe) -> None:
    """Refuse a trunk that would take years on CPUs: as a rule, GPUs were meant.

    Raises:
        UserError: unless the recipe itself says that it is to be the CPU.
    """
    if recipe.run.device == "cpu":
        return
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build_trunk(recipe.trunk).parameters())
    if size > LARGEST_ON_CPU:
        raise UserError(
            f"there are no GPUs, and {recipe.trunk.name} with its {size / 1e6:,.0f} million parameters is "
            "not trained on CPUs: say where GPUs are, by gpus_per_node in the site file; take a small "
            "recipe, such as --recipe cifar10 or demo; or have it on CPUs all the same, by run.device=cpu"
        )


def refuse_probe(probe: Probe) -> tuple[Dataset, Dataset]:
    """Refuse a probe that could only fail.

    Returns:
        Its training and test set.

    Raises:
        UserError: a dataset cannot be opened, an image has not one label, there are fewer than two labels, or
            none on both sides, or fewer training images than neighbours.
    """
    sets = open_dataset(probe.train), open_dataset(probe.test)
    remedy = "mend it, or go on without, by probe=null"
    classes = []
    for dataset in sets:
        try:
            classes.append(classes_of(dataset, evenly_spaced(len(dataset), probe.max_samples))[0])
        except UserError as error:
            raise UserError(f"probe: {error}; or go on without one, by probe=null") from None
    train, test = classes
    if len(train) < 2:
        raise UserError(
            f"probe.train, {probe.train}, has {len(train)} labels, and kNN tells two apart at least: {remedy}"
        )
    if not set(train) & set(test):
        raise UserError(
            f"probe.train and probe.test, {probe.train} and {probe.test}, share no label: {remedy}"
        )
    if (most := min(len(sets[0]), probe.max_samples)) < probe.k:
        raise UserError(f"probe.k is {probe.k}, and there are {most} training images to vote: lower probe.k")
    return sets
