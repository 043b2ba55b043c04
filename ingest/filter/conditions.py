"""Conditions on columns, as people type them: `width >= 256`, `lang = "en"`, `label in [cat, dog]`.

    condition  = column operator value | column ["not"] "in" "[" value {"," value} "]"
    operator   = "=" | "==" | "!=" | "<" | "<=" | ">" | ">="
    column, value = a bare word without blanks and any of []'",=<>! or text in quotes, \\ before a quote or \\

A column may be derived: `aspect` (longer through shorter side), `short_side`, `long_side`, `label` (the
first), `label_count`. A list fulfils `=` and `in` if any of its values does, and `!=` and `not in` if none is
excluded. Texts that spell numbers compare with a number as numbers. What is null, or not a number, fulfils
nothing.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import UserError

DERIVED = {
    "aspect": ("width", "height"),
    "short_side": ("width", "height"),
    "long_side": ("width", "height"),
    "label": ("labels",),
    "label_count": ("labels",),
}
_TOKEN = re.compile(
    r"""\s*(?:(?P<sign>==|!=|<=|>=|[=<>\[\],])|"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'"""
    r"""|(?P<bare>[^\s\[\],=<>!"']+))""",
    re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?(\d+|(?=\.?\d)\d*\.?\d*([eE][+-]?\d{1,3})?)")
_SPELLED = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_COMPARE_TEXT = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A parsed condition.

    Attributes:
        text: as it was typed.
        column: what it is about.
        sign: one of = < <= > >=.
        values: one, or with = any number of which one must fit.
        negated: whether what fits is excluded.
    """

    text: str
    column: str
    sign: str
    values: tuple[str, ...]
    negated: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be read to decide it."""
        return self.column, *DERIVED.get(self.column, ())


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """Whether each row fulfils a condition, and whether it is because of a null that it does not."""

    fits: NDArray[np.bool_]
    null: NDArray[np.bool_]


def parse(text: str) -> Condition:
    """Read one condition.

    Raises:
        UserError: it is none.
    """
    tokens = _tokens(text)
    kinds = [kind for kind, _ in tokens]
    words = [value for _, value in tokens]
    if kinds == ["word", "sign", "word"] and words[1] in ("==", "!=", *_COMPARE):
        sign = "=" if words[1] in ("==", "!=") else words[1]
        return Condition(text=text, column=words[0], sign=sign, values=(words[2],), negated=words[1] == "!=")
    negated = tokens[1:2] == [("word", "not")]
    rest = tokens[3 if negated else 2 :]
    values, commas = rest[1:-1:2], rest[2:-1:2]
    if (
        kinds[:1] == ["word"]
        and tokens[2 if negated else 1 :][:1] == [("word", "in")]
        and (rest[:1], rest[-1:]) == ([("sign", "[")], [("sign", "]")])
        and len(values) == len(commas) + 1
        and all(kind == "word" for kind, _ in values)
        and all(comma == ("sign", ",") for comma in commas)
    ):
        chosen = tuple(value for _, value in values)
        return Condition(text=text, column=words[0], sign="=", values=chosen, negated=negated)
    raise _wrong(text, "is not a condition")


def evaluate(condition: Condition, rows: pa.Table) -> Verdicts | None:
    """Decide a condition for every row.

    Returns:
        None if the rows do not have the column.

    Raises:
        UserError: the column cannot be compared with the values.
    """
    column = _column(condition.column, rows)
    if column is None:
        return None
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    fits, null = _any_fits(condition, column)
    if condition.negated:
        fits = ~fits
    return Verdicts(fits=fits & ~null, null=null)


def _tokens(text: str) -> list[tuple[str, str]]:
    found, end = [], 0
    while end < len(text.rstrip()):
        match = _TOKEN.match(text, end)
        if match is None:
            raise _wrong(text, f"cannot be read from {text[end:].strip()[:20]!r} on")
        end = match.end()
        if match["sign"] is not None:
            found.append(("sign", match["sign"]))
        elif match["bare"] is not None:
            found.append(("word", match["bare"]))
        else:
            quoted = match["double"] if match["double"] is not None else match["single"]
            found.append(("word", re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)))
    return found


def _column(name: str, rows: pa.Table) -> pa.Array | None:
    """A column of the table, or one derived from it."""
    if name in rows.column_names:
        return rows[name].combine_chunks()
    if name not in DERIVED or not set(DERIVED[name]) <= set(rows.column_names):
        return None
    if name == "label":
        first = pc.list_slice(rows["labels"].combine_chunks(), 0, 1, return_fixed_size_list=True)
        return first.flatten()  # null where there is none
    if name == "label_count":
        return pc.list_value_length(rows["labels"].combine_chunks())
    width, height = (rows[side].combine_chunks().cast(pa.float64()) for side in ("width", "height"))
    long, short = (f(width, height, skip_nulls=False) for f in (pc.max_element_wise, pc.min_element_wise))
    return {"aspect": pc.divide(long, short), "short_side": short, "long_side": long}[name]


def _any_fits(condition: Condition, column: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether any of the condition's values fits each of the column's; and which of the latter are null."""
    kind = column.type
    null = np.asarray(column.is_null(nan_is_null=True))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if condition.sign != "=":
            raise _wrong(condition.text, f"compares lists: use =, != or in with {condition.column}")
        inner, inner_null = _any_fits(condition, column.flatten())
        hits = np.asarray(pc.list_parent_indices(column))[inner & ~inner_null]
        return np.bincount(hits, minlength=len(column)).astype(bool), null
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if condition.sign != "=" and _NUMBER.fullmatch(condition.values[0]):
            return _any_fits(condition, _numbers(column))
        if condition.sign == "=":
            fits = pc.is_in(column, value_set=pa.array(condition.values, kind))
        else:
            fits = _COMPARE_TEXT[condition.sign](column, pa.scalar(condition.values[0], kind))
        return np.asarray(fits.fill_null(False)), null
    values = [_value(condition, value, kind) for value in condition.values]
    numbers = column.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(zero_copy_only=False)
    compare = _COMPARE[condition.sign]
    return np.any([compare(numbers, value) for value in values], axis=0), null


def _numbers(texts: pa.Array) -> pa.Array:
    """The numbers that texts spell, null where they spell none: columns of CSV and JSON are text."""
    plain = pc.utf8_trim_whitespace(texts)
    spelled = pc.match_substring_regex(plain, rf"^(?:{_SPELLED})$")
    return pc.if_else(spelled, plain, pa.scalar(None, plain.type)).cast(pa.float64())


def _value(condition: Condition, text: str, kind: pa.DataType) -> bool | float:
    if pa.types.is_boolean(kind):
        if condition.sign != "=" or text not in ("true", "false"):
            raise _wrong(condition.text, f"compares {condition.column} wrongly: it is true or false")
        return text == "true"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _wrong(condition.text, f"compares {condition.column}, and a {kind} cannot be compared")
    if not _NUMBER.fullmatch(text):
        raise _wrong(condition.text, f"compares {condition.column}, a number, with {text!r}")
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _wrong(text: str, problem: str) -> UserError:
    return UserError(
        f"--where '{text}' {problem}: write, for example, 'width >= 256', 'lang = \"en\"' or "
        "'label in [cat, dog]'"
    )
