"""Everything that takes part in a pretraining, and how it is put together."""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.hang.watchdog import Watchdog
from cluster.host import node_name
from cluster.rank.torch_dist import World
from cluster.run.folder import RunFolder
from cluster.site import Site, read_site
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.files import latest
from pipeline.data.loader import Loader
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.client import Node
from pipeline.methods.build import assemble_method
from pipeline.methods.method import HasPositives, Method
from pipeline.parallel.engine import Engine
from pipeline.parallel.parallelize import parallelize
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.branch import read_parent
from pipeline.train.guard import Guard
from pipeline.train.length import optimizer_steps
from pipeline.train.loss_scale import LossScale
from pipeline.train.metrics import Metrics
from pipeline.train.optim import build_optimizer
from pipeline.train.positives import Positives
from pipeline.train.probe import KnnProbe
from pipeline.train.profile import Profile
from pipeline.train.run_recipe import adopt, count_classes, record_attempt, record_warm_start
from pipeline.train.sound import sound_of_run
from pipeline.train.stragglers import Stragglers
from pipeline.train.warm_start import begin_from, checkpoint_to_begin_from
from pipeline.trunks.export import CLASSES
from pipeline.trunks.interop import read_weights, warm_start
from pipeline.trunks.weight_files import init_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that takes part. `engine` is the method as it is called; `step` is where to go on from."""

    recipe: PretrainRecipe
    run: RunFolder
    world: World
    loader: Loader
    method: Method
    engine: Engine
    optimizer: Optimizer
    guard: Guard
    checkpoints: Checkpoints
    metrics: Metrics | None  # on the first rank
    scale: LossScale
    probe: KnnProbe | None  # on the first rank, if the recipe has one
    watchdog: Watchdog
    positives: Positives | None  # with CMA
    stragglers: Stragglers
    profile: Profile
    step: int
    total_steps: int


def set_up(recipe: PretrainRecipe, folder: Path, world: World, watchdog: Watchdog | None = None) -> Training:
    """Build every part, and load the newest checkpoint."""
    loader = Loader(
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.run.workers,
        device=world.device,
        resident=recipe.run.resident,
        cache=CachePlace.of(recipe.run),
        node=place_on_node(world),
        targets=recipe.method.supervised,
        positions=recipe.method.remembers,
    )
    recipe = count_classes(recipe, loader.training_set)
    total_steps = optimizer_steps(recipe, samples=loader.training_set.samples)
    with torch.device("meta"):
        method = assemble_method(
            recipe, total_steps=total_steps, group=world.group, samples=len(loader.dataset)
        )
    rank_rows = recipe.data.batch_size // world.size
    engine = parallelize(method, train=recipe.train, seed=recipe.seed, rank_rows=rank_rows, world=world)
    optimizer = build_optimizer(engine, recipe.optim)
    if recipe.trunk.init_from is not None and latest(folder) is None:
        read_weights(recipe.trunk)  # it must fit, too
    if world.is_first:  # only now: a recipe that does not fit must not claim the folder
        adopt(recipe, folder)
        if recipe.method.supervised:
            write_atomically(folder / CLASSES, json.dumps(loader.training_set.classes) + "\n")
        record_attempt(folder, ranks=world.size, device=str(world.device), of_clips=recipe.data.is_of_clips)
    if recipe.data.audio is not None:
        loader.normalise_sound(sound_of_run(recipe, folder, world))
    submitted_to = folder / "site.yaml"
    site = read_site(submitted_to) if submitted_to.is_file() else Site()
    parent = read_parent(folder)
    checkpoints = Checkpoints(
        folder,
        world=world,
        method=method,
        optimizer=optimizer,
        minutes=recipe.run.checkpoint_minutes,
        failures_per_node_day=site.failures_per_node_day,
        nodes=recipe.run.nodes,
        every_steps=recipe.run.checkpoint_every_steps,
        keep_last=recipe.run.keep_last,
        keep_every_steps=recipe.run.keep_every_steps,
        start_over=recipe.run.start_over or parent is not None,  # a branch is told what to do below
    )
    scale = LossScale(enabled=recipe.train.precision == "fp16")
    guard = Guard(
        method,
        world=world,
        max_skipped=recipe.train.max_skipped_steps,
        spike_deviations=recipe.train.spike_deviations,
    )
    run = RunFolder(folder)
    unwatched = Watchdog(run, rank=world.rank, local_rank=world.local_rank, seconds=recipe.run.hang_seconds)
    watchdog = watchdog or unwatched
    positives = None
    if isinstance(method, HasPositives) and method.cma is not None:
        per_epoch = loader.steps_per_epoch / recipe.train.accumulate
        positives = Positives(method, run=folder, world=world, watchdog=watchdog, steps_per_epoch=per_epoch)
    state = checkpoints.load()
    if state is not None:
        loader.check_state(state["loader"])
        scale.load(state["loss_scale"])
        guard.load(state["guard"])
        if positives is not None:
            positives.load(state.get("positives"))
        if state["step"] > total_steps:
            raise UserError(
                f"the run has saved step {state['step']}, and is to have {total_steps}: raise train.epochs, "
                "or branch from an older checkpoint with `submit pretrain --from`"
            )
        logger.info("going on from step %d of %d", state["step"], total_steps)
    elif parent is not None:
        raise UserError(
            f"{folder} is a branch of {parent.run} at step {parent.step}, and no checkpoint of it is whole: "
            "remove it, and branch from another one"
        )
    else:
        _begin(recipe, folder, method, loader, world)
    step = 0 if state is None else state["step"]
    return Training(
        recipe=recipe,
        run=run,
        world=world,
        loader=loader,
        method=method,
        engine=engine,
        optimizer=optimizer,
        guard=guard,
        checkpoints=checkpoints,
        metrics=Metrics(folder, step=step, total_steps=total_steps, log_every=recipe.run.log_every)
        if world.is_first
        else None,
        scale=scale,
        probe=KnnProbe(recipe, device=world.device) if recipe.probe and world.is_first else None,
        watchdog=watchdog,
        positives=positives,
        stragglers=Stragglers(world, step=step),
        profile=Profile(folder, steps=recipe.run.profile, world=world),
        step=step,
        total_steps=total_steps,
    )


def _begin(recipe: PretrainRecipe, folder: Path, method: Method, loader: Loader, world: World) -> None:
    """Fill in what the recipe begins with, if it is not drawn from the seed."""
    begun_from = None
    if recipe.train.init_from is not None:
        # The first rank's, for all: a run that still trains may save another one in between.
        checkpoint = world.gather(checkpoint_to_begin_from(recipe.train.init_from))[0]
        begin_from(checkpoint, method, loader, world=world)
        begun_from = checkpoint / "manifest.json"
    for which, trunk in method.trunks().items():
        section = recipe.trunk_section(which)
        if section.init_from is not None:
            warm_start(trunk, read_weights(section))
            begun_from = begun_from or init_file(section.init_from)
    if begun_from is not None and world.is_first:
        record_warm_start(folder, begun_from)


def place_on_node(world: World) -> Node:
    """This rank among those of its node; they share what is read ahead."""
    everyone = world.gather((node_name(), secrets.token_hex(8)))
    here = [rank for rank, (node, _) in enumerate(everyone) if node == everyone[world.rank][0]]
    return Node(name=everyone[here[0]][1], ranks=tuple(here), number=here.index(world.rank))
