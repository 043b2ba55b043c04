"""Words as they are compared: what a text and WordNet's nouns have in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+")
# A hashtag; a word; or what ends a phrase, which a blank, a hyphen or an underscore does not.
_PIECE = re.compile(r"#(\w+)|([^\W_]+)|([^\s\w-])")
_APOSTROPHES = str.maketrans("", "", "'’ʼ")
# Those that WordNet knows as nouns, too: the can, the back, and the doe that "does" would be the plural of.
_FUNCTION_WORDS = """
    a about above across after against all along am among an and any are around as at back be been before
    behind below beside between beyond both but by can could did do does doing down each few for from had
    has have having he her here hers him his how i if in inside into is it its just like may me might mine
    more most must my near next no nor not now of off on once one only or other our ours out outside over
    own past round same see she should so some still such than that the their theirs them then there these
    they this those through to too under until up upon us very was we well were what when where which while
    who whom why will with within without would you your yours
"""
_HOLDING_TOGETHER = frozenset(_FUNCTION_WORDS.split())


def words(text: str) -> list[str]:
    """Its words in Unicode's compatibility form and lower case, without apostrophes."""
    return _WORD.findall(_normal(text))


def phrases(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Words that may belong together, and whether they are a hashtag."""
    phrase: list[str] = []
    for hashtag, word, _ in _PIECE.findall(_normal(text)):
        if word:
            phrase.append(word)
            continue
        if phrase:
            yield False, phrase
            phrase = []
        if hashtag:
            yield True, _WORD.findall(hashtag)
    if phrase:
        yield False, phrase


def is_function_word(word: str) -> bool:
    """Whether a word of a sentence holds it together, and names nothing."""
    return word in _HOLDING_TOGETHER


def _normal(text: str) -> str:
    # Twice: lower case may take a character apart.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(_APOSTROPHES)
