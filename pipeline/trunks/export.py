"""Trunks as files for other people: safetensors, a description, and a model card. Nothing is pickled (S1).

A folder holds `trunk.safetensors` (parameters and buffers), `trunk.json` (architecture, preprocessing,
provenance) and `README.md`. The baselines of an evaluation, a random trunk and raw pixels, are such folders
too, so that one code path serves them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.typed_yaml import Section, load_recipe
from ingest.dataset.open import Dataset
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.models.trunk import build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe import BYOL, PretrainRecipe, Trunk
from pipeline.transfer.features import Preprocessing, evenly_spaced, fit_image, image_batches, normalise

_CALIBRATION_IMAGES = 10_000  # at most, evenly spaced


class Pixels(Section):
    """No network at all: the normalised pixels of a small square, flattened."""

    name: Literal["pixels"]


class TrunkSpec(Section):
    """What `trunk.json` holds. `provenance` is for people: data, recipe, commit, steps, metrics."""

    format: Literal[1] = 1
    architecture: Trunk | Pixels
    preprocessing: Preprocessing
    feature_dim: PositiveInt
    provenance: dict[str, Any] = Field(default_factory=dict)


class ExportedTrunk(nn.Module):
    """A trunk as `load_trunk` returns it.

    `forward` takes normalised images (N, 3, S, S) and returns features (N, feature_dim); `preprocess` makes
    one image into such an input; `preprocessing` describes how.
    """

    def __init__(self, network: nn.Module, spec: TrunkSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    @property
    def feature_dim(self) -> int:
        """Length of a feature vector."""
        return self.spec.feature_dim

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes an input."""
        return self.spec.preprocessing

    def preprocess(self, image: Image.Image) -> Tensor:
        """An image of any size → float32 (3, S, S)."""
        fitted = fit_image(image.convert("RGB"), self.preprocessing)
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        return normalise(pixels[None], self.preprocessing, torch.device("cpu"))[0]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, S, S) → features (N, feature_dim)."""
        features: Tensor = self.network(images)
        return features


def load_trunk(path: str | Path) -> ExportedTrunk:
    """Open an exported trunk, in evaluation mode, on the CPU.

    >>> trunk = load_trunk("runs/demo/latest/trunk")
    >>> features = trunk(trunk.preprocess(image)[None])

    Raises:
        UserError: if the folder is no exported trunk, or its tensors are not exactly those of its
        architecture.
    """
    folder = Path(path)
    spec = read_spec(folder)
    network = _build(spec.architecture)
    try:
        network.load_state_dict(load_file(folder / "trunk.safetensors"), strict=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        name = spec.architecture.name
        raise UserError(
            f"{folder}/trunk.safetensors does not hold the tensors of {name}: {' '.join(str(error).split())}"
        ) from error
    return ExportedTrunk(network, spec).eval()


def save_trunk(network: nn.Module, spec: TrunkSpec, out: Path) -> None:
    """Write a trunk's folder; `network` has exactly the tensors of `spec.architecture`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with torch.device("meta"):
        expected = {
            name: tuple(tensor.shape) for name, tensor in _build(spec.architecture).state_dict().items()
        }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(
            f"these are not the tensors of {spec.architecture.name}: "
            f"{sorted(found.items() ^ expected.items())[:4]}"
        )
    temporary = out / ".trunk.safetensors.part"
    save_file(tensors, temporary)
    temporary.replace(out / "trunk.safetensors")
    write_atomically(out / "trunk.json", spec.model_dump_json(indent=2) + "\n")
    write_atomically(out / "README.md", model_card(spec, sum(t.numel() for t in network.parameters())))


def export_trunk(run: Path, out: Path, *, which: Literal["student", "teacher"] = "student") -> TrunkSpec:
    """Export the trunk of a run's newest checkpoint, or of the checkpoint given.

    Args:
        run: a run folder, or one of its `checkpoints/step-…`.
        which: the trunk that learns, or the one that follows it.

    Raises:
        UserError: if there is no whole checkpoint there, or no teacher in it.
    """
    checkpoint = run if (run / "manifest.json").is_file() else latest(run)
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint; give the folder of a run that has saved one")
    run = checkpoint.resolve().parent.parent
    recipe = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    network = build_trunk(recipe.trunk)
    tensors = read_tensors(checkpoint, prefix="trunk." if which == "student" else "teacher.trunk.")
    if not tensors:
        raise UserError(
            f"{run} was trained by {recipe.method.name} without a teacher: export --which student"
        )
    network.load_state_dict(tensors, strict=True)
    teacher = isinstance(recipe.method, BYOL) and not recipe.method.shared_weights
    spec = TrunkSpec(
        architecture=recipe.trunk.model_copy(update={"init_from": None}),  # it is in the provenance
        preprocessing=evaluation_preprocessing(recipe),
        feature_dim=network.feature_dim,
        provenance=_provenance(run, checkpoint, recipe) | ({"which": which} if teacher else {}),
    )
    save_trunk(network, spec, out)
    return spec


def _provenance(run: Path, checkpoint: Path, recipe: PretrainRecipe) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] <= state["step"]][-1:]
    attempt = json.loads((run / "attempts.jsonl").read_text().splitlines()[-1])
    warm = run / "init_from.json"
    return {
        "what": "pretrained on images without labels",
        "method": recipe.method.name,
        "data": state["loader"]["root"],
        "samples": state["loader"]["samples"],
        "steps": state["step"],
        "init_from": json.loads(warm.read_text())["sha256"] if warm.is_file() else None,
        "version": attempt["version"],
        "commit": attempt["commit"],
        "uncommitted_changes": attempt["dirty"],
        "metrics": {k: v for row in last for k, v in row.items() if isinstance(v, int | float)},
        "recipe": recipe.model_dump(mode="json", exclude={"run"}),
    }


def random_trunk(
    spec: TrunkSpec, dataset: Dataset, *, seed: int, out: Path, workers: int, device: torch.device
) -> None:
    """The same architecture and preprocessing as `spec`, with weights drawn from the seed and nothing
    learned.

    BatchNorm's statistics are a cumulative average over the training images: without them a random trunk is
    far worse than it needs to be, and a poor baseline.
    """
    if not isinstance(spec.architecture, Trunk):
        raise UserError("raw pixels have no weights to draw; give a trunk that was exported from a run")
    network = build_trunk(spec.architecture)
    # Wrapped as a method wraps it: the same seed then gives the weights that pretraining started from.
    initialize(nn.ModuleDict({"trunk": network}), seed=seed)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    calibrate_batchnorm(network, dataset, preprocessing=spec.preprocessing, workers=workers, device=device)
    provenance = {"what": "random weights, BatchNorm calibrated", "seed": seed, "data": dataset.root}
    save_trunk(network, spec.model_copy(update={"provenance": provenance}), out)


def calibrate_batchnorm(
    network: nn.Module, dataset: Dataset, *, preprocessing: Preprocessing, workers: int, device: torch.device
) -> None:
    """Set every BatchNorm's running statistics to their average over batches of the dataset."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for the cumulative average
    positions = evenly_spaced(len(dataset), _CALIBRATION_IMAGES)
    network.train()
    with torch.no_grad():
        for batch in image_batches(dataset, positions, preprocessing=preprocessing, workers=workers):
            network(normalise(batch.images, preprocessing, device))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def pixels_trunk(spec: TrunkSpec, *, size: int, out: Path) -> TrunkSpec:
    """Raw pixels of `size` x `size` as a trunk, normalised like `spec`."""
    preprocessing = Preprocessing(
        image_size=size, resize=size, mean=spec.preprocessing.mean, std=spec.preprocessing.std
    )
    pixels = TrunkSpec(
        architecture=Pixels(name="pixels"),
        preprocessing=preprocessing,
        feature_dim=3 * size * size,
        provenance={"what": "raw pixels"},
    )
    save_trunk(nn.Flatten(), pixels, out)
    return pixels


def evaluation_preprocessing(recipe: PretrainRecipe) -> Preprocessing:
    """How images are shown to a trunk of this recipe: at the probe's size, else at the largest crop's.

    From 96 pixels up the short side is resized to 8/7 of it first and the centre is cut, as ImageNet's
    models are evaluated; small images are shown whole.
    """
    size = recipe.probe.image_size if recipe.probe else max(group.size for group in recipe.data.crops)
    return Preprocessing(
        image_size=size,
        resize=round(size * 8 / 7) if size >= 96 else size,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )


def read_spec(folder: Path) -> TrunkSpec:
    """The description of an exported trunk, without its weights."""
    path = folder / "trunk.json"
    if not path.is_file():
        raise UserError(f"{folder} is not an exported trunk: it has no trunk.json; `submit export` makes one")
    try:
        return TrunkSpec.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} cannot be used: {key}: {first['msg']}; was it edited?") from error


def _build(architecture: Trunk | Pixels) -> nn.Module:
    return build_trunk(architecture) if isinstance(architecture, Trunk) else nn.Flatten()


def model_card(spec: TrunkSpec, parameters: int) -> str:
    """README.md of an exported trunk: Markdown with the front matter that model hubs read."""
    p, view = spec.provenance, spec.preprocessing
    facts = {
        "architecture": spec.architecture.name,
        "parameters": f"{parameters:,}",
        "features": f"{spec.feature_dim} per image",
        "input": f"{view.image_size} x {view.image_size}: short side to {view.resize}, centre crop, "
        f"mean {view.mean}, std {view.std}",
        "training data": p.get("data", "none"),
        "method": p.get("method", "none"),
        "steps": p.get("steps", 0),
        "commit": p.get("commit", "unknown"),
        **({"network": p["which"]} if "which" in p else {}),
        "last metrics": ", ".join(f"{k} {v:.4g}" for k, v in p.get("metrics", {}).items()) or "none",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    recipe = yaml.safe_dump(p["recipe"], sort_keys=False) if "recipe" in p else ""
    return CARD.format(
        name=spec.architecture.name,
        what=p.get("what", "an image trunk"),
        table=table,
        recipe=f"\n## Recipe\n\n```yaml\n{recipe}```\n" if recipe else "",
    )


CARD = """---
library_name: pytorch
pipeline_tag: image-feature-extraction
license: unknown
---
# {name}: {what}

| | |
|---|---|
{table}

Training data is named by the Merkle root of a sealed dataset.

## Use

```python
from PIL import Image
from pipeline.trunks.export import load_trunk

trunk = load_trunk("path/of/this/folder")
features = trunk(trunk.preprocess(Image.open("image.jpg"))[None])   # (1, feature_dim)
```

The weights are in `trunk.safetensors`, under the names of the architecture's own modules.

## Intended use and limits

Frozen features for retrieval, nearest neighbours and linear classifiers, and a start for fine-tuning. No
labels were used in pretraining. The images were not curated: whatever biases and unwanted content they
hold, the features may reflect. Do not use them to identify people or to decide about them.

## Licence

The licences of the training images are unknown to this tool; whoever publishes these weights has to find
out what they permit. {recipe}"""
