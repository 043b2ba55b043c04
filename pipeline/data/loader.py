"""The loader: an endless sequence of batches that depends on no rank, worker or restart."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from cluster.errors import UserError
from ingest.video.container import library_versions
from pipeline.data.batch import Batch, Inputs
from pipeline.data.clip.statistics import BinStatistics
from pipeline.data.clip.views import ClipViews
from pipeline.data.image.views import crops_by_name
from pipeline.data.modality import modality_of
from pipeline.data.node_cache import CachePlace
from pipeline.data.order import Order, plan_order, rank_rows
from pipeline.data.rank_batches import RankBatches
from pipeline.data.read_ahead.client import Node, ReadAhead
from pipeline.data.read_ahead.demand import Training
from pipeline.data.resident import RankBoxes, ResidentImages
from pipeline.data.targets import TargetReader
from pipeline.data.training_set import TrainingSet, open_training_set
from pipeline.data.workers import Makes, Pinnable, numbered, start_fork_server
from pipeline.recipe.data import Data

T = TypeVar("T", bound=Pinnable)


class Loader:
    """A sealed dataset as global batches, a pure function of (root, view, seed, step, B, L, W).

    Args:
        data: what is read, and what becomes of a sample.
        rank, world_size: this rank takes its contiguous rows of every global batch.
        workers: processes that read and cut; 0 does it in this one. The batches do not depend on it.
        device: where `augment` works.
        resident: decode all images now and keep them on the device, where the crops are then cut: the same
            crops. For images of one size that fit.
        cache: where the node's readers share what they know of the dataset, and what is read ahead.
        node: this rank's place on its node; None if it is there alone.
        targets: whether batches have the labels of their samples, or their tags.
        positions: whether batches have the positions of their samples in the dataset.

    Attributes:
        training_set: what is read.
        dataset: its samples.
        steps_per_epoch: micro-batches of one epoch.

    Raises:
        UserError: if the dataset is not sealed or smaller than a batch, or the ranks do not divide the batch;
            or, see `ResidentImages`, if the images cannot be resident; or videos cannot be decoded here.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        rank: int,
        world_size: int,
        workers: int,
        device: torch.device,
        resident: bool = False,
        cache: CachePlace | None = None,
        node: Node | None = None,
        targets: bool = False,
        positions: bool = False,
    ) -> None:
        self._workers, self._device = workers, device
        if data.is_of_clips:
            library_versions()  # or it says what to install
        if workers:
            start_fork_server()  # its imports take as long as all that follows
        self.training_set = open_training_set(data)
        dataset = self.training_set.dataset
        samples, copies = self.training_set.samples, self.training_set.copies
        order = plan_order(samples=samples, batch_size=data.batch_size, window=data.window, seed=seed)
        rows = rank_rows(data.batch_size, rank=rank, world_size=world_size)
        self.dataset = dataset
        self._modality = modality_of(data)
        reader = TargetReader(self.training_set) if targets else None
        self._batches = RankBatches(
            dataset,
            self._modality,
            order,
            rows,
            cache=cache,
            targets=reader,
            copies=copies,
            positions=positions,
        )
        self._cache, self._node, self._uses = cache, node or Node.alone(rank), 0
        of_node = (rank_rows(data.batch_size, rank=r, world_size=world_size) for r in self._node.ranks)
        self._demand = Training(order, self.training_set.counts, tuple(of_node), copies)
        self._identity = order_identity(self.training_set, order, data, targets=targets)
        self._step = 0
        self.steps_per_epoch = order.steps_per_epoch
        self._images: ResidentImages | None = None
        if resident:
            if data.is_of_clips:
                raise UserError(
                    "run.resident keeps images in memory, and data.clip and data.audio are of videos"
                )
            self._images = ResidentImages(
                dataset, crops_by_name(data), workers=workers, device=device, cache=cache
            )

    def from_step(self, step: int, *, held: int = 1) -> Iterator[tuple[int, Batch]]:
        """Batches with their global micro-batch counter, from `step` on, epoch after epoch, without end.

        Args:
            held: batches that the caller keeps while it asks for another.

        Raises:
            UserError: see `RankBatches` and `numbered`.
        """
        for number, batch in enumerate(self._endless(step, held), step):
            self._step = number + 1
            yield number, batch

    def _endless(self, step: int, held: int) -> Iterator[Batch]:
        if self._images is not None:
            draw = RankBoxes(self._batches, self.dataset, self._images)
            yield from map(self._images.cut, self._numbered(draw, draw.box_bytes, step, held))
            return
        self._uses += 1
        ahead = ReadAhead(
            self.dataset,
            self._demand,
            workers=self._workers,
            cache=self._cache,
            node=self._node,
            use=self._uses,
            first=step,
        )
        made = self._numbered(self._batches.read_from(ahead.packs), self._batches.view_bytes, step, held)
        yield from ahead.follow(made, step)

    def _numbered(self, make: Makes[T], size: int, step: int, held: int) -> Iterator[T]:
        pin_memory = self._device.type == "cuda"
        return numbered(
            make, step, workers=self._workers, pin_memory=pin_memory, shared_bytes=size, held=held
        )

    def locate(self, step: int) -> list[tuple[int, int]]:
        """Where this rank's samples of micro-batch `step` are, as (unit index, row); nothing is read."""
        return self._batches.places(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the identity of the order, and the next step."""
        return {**self._identity, "step": self._step}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuse to go on in another order than the saved one.

        Raises:
            UserError: naming what differs.
        """
        for key, value in self._identity.items():
            if saved.get(key) != value:
                raise UserError(
                    f"the checkpoint's batches have {key} {saved.get(key)!r}, these have {value!r}: "
                    "go on with the same data, seed, batch size and window, or start a new run"
                )

    def normalise_sound(self, statistics: BinStatistics) -> None:
        """From now on `augment` gives sound with zero mean and unit variance in each bin, and no decibels."""
        assert isinstance(self._modality, ClipViews)
        self._modality.statistics = statistics

    def augment(self, batch: Batch, *, dtype: torch.dtype = torch.float32) -> Inputs:
        """What a method is shown of a batch, on the device."""
        views = {name: view.to(self._device, non_blocking=True) for name, view in batch.views.items()}
        inputs = self._modality.finish(views, batch.parameters, dtype=dtype)
        targets = batch.targets and batch.targets.to(self._device)
        return replace(inputs, number=batch.number, targets=targets, positions=batch.positions)


def order_identity(training_set: TrainingSet, order: Order, data: Data, *, targets: bool) -> dict[str, Any]:
    """What the batches of a run follow from: JSON values."""
    identity: dict[str, Any] = {
        "root": training_set.dataset.root,
        "view": data.view,
        "samples": order.samples,
        "seed": order.seed,
        "batch_size": order.batch_size,
        "lanes": order.lanes,
        "window": order.window,
    }
    if training_set.tags is not None:
        identity["tags"] = training_set.tags.sha256
    if training_set.copies is not None:
        identity["images"] = len(training_set.dataset)
    if targets:  # their codes are those of the tags, or of the root's vocabulary
        identity["targets"] = "labels" if training_set.tags is None else "tags"
    return identity
