"""Pages made from the code: every command with its options, and every key of every recipe.

`make docs` writes them to docs/reference/.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from cluster.job import import_function
from cluster.site import Site
from cluster.typed_yaml import Section
from ingest.cli import app as ingest_app
from pipeline.cli import app as submit_app
from pipeline.dag.stage import Later
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import PredictRecipe
from pipeline.stages.kinds import KINDS
from pipeline.transfer.evaluations import EVALUATIONS

MOST_VALUES = 4  # of a key, that are shown
CONFIGS = Path(__file__).parent.parent / "configs"
PROGRAMS = {"submit": submit_app, "ingest": ingest_app()}


def write_reference(folder: Path) -> None:
    """All of them, each a page of Markdown."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / f"{name}.md").write_text(text)


def pages() -> dict[str, str]:
    """The text of each page, by its name."""
    found = {f"{name}-command": program_page(name, program) for name, program in PROGRAMS.items()}
    return found | {
        "training-recipe": training_page(),
        "evaluation-recipes": evaluations_page(),
        "stages": stages_page(),
        "site-file": site_page(),
    }


# ------------------------------------------------------------------------------------------------ commands


def program_page(name: str, program: typer.Typer) -> str:
    command = typer.main.get_command(program)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name=name)


# ------------------------------------------------------------------------------------------------- recipes


def training_page() -> str:
    shipped = {
        path.stem: (yaml.safe_load(path.read_text()), path.parent.name)
        for kind in ("pretrain", "transfer")
        for path in sorted((CONFIGS / kind).glob("*.yaml"))
    }
    intro = (
        "# Keys of a training's recipe\n\n"
        "For `submit pretrain` and `submit finetune`, and for the stages of these names. Each key can be set "
        "in a recipe's file or on the command line: `optim.lr=0.3`. Where the last column but one says yes, "
        "a run can be continued with another value; for any other key, `--from` starts a new run with the "
        "weights of an old one. The last column names the recipes that set the key, and to what."
    )
    return "\n\n".join([intro, *section_parts(PretrainRecipe, "", PretrainRecipe.steers, shipped)]) + "\n"


def evaluations_page() -> str:
    parts = ["# Keys of evaluations", "Of the commands of these names: `submit knn … k=20`."]
    recipes = {name: evaluation.recipe for name, evaluation in EVALUATIONS.items()}
    for name, recipe in (recipes | {"predict": PredictRecipe}).items():
        parts += [f"## `{name}`", *below(section_parts(recipe, "", {}, {}))]
    return "\n\n".join(parts) + "\n"


def stages_page() -> str:
    parts = [
        "# Stages of a graph",
        "A stage has a `kind`, a `recipe` and `inputs`, each an output of another stage: `trunk: export`, "
        "`data: shards/data`.",
    ]
    for name, kind in KINDS.items():
        parts.append(f"## `{name}`")
        function = kind.run.func if isinstance(kind.run, partial) else kind.run
        if isinstance(function, Later):
            function = import_function(function.name)
        parts.append(EVALUATIONS[name].about if name in EVALUATIONS else clean(inspect.getdoc(function)))
        needed = ", ".join(map(code, sorted(kind.inputs))) or "none"
        further = f"; may have {', '.join(map(code, sorted(kind.optional)))}" if kind.optional else ""
        parts.append(f"Inputs: {needed}{further}.")
        if kind.recipe is PretrainRecipe:
            parts.append("Its recipe is that of [a training](training-recipe.md).")
        else:
            parts += below(section_parts(kind.recipe, "", {}, {}))
    return "\n\n".join(part for part in parts if part) + "\n"


def site_page() -> str:
    return (
        "\n\n".join(
            [
                "# Keys of a site file",
                "What `submit` knows about a cluster. `submit init-site` writes one; `--cluster FILE` or the "
                "variable `SUBMIT_CLUSTER` names it. This is the one that ships, with every key:",
                f"```yaml\n{(CONFIGS / 'cluster' / 'default.yaml').read_text()}```",
                "## Types and bounds",
                *below(section_parts(Site, "", {}, {})),
            ]
        )
        + "\n"
    )


Shipped = Mapping[str, tuple[dict[str, Any], str]]


def section_parts(model: type[Section], prefix: str, steers: Any, shipped: Shipped) -> Iterator[str]:
    """A heading, what the section is, a table of its keys; then the sections below it."""
    yield f"## `{prefix}`" if prefix else "## The recipe itself"
    yield clean(model.__doc__)
    rows, inner_sections = [], []
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        free = (
            steers is True
            or (isinstance(steers, dict) and steers.get(name) is True)
            or (isinstance(steers, set) and name in steers)
        )
        inner = [each for each in choices(field.annotation) if is_section(each)]
        if inner:
            further = steers.get(name) if isinstance(steers, dict) else steers is True
            inner_sections += [(each, path, further) for each in inner]
        required = field.default is PydanticUndefined and field.default_factory is None
        default = "required" if required else code(shown(field.get_default(call_default_factory=True)))
        kinds = " or ".join(dict.fromkeys(map(kind_of, choices(field.annotation))))
        row = [code(path), kinds + bounds(field.metadata), default if not inner or required else "see there"]
        if shipped:
            row += ["yes" if free else "", users(path, shipped) if not inner else ""]
        rows.append(row)
    heads = ["key", "value", "default"] + (["may change in a run", "set by"] if shipped else [])
    yield table(heads, rows)
    for each, path, further in inner_sections:
        title = (
            f"{path}` ({each.model_fields['name'].annotation.__args__[0]})"
            if is_variant(each)
            else f"{path}`"
        )
        parts = list(section_parts(each, path, further, shipped))
        yield f"## `{title}"
        yield from parts[1:]


def below(parts: Iterator[str]) -> list[str]:
    """The same under a heading that is there already."""
    return [part.replace("## ", "### ", 1) if part.startswith("## ") else part for part in list(parts)[1:]]


def is_variant(model: type[Section]) -> bool:
    """Whether it is one of several sections of that place, told apart by `name`."""
    return hasattr(model, "title")


def is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Section)


def choices(annotation: Any) -> list[Any]:
    """What a value may be, without what is said of it; of several sections each."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [each for part in get_args(annotation) for each in choices(part)]
    if get_origin(annotation) is tuple and is_section(get_args(annotation)[0]):
        return choices(get_args(annotation)[0])
    return [annotation]


def kind_of(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return ", ".join(code(str(each)) for each in get_args(kind))
    if get_origin(kind) in (tuple, list):
        inner = [each for each in get_args(kind) if each is not Ellipsis]
        words = [" or ".join(map(kind_of, choices(each))) for each in inner]
        listed = Ellipsis in get_args(kind) or get_origin(kind) is list
        return f"list of {words[0]}" if listed else f"[{', '.join(words)}]"
    if is_section(kind):
        return "section"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
    return words.get(kind) or typing.cast(str, getattr(kind, "__name__", str(kind)))


def bounds(metadata: list[Any]) -> str:
    signs = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    said = [
        f"{words} {getattr(each, sign):g}"
        for each in metadata
        for sign, words in signs.items()
        if getattr(each, sign, None) is not None
    ]
    return f", {', '.join(said)}" if said else ""


def users(path: str, shipped: Shipped) -> str:
    """Which recipes set a key to what; by value, for many have the same."""
    by_value: dict[str, list[str]] = {}
    for name, (values, _) in shipped.items():
        found: Any = values
        for word in path.split("."):
            found = found.get(word) if isinstance(found, dict) else None
        if found is not None:
            by_value.setdefault(shown(found), []).append(name)
    return "; ".join(
        f"{code(value)}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for value, names in list(by_value.items())[:MOST_VALUES]
    ) + (f"; and {len(by_value) - MOST_VALUES} other values" if len(by_value) > MOST_VALUES else "")


# -------------------------------------------------------------------------------------------------- Markdown


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def shown(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    if isinstance(value, tuple):
        value = list(value)
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10_000)
        if not isinstance(value, Path)
        else str(value)
    )
    return text.removesuffix("\n...\n").strip()


def clean(text: str | None) -> str:
    return inspect.cleandoc(text or "")
