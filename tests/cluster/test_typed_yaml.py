"""YAML that anybody may have written: whatever it says, it is one sentence, soon, in little memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.typed_yaml import MOST_BYTES, MOST_LEVELS, MOST_VALUES, apply_override, read_yaml


def laughs(levels: int, *, merged: bool = False) -> str:
    """Each level holds the one before it nine times over."""
    lines = ["l0: &l0 {k: v}"]
    for level in range(1, levels):
        again = ", ".join([f"*l{level - 1}"] * 9)
        lines.append(f"l{level}: &l{level} " + (f"{{<<: [{again}]}}" if merged else f"[{again}]"))
    return "\n".join(lines)


HOSTILE = {
    "a billion laughs": (laughs(10), "values, aliases written out"),
    "a billion merges": (laughs(10, merged=True), "values, aliases written out"),
    "lists in lists": ("x: " + "[" * 50_000, "levels deep"),
    "mappings in mappings": ("{a: " * 50_000, "levels deep"),
    "dashes": ("- " * 50_000, "levels deep"),
    "aliases in aliases": (
        "\n".join(["l0: &l0 [1]", *(f"l{n}: &l{n} [*l{n - 1}]" for n in range(1, 200))]),
        "levels deep",
    ),
    "many values": ("x: [" + "1," * (MOST_VALUES + 1) + "]", "values, aliases written out"),
    "many keys": ("\n".join(f"k{n}:" for n in range(MOST_VALUES)), "values, aliases written out"),
    "a long text": ("x: " + "y" * MOST_BYTES, "it has more than 262,144 bytes"),
    "an alias of itself": ("a: &a {b: [*a]}", "alias inside of what it stands for"),
    "an alias of nothing": ("a: *b", "not valid YAML"),
    "a merge of itself": ("a: &a {<<: *a}", "alias inside of what it stands for"),
    "a day that there is not": ("a: 2026-13-45", "not valid YAML"),
    "a number without end": ("a: " + "9" * 5_000, "not valid YAML"),
    "a function": ("a: !!python/object/apply:os.system [touch pwned]", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "a list": ("[1]", "must hold a mapping"),
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte more than there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", HOSTILE)
def test_S1_hostile_yaml_is_one_sentence(tmp_path: Path, name: str, little_memory: None) -> None:
    text, told = HOSTILE[name]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=told) as raised:
        read_yaml(path)
    assert time.process_time() - began < 10
    assert str(path) in str(raised.value)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("data", [b"a: \xff", b"a: \x00", b"\xff\xfea", b"a: \x1b"])
def test_bytes_that_are_no_text_are_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.yaml is not valid YAML"):
        read_yaml(tmp_path / "x.yaml")


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "gone.yaml", "."):
        with pytest.raises(UserError, match="cannot be read: "):
            read_yaml(tmp_path / name)


def test_an_override_is_bounded_alike() -> None:
    for text in ("[" * 50_000, "2026-13-45", "*a"):
        with pytest.raises(UserError, match="the value of"):
            apply_override({}, f"a={text}")


def test_what_a_recipe_may_need_is_read(tmp_path: Path) -> None:
    deep: object = 1
    for _ in range(MOST_LEVELS - 2):
        deep = [deep]
    (tmp_path / "x.yaml").write_text(f"{laughs(4)}\ndeep: {deep}\nmerged: {{<<: *l0, more: 1}}\n")
    values = read_yaml(tmp_path / "x.yaml")
    assert (values["deep"], values["merged"]) == (deep, {"k": "v", "more": 1})
    assert values["l3"][8][8][8] == {"k": "v"}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a=out/train #3", "out/train #3"),
        ("a=out/a: b", "out/a: b"),
        ("a=#3", "#3"),
        ("a=it's: here", "it's: here"),
        ("a=~/x", str(Path("~/x").expanduser())),
        ("a={b: 1}", {"b": 1}),
        ("a='x # y'", "x # y"),
        ("a=[1, 2] # two", [1, 2]),
        ("a=3", 3),
        ("a=", None),
        ("a=~", None),
    ],
)
def test_a_value_is_yaml_or_the_text_that_stands_there(word: str, value: object) -> None:
    values: dict[str, object] = {}
    apply_override(values, word)
    assert values == {"a": value}
