"""WordNet's nouns: what each means first, and what kind of thing that is.

`wordnet-nouns.txt.xz` has what is needed of WordNet 3.0 (see WORDNET-LICENSE.txt), as
`python -m pipeline.hashtags.pack_wordnet` makes it: a line for each synset that is the first sense of a noun,
"OFFSET FILE NOUN NOUN …", with the number of its lexicographer file; after an empty line, irregular plurals,
"PLURAL SINGULAR …". Words of a noun are joined by underscores.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import get_args

from pipeline.recipe.stages import NounKind

PACKED = Path(__file__).with_name("wordnet-nouns.txt.xz")
# The number of the first of FILES.
FIRST_FILE = 3
FILES: tuple[NounKind, ...] = get_args(NounKind)
# Morphy's rules for nouns (https://wordnet.princeton.edu/documentation/morphy7wn).
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)


@dataclass(frozen=True, kw_only=True)
class Synset:
    """Nouns that mean the same, and mean this first.

    Attributes:
        name: "n" and WordNet 3.0's offset, eight digits, as ImageNet names its classes.
        file: the kind of thing, one of FILES.
        nouns: words separated by blanks; the first is the one that WordNet names first.
    """

    name: str
    file: NounKind
    nouns: tuple[str, ...]


class Nouns:
    """WordNet's nouns, by what people write."""

    def __init__(self, text: str) -> None:
        lines = iter(text.splitlines())
        self._of: dict[str, Synset] = {}
        for line in takewhile(bool, lines):
            offset, file, *nouns = _blanks(line.split())
            synset = Synset(name=f"n{offset}", file=FILES[int(file) - FIRST_FILE], nouns=tuple(nouns))
            self._of |= dict.fromkeys(nouns, synset)
        self._irregular: dict[str, tuple[str, ...]] = {}
        for line in lines:
            plural, *singulars = _blanks(line.split())
            self._irregular[plural] = tuple(singulars)
        # Of two that are the same when they are joined, the first.
        several = [noun for noun in self._of if " " in noun]
        self._joined = {noun.replace(" ", ""): self._of[noun] for noun in reversed(several)}

    def synsets(self) -> Iterator[Synset]:
        """All, in WordNet's order."""
        return iter(dict.fromkeys(self._of.values()))

    def find(self, noun: str, *, joined: bool = False) -> Synset | None:
        """What a noun, singular or plural, means first; None if it is none.

        Args:
            noun: words separated by blanks, see `words`.
            joined: whether it may be several words without the blanks, as in a hashtag.
        """
        forms = [noun, *self._irregular.get(noun, ()), *_singulars(noun)]
        tables = (self._of, self._joined) if joined else (self._of,)
        return next((table[form] for table in tables for form in forms if form in table), None)


@lru_cache(maxsize=1)
def wordnet() -> Nouns:
    """Those in the package: 0.3 s and 60 MB, once in a process."""
    return Nouns(lzma.decompress(PACKED.read_bytes()).decode())


def _blanks(nouns: list[str]) -> list[str]:
    return [noun.replace("_", " ") for noun in nouns]


def _singulars(noun: str) -> Iterator[str]:
    if len(noun) <= 2 or noun.endswith("ss"):
        return
    for ending, instead in _ENDINGS:
        if noun.endswith(ending):
            yield noun.removesuffix(ending) + instead
