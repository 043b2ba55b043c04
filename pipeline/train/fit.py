"""What of a recipe does not fit its data, its ranks or its length: told before anything is submitted."""

from __future__ import annotations

import torch

from cluster.errors import UserError
from ingest.dataset.open import Dataset, open_dataset
from pipeline.data.evaluation import evenly_spaced
from pipeline.data.order import plan_order, rank_rows
from pipeline.data.training_set import open_training_set
from pipeline.methods.build import assemble_method
from pipeline.parallel.batchnorm import synchronised_samples
from pipeline.recipe.method import SwAV
from pipeline.recipe.pretrain import PretrainRecipe, Probe
from pipeline.train.length import optimizer_steps
from pipeline.transfer.labels import classes_of


def refuse_misfit(recipe: PretrainRecipe, *, ranks: int) -> None:
    """Refuse a training that could only fail, or be none.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    data, train = recipe.data, recipe.train
    rows = rank_rows(data.batch_size, rank=0, world_size=ranks)
    synchronised_samples(train.sync_bn_samples, ranks=ranks, rank_rows=rows.stop - rows.start)
    if (train.sync_bn_samples or data.batch_size) < 2:
        raise UserError(
            "BatchNorm has no deviation of a single sample: give data.batch_size and "
            "train.sync_bn_samples of 2 at least"
        )
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
