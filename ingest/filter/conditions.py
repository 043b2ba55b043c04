"""Whether rows fulfil a condition.

A column may be derived: `aspect` (longer through shorter side), `short_side`, `long_side`, `label` (the
first), `label_count`. A list fulfils a comparison if any of its values does, and a negated one if none does.
Texts that spell numbers compare with a number as numbers; dates and times compare with ISO 8601, in UTC where
no zone is given, a day being its midnight. As in SQL, what is null, or not a number, fulfils neither a
comparison nor its opposite, only `is null`.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ingest.filter.condition_text import Clause, Combination, Comparison, Condition, Negation, wrong

DERIVED = {
    "aspect": ("width", "height"),
    "short_side": ("width", "height"),
    "long_side": ("width", "height"),
    "label": ("labels",),
    "label_count": ("labels",),
}
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """Whether each row fulfils a condition, and whether it is because of a null that it does not."""

    fits: NDArray[np.bool_]
    null: NDArray[np.bool_]


def columns_of(condition: Condition) -> set[str]:
    """What must be read to decide it."""
    return {each for name in condition.columns for each in (name, *DERIVED.get(name, ()))}


def lacking(condition: Condition, rows: pa.Table) -> set[str]:
    """The columns of a condition that rows neither have nor let derive."""
    return {name for name in condition.columns if _column(name, rows.slice(0, 0)) is None}


def evaluate(condition: Condition, rows: pa.Table) -> Verdicts:
    """Decide a condition for every row. A column that the rows do not have is null in all of them.

    Raises:
        UserError: a column cannot be compared with the values.
    """
    fits = _decide(condition.clause, rows, condition.text)
    return Verdicts(fits=np.asarray(fits.fill_null(False)), null=np.asarray(fits.is_null()))


def _decide(clause: Clause, rows: pa.Table, text: str) -> pa.BooleanArray:
    """Of each row true, false or, where that cannot be said, null."""
    match clause:
        case Negation(part):
            return pc.invert(_decide(part, rows, text))
        case Combination(parts, either):
            combine = pc.or_kleene if either else pc.and_kleene
            decided = _decide(parts[0], rows, text)
            for part in parts[1:]:
                decided = combine(decided, _decide(part, rows, text))
            return decided
    column = _column(clause.column, rows)
    if column is None:
        return pa.repeat(True, len(rows)) if clause.sign == "null" else pa.nulls(len(rows), pa.bool_())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if clause.sign == "null":
        return column.is_null(nan_is_null=True)
    fits, null = _any_fits(clause, column, text)
    return pa.array(fits, mask=null if null.any() else None)


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


def _any_fits(clause: Comparison, column: pa.Array, text: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether any of the values fits each of the column's; and which of the latter are null."""
    kind, sign = column.type, clause.sign
    null = np.asarray(column.is_null(nan_is_null=True))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if sign not in ("=", "like", "ilike"):
            raise wrong(text, f"compares lists: use =, !=, in or like with {clause.column}")
        inner, inner_null = _any_fits(clause, column.flatten(), text)
        hits = np.asarray(pc.list_parent_indices(column))[inner & ~inner_null]
        return np.bincount(hits, minlength=len(column)).astype(bool), null
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if sign in _COMPARE_TEXT and _NUMBER.fullmatch(clause.values[0]):
            return _any_fits(clause, _numbers(column), text)
        return np.asarray(_fitting_texts(clause, column).fill_null(False)), null
    if sign in ("like", "ilike"):
        raise wrong(text, f"asks what {clause.column} is like, and a {kind} is no text")
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        values: list[Any] = [_moment(clause, value, text) for value in clause.values]
        # Times with a zone are in UTC within.
        zoned = pa.timestamp("us", getattr(kind, "tz", None))
        numbers = column.cast(zoned, safe=False).cast(pa.int64()).fill_null(0).to_numpy()
    else:
        values = [_value(clause, value, kind, text) for value in clause.values]
        numbers = column.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(zero_copy_only=False)
    return np.any([_COMPARE[sign](numbers, value) for value in values], axis=0), null


def _fitting_texts(clause: Comparison, column: pa.Array) -> pa.Array:
    if clause.sign == "=":
        return pc.is_in(column, value_set=pa.array(clause.values, column.type))
    if clause.sign in ("like", "ilike"):
        return pc.match_like(column, clause.values[0], ignore_case=clause.sign == "ilike")
    return _COMPARE_TEXT[clause.sign](column, pa.scalar(clause.values[0], column.type))


def _numbers(texts: pa.Array) -> pa.Array:
    """The numbers that texts spell, null where they spell none: columns of CSV and JSON are text."""
    plain = pc.utf8_trim_whitespace(texts)
    spelled = pc.match_substring_regex(plain, rf"^(?:{_SPELLED})$")
    return pc.if_else(spelled, plain, pa.scalar(None, plain.type)).cast(pa.float64())


def _moment(clause: Comparison, value: str, text: str) -> int:
    """Microseconds since 1970, UTC."""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise wrong(
            text, f"compares {clause.column}, a date, with {value!r}, not one such as 2024-01-31"
        ) from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _value(clause: Comparison, value: str, kind: pa.DataType, text: str) -> bool | float:
    if pa.types.is_boolean(kind):
        if clause.sign != "=" or value not in ("true", "false"):
            raise wrong(text, f"compares {clause.column} wrongly: it is true or false")
        return value == "true"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise wrong(text, f"compares {clause.column}, and a {kind} cannot be compared")
    if not _NUMBER.fullmatch(value):
        raise wrong(text, f"compares {clause.column}, a number, with {value!r}")
    return int(value) if value.lstrip("+-").isdigit() else float(value)
