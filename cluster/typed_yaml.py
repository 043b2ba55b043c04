"""Typed YAML: one file is one complete description of a job or a site, checked once and trusted from then on.

A file is read, merged over its `base` if it names one, overridden by dotted `key=value` words, and validated
as a whole: what is saved and shown is that whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic.fields import FieldInfo

from cluster.errors import UserError
from cluster.small_file import read_small

# The largest recipe here has a hundredth of that.
MOST_BYTES = 256 << 10
MOST_VALUES = 20_000
MOST_LEVELS = 40

_IS_PLACE = "a path, which begins where the command is typed, or the URL of a store"
Place = Annotated[str, _IS_PLACE]


class Section(BaseModel):
    """A part of a recipe: immutable; an unknown key is an error, and so is a number that is not finite.

    `renamed` are keys that the section once had, each with what has taken its place, for that error.
    `unwritten` are keys that are left out where they are None: a recipe that has no use for what came later
    stays, in files and in the keys of stages, what it was.
    `steers` are the keys of a whole recipe, as pydantic's `exclude` takes them, that say where and how the
    work is done: begun work may go on with others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}
    unwritten: ClassVar[frozenset[str]] = frozenset()
    steers: ClassVar[dict[str, Any]] = {"run": True}

    @model_serializer(mode="wrap")
    def _without_what_is_unwritten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {
            name: value for name, value in values.items() if value is not None or name not in self.unwritten
        }

    def identity(self) -> dict[str, Any]:
        """Plain values of all that does not steer: what tells this work from other work."""
        return self.model_dump(mode="json", exclude=self.steers)

    def placed(self) -> Self:
        """The same with all its places absolute: it may be read in another folder than it was written in."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                found[name] = value.placed()
            elif value is not None and _is_place(field):
                found[name] = absolute(value)
        return self.model_copy(update=found)


def absolute(place: str) -> str:
    """A place as it is called from everywhere."""
    return place if not place or "://" in place else str(Path(place).absolute())


def _is_place(field: FieldInfo) -> bool:
    optional = [given for choice in get_args(field.annotation) for given in get_args(choice)[1:]]
    return _IS_PLACE in (*field.metadata, *optional)


R = TypeVar("R", bound=Section)


def load_recipe(model: type[R], name: str, overrides: list[str] | None = None, *, kind: str) -> R:
    """Read, merge over its base, override and check a recipe.

    Args:
        model: the recipe's type.
        name: a YAML file's path, or the name of a recipe that ships in `configs/{kind}/`, or with its folder
            in front: `transfer/knn`.
        overrides: dotted `key=value` words; the value is read as YAML.
        kind: the folder of `configs/` to look in: "pretrain", "transfer", "dag" or "cluster".

    Raises:
        UserError: if there is no such recipe, or a key or value is wrong: names file, key and choices.
    """
    values, where = read_recipe(name, kind=kind)
    for override in overrides or []:
        apply_override(values, override)
    return check_recipe(model, values, where=where)


def read_recipe(name: str, *, kind: str) -> tuple[dict[str, Any], str]:
    """A recipe's plain values, not checked yet, and the files that they come from, for errors.

    With `base: OTHER` a file says only what differs from another one: a shipped recipe by its name, or a
    .yaml file by its path from this one's folder. That one has no base itself: two files tell everything.
    Mappings are merged key by key; a list, a number, a text or null takes the place of what the base has
    there.

    Raises:
        UserError: if a file does not exist or is no YAML mapping, or the base has a base.
    """
    name, kind = _in_folder(name, kind)
    path = find_recipe(name, kind=kind)
    values = read_yaml(path)
    if "base" not in values:
        return values, str(path)
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base is the name of another recipe or a .yaml file, not {base!r}")
    try:
        below = find_recipe(str(path.parent / base) if base.endswith((".yaml", ".yml")) else base, kind=kind)
    except UserError as error:
        raise UserError(f"{path}: base: {error}") from None
    beneath = read_yaml(below)
    if "base" in beneath:
        raise UserError(
            f"{path}: its base {below} has a base itself, {beneath['base']!r}, and may not: name that one "
            "here, and write out what lies between"
        )
    return merge(beneath, values), f"{path} (base {below})"


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees of plain values as one: mappings key by key, of all else what is above."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        found[key] = merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return found


def find_recipe(name: str, *, kind: str) -> Path:
    """The file of a recipe: a path ending in .yaml, or a name from `configs/{kind}/`, or `KIND/NAME`."""
    name, kind = _in_folder(name, kind)
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"there is no recipe file {name}; give an existing .yaml file or one of {_shipped(kind)}"
            )
        return path
    shipped = _configs() / kind / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not shipped.is_file():
        elsewhere = [f"{other}/{name}" for other in _kinds() if name in _shipped(other)]
        close = elsewhere or difflib.get_close_matches(name, _shipped(kind), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UserError(
            f"there is no recipe {name!r}{hint} shipped: {', '.join(_shipped(kind))}; or give a .yaml file"
        )
    return shipped


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, safely loaded. An alias (`*name`) is as good as its text written out again."""
    try:
        data = read_small(path, most=MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    values = _load(data, where=str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(values).__name__}")
    return values


def _load(text: bytes | str, *, where: str) -> Any:
    """Plain values, whoever has written the text: it takes no time and memory that a recipe would not."""
    try:
        _refuse_what_grows(text, where=where)
        values = yaml.load(text, Loader=_PlainYaml)  # noqa: S506 -- a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date or a number that there is not
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    # The loader has one object for an anchor and all its aliases: an override of one would change the others.
    return _written_out(values)


def _refuse_what_grows(text: bytes | str, *, where: str) -> None:
    """Look at a text piece by piece, before the whole is built: ten aliases of ten of ten are a billion."""
    opened: list[_Opened] = []
    known: dict[str, tuple[int, int]] = {}  # anchor -> values that it stands for, and levels of them
    count = 0
    for event in yaml.parse(text, Loader=_PlainYaml):
        if isinstance(event, yaml.CollectionStartEvent):
            count += 1
            opened.append(_Opened(anchor=event.anchor, before=count - 1))
            anchor, values, levels = None, 0, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
            anchor, values, levels = ended.anchor, count - ended.before, ended.levels + 1
        elif isinstance(event, yaml.AliasEvent):
            if any(each.anchor == event.anchor for each in opened):
                raise UserError(f"{where} has an alias inside of what it stands for: write that part out")
            anchor, (values, levels) = None, known.get(event.anchor or "", (1, 1))
            count += values
        elif isinstance(event, yaml.ScalarEvent):
            anchor, values, levels = event.anchor, 1, 1
            count += 1
        else:
            continue
        if anchor is not None:
            known[anchor] = values, levels
        if opened:
            opened[-1].levels = max(opened[-1].levels, levels)
        if len(opened) + levels > MOST_LEVELS:
            raise UserError(f"{where} nests values more than {MOST_LEVELS} levels deep")
        if count > MOST_VALUES:
            raise UserError(f"{where} has more than {MOST_VALUES:,} values, aliases written out")


@dataclass(kw_only=True)
class _Opened:
    """A mapping or list whose end has not come yet.

    Attributes:
        before: values that came before it.
        levels: of what is in it, so far.
    """

    anchor: str | None
    before: int
    levels: int = 0


def _written_out(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _written_out(value) for key, value in node.items()}
    if isinstance(node, str) and node.startswith("~/"):  # a shell does not, behind `key=`
        return str(Path(node).expanduser())
    return [_written_out(value) for value in node] if isinstance(node, list) else node


def check_recipe(model: type[R], values: dict[str, Any], *, where: str) -> R:
    """Validate plain values into a recipe; `where` names their origin in the error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"recipe {where}: {_explain(model, error)}") from error


class _PlainYaml(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string, and `10:15` as 615; people mean the number, and these words."""


_PlainYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


for _digit in "0123456789":
    _base_60 = ("tag:yaml.org,2002:str", re.compile(r"^[0-9]+(:[0-9]+)+$"))
    _PlainYaml.yaml_implicit_resolvers[_digit].insert(0, _base_60)


_NOTHINGS = ("none", "None", "off", "no", "", False)
_YAML_BEGINS = ("[", "{", '"', "'", "|", ">", "&", "*", "!")


def _in_folder(name: str, kind: str) -> tuple[str, str]:
    """A recipe's name and folder, where the name has the folder in front: `transfer/knn`."""
    folder, slash, rest = name.partition("/")
    if slash and folder in _kinds() and not name.endswith((".yaml", ".yml")):
        return rest, folder
    return name, kind


def _configs() -> Path:
    return Path(str(resources.files("configs")))


def _kinds() -> list[str]:
    return sorted(
        entry.name for entry in _configs().iterdir() if not entry.name.startswith("_") and entry.is_dir()
    )


def _shipped(kind: str) -> list[str]:
    return sorted(entry.stem for entry in (_configs() / kind).iterdir())


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` word in plain values, in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise UserError(
            f"{override!r} is not an override; write key=value with a dotted key, such as optim.lr=0.3"
        )
    value = text if _is_text(text) else _load(text, where=f"the value of {override!r}")
    *parents, last = key.split(".")
    node: Any = values
    for position, part in enumerate(parents):
        node = _step_into(node, part, here=".".join(parents[: position + 1]))
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _is_text(word: str) -> bool:
    """Whether a value is a plain text, such as a path, in which YAML would see a comment or a mapping."""
    if word.lstrip().startswith(_YAML_BEGINS) or "\n" in word:
        return False
    return word.startswith("#") or " #" in word or ": " in word or word.endswith(":")


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
    location, section = _as_written(model, first["loc"])
    key = ".".join(location)
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        given = first.get("input")
        got = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
        none = given in _NOTHINGS and first["type"] in ("model_type", "model_attributes_type", "dict_type")
        return f"{key or 'the recipe'}: {message}{got}{f'; for none, give {key}=null' if none else ''}"
    parent = ".".join(location[:-1])
    if issubclass(section, Section) and location[-1] in section.renamed:
        return f"{key!r} is now {'.'.join(filter(None, [parent, section.renamed[location[-1]]]))}"
    allowed = sorted(section.model_fields)
    close = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {'.'.join(filter(None, [parent, close[0]]))!r}?" if close else "."
    return f"{key!r} is not a key of {parent or 'the recipe'}{hint} Allowed: {', '.join(allowed)}."


def _as_written(
    section: type[BaseModel], location: tuple[str | int, ...]
) -> tuple[list[str], type[BaseModel]]:
    """The keys of a place as people write them, and the section that the last one is, or should be, in.

    Pydantic adds the name of the section it chose where one of several may stand.
    """
    keys, rest, inside = list[str](), list(location), section
    while rest:
        section = inside
        part = rest.pop(0)
        keys.append(str(part))
        field = section.model_fields.get(str(part))
        if field is not None:
            choices = _sections_in(field.annotation)
            if field.discriminator is not None and rest:
                tag, name = rest.pop(0), str(field.discriminator)
                choices = [each for each in choices if tag in get_args(each.model_fields[name].annotation)]
            inside = choices[0] if choices else section
    return keys, section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, also as an optional one or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]
