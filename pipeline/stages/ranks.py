"""What the ranks of a stage's job do, where they share out the images of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.hang.watchdog import Watchdog
from cluster.rank.preempt import PreemptionFlag, end_preempted
from cluster.rank.torch_dist import World, choose_device, distributed, own_place
from cluster.run.folder import RunFolder
from cluster.typed_yaml import check_recipe
from ingest.dataset.open import open_dataset
from pipeline.recipe.stages import FeaturesRecipe, Machines, Windows
from pipeline.recipe.transfer import PredictRecipe
from pipeline.transfer.extract import at_layer, warn_of_shared, write_features
from pipeline.transfer.predict import predict_together
from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.files import load_trunk

SETS = ("train", "test")


@dataclass(frozen=True)
class _Team:
    """This rank among all, watched, and asked to stop or not."""

    world: World
    watchdog: Watchdog
    stop: PreemptionFlag


@contextmanager
def _team(run: RunFolder, machines: Machines) -> Iterator[_Team]:
    rank, local_rank = own_place()
    nccl = choose_device(machines.device).type == "cuda"
    seconds = machines.hang_seconds
    with (
        Watchdog(run, rank=rank, local_rank=local_rank, seconds=seconds, nccl=nccl) as watchdog,
        distributed(machines.device) as world,
        PreemptionFlag(run) as stop,
    ):
        yield _Team(world, watchdog, stop)


def extract(
    recipe: dict[str, Any], trunk: str, train: dict[str, Any], test: dict[str, Any], folder: str
) -> None:
    """Write train.safetensors and test.safetensors; one that is there already is whole, and stays.

    Args:
        train, test: of a dataset its place, its root and its view, see `pipeline.stages.inputs.pinned`.

    Raises:
        UserError: if a sample has not one label, or cannot be read.
        Preempted: if a signal asked to stop.
    """
    checked, run = check_recipe(FeaturesRecipe, recipe, where=folder), RunFolder(Path(folder))
    videos = checked.videos or Windows()
    with _team(run, checked.run) as team:
        world = team.world
        exported = load_trunk(trunk).to(world.device)
        network = at_layer(exported, exported.network, videos)
        opened = [
            open_dataset(said["root"], sealed=said["sealed"], view=said.get("view")) for said in (train, test)
        ]
        if world.is_first:
            warn_of_shared(*opened)
        for name, dataset in zip(SETS, opened, strict=True):
            made = run.path / f"{name}.safetensors"
            if world.gather(made.exists())[0]:  # as the first rank sees it
                continue
            part = made.with_name(f".{made.name}.part")
            whole = write_features(
                network,
                dataset,
                part,
                dim=network.feature_dim,
                preprocessing=exported.preprocessing,
                workers=checked.run.workers,
                device=world.device,
                precision=checked.precision,
                rank=world.rank,
                ranks=world.size,
                busy=team.watchdog.busy,
                stop=lambda: team.stop.requested,
                several_labels=True,
                videos=videos,
            )
            if world.any(not whole)[0]:
                end_preempted(world, run, f"asked to stop while it extracted {made.name}")
            if world.is_first:
                part.replace(made)
        world.barrier()


def predict(recipe: dict[str, Any], classifier: str, test: dict[str, Any], folder: str) -> None:
    """Write predictions.parquet.

    Args:
        test: of a dataset its place, its root and its view, see `pipeline.stages.inputs.pinned`.
    """
    checked, run = check_recipe(PredictRecipe, recipe, where=folder), RunFolder(Path(folder))
    with _team(run, checked.run) as team:
        predict_together(
            load_classifier(classifier).to(team.world.device),
            open_dataset(test["root"], sealed=test["sealed"], view=test.get("view")),
            checked,
            run.path / "predictions.parquet",
            world=team.world,
            workers=checked.run.workers,
            busy=team.watchdog.busy,
        )
