"""Trunks that learnt nothing: random weights, and the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.evaluation import evenly_spaced
from pipeline.data.shown import AnyPreprocessing, shown_inputs
from pipeline.models.trunk import arrange_weights, build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.files import Pixels, TrunkSpec, images_of, save_trunk

_CALIBRATION_SAMPLES = 10_000  # at most, evenly spaced


def random_trunk(
    spec: TrunkSpec, dataset: Dataset, *, seed: int, out: Path, workers: int, device: torch.device
) -> None:
    """The same architecture and preprocessing as `spec`, with weights drawn from the seed and nothing
    learned.

    BatchNorm's statistics are a cumulative average over the training images: without them a random trunk is
    far worse than it needs to be, and a poor baseline.
    """
    if not isinstance(spec.architecture, Architecture):
        raise UserError("raw pixels have no weights to draw; give a trunk that was exported from a run")
    network = build_trunk(spec.architecture)
    # Wrapped as a method wraps it: the same seed then gives the weights that pretraining started from.
    initialize(nn.ModuleDict({"trunk": network}), seed=seed)
    network = network.to(device)
    arrange_weights(network)
    calibrate_batchnorm(network, dataset, preprocessing=spec.preprocessing, workers=workers, device=device)
    provenance = {"what": "random weights, BatchNorm calibrated", "seed": seed, "data": dataset.root}
    save_trunk(network, spec.model_copy(update={"provenance": provenance}), out)


def calibrate_batchnorm(
    network: nn.Module,
    dataset: Dataset,
    *,
    preprocessing: AnyPreprocessing,
    workers: int,
    device: torch.device,
) -> None:
    """Set every BatchNorm's running statistics to their average over batches of the dataset."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for the cumulative average
    positions = evenly_spaced(len(dataset), _CALIBRATION_SAMPLES)
    network.train()
    with torch.no_grad():
        for batch in shown_inputs(dataset, positions, preprocessing, workers=workers, device=device):
            network(batch.inputs)
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def pixels_trunk(spec: TrunkSpec, *, size: int, out: Path) -> TrunkSpec:
    """Raw pixels of `size` x `size` as a trunk, normalised like `spec`."""
    preprocessing = images_of(spec.preprocessing).model_copy(update={"image_size": size, "resize": size})
    pixels = TrunkSpec(
        architecture=Pixels(name="pixels"),
        preprocessing=preprocessing,
        feature_dim=3 * size * size,
        provenance={"what": "raw pixels"},
    )
    save_trunk(nn.Flatten(), pixels, out)
    return pixels
