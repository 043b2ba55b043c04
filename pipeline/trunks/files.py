"""A trunk as files for other people, and reading them again. Nothing is pickled (S1).

A folder holds `trunk.safetensors` (parameters and buffers), `trunk.json` (architecture, preprocessing,
provenance) and `README.md`, a model card. The baselines of an evaluation, a random trunk and raw pixels, are
such folders too, so that one code path serves them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.small_file import read_small
from cluster.typed_yaml import Section
from ingest.image.decode import decoded
from pipeline.data.evaluation import Preprocessing, fit_image, normalise
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.trunk import Trunk
from pipeline.trunks.tensor_file import read_tensors, write_tensors

WEIGHTS = "trunk.safetensors"
_MOST_BYTES = 1 << 20  # of a description; the largest here has some thousand


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
        """An image of any size and mode → float32 (3, S, S): upright, its colours and transparent parts as
        wherever else this trunk is shown images.
        """
        fitted = fit_image(decoded(image), self.preprocessing)
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
    with torch.device("meta"):  # a description takes no memory, whatever it says: the tensors there do
        network = _build(spec.architecture)
    try:
        tensors = read_tensors(folder / WEIGHTS)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        name = spec.architecture.name
        raise UserError(
            f"{folder / WEIGHTS} does not hold the tensors of {name}: {' '.join(str(error).split())}"
        ) from error
    size = spec.preprocessing.image_size
    features = declared(network).feature_dim if isinstance(spec.architecture, Trunk) else 3 * size * size
    if spec.feature_dim != features:
        raise UserError(f"{folder}/trunk.json says {spec.feature_dim} features, and its trunk has {features}")
    return ExportedTrunk(network.float(), spec).eval()


def save_trunk(network: nn.Module, spec: TrunkSpec, out: Path) -> None:
    """Write a trunk's folder; `network` has exactly the tensors of `spec.architecture`."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = network.state_dict()
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
    write_tensors(tensors, out / WEIGHTS, architecture=_trunk_of(spec))
    write_atomically(out / "trunk.json", spec.model_dump_json(indent=2) + "\n")
    write_atomically(out / "README.md", model_card(spec, sum(t.numel() for t in network.parameters())))


def refuse_foreign(out: Path, spec_file: str, provenance: Mapping[str, Any]) -> None:
    """Refuse to write into a folder that holds what is not to be lost: other files, or another run's export.

    Raises:
        UserError: naming it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder to write, which need not be there yet")
    if not out.is_dir():
        return
    there = {path.name for path in out.iterdir()}
    if spec_file not in there:
        mine = {"README.md", WEIGHTS, "trunk.json", "classifier.safetensors", "classifier.json"}
        if taken := sorted(there & mine):
            raise UserError(
                f"{out} holds a {taken[0]} already: give another folder, or --force to overwrite it"
            )
        return
    try:
        found = json.loads((out / spec_file).read_text())["provenance"]
        same = found.get("recipe") == provenance.get("recipe") and found.get("data") == provenance.get("data")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise UserError(
            f"{out} holds what another run became: give another folder, or --force to overwrite it"
        )


def read_spec(folder: Path) -> TrunkSpec:
    """The description of an exported trunk, without its weights."""
    path = folder / "trunk.json"
    if not path.is_file():
        raise UserError(f"{folder} is not an exported trunk: it has no trunk.json; `submit export` makes one")
    try:
        return TrunkSpec.model_validate_json(read_small(path, most=_MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise explain_invalid(path, error) from error


class Start(NamedTuple):
    """Where a training from an exported trunk starts: its section of the recipe, and how it sees images."""

    trunk: Trunk
    preprocessing: Preprocessing


def start_of(folder: Path) -> Start:
    """Where a training starts from an exported trunk.

    Raises:
        UserError: if the folder is none, or there is nothing in it that could learn.
    """
    spec = read_spec(folder)
    if not isinstance(spec.architecture, Trunk):
        raise UserError(f"{folder} holds raw pixels and no network: there is nothing to train further")
    trunk = spec.architecture.model_copy(update={"init_from": str(folder.absolute())})
    return Start(trunk, spec.preprocessing)


def explain_invalid(path: Path, error: ValidationError) -> UserError:
    """The sentence about a description that cannot be used."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return UserError(f"{path} cannot be used: {key}: {first['msg']}; was it edited?")


def _trunk_of(spec: TrunkSpec) -> Trunk | None:
    return spec.architecture if isinstance(spec.architecture, Trunk) else None


def _build(architecture: Trunk | Pixels) -> nn.Module:
    return build_trunk(architecture) if isinstance(architecture, Trunk) else nn.Flatten()


def model_card(spec: TrunkSpec, parameters: int) -> str:
    """README.md of an exported trunk: Markdown with the front matter that model hubs read."""
    facts = facts_of(spec.architecture, spec.preprocessing, parameters, spec.provenance)
    facts = {"features": f"{spec.feature_dim} per image"} | facts
    return fill_card(CARD, spec.architecture, facts, spec.provenance)


def facts_of(
    architecture: Trunk | Pixels, view: Preprocessing, parameters: int, p: Mapping[str, Any]
) -> dict[str, str]:
    """What a model card says first.

    Args:
        p: the provenance.
    """
    return {
        "architecture": architecture.name + _stem_of(architecture),
        "parameters": f"{parameters:,}",
        "input": f"{view.image_size} x {view.image_size}: short side to {view.resize}, "
        f"{view.interpolation}, centre crop, mean {view.mean}, std {view.std}",
        "training data": p.get("data", "none"),
        "method": p.get("method", "none"),
        "steps": str(p.get("steps", 0)),
        "commit": p.get("commit", "unknown"),
        **({"network": p["which"]} if "which" in p else {}),
        "last metrics": ", ".join(f"{k} {v:.4g}" for k, v in p.get("metrics", {}).items()) or "none",
    }


def _stem_of(architecture: Trunk | Pixels) -> str:
    if isinstance(architecture, Pixels) or architecture.stem == "imagenet":
        return ""
    return f", with the stem {architecture.stem} in place of timm's, whose model this is not"


def fill_card(
    card: str, architecture: Trunk | Pixels, facts: Mapping[str, str], p: Mapping[str, Any], **more: str
) -> str:
    """A card's text.

    Args:
        p: the provenance.
        more: what else stands in braces there.
    """
    recipe = yaml.safe_dump(p["recipe"], sort_keys=False) if "recipe" in p else ""
    return card.format(
        name=architecture.name,
        what=p.get("what", "an image trunk"),
        table="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        recipe=f"\n## Recipe\n\n```yaml\n{recipe}```\n" if recipe else "",
        **more,
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

from pipeline.export import load_trunk

trunk = load_trunk("path/of/this/folder")
features = trunk(trunk.preprocess(Image.open("image.jpg"))[None])   # (1, feature_dim)
```

The weights are in `trunk.safetensors`, under the names of the architecture's own modules.

## Intended use and limits

Frozen features for retrieval, nearest neighbours and linear classifiers, and a start for fine-tuning.
Whatever biases and unwanted content the images hold, the features may reflect. Do not use them to identify
people or to decide about them.

## Licence

The licences of the training images are unknown to this tool; whoever publishes these weights has to find
out what they permit. {recipe}"""
