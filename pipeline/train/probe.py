"""How good the trunk is while it trains: weighted kNN on labelled datasets. Training does not notice."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ingest.dataset.open import open_dataset
from pipeline.distributed.sharded import is_piece, named_tensors, whole
from pipeline.models.trunk import build_trunk
from pipeline.recipe import KnnRecipe, PretrainRecipe, Trunk
from pipeline.transfer.features import extract_features
from pipeline.transfer.knn import knn
from pipeline.trunks.export import evaluation_preprocessing


class KnnProbe:
    """The recipe's `probe`; one rank has it, the others wait.

    Raises:
        UserError: at once, if a dataset cannot be opened.
    """

    def __init__(self, recipe: PretrainRecipe, *, device: torch.device) -> None:
        if recipe.probe is None:
            raise ValueError("the recipe has no probe")
        self._section, self._device, self._workers = recipe.probe, device, recipe.run.workers
        self._preprocessing = evaluation_preprocessing(recipe)
        self._train, self._test = open_dataset(recipe.probe.train), open_dataset(recipe.probe.test)

    def accuracy(self, trunk: nn.Module) -> float:
        """Top-1 accuracy in percent of the test set's samples by their neighbours in the training set."""
        network = _Widened(trunk.to(self._device))
        train, test = (
            extract_features(
                network,
                dataset,
                preprocessing=self._preprocessing,
                workers=self._workers,
                device=self._device,
                limit=self._section.max_samples,
            )
            for dataset in (self._train, self._test)
        )
        recipe = KnnRecipe(k=(self._section.k,), temperature=self._section.temperature)
        return 100 * knn(train, test, recipe, device=self._device).top1[self._section.k]


def whole_trunk(trunk: nn.Module, section: Trunk, *, keep: bool) -> nn.Module | None:
    """The trunk in one piece, for a rank to call alone: itself, or a copy where it is sharded. All ranks call
    this together.

    Args:
        section: what it was built from.
        keep: whether this rank wants it; None is returned otherwise.
    """
    if not any(is_piece(parameter) for parameter in trunk.parameters()):
        return trunk
    tensors = {}
    for name, tensor in named_tensors(trunk):
        full = whole(tensor.detach(), tensor)
        if keep:
            tensors[name] = full
    if not keep:
        return None
    with torch.device("meta"):
        copy = build_trunk(section)
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)


class _Widened(nn.Module):
    """A trunk that takes float32 images whatever its weights are, and keeps the mode of its parts."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.trunk.parameters()).dtype
        return cast(Tensor, self.trunk(images.to(dtype)))
