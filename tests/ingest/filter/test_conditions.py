"""Conditions on columns: what is written is what is read, and what it means."""

import json
import operator
import sqlite3
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.filter.condition_text import Comparison, Negation, parse
from ingest.filter.conditions import evaluate

SIGNS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
words = st.text(max_size=12)
blanks = st.text(" \t", max_size=2)


def quoted(word, quote='"'):
    return quote + word.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


@settings(deadline=None)  # the first one loads the grammar
@given(
    column=words, sign=st.sampled_from(sorted(SIGNS)), value=words, blank=blanks, quote=st.sampled_from("\"'")
)
def test_a_comparison_of_any_texts_is_read_back(column, sign, value, blank, quote):
    found = parse(f"{blank}{quoted(column, quote)}{blank}{sign}{blank}{quoted(value)}{blank}")
    said = Comparison(column=column, sign="=" if sign in ("==", "!=") else sign, values=(value,))
    assert found.clause == (Negation(said) if sign == "!=" else said)


@given(column=words, values=st.lists(words, min_size=1, max_size=5), blank=blanks, negated=st.booleans())
def test_a_choice_of_any_texts_is_read_back(column, values, blank, negated):
    listed = f"{blank},{blank}".join(map(quoted, values))
    found = parse(f"{quoted(column)} {'not ' * negated}in{blank}[{blank}{listed}{blank}]")
    said = Comparison(column=column, sign="=", values=tuple(values))
    assert found.clause == (Negation(said) if negated else said)


pieces = ["a", "b", " ", '"', "'", "\\", "[", "]", "(", ")", ",", "=", "<", ">", "!", "0", ".", "-", "*", ";"]
pieces += [
    f" {word} " for word in ("in", "not", "and", "or", "like", "is", "null", "between", "select", "date")
]


@given(st.lists(st.sampled_from(pieces), max_size=14).map("".join))
def test_any_text_is_a_condition_or_a_sentence(text):
    try:
        found = parse(text)
    except UserError as error:
        assert "write, for example" in str(error)
    else:
        assert found.columns


@pytest.mark.parametrize(
    "text",
    [
        "",
        "width",
        "width >=",
        ">= 256",
        "width >= 256 x",
        "width = [1]",
        "label in",
        "label in cat",
        "label in []",
        "label in [cat",
        "label in [cat dog]",
        "label in [cat,, dog]",
        "label in [cat] x",
        "label not [cat]",
        "label not in cat",
        '"width >= 256',
        "width >= '256",
        "width => 256",
        "width >= 256; rm",
        "__import__('os').system('x')",
        "width",
        "not width",
        "width > 1 and",
        "width > 1 or or width < 2",
        "(width > 1",
        "width > 1)",
        "width > 1, width < 3",
        "1 < width < 3",
        "width is 3",
        "width is not",
        "width between 1",
        "label in ()",
        "label in (, cat)",
        "label in [[cat]]",
        "label in (select a from b)",
        "label in (select)(a)",
        "caption like",
        "caption like '%' escape '!'",
        "width > (select 1)",
        "width = length(caption)",
        "read_text(caption) = 'x'",
        "exists (select 1)",
        "width > 1 union select 1",
        "width > 1; select 1",
        "width > 1 -- and more",
        "case when width > 1 then 2 end = 2",
        "width + 1 > 2",
        "labels[0] = cat",
        "cast(width as text) = '1'",
        "not " * 2_000 + "width > 1",
    ],
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(UserError, match=r"--where '.*write, for example"):
        parse(text)


def decide(text, columns):
    verdicts = evaluate(parse(text), pa.table(columns))
    return verdicts.fits.tolist(), verdicts.null.tolist()


numbers = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(numbers, min_size=1, max_size=6),
    sign=st.sampled_from(sorted(SIGNS)),
    limit=st.one_of(st.integers(-(2**70), 2**70), st.floats(-1e6, 1e6).map(lambda x: round(x, 3))),
)
def test_numbers_compare_as_numbers_whatever_their_type(values, sign, limit):
    fits, null = decide(f"n {sign} {limit}", {"n": pa.array(values, pa.int64())})
    assert null == [value is None for value in values]
    if isinstance(limit, int):
        assert fits == [value is not None and SIGNS[sign](value, limit) for value in values]
    else:
        assert fits == [value is not None and SIGNS[sign](float(value), limit) for value in values]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64(), pa.int32(), pa.float32()])
def test_narrow_types_and_limits_out_of_their_range(kind):
    column = {"n": pa.array([0, 3, 200 if kind == pa.uint8() else 100_000, None], kind)}
    assert decide("n < -1", column)[0] == [False, False, False, False]
    assert decide("n > -1", column)[0] == [True, True, True, False]
    assert decide("n < 1e30", column)[0] == [True, True, True, False]
    assert decide("n >= 2.5", column)[0] == [False, True, True, False]
    assert decide("n in [0, 3]", column)[0] == [True, True, False, False]
    assert decide("n not in [0, 3]", column)[0] == [False, False, True, False]


def test_a_large_hash_is_compared_exactly():
    column = {"phash": pa.array([2**63 + 1, 2**63], pa.uint64())}
    assert decide(f"phash = {2**63 + 1}", column)[0] == [True, False]


def test_not_a_number_is_null():
    assert decide("n != 1", {"n": pa.array([1.0, 2.0, float("nan")])}) == (
        [False, True, False],
        [False, False, True],
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts(kind):
    column = {"lang": pa.array(["en", "de", None, ""], pa.string()).cast(kind)}
    assert decide("lang = en", column) == ([True, False, False, False], [False, False, True, False])
    assert decide('lang != "en"', column)[0] == [False, True, False, True]
    assert decide("lang in [en, '']", column)[0] == [True, False, False, True]
    assert decide("lang < e", column)[0] == [False, True, False, True]
    assert decide("lang = 5", column)[0] == [False] * 4


def test_true_and_false():
    column = {"safe": pa.array([True, False, None])}
    assert decide("safe = true", column) == ([True, False, False], [False, False, True])
    assert decide("safe != true", column)[0] == [False, True, False]
    for text in ("safe = 1", "safe < true"):
        with pytest.raises(UserError, match="it is true or false"):
            decide(text, column)


def test_lists_fit_if_any_of_their_values_does():
    column = {"labels": pa.array([["cat", "pet"], ["dog"], [], None, ["pet"]], pa.list_(pa.string()))}
    assert decide("labels = pet", column) == (
        [True, False, False, False, True],
        [False, False, False, True, False],
    )
    assert decide("labels not in [cat, dog]", column)[0] == [False, False, True, False, True]
    with pytest.raises(UserError, match="compares lists"):
        decide("labels < cat", column)


def test_derived_columns():
    columns = {
        "width": pa.array([30, 10, 10, None], pa.uint32()),
        "height": pa.array([10, 30, 10, 10], pa.uint32()),
        "labels": pa.array([["cat", "pet"], [], ["dog"], ["pet"]], pa.list_(pa.string())),
    }
    assert decide("aspect <= 2.9", columns) == ([False, False, True, False], [False, False, False, True])
    assert decide("aspect = 3", columns)[0] == [True, True, False, False]
    assert decide("short_side = 10", columns)[0] == [True, True, True, False]
    assert decide("long_side > 10", columns)[0] == [True, True, False, False]
    assert decide("label in [cat, pet]", columns) == (
        [True, False, False, True],
        [False, True, False, False],
    )
    # A column of that name is what is meant.
    assert decide("aspect = 7", {**columns, "aspect": pa.array([7, 7, 1, 7])})[0] == [True, True, False, True]


def test_sliced_tables_are_decided_row_by_row():
    table = pa.table(
        {"labels": pa.array([["a"], ["b", "c"], [], ["c"]], pa.list_(pa.string())), "n": [1, 2, 3, 4]}
    )
    part = pa.concat_tables([table.slice(1, 2), table.slice(3)])
    assert evaluate(parse("labels = c"), part).fits.tolist() == [True, False, True]
    assert evaluate(parse("label = c"), part).fits.tolist() == [False, False, True]
    assert evaluate(parse("n >= 3"), part).fits.tolist() == [False, True, True]


def test_absent_columns_and_wrong_types():
    assert decide("score > 1", {"n": [1]}) == ([False], [True])
    assert decide("aspect > 1", {"width": [1]}) == ([False], [True])
    with pytest.raises(UserError, match="a number, with 'big'"):
        decide("n > big", {"n": pa.array([1])})
    for text in ("nan", "inf", "1_000", "0x10", "1.2.3", ".", "-", "e5"):
        with pytest.raises(UserError, match="a number, with"):
            decide(f"n = {text}", {"n": pa.array([1.0])})
    with pytest.raises(UserError, match="cannot be compared"):
        decide("sha = ab", {"sha": pa.array([b"ab"])})


def test_conditions_of_no_rows():
    for kind, text in ((pa.int64(), "n > 1"), (pa.string(), "n = a"), (pa.list_(pa.string()), "n = a")):
        verdicts = evaluate(parse(text), pa.table({"n": pa.array([], kind)}))
        assert verdicts.fits.dtype == np.bool_
        assert verdicts.fits.tolist() == verdicts.null.tolist() == []


def test_the_error_names_the_condition_as_typed():
    with pytest.raises(UserError) as error:
        parse("width => 256")
    assert json.loads(json.dumps(str(error.value))).startswith("--where 'width => 256' is not a condition")


def test_numbers_in_texts_compare_with_numbers_as_numbers():
    texts = {"n": pa.array(["10", "9", " 2.5e1", "-1", ".5", "x", "", None, "0x10", "nan", "+7."])}
    assert decide("n > 8", texts)[0] == [True, True, True, *[False] * 8]
    assert decide("n <= 0.5", texts)[0] == [False] * 3 + [True, True] + [False] * 6
    assert decide("n = 10", texts)[0] == [True] + [False] * 10
    assert decide("day >= 2020-01-02", {"day": pa.array(["2020-01-02", "2019-12-31"])})[0] == [True, False]


def test_words_of_the_grammar_are_values_where_values_stand():
    column = {"lang": pa.array(["is", "no", "not", "or", "null", None])}
    assert decide("lang = is", column)[0] == [True, *[False] * 5]
    assert decide("lang in [no, not, Null]", column)[0] == [False, True, True, False, False, False]
    assert decide("lang = or or lang = null", column)[0] == [False] * 3 + [True, True, False]
    assert decide("lang NOT IN (is, 'no') AND lang IS NOT NULL", column)[0] == [False] * 2 + [True] * 3 + [
        False
    ]
    assert decide("'is' = 1", {"is": pa.array([1])})[0] == [True]


def test_quotes_in_quotes_are_doubled_or_escaped():
    column = {"caption": pa.array(["it's", 'a "b"', "c\\d", ""])}
    assert decide("caption = 'it''s'", column)[0] == [True, False, False, False]
    assert decide(r"""caption in ['it\'s', "a ""b\"", '']""", column)[0] == [True, True, False, True]
    for text in (r"caption = 'c\d'", r"caption = 'c\\d'"):
        assert decide(text, column)[0] == [False, False, True, False]


def test_like():
    column = {"caption": pa.array(["a cat", "Cats", "100%", "1000", None])}
    assert decide("caption like '%cat%'", column)[0] == [True, False, False, False, False]
    assert decide("caption ilike 'cat_'", column)[0] == [False, True, False, False, False]
    assert decide("caption not like '%cat%'", column) == (
        [False, True, True, True, False],
        [False] * 4 + [True],
    )
    assert decide(r"caption like '100\%'", column)[0] == [False, False, True, False, False]
    labels = {"labels": pa.array([["cat", "dog"], ["cow"], [], None], pa.list_(pa.string()))}
    assert decide("labels like 'c%t'", labels)[0] == [True, False, False, False]
    assert decide("labels not like 'c%t'", labels)[0] == [False, True, True, False]
    with pytest.raises(UserError, match="is no text"):
        decide("n like '1%'", {"n": pa.array([1])})


@pytest.mark.parametrize(
    "kind",
    [pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "Asia/Tokyo")],
)
def test_dates(kind):
    days = pa.array([None, 0, 86_400 * 365, 86_400 * 19_723], pa.timestamp("s"))  # 1970, 1971, 2024
    column = {
        "taken": days.cast(kind)
        if getattr(kind, "tz", None) is None
        else pa.array(
            [None if day is None else day * 1_000_000 for day in days.cast(pa.int64()).to_pylist()], kind
        )
    }
    assert decide("taken >= 1971-01-01", column) == ([False, False, True, True], [True, False, False, False])
    assert decide("taken = DATE '2024-01-01'", column)[0] == [False, False, False, True]
    assert decide("taken between 1970-01-01 and '1971-01-01 00:00:00'", column)[0] == [
        False,
        True,
        True,
        False,
    ]
    assert decide("taken < 2024-01-01T01:00+02:00", column)[0] == [False, True, True, False]
    assert decide("taken < date '3000-01-01'", column)[0] == [False, True, True, True]
    with pytest.raises(UserError, match="a date, with 'soon'"):
        decide("taken < soon", column)


def test_dates_that_are_text_compare_as_they_are_written():
    column = {"taken": pa.array(["2019-12-31", "2020-06-01T10:00:00", None])}
    assert decide("taken >= date '2020-01-01'", column)[0] == [False, True, False]
    assert decide("not taken between 2019-01-01 and 2019-12-31", column)[0] == [False, True, False]


leaves = st.one_of(
    st.builds("{} {} {}".format, st.sampled_from("ab"), st.sampled_from(sorted(SIGNS)), st.integers(0, 3)),
    st.builds("{} in ({}, 3)".format, st.sampled_from("ab"), st.integers(0, 3)),
    st.builds("{} not in (0, {})".format, st.sampled_from("ab"), st.integers(0, 3)),
    st.builds("{} not between 1 and {}".format, st.sampled_from("ab"), st.integers(0, 3)),
    st.builds("{} is {}null".format, st.sampled_from("ab"), st.sampled_from(["", "not "])),
    st.builds(
        "t {}like '{}'".format, st.sampled_from(["", "not "]), st.sampled_from(["x%", "_y", "%", "xy"])
    ),
)
combined = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds("{} and {}".format, inner, inner),
        st.builds("{} OR {}".format, inner, inner),
        st.builds("not {}".format, inner),
        st.builds("({})".format, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(combined)
def test_combinations_mean_what_they_mean_in_sql(text):
    sides = [None, 0, 1, 2, 3]
    rows = [(a, b, t) for a in sides for b in sides for t in (None, "xy", "zy", "")]
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("pragma case_sensitive_like = on")
        database.execute("create table rows (a, b, t)")
        database.executemany("insert into rows values (?, ?, ?)", rows)
        verdicts = [value for (value,) in database.execute(f"select {text} from rows order by rowid")]
    columns = zip(*rows, strict=True)
    kinds = (pa.int64(), pa.int64(), pa.string())
    table = {name: pa.array(values, kind) for name, values, kind in zip("abt", columns, kinds, strict=True)}
    assert decide(text, table) == ([value == 1 for value in verdicts], [value is None for value in verdicts])


def test_a_column_that_rows_lack_is_null_in_them():
    column = {"n": pa.array([1, 2])}
    assert decide("n = 1 or score > 3", column) == ([True, False], [False, True])
    assert decide("score is null and n = 2", column)[0] == [False, True]
    assert decide("not score > 3", column) == ([False, False], [True, True])
