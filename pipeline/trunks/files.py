"""A trunk as files for other people, and reading them again. Nothing is pickled (S1).

A folder holds `trunk.safetensors` (parameters and buffers), `trunk.json` (architecture, preprocessing,
provenance) and `README.md`, a model card. The baselines of an evaluation, a random trunk and raw pixels, are
such folders too, so that one code path serves them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.small_file import read_small
from cluster.typed_yaml import Section
from pipeline.data.clip.evaluation import AudioPreprocessing, ClipPreprocessing
from pipeline.data.evaluation import Preprocessing
from pipeline.data.shown import AnyPreprocessing
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.inputs import Source, input_of, outputs_of
from pipeline.trunks.tensor_file import read_tensors, write_tensors

WEIGHTS = "trunk.safetensors"
_MOST_BYTES = 1 << 20  # of a description; the largest here has some thousand


class Pixels(Section):
    """No network at all: the normalised pixels of a small square, flattened."""

    name: Literal["pixels"]


class TrunkSpec(Section):
    """What `trunk.json` holds. `provenance` is for people: data, recipe, commit, steps, metrics."""

    format: Literal[1] = 1
    architecture: Architecture | Pixels
    preprocessing: AnyPreprocessing
    feature_dim: PositiveInt
    provenance: dict[str, Any] = Field(default_factory=dict)


class ExportedTrunk(nn.Module):
    """A trunk as `load_trunk` returns it.

    `forward` takes normalised images (N, 3, S, S), clips (N, 3, T, S, S) or spectrograms (N, 1, frames, bins)
    and returns features (N, feature_dim); `preprocess` makes one image, or the middle of one video, into such
    an input; `preprocessing` describes how; `features` does both, of many.
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
    def preprocessing(self) -> AnyPreprocessing:
        """How an image or a video becomes an input."""
        return self.spec.preprocessing

    def preprocess(self, source: Source) -> Tensor:
        """One input, float32: of a picture of any size and mode, upright, its colours and transparent parts
        as wherever else this trunk is shown pictures; or of the middle of a video. See `input_of`.
        """
        return input_of(source, self.preprocessing)

    def features(self, sources: Iterable[Source], *, batch_size: int = 64) -> Tensor:
        """Features of many pictures or videos, (N, feature_dim) float32 on the CPU, in their order.

        Args:
            sources: anything that `preprocess` takes, of different sizes and kinds: paths, images, arrays.
        """
        return outputs_of(self, sources, self.preprocessing, width=self.feature_dim, batch_size=batch_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs → features (N, feature_dim)."""
        features: Tensor = self.network(inputs)
        return features


def load_trunk(path: str | Path) -> ExportedTrunk:
    """Open an exported trunk, in evaluation mode, on the CPU.

    >>> trunk = load_trunk("runs/demo/latest/trunk")
    >>> features = trunk.features(["cat.jpg", "dog.png"])

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
    features = (
        declared(network).feature_dim
        if isinstance(spec.architecture, Architecture)
        else 3 * images_of(spec.preprocessing).image_size ** 2
    )
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
                f"{out} already holds {taken[0]}: name another folder, or use --force to overwrite it"
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


def images_of(view: AnyPreprocessing) -> Preprocessing:
    """How a trunk for images is shown them.

    Raises:
        UserError: if it is for videos.
    """
    if isinstance(view, Preprocessing):
        return view
    raise UserError("this trunk is for videos, and an image was to be shown to it: give one for images")


class Start(NamedTuple):
    """Where a training from an exported trunk starts: its section of the recipe, and the mean and deviation
    of the colours that it is used to, as a recipe's `data` has them; none of a trunk for sound.
    """

    trunk: Architecture
    colours: Mapping[str, tuple[float, float, float]]


def start_of(folder: Path) -> Start:
    """Where a training starts from an exported trunk.

    Raises:
        UserError: if the folder is none, or there is nothing in it that could learn.
    """
    spec = read_spec(folder)
    if not isinstance(spec.architecture, Architecture):
        raise UserError(f"{folder} holds raw pixels and no network: there is nothing to train further")
    trunk = spec.architecture.model_copy(update={"init_from": str(folder.absolute())})
    view = (
        spec.preprocessing.pictures
        if isinstance(spec.preprocessing, ClipPreprocessing)
        else spec.preprocessing
    )
    return Start(trunk, {"mean": view.mean, "std": view.std} if isinstance(view, Preprocessing) else {})


def explain_invalid(path: Path, error: ValidationError) -> UserError:
    """The sentence about a description that cannot be used."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return UserError(f"{path} cannot be used: {key}: {first['msg']}; was it edited?")


def _trunk_of(spec: TrunkSpec) -> Architecture | None:
    return spec.architecture if isinstance(spec.architecture, Architecture) else None


def _build(architecture: Architecture | Pixels) -> nn.Module:
    return build_trunk(architecture) if isinstance(architecture, Architecture) else nn.Flatten()


def model_card(
    spec: TrunkSpec,
    parameters: int,
    *,
    library: str = "pytorch",
    example: str | None = None,
    weights: str = "The weights are in `trunk.safetensors`, under the names of the architecture's modules.",
) -> str:
    """README.md of an exported trunk: Markdown with the front matter that model hubs read.

    Args:
        library: that reads it.
        example: of its use, in Python; None: of `load_trunk`.
        weights: where they are, in a sentence.
    """
    facts = facts_of(spec.architecture, spec.preprocessing, parameters, spec.provenance)
    things, tag, ours = _SHOWN[type(spec.preprocessing)]
    facts = {"features": f"{spec.feature_dim} per {things}"} | facts
    return fill_card(
        CARD,
        spec.architecture,
        facts,
        spec.provenance,
        tag=tag,
        example=example or ours,
        things=things,
        library=library,
        weights=weights,
    )


def facts_of(
    architecture: Architecture | Pixels, view: AnyPreprocessing, parameters: int, p: Mapping[str, Any]
) -> dict[str, str]:
    """What a model card says first.

    Args:
        p: the provenance.
    """
    return {
        "architecture": architecture.name + _stem_of(architecture),
        "parameters": f"{parameters:,}",
        "input": _input_of(view),
        "training data": p.get("data", "none"),
        "method": p.get("method", "none"),
        "steps": str(p.get("steps", 0)),
        "commit": p.get("commit", "unknown"),
        **({"network": p["which"]} if "which" in p else {}),
        "last metrics": ", ".join(f"{k} {v:.4g}" for k, v in p.get("metrics", {}).items()) or "none",
    }


def _input_of(view: AnyPreprocessing) -> str:
    if isinstance(view, ClipPreprocessing):
        return f"{view.frames} pictures, {view.fps:g} a second, each {_input_of(view.pictures)}"
    if isinstance(view, AudioPreprocessing):
        sound = view.audio
        return (
            f"{sound.seconds:g} s of sound, mono, {sound.rate} samples a second; decibels in {sound.bins} "
            f"{sound.kind} bins, Fourier transforms of {sound.window} samples every {sound.hop}, down to "
            f"{sound.top_db:g} below the loudest; each bin standardised as trunk.json says"
        )
    return (
        f"{view.image_size} x {view.image_size}: short side to {view.resize}, "
        f"{view.interpolation}, centre crop, mean {view.mean}, std {view.std}"
    )


def _stem_of(architecture: Architecture | Pixels) -> str:
    if isinstance(architecture, Pixels) or architecture.stem == "imagenet":
        return ""
    return f", with the stem {architecture.stem} in place of timm's, whose model this is not"


def fill_card(
    card: str,
    architecture: Architecture | Pixels,
    facts: Mapping[str, str],
    p: Mapping[str, Any],
    **more: str,
) -> str:
    """A card's text.

    Args:
        p: the provenance.
        more: what else stands in braces there.
    """
    recipe = yaml.safe_dump(p["recipe"], sort_keys=False) if "recipe" in p else ""
    return card.format(
        name=architecture.name,
        what=p.get("what", "a trunk"),
        table="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        recipe=f"\n## Recipe\n\n```yaml\n{recipe}```\n" if recipe else "",
        **more,
    )


_OF_IMAGES = """from pipeline.export import load_trunk

trunk = load_trunk("path/of/this/folder")
features = trunk.features(["image.jpg"])   # (1, feature_dim); also images, arrays and tensors of any size"""
_OF_VIDEOS = """from pipeline.export import load_trunk

trunk = load_trunk("path/of/this/folder")
features = trunk.features(["video.mp4"])   # (1, feature_dim)"""
# What a trunk is shown, what hubs call its task, and how to begin.
_SHOWN: Mapping[type[Section], tuple[str, str, str]] = {
    Preprocessing: ("image", "image-feature-extraction", _OF_IMAGES),
    ClipPreprocessing: ("video", "feature-extraction", _OF_VIDEOS),
    AudioPreprocessing: ("recording", "feature-extraction", _OF_VIDEOS),
}

CARD = """---
library_name: {library}
pipeline_tag: {tag}
license: unknown
---
# {name}: {what}

| | |
|---|---|
{table}

Training data is named by the Merkle root of a sealed dataset.

## Use

```python
{example}
```

{weights}

## Intended use and limits

Frozen features for retrieval, nearest neighbours and linear classifiers, and a start for fine-tuning.
Whatever biases and unwanted content the {things}s hold, the features may reflect. Do not use them to identify
people or to decide about them.

## Licence

The licences of the training {things}s are unknown to this tool; whoever publishes these weights has to find
out what they permit. {recipe}"""
