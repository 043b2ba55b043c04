"""Typed records: JSON files that are checked once, where they are read, and trusted from then on.

Code of several versions reads and writes the same run folders: a key that this one does not know is ignored.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.errors import UserError
from cluster.small_file import read_small
from cluster.wording import visible

T = TypeVar("T")


def read_record(kind: type[T], path: Path, *, remedy: str) -> T:
    """A JSON file as a value of that kind: a dataclass, a model, or a list or dictionary of them.

    Args:
        remedy: what to do if it is damaged, in the imperative.

    Raises:
        UserError: if there is no such file, it cannot be read, or holds something else; names it.
    """
    try:
        text = read_small(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path} cannot be read: {reason}; {remedy}") from error
    return parse_record(kind, text, where=str(path), remedy=remedy)


def parse_record(kind: type[T], text: str | bytes, *, where: str, remedy: str) -> T:
    """The same of text that comes from `where`."""
    try:
        value: T = _checker(kind).validate_json(text)  # type: ignore[arg-type]
    except (ValidationError, UserError) as error:  # the latter: a value that refuses itself
        raise UserError(f"{where} is damaged: {_complaint(error, text)}; {remedy}") from error
    return value


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _complaint(error: ValidationError | UserError, text: str | bytes) -> str:
    """The first thing that is wrong, in words."""
    if isinstance(error, UserError):
        return str(error)
    if not text.strip():
        return "it is empty"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "it is not JSON, or not all of it is there"
    key = visible(".".join(str(part) for part in first["loc"]))
    return f"{key}: {first['msg'].lower()}" if key else first["msg"].lower()
