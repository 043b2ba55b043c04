"""How good the trunk is while it trains: weighted kNN on labelled datasets. Training does not notice."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.data.evaluation import evaluation_preprocessing
from pipeline.data.node_cache import CachePlace
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import KnnRecipe
from pipeline.train.fit import refuse_probe
from pipeline.transfer.extract import extract_features
from pipeline.transfer.knn import knn

logger = logging.getLogger(__name__)


class KnnProbe:
    """The recipe's `probe`; one rank has it, the others wait.

    Raises:
        UserError: at once, if it could only fail: see `pipeline.train.fit`.
    """

    def __init__(self, recipe: PretrainRecipe, *, device: torch.device) -> None:
        if recipe.probe is None:
            raise ValueError("the recipe has no probe")
        self._section, self._device, self._workers = recipe.probe, device, recipe.run.workers
        self._cache = CachePlace.of(recipe.run)
        self._preprocessing = evaluation_preprocessing(recipe)
        self._train, self._test = refuse_probe(recipe.probe)

    def accuracy_or_none(self, trunk: nn.Module, *, step: int) -> float | None:
        """The accuracy; or None and a word in the log: what only looks at a training does not end it."""
        try:
            return self.accuracy(trunk)
        except Exception as error:
            logger.warning(
                "step %d is not probed (%s: %s); the training goes on", step, type(error).__name__, error
            )
            return None

    def accuracy(self, trunk: nn.Module) -> float:
        """Top-1 accuracy in percent of the test set's samples by their neighbours in the training set."""
        network = _Widened(trunk.to(self._device))
        train, test = (
            extract_features(
                network,
                dataset,
                preprocessing=self._preprocessing,
                workers=self._workers,
                cache=self._cache,
                device=self._device,
                limit=self._section.max_samples,
            )
            for dataset in (self._train, self._test)
        )
        recipe = KnnRecipe(k=(self._section.k,), temperature=self._section.temperature)
        return 100 * knn(train, test, recipe, device=self._device).top1[self._section.k]


class _Widened(nn.Module):
    """A trunk that takes float32 images whatever its weights are, and keeps the mode of its parts."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.trunk.parameters()).dtype
        return cast(Tensor, self.trunk(images.to(dtype)))
