"""One JSON value of any size, piece by piece: only one of its items is held at a time."""

import json
import re
from collections.abc import Iterator
from typing import Any

# An item that is longer has no end.
_LONGEST_ITEM = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")


class JsonStream:
    """A text that is JSON, read from its beginning on.

    Args:
        pieces: of the text.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def next_character(self, between: re.Pattern[str] = _SPACE) -> str:
        """The next one that is no white space, which stays; "" at the end."""
        while True:
            found = between.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        """Go beyond this character, which is next.

        Raises:
            ValueError: another one is.
        """
        if self.next_character() != character:
            raise ValueError(f"it has no {character} where one must be")
        self._at += 1

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            ValueError: there is none, or it is too long.
            RecursionError: it is nested too deep.
        """
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if len(self._text) - self._at >= _LONGEST_ITEM or not self._read_on():
                    raise
                continue
            # A number may go on.
            if end < len(self._text) or not self._read_on():
                self._at = end
                return value

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here, to its end; commas too many, or none, are let pass.

        Raises:
            ValueError, RecursionError: as of `value`.
        """
        self.take("[")
        while self.next_character(_BETWEEN) != "]":
            yield self.value()
        self._at += 1

    def members(self) -> Iterator[str]:
        """The names in the object that begins here; the value of each is to be read before the next name.

        Raises:
            ValueError, RecursionError: as of `value`.
        """
        self.take("{")
        while self.next_character(_BETWEEN) != "}":
            name = self.value()
            self.take(":")
            yield str(name)
        self._at += 1

    def _read_on(self) -> bool:
        piece = next(self._pieces, "")
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
