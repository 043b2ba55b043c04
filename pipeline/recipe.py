"""Recipes: one YAML file is one runnable, complete description of a job, checked here once.

A recipe is read, overridden by dotted `key=value` words, and validated as a whole; after that the code
trusts it.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cluster.errors import UserError

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Photometric(Section):
    """Colour augmentation, drawn per crop. Strengths are torchvision's ColorJitter ranges."""

    jitter_probability: Probability = 0.8
    brightness: NonNegativeFloat = 0.8
    contrast: NonNegativeFloat = 0.8
    saturation: NonNegativeFloat = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    grey_probability: Probability = 0.2
    blur_probability: Probability = 0.5
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    solarize_probability: Probability = 0.0


class CropGroup(Section):
    """Crops of one size, cut by RandomResizedCrop, flipped, and coloured alike."""

    count: PositiveInt
    size: PositiveInt
    scale: tuple[Fraction, Fraction]
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Probability = 0.5
    photometric: Photometric = Photometric()


class Data(Section):
    """What is read, and how a sample becomes crops.

    `batch_size` is the coupled batch: the one that Sinkhorn and BatchNorm see, over all ranks.
    """

    root: str
    sealed: str | None = None
    view: str | None = None
    batch_size: PositiveInt
    window: PositiveInt = 131_072
    crops: tuple[CropGroup, ...] = Field(min_length=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)


class RegNetParameters(Section):
    """The design space of Radosavovic et al., 2020: widths from a quantised line, w_j = w_0 + w_a j."""

    depth: PositiveInt
    w_0: PositiveInt
    w_a: PositiveFloat
    w_m: Annotated[float, Field(gt=1)]
    group_width: PositiveInt


class Trunk(Section):
    """The network that is kept: a published size by name, or `regnet_y` with `regnet` parameters."""

    name: Literal[
        "regnet_y",
        "regnety_tiny",
        "regnety_200mf",
        "regnety_400mf",
        "regnety_600mf",
        "regnety_800mf",
        "regnety_1_6gf",
        "regnety_3_2gf",
        "regnety_4gf",
        "regnety_6_4gf",
        "regnety_8gf",
        "regnety_12gf",
        "regnety_16gf",
        "regnety_32gf",
        "regnety_64gf",
        "regnety_128gf",
        "regnety_256gf",
        "regnety_10b",
        "resnet18",
        "resnet50",
    ]
    stem: Literal["imagenet", "low_resolution"] = "imagenet"
    regnet: RegNetParameters | None = None

    @model_validator(mode="after")
    def _parameters_belong_to_regnet_y(self) -> Self:
        if (self.name == "regnet_y") != (self.regnet is not None):
            raise ValueError("`regnet` parameters go with name: regnet_y, and only with it")
        return self


class Head(Section):
    """The projection MLP: trunk features → hidden layers → output."""

    hidden: tuple[PositiveInt, ...]
    output: PositiveInt = 128
    batch_norm: bool = True


class SwAV(Section):
    """Caron et al., 2020 (https://arxiv.org/abs/2006.09882); SEER uses it with 16,000 prototypes."""

    name: Literal["swav"]
    head: Head
    prototypes: PositiveInt
    temperature: PositiveFloat = 0.1
    epsilon: PositiveFloat = 0.05
    sinkhorn_iterations: PositiveInt = 3
    freeze_prototypes_steps: NonNegativeInt = 313
    queue_length: NonNegativeInt = 0
    queue_start_step: NonNegativeInt = 0


class Optim(Section):
    """The optimizer and its schedule: linear warm-up from `warmup_lr` to `lr`, then cosine to `final_lr`, or
    constant. `lr` is the peak, not scaled by the batch size.
    """

    name: Literal["sgd", "larc", "lars", "adamw"]
    lr: PositiveFloat
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_lr: NonNegativeFloat = 0.0
    final_lr: NonNegativeFloat = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 0.0
    trust: PositiveFloat = 0.001
    decay_bias_and_norm: bool = False
    clip_norm: PositiveFloat | None = None


class Train(Section):
    """How long and in what arithmetic. Exactly one of `steps` and `epochs`."""

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    accumulate: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    sync_bn_samples: PositiveInt | None = None
    compile: bool = False
    strategy: Literal["ddp"] = "ddp"
    max_skipped_steps: PositiveInt = 3

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self


class Probe(Section):
    """A weighted kNN on labelled datasets, every so many steps; it changes nothing in the training."""

    train: str
    test: str
    every_steps: PositiveInt
    image_size: PositiveInt
    k: PositiveInt = 20
    temperature: PositiveFloat = 0.1
    max_samples: PositiveInt = 10_000


class Run(Section):
    """Where and how: nothing here changes a number, so none of it is part of a stage's key."""

    folder: str = "runs"
    name: str | None = None
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None
    workers: NonNegativeInt = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: PositiveInt = 10
    checkpoint_minutes: PositiveFloat = 10.0
    checkpoint_every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None


class PretrainRecipe(Section):
    """Everything `submit pretrain` needs."""

    seed: NonNegativeInt = 0
    data: Data
    trunk: Trunk
    method: SwAV
    optim: Optim
    train: Train
    probe: Probe | None = None
    run: Run = Run()


class KnnRecipe(Section):
    """Weighted kNN of Wu et al., 2018 (https://arxiv.org/abs/1805.01978), section 3.4."""

    k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    temperature: PositiveFloat = 0.1


class LinearRecipe(Section):
    """Logistic regression on frozen features; regularisation is chosen on a split of the training set."""

    regularisation: tuple[NonNegativeFloat, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_iterations: PositiveInt = 200
    seed: NonNegativeInt = 0


R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], name: str, overrides: list[str] | None = None, *, kind: str) -> R:
    """Read, override and check a recipe.

    Args:
        model: the recipe's type.
        name: a YAML file's path, or the name of a recipe that ships in `configs/{kind}/`.
        overrides: dotted `key=value` words; the value is read as YAML.
        kind: the folder of `configs/` to look in: "pretrain", "transfer" or "dag".

    Raises:
        UserError: if there is no such recipe, or a key or value is wrong: names file, key and choices.
    """
    path = find_recipe(name, kind=kind)
    values = read_yaml(path)
    for override in overrides or []:
        apply_override(values, override)
    return check_recipe(model, values, where=str(path))


def find_recipe(name: str, *, kind: str) -> Path:
    """The file of a recipe: a path ending in .yaml, or a name from `configs/{kind}/`."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"there is no recipe file {name}; give an existing .yaml file or one of {_shipped(kind)}"
            )
        return path
    shipped = Path(str(resources.files("configs"))) / kind / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not shipped.is_file():
        close = difflib.get_close_matches(name, _shipped(kind), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UserError(
            f"there is no recipe {name!r}{hint} shipped: {', '.join(_shipped(kind))}; or give a .yaml file"
        )
    return shipped


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, safely loaded."""
    try:
        values = yaml.load(path.read_text(), Loader=_YamlWithScientificFloats)  # noqa: S506 -- a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(values).__name__}")
    return values


def check_recipe(model: type[R], values: dict[str, Any], *, where: str) -> R:
    """Validate plain values into a recipe; `where` names their origin in the error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"recipe {where}: {_explain(model, error)}") from error


class _YamlWithScientificFloats(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""


_YamlWithScientificFloats.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _shipped(kind: str) -> list[str]:
    return sorted(Path(str(entry)).stem for entry in (resources.files("configs") / kind).iterdir())


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` word in plain values, in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise UserError(
            f"{override!r} is not an override; write key=value with a dotted key, such as optim.lr=0.3"
        )
    try:
        value = yaml.load(text, Loader=_YamlWithScientificFloats)  # noqa: S506 -- a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"the value of {override!r} is not valid YAML") from error
    *parents, last = key.split(".")
    node: Any = values
    for position, part in enumerate(parents):
        node = _step_into(node, part, here=".".join(parents[: position + 1]))
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _step_into(node: Any, part: str, *, here: str) -> Any:
    child = node[_list_index(node, part, here)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UserError(f"{here!r} is a value, not a section: it has no keys to override")
    return child


def _list_index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{key!r}: the list has {len(node)} entries; use an index from 0 to {len(node) - 1}")
    return int(part)


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Pydantic's first complaint, as one sentence with the way out."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not isinstance(part, int)]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        given = first.get("input")
        got = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
        return f"{key or 'the recipe'}: {message}{got}"
    section = _section_at(model, [str(part) for part in location[:-1]])
    allowed = sorted(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
    parent = ".".join(str(part) for part in first["loc"][:-1])
    hint = f"; did you mean {'.'.join(filter(None, [parent, close[0]]))!r}?" if close else "."
    return f"{key!r} is not a key of {parent or 'the recipe'}{hint} Allowed: {', '.join(allowed)}."


def _section_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The section that a dotted path leads to, through optional fields and tuples."""
    for name in path:
        model = _section_in(model.model_fields[name].annotation)
    return model


def _section_in(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if argument is not type(None) and argument is not Ellipsis:
            return _section_in(argument)
    raise TypeError(f"{annotation} holds no section")
