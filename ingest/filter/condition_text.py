"""Conditions as people type them: `width >= 256`, `label in [cat, dog]`, `lang = en or caption like '%cat%'`.

The grammar is that of SQL's WHERE, as sqlglot reads it, but for values, which are words of ours:

    condition = comparison | "not" condition | condition ("and" | "or") condition | "(" condition ")"
    comparison = column operator value | column ["not"] "in" "[" value {"," value} "]"
               | column ["not"] ("like" | "ilike") value | column ["not"] "between" value "and" value
               | column "is" ["not"] "null"
    operator = "=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">="
    column, value = a bare word without blanks and any of [](),'"=<>! | text in quotes

A quote within quotes is doubled or has a backslash before it. The list of `in` may be in parentheses; `date`
and `timestamp` before a quoted value are SQL's way to say what it is. sqlglot is given our words and these
signs and no others, and what it makes of them is taken over piece by piece: nothing else of SQL can be said.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.errors import UserError

if TYPE_CHECKING:
    from sqlglot.expressions import Expr

Sign = Literal["=", "<", "<=", ">", ">=", "like", "ilike", "null"]

_TOKEN = re.compile(
    r"""\s*(?:(?P<sign>==|!=|<>|<=|>=|[=<>\[\](),])
    |(?:(?:date|timestamp)\s*(?=['"]))?
     (?:"(?P<double>(?:[^"\\]|\\.|"")*)"|'(?P<single>(?:[^'\\]|\\.|'')*)')
    |(?P<bare>[^\s\[\](),=<>!"']+))""",
    re.DOTALL | re.VERBOSE | re.IGNORECASE,
)
_ESCAPED = {'"': re.compile(r"""\\([\\"'])|"(")"""), "'": re.compile(r"""\\([\\"'])|'(')""")}
# What sqlglot's parser calls them.
_SIGNS = {
    "=": "EQ",
    "==": "EQ",
    "!=": "NEQ",
    "<>": "NEQ",
    "<": "LT",
    "<=": "LTE",
    ">": "GT",
    ">=": "GTE",
    "[": "L_BRACKET",
    "]": "R_BRACKET",
    "(": "L_PAREN",
    ")": "R_PAREN",
    ",": "COMMA",
}
_KEYWORDS = {"and", "or", "not", "in", "is", "null", "like", "ilike", "between"}
# What a value follows, though it may be spelled like a keyword: `lang = is`, `lang in [no, is]`.
_BEFORE_VALUES = {"EQ", "NEQ", "LT", "LTE", "GT", "GTE", "LIKE", "ILIKE", "BETWEEN"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A column against values.

    Attributes:
        column: its name.
        sign: "null" has no value.
        values: one, or with = any number of which one must fit.
    """

    column: str
    sign: Sign
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Negation:
    part: "Clause"


@dataclass(frozen=True)
class Combination:
    """All of the parts, or any."""

    parts: tuple["Clause", ...]
    any: bool


Clause = Comparison | Negation | Combination


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A parsed condition: as it was typed, and what it says."""

    text: str
    clause: Clause

    @property
    def columns(self) -> list[str]:
        """The columns that it names, in the order of the text."""
        return list(dict.fromkeys(_columns(self.clause)))


def parse(text: str) -> Condition:
    """Read one condition.

    Raises:
        UserError: it is none.
    """
    from sqlglot import ErrorLevel, ParseError, Token, TokenType
    from sqlglot.expressions import Condition as SqlCondition
    from sqlglot.parser import Parser

    tokens = [Token(getattr(TokenType, kind), word) for kind, word in _tokens(text)]
    try:
        found = Parser(error_level=ErrorLevel.RAISE).parse_into(SqlCondition, tokens, text)
        clause = _clause(found[0]) if len(found) == 1 and found[0] is not None else None
    except ParseError:
        clause = None
    except RecursionError:
        raise wrong(text, "is nested too deeply") from None
    if clause is None:
        raise wrong(text, "is not a condition")
    return Condition(text=text, clause=clause)


def wrong(text: str, problem: str) -> UserError:
    return UserError(
        f"--where '{text}' {problem}: write, for example, 'width >= 256', 'lang = \"en\"', "
        "'label in [cat, dog]' or \"lang is null or not caption like '%cat%'\""
    )


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """What kind sqlglot calls it, and the word."""
    last, end, listed = "", 0, False
    while end < len(text.rstrip()):
        match = _TOKEN.match(text, end)
        if match is None:
            raise wrong(text, f"cannot be read from {text[end:].strip()[:20]!r} on")
        end = match.end()
        word, kind = _word(match), "IDENTIFIER"
        if match["sign"] is not None:
            kind = _SIGNS[word]
            # sqlglot reads over a comma too many.
            if listed and last != "IDENTIFIER":
                raise wrong(text, "is not a condition")
            listed = last == "IN" or (listed and kind == "COMMA")
        elif match["bare"] is not None and not listed and last not in _BEFORE_VALUES:
            kind = word.upper() if word.lower() in _KEYWORDS else kind
        yield kind, word
        last = kind


def _word(match: re.Match[str]) -> str:
    for group, quote in (("double", '"'), ("single", "'")):
        if match[group] is not None:
            return _ESCAPED[quote].sub(lambda escape: escape[1] or escape[2], match[group])
    return match["sign"] or match["bare"]


def _clause(found: "Expr") -> Clause | None:
    """What sqlglot read, in our terms; None if it is more than a condition can say."""
    from sqlglot import expressions as sql

    match found:
        case sql.Paren():
            return _clause(found.this)
        case sql.And() | sql.Or():
            parts = [_clause(part) for part in found.flatten()]
            sound = [part for part in parts if part is not None]
            if len(sound) < len(parts):
                return None
            return Combination(tuple(sound), any=isinstance(found, sql.Or))
        case sql.Not():
            part = _clause(found.this)
            return part and Negation(part)
    column = _name(found.args.get("this"))
    if column is None:
        return None
    clause = _comparison(column, found)
    return Negation(clause) if clause and (found.args.get("negate") or isinstance(found, sql.NEQ)) else clause


def _comparison(column: str, found: "Expr") -> Clause | None:
    """A column against values, without a `not` in it."""
    from sqlglot import expressions as sql

    signs: dict[type[Expr], Sign] = {
        sql.EQ: "=",
        sql.NEQ: "=",
        sql.LT: "<",
        sql.LTE: "<=",
        sql.GT: ">",
        sql.GTE: ">=",
        sql.Like: "like",
        sql.ILike: "ilike",
    }
    if isinstance(found, sql.Is):
        null = isinstance(found.expression, sql.Null)
        return Comparison(column=column, sign="null") if null else None
    if isinstance(found, sql.Between):
        low, high = _name(found.args["low"]), _name(found.args["high"])
        if low is None or high is None:
            return None
        bounds = (
            Comparison(column=column, sign=">=", values=(low,)),
            Comparison(column=column, sign="<=", values=(high,)),
        )
        return Combination(bounds, any=False)
    chosen = found.expressions if isinstance(found, sql.In) else [found.args.get("expression")]
    values = [value for each in chosen if (value := _name(each)) is not None]
    sign = "=" if isinstance(found, sql.In) else signs.get(type(found))
    if sign is None or not values or len(values) < len(chosen):
        return None
    return Comparison(column=column, sign=sign, values=tuple(values))


def _name(found: "Expr | None") -> str | None:
    """A word: to sqlglot, each is the name of a column."""
    from sqlglot import expressions as sql

    return found.name if isinstance(found, sql.Column) and len(found.parts) == 1 else None


def _columns(clause: Clause) -> Iterator[str]:
    match clause:
        case Comparison():
            yield clause.column
        case Negation(part):
            yield from _columns(part)
        case Combination(parts):
            for part in parts:
                yield from _columns(part)
