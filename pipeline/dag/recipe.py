"""What a graph is: `configs/dag/*.yaml`.

A graph may write stages once for a list of names:

    repeat: {method: [swav, byol]}
    stages:
      pretrain_{method}: {kind: pretrain, recipe: "pretrain/cifar10_{method}", inputs: {data: train}}
      pretrain_byol: {recipe: pretrain/mine}
      compare: {kind: compare, inputs: {"{method}": "pretrain_{method}"}}

Every stage, and every input of a stage, whose name holds `{method}` is there once for each name of the list,
which takes the place of `{method}` in all of it; so is every line of `show` whose stage's name does. What is
written out for one of them, as here for `pretrain_byol`, comes on top of that, key by key. A word such as
`repeat.method=[swav]` is another list.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from cluster.errors import UserError
from cluster.typed_yaml import Section, apply_override, check_recipe, merge, read_recipe

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Check(Section):
    """What a stage's metric must be: `at_least` a value, or `above` another stage's metric of that name,
    beyond both intervals: its lower end lies above the other's higher end.

    A metric has an interval if there are others called like it, with `_low` and `_high` behind.
    """

    metric: str
    at_least: float | None = None
    above: str | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.above is None):
            raise ValueError("a check has either at_least, a number, or above, a stage")
        return self


class StageSection(Section):
    """One stage of a graph.

    `recipe` is a mapping, or the name of a recipe file such as `pretrain/demo`; a mapping may have such a
    name as its `base`, and what differs from it. `inputs` fills the kind's roles, each with the name of
    another stage, or a path inside its folder: `photographs/train.tar`. The graph fails if one of the
    `checks` does; its results stay.
    """

    kind: str
    recipe: str | dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    checks: tuple[Check, ...] = ()


class Shown(Section):
    """A line to print when all is done: a metric of a stage, or the path of a file of its.

    A metric that is not whole is taken for a share and printed as a percentage.
    """

    text: str
    stage: str
    metric: str | None = None
    file: str | None = None


class DagRecipe(Section):
    """A graph. A stage writes to `{folder}/{kind}-{key}`, and `{folder}/latest/{stage}` points there."""

    folder: str
    stages: dict[Name, StageSection] = Field(min_length=1)
    show: tuple[Shown, ...] = ()


def load_dag(name: str, overrides: list[str]) -> DagRecipe:
    """Read a graph, write out what it repeats, put in the recipes that its stages name, and override it:
    `stages.pretrain.recipe.train.steps=50`; of all stages of a pattern: `stages.pretrain_*.recipe.seed=1`;
    and what is repeated: `repeat.seed=[0]`.

    Raises:
        UserError: if a file, stage or key does not exist, or a value is wrong.
    """
    values, where = read_recipe(name, kind="dag")
    lists = [word for word in overrides if word.startswith("repeat.")]
    for word in lists:
        listed = word.removeprefix("repeat.").partition("=")[0]
        if listed not in (there := values.get("repeat") or {}):
            hint = suggest(listed, there) if there else "; it repeats nothing"
            raise UserError(f"{word!r}: {where} has no list {listed!r} to repeat{hint}")
        apply_override(values, word)
    write_out_repeats(values, where=where)
    check_recipe(DagRecipe, values, where=where)
    _expand_recipes(values)
    stages = list(values["stages"])
    words = [word for word in overrides if word not in lists]
    for override in [each for word in words for each in _of_each_stage(word, stages, where=where)]:
        if base := re.match(r"(stages\.\w+\.recipe)\.base=(.*)", override):
            raise UserError(
                f"{override!r}: what a recipe's base has was put in its place already: {base[1]}={base[2]} "
                "takes that recipe instead, and words behind it change its keys"
            )
        apply_override(values, override)
        unknown = values["stages"].keys() - stages
        if unknown:
            stage = unknown.pop()
            raise UserError(f"{override!r}: {where} has no stage {stage!r}{suggest(stage, stages)}")
        _expand_recipes(values)
    return check_recipe(DagRecipe, values, where=where)


def write_out_repeats(values: dict[str, Any], *, where: str) -> None:
    """Put every stage of a graph in the place of what `repeat` says of it, in plain values.

    Raises:
        UserError: if `repeat` does not hold lists of names, or a stage or input asks for a list that is not
            there.
    """
    lists = _lists(values.pop("repeat", {}), where=where)
    stages = values.get("stages")
    if not isinstance(stages, dict):
        return  # and the graph's type says so
    values["stages"] = _repeated(stages, lists, where=f"{where}: stage")
    for name, section in values["stages"].items():
        inputs = section.get("inputs") if isinstance(section, dict) else None
        if isinstance(inputs, dict):
            section["inputs"] = _repeated(inputs, lists, where=f"{where}: stage {name}: input")
    if isinstance(values.get("show"), list):
        values["show"] = [
            filled
            for line in values["show"]
            for _, filled in (
                _each(line["stage"], line, lists, where=f"{where}: show")
                if isinstance(line, dict) and isinstance(line.get("stage"), str)
                else [("", line)]
            )
        ]


def _lists(repeat: Any, *, where: str) -> dict[str, list[str]]:
    if not isinstance(repeat, dict):
        raise UserError(
            f"{where}: repeat is a mapping of names to lists, such as {{method: [swav, byol]}}, "
            f"not {repeat!r}"
        )
    for name, words in repeat.items():
        fine = isinstance(words, list) and all(re.fullmatch(r"[a-z0-9_]+", str(word)) for word in words)
        if not fine or len(set(map(str, words))) < len(words):
            raise UserError(
                f"{where}: repeat.{name} is a list of different names, each of a-z, 0-9 and _, not {words!r}"
            )
    return {str(name): [str(word) for word in words] for name, words in repeat.items()}


def _repeated(section: Mapping[Any, Any], lists: Mapping[str, list[str]], *, where: str) -> dict[str, Any]:
    """A mapping with every entry whose key names lists written out; the order is that of the keys."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        for name, filled in _each(str(key), value, lists, where=where):
            there = found.get(name, filled)
            # What is written out comes on top, wherever it stands.
            below, above = (there, filled) if name == key else (filled, there)
            both = isinstance(below, dict) and isinstance(above, dict)
            found[name] = merge(below, above) if both else above
    return found


def _each(key: str, value: Any, lists: Mapping[str, list[str]], *, where: str) -> list[tuple[str, Any]]:
    """An entry once for every name of the lists that its key names."""
    place = re.search(r"{(\w+)}", key)
    if place is None:
        return [(key, value)]
    if place[1] not in lists:
        there = suggest(place[1], lists) if lists else "; the graph repeats nothing"
        raise UserError(f"{where} {key!r}: repeat has no list {place[1]!r}{there}")
    return [
        entry
        for word in lists[place[1]]
        for entry in _each(key.replace(place[0], word), _filled(value, place[0], word), lists, where=where)
    ]


def _filled(node: Any, place: str, word: str) -> Any:
    """Plain values with a word in all places for it."""
    if isinstance(node, dict):
        return {_filled(key, place, word): _filled(value, place, word) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, place, word) for value in node]
    return node.replace(place, word) if isinstance(node, str) else node


def _of_each_stage(override: str, stages: Iterable[str], *, where: str) -> list[str]:
    """`stages.PATTERN.KEY=VALUE` once for each stage that the pattern fits; any other override as it is."""
    key, separator, value = override.partition("=")
    section, _, rest = key.partition(".")
    pattern, dot, inside = rest.partition(".")
    if section != "stages" or "*" not in pattern:
        return [override]
    fitting = fnmatch.filter(stages, pattern)
    if not fitting:
        raise UserError(f"{override!r}: {where} has no stage {pattern!r}{suggest(pattern, stages)}")
    return [f"stages.{name}{dot}{inside}{separator}{value}" for name in fitting]


def _expand_recipes(values: dict[str, Any]) -> None:
    """Put the recipe in the place of its name, so that it can be overridden key by key."""
    stages = values.get("stages")
    for section in stages.values() if isinstance(stages, dict) else []:
        recipe = section.get("recipe") if isinstance(section, dict) else None
        if isinstance(recipe, str):
            section["recipe"] = read_recipe(recipe, kind="pretrain")[0]
        elif isinstance(recipe, dict) and isinstance(recipe.get("base"), str):
            differs = {key: value for key, value in recipe.items() if key != "base"}
            section["recipe"] = merge(read_recipe(recipe["base"], kind="pretrain")[0], differs)


def suggest(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest one, or all there are."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(choices)}"
