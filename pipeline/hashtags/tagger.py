"""From what people write about a picture to what may be seen on it: synsets of WordNet's nouns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pipeline.hashtags.wordnet import Nouns, Synset
from pipeline.hashtags.words import is_function_word, phrases
from pipeline.recipe.stages import NounKind

_LONGEST = 3


class Tagger:
    """Finds nouns, the longest first, each in its first sense.

    Args:
        nouns: those that are known.
        files: kinds of things that become tags; a noun of another kind is passed over with all its words.
    """

    def __init__(self, nouns: Nouns, files: Collection[NounKind]) -> None:
        self._nouns = nouns
        self._files = frozenset(files)

    def of_caption(self, text: str) -> dict[str, Synset]:
        """The synsets that a sentence names, by their names, in their order; it may have hashtags."""
        return self._kept(self._found(text, labels=False))

    def of_label(self, text: str) -> dict[str, Synset]:
        """The same of a label or hashtag, which may be several words in one, and has no function words."""
        return self._kept(self._found(text, labels=True))

    def _kept(self, found: Iterator[Synset]) -> dict[str, Synset]:
        return {synset.name: synset for synset in found if synset.file in self._files}

    def _found(self, text: str, *, labels: bool) -> Iterator[Synset]:
        for hashtag, phrase in phrases(text):
            yield from self._in_phrase(phrase, label=labels or hashtag)

    def _in_phrase(self, phrase: Sequence[str], *, label: bool) -> Iterator[Synset]:
        start = 0
        while start < len(phrase):
            for length in range(min(_LONGEST, len(phrase) - start), 0, -1):
                noun = " ".join(phrase[start : start + length])
                if length == 1 and not label and is_function_word(noun):
                    continue
                synset = self._nouns.find(noun, joined=label and length == 1)
                if synset is not None:
                    yield synset
                    break
            start += length
