"""A trained classifier as files for other people, and reading them again. Nothing is pickled (S1).

A folder holds `classifier.safetensors`, of images a checkpoint of timm's model of that name;
`classifier.json` (architecture, preprocessing, the classes in order, provenance); and `README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.small_file import read_small
from cluster.typed_yaml import Section
from pipeline.data.evaluation import Preprocessing
from pipeline.data.shown import AnyPreprocessing
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.models.timm_trunk import classifier_name
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.files import explain_invalid, facts_of, fill_card
from pipeline.trunks.inputs import Source, input_of, outputs_of
from pipeline.trunks.tensor_file import read_tensors, write_tensors

TENSORS, SPEC = "classifier.safetensors", "classifier.json"
MOST_BYTES = 64 << 20  # of a description: of a million classes, some 20 MB


class ClassifierSpec(Section):
    """What `classifier.json` holds. `classes` are the labels, in the order of the logits."""

    format: Literal[1] = 1
    architecture: Architecture
    preprocessing: AnyPreprocessing
    feature_dim: PositiveInt
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    provenance: dict[str, Any] = Field(default_factory=dict)


class ExportedClassifier(nn.Module):
    """A classifier as `load_classifier` returns it: normalised images (N, 3, S, S), or clips or spectrograms
    (N, …), to logits (N, classes).

    Attributes:
        spec: what it is, how an image or a video becomes an input, and what the classes are called.
    """

    def __init__(self, network: Classifier, spec: ClassifierSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def preprocess(self, source: Source) -> Tensor:
        """One input, float32: see `input_of`."""
        return input_of(source, self.spec.preprocessing)

    def logits(self, sources: Iterable[Source], *, batch_size: int = 64) -> Tensor:
        """Logits of many pictures or videos, (N, classes) float32 on the CPU, in their order.

        Args:
            sources: anything that `preprocess` takes: paths, images, arrays, of different sizes.
        """
        return outputs_of(
            self, sources, self.spec.preprocessing, width=len(self.spec.classes), batch_size=batch_size
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs → logits (N, classes)."""
        logits: Tensor = self.network(inputs)
        return logits


def is_classifier(path: Path) -> bool:
    """Whether a folder is an exported classifier."""
    return (path / SPEC).is_file()


def load_classifier(path: str | Path) -> ExportedClassifier:
    """Open an exported classifier, in evaluation mode, on the CPU.

    Raises:
        UserError: if the folder is none, or its tensors are not exactly those of its architecture.
    """
    folder = Path(path)
    spec = read_classifier_spec(folder)
    with torch.device("meta"):  # a description takes no memory, whatever it says: the tensors there do
        network = _build(spec)
    try:
        tensors = read_tensors(folder / TENSORS)
        network.load_state_dict(_from_timm(tensors, spec.architecture), strict=True, assign=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / TENSORS} does not hold the tensors of {spec.architecture.name} with "
            f"{len(spec.classes)} classes: {' '.join(str(error).split())}"
        ) from error
    features = declared(network.trunk).feature_dim
    if spec.feature_dim != features:
        raise UserError(f"{folder / SPEC} says {spec.feature_dim} features, and its trunk has {features}")
    return ExportedClassifier(network.float(), spec).eval()


def save_classifier(tensors: Mapping[str, Tensor], spec: ClassifierSpec, out: Path) -> None:
    """Write a classifier's folder.

    Args:
        tensors: those of a `Classifier`, under its names: "trunk.…", "head.…".
    """
    with torch.device("meta"):
        network = _build(spec)
    network.load_state_dict(dict(tensors), strict=True, assign=True)
    out.mkdir(parents=True, exist_ok=True)
    tensors = _to_timm(network.state_dict(), spec.architecture)
    write_tensors(tensors, out / TENSORS, architecture=spec.architecture)
    write_atomically(out / SPEC, spec.model_dump_json(indent=2) + "\n")
    write_atomically(out / "README.md", _card(spec, sum(each.numel() for each in network.parameters())))


def read_classifier_spec(folder: Path) -> ClassifierSpec:
    """The description of an exported classifier, without its weights.

    Raises:
        UserError: if the folder is none, or the description cannot be used.
    """
    path = folder / SPEC
    if not path.is_file():
        raise UserError(
            f"{folder} is not an exported classifier: it has no {SPEC}; `submit export` makes one of a run "
            "that was fine-tuned"
        )
    try:
        return ClassifierSpec.model_validate_json(read_small(path, most=MOST_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise explain_invalid(path, error) from error


def _build(spec: ClassifierSpec) -> Classifier:
    head = LinearHead(spec.feature_dim, len(spec.classes))
    return Classifier(build_trunk(spec.architecture), head)


def head_name(architecture: Architecture) -> str:
    """What timm calls the last layer."""
    if architecture.is_timms:
        return classifier_name(architecture.name)
    return "fc" if architecture.name.startswith("resnet") else "head.fc"


def _to_timm(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Our trunks have timm's names already."""
    head = head_name(architecture)
    return {
        (
            name.removeprefix("trunk.")
            if name.startswith("trunk.")
            else f"{head}.{name.removeprefix('head.')}"
        ): tensor
        for name, tensor in tensors.items()
    }


def _from_timm(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    head = f"{head_name(architecture)}."
    return {
        (f"head.{name.removeprefix(head)}" if name.startswith(head) else f"trunk.{name}"): tensor
        for name, tensor in tensors.items()
    }


def _card(spec: ClassifierSpec, parameters: int) -> str:
    provenance = spec.provenance
    facts = facts_of(spec.architecture, spec.preprocessing, parameters, provenance)
    facts = {"classes": f"{len(spec.classes):,}, named in {SPEC}"} | facts
    classes = json.dumps(len(spec.classes))
    of_images = isinstance(spec.preprocessing, Preprocessing)
    return fill_card(
        _CARD,
        spec.architecture,
        facts,
        provenance,
        classes=classes,
        library="timm" if of_images else "pytorch",
        tag="image-classification" if of_images else "video-classification",
        things="images" if of_images else "videos",
        example="image.jpg" if of_images else "video.mp4",
        weights=_TIMM.format(classes=classes) if of_images else _OWN,
    )


_TIMM = """\
`classifier.safetensors` is a checkpoint of timm's model of this architecture with `num_classes={classes}`,
where its stem is timm's."""
_OWN = """\
`classifier.safetensors` has the names of the architecture's own modules, and `head.fc`. A video is shown in
several windows, whose probabilities are averaged."""

_CARD = """---
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
from pipeline.export import load_classifier

classifier = load_classifier("path/of/this/folder")
logits = classifier.logits(["{example}"])   # (1, {classes}); the classes are classifier.spec.classes
```

{weights}

## Intended use and limits

Telling apart the classes named above on {things} like those it was trained on. How accurate it is on a test
set, with an interval, is what `submit predict` says. Do not use it to identify people or to decide about
them.

## Licence

The licences of the training {things} are unknown to this tool; whoever publishes these weights has to find
out what they permit. {recipe}"""
