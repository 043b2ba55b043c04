"""Makes the package's file of nouns from WordNet 3.0's database, such as Debian's wordnet-base.

python -m pipeline.hashtags.pack_wordnet /usr/share/wordnet
"""

from __future__ import annotations

import lzma
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipeline.hashtags.wordnet import PACKED
from pipeline.hashtags.words import words


def packed(folder: Path) -> bytes:
    """The file's bytes, see `pipeline.hashtags.wordnet`."""
    order, files = _synsets(folder / "data.noun")
    nouns: dict[int, list[str]] = defaultdict(list)
    for noun, offset in _first_senses(folder / "index.noun").items():
        nouns[offset].append(noun)
    lines = [
        f"{offset:08d} {files[offset]:02d} {' '.join(sorted(there, key=order[offset].index))}"
        for offset, there in sorted(nouns.items())
    ]
    irregular = dict(_irregular(folder / "noun.exc"))
    lines += ["", *(f"{plural} {' '.join(irregular[plural])}" for plural in sorted(irregular))]
    return lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME)


def _entries(path: Path) -> Iterator[list[str]]:
    """The fields of each line, but for the licence at the head."""
    for line in path.read_text().splitlines():
        if not line.startswith("  "):
            yield line.split()


def _noun(written: str) -> str:
    return "_".join(words(written))


def _synsets(path: Path) -> tuple[dict[int, list[str]], dict[int, int]]:
    """Of each offset its nouns in WordNet's order, and the number of its file."""
    order, files = {}, {}
    for offset, file, _, count, *rest in _entries(path):
        order[int(offset)] = [_noun(written) for written in rest[: 2 * int(count, 16) : 2]]
        files[int(offset)] = int(file)
    return order, files


def _first_senses(path: Path) -> dict[str, int]:
    """The offset of each noun's first sense."""
    found: dict[str, int] = {}
    # Of two that differ in apostrophes or dots only, the one without.
    for entry in sorted(_entries(path), key=lambda entry: _noun(entry[0]) != entry[0]):
        senses, noun = int(entry[2]), _noun(entry[0])
        if noun:
            found.setdefault(noun, int(entry[-senses]))
    return found


def _irregular(path: Path) -> Iterator[tuple[str, list[str]]]:
    for plural, *singulars in _entries(path):
        yield _noun(plural), [_noun(singular) for singular in singulars]


if __name__ == "__main__":
    PACKED.write_bytes(packed(Path(sys.argv[1])))
