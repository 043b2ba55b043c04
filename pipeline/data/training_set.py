"""What a training reads: samples of a sealed dataset, and their labels or tags."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.vocabulary import UnitLabels
from pipeline.data.copies import Copies
from pipeline.data.tags import Tags, open_tags
from pipeline.recipe.data import Data


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """Samples, and what each is to be told from the others by.

    Attributes:
        dataset: of the samples; where there are tags, those that have some.
        tags: in place of the dataset's labels.
        copies: of the samples, where the tags have some of them several times.
    """

    dataset: Dataset
    tags: Tags | None = None
    copies: Copies | None = None

    @property
    def counts(self) -> NDArray[np.int64]:
        """How much an epoch has of each unit, (units,)."""
        return self.dataset.counts if self.copies is None else self.copies.counts

    @property
    def samples(self) -> int:
        """How many an epoch has, copies among them."""
        return int(self.counts.sum())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels or tags, in the order of their codes."""
        return self.dataset.vocabulary.names if self.tags is None else self.tags.names

    def unit_labels(self, unit_index: int) -> UnitLabels:
        """Of one unit's samples, as codes.

        Raises:
            UserError: they are damaged.
        """
        if self.tags is None:
            return self.dataset.unit_labels(unit_index)
        return self.tags.unit_labels(self.dataset, unit_index)


def open_training_set(data: Data) -> TrainingSet:
    """What a recipe says is read.

    Raises:
        UserError: the dataset cannot be opened, or its tags; or they are those of another.
    """
    dataset = open_dataset(data.root, sealed=data.sealed, view=data.view)
    if data.tags is None:
        return TrainingSet(dataset=dataset)
    tags = open_tags(Path(data.tags))
    made_of = tags.vocabulary.root
    if made_of != dataset.root:
        raise UserError(
            f"the tags in {data.tags} are of root {made_of[:12]}, and {data.root} is opened as root "
            f"{dataset.root[:12]}: open it with data.sealed={made_of}, or make tags of this root"
        )
    seen = dataset.view
    whole = seen is None or seen.digest == tags.vocabulary.view
    shown = dataset.through(tags.tagged if whole or seen is None else tags.tagged.within(seen))
    if not tags.resampled:
        return TrainingSet(dataset=shown, tags=tags)
    if not whole:
        raise UserError(
            f"the tags in {data.tags} were resampled over other images than those of data.view={data.view}: "
            f"make tags with view={data.view}, or without resample"
        )
    return TrainingSet(dataset=shown, tags=tags, copies=Copies(tags.copies, partial(tags.unit_copies, shown)))
