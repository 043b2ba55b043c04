"""A text file in blocks of whole lines, as UTF-8, however it was written and packed."""

import codecs
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# Opens a list, unpacked, from its beginning.
Opened = Callable[[], AbstractContextManager[Any]]
BLOCK_BYTES = 8 << 20
# A line longer than this is none of a list; longer ones would be held in memory.
_LONGEST_LINE = 64 << 20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like the mark of UTF-16
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class LongLineError(ValueError):
    """A line that has no end."""

    def __init__(self) -> None:
        super().__init__(f"it has a line of more than {_LONGEST_LINE >> 20} MB")


def blocks(opened: Opened) -> Iterator[bytes]:
    """The text from its beginning: pieces that end where a line ends, and the rest; none is empty.

    UTF-16 is told by its byte order mark, or by the NUL beside its first letter. What is no UTF-8 stays as it
    is. The mark is left out.

    Raises:
        LongLineError: there is one.
    """
    rest = b""
    for piece in pieces(opened):
        end = max(piece.rfind(b"\n"), piece.rfind(b"\r", 0, -1)) + 1
        if not end:
            rest += piece
            if len(rest) > _LONGEST_LINE:
                raise LongLineError
            continue
        yield rest + piece[:end]
        rest = piece[end:]
    if rest:
        yield rest


def pieces(opened: Opened) -> Iterator[bytes]:
    """The text in pieces that end anywhere; else as `blocks`."""
    with opened() as file:
        yield from _as_utf8(file)


def encoding_of(beginning: bytes) -> str:
    """How a text is written, by its byte order mark, or the NUL beside its first letter: a codec that leaves
    the mark out.
    """
    for mark, name in _MARKS:
        if beginning.startswith(mark):
            return name
    if b"\0" in beginning[:2]:
        return "utf-16-le" if beginning[1:2] == b"\0" else "utf-16-be"
    return "utf-8"


def _as_utf8(file: Any) -> Iterator[bytes]:
    beginning = file.read(BLOCK_BYTES)
    encoding = encoding_of(beginning)
    if encoding.startswith("utf-8"):
        beginning = beginning.removeprefix(codecs.BOM_UTF8)
        while beginning:
            yield beginning
            beginning = file.read(BLOCK_BYTES)
        return
    decoder = codecs.getincrementaldecoder(encoding)("backslashreplace")
    while beginning:
        yield decoder.decode(beginning).encode("utf-8", "backslashreplace")
        beginning = file.read(BLOCK_BYTES)
    yield decoder.decode(b"", final=True).encode("utf-8", "backslashreplace")
