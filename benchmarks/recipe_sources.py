"""Claim: a recipe that names a source equals it key by key, or its header says where it does not.

    python benchmarks/recipe_sources.py [RECIPE ...]

For each recipe of configs/pretrain/, or those named, a table in Markdown of every key but those of `run`: our
value, the source's, and the file and line where it is set, from benchmarks/recipe_sources.yaml; then what
differs and is no key. Ends with 1 if a recipe differs in what its header does not list; a test holds it, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any

from cluster.typed_yaml import find_recipe, load_recipe, read_yaml
from pipeline.recipe.pretrain import PretrainRecipe

SOURCES_FILE = Path(__file__).with_suffix(".yaml")
SOURCES = read_yaml(SOURCES_FILE)
LISTED = "Differs from the source:"


@dataclass(frozen=True)
class Row:
    """One key; `where` is None if no source has it, and `theirs` then says what it is."""

    key: str
    ours: Any
    theirs: Any
    where: str | None

    @property
    def differs(self) -> bool:
        return self.where is not None and self.ours != self.theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=list(SOURCES["recipes"]))
    names = parser.parse_args().recipes
    if unknown := set(names) - set(SOURCES["recipes"]):
        parser.error(f"no sources are noted for {', '.join(sorted(unknown))}: see {SOURCES_FILE}")
    for name in names:
        print(f"## {name}\n\n| key | ours | source | where |\n|---|---|---|---|")
        for row in rows(name):
            mark = "**" if row.differs else ""
            print(f"| {row.key} | {mark}{row.ours}{mark} | {row.theirs} | {row.where or ''} |")
        print(*(f"\n- {words}: {where}" for words, where in besides(name)), "\n")
    found = [problem for name in names for problem in problems(name)]
    print(*found, sep="\n", file=sys.stderr)
    sys.exit(bool(found))


def rows(name: str) -> Iterator[Row]:
    """Every key of a recipe beside its source's.

    Raises:
        KeyError: if neither a source has a key, nor `ours` says what it is.
    """
    values = load_recipe(PretrainRecipe, name, kind="pretrain").model_dump(mode="json", exclude={"run"})
    blocks = [SOURCES["blocks"][block] for block in reversed(SOURCES["recipes"][name]["blocks"])]
    for key, ours in flat(values):
        theirs = (
            (said, block["repository"])
            for block in blocks
            for pattern, said in block.get("keys", {}).items()
            if fnmatchcase(key, pattern)
        )
        if found := next(theirs, None):
            (value, where), repository = found
            yield Row(key, ours, value, place(repository, where))
        else:
            yield Row(key, ours, SOURCES["ours"][key] if blocks else "", None)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a list of numbers is a value."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): part for index, part in enumerate(value)}
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from flat(part, f"{key}.{name}" if key else name)


def place(repository: str, where: str | None) -> str:
    """A file and line for people, with the commit at which it was read."""
    if where is None:
        return "of no meaning there"
    file = where.partition(":")[0]
    return f"{repository} {where} @{SOURCES['repositories'][repository][file]}"


def besides(name: str) -> list[tuple[str, str]]:
    """What differs and is no key: the words of the header, and where it is in the source."""
    blocks = map(SOURCES["blocks"].get, SOURCES["recipes"][name]["blocks"])
    return [
        (words, place(block["repository"], where))
        for block in blocks
        for words, where in block.get("besides", ())
    ]


def listed(name: str) -> str:
    """What a recipe's header lists as differences, and what its base's lists, if it says "as BASE does"."""
    path = find_recipe(name, kind="pretrain")
    header = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in header).partition(LISTED)[2]
    base = read_yaml(path).get("base")
    return f"{text} {listed(base)}" if base is not None and f"as {base} does" in text else text


def problems(name: str) -> list[str]:
    """In what a recipe and its header are not what its source is."""
    text, words = listed(name), SOURCES["recipes"][name].get("differs", {})
    found = [] if text else [f"{name}: its header has no '{LISTED}'"]
    differing = {row.key for row in rows(name) if row.differs}
    found += [f"{name}: {key} is another in the source, and not listed" for key in differing - set(words)]
    found += [f"{name}: {key} is the source's, and listed as another" for key in set(words) - differing]
    said = [*words.values(), *(each for each, _ in besides(name))]
    return found + [f"{name}: its header does not say {each!r}" for each in said if each not in text]


if __name__ == "__main__":
    main()
