"""WebDataset's convention for tars: members that follow each other under one key are one sample.

The key is the path up to the first dot of its last part; what follows says what the member is. Texts, labels
and JSON are companions of the sample's other members: they are no attempts, but say something of them.

.txt, .caption    the caption
.cls, .label      the labels
.json             if not told otherwise, the caption ("caption", "text", "alt") and the labels ("labels",
                  "label", "hashtags"); where the image came from ("url"); and the rest as it is

Members under one key that do not follow each other are not joined: that would take the memory that a stranger
wants it to take.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ingest.sources.source import Item
from ingest.sources.urls import split_labels

COMPANIONS = ("txt", "caption", "cls", "label", "json")
# What a companion may say; the rest of a longer one is not read.
LARGEST_COMPANION = 1 << 16
COLUMNS = pa.schema([pa.field("source_url", pa.string()), pa.field("json", pa.string())])
_CAPTION_NAMES = ("caption", "text", "alt")
_LABEL_NAMES = ("labels", "label", "hashtags")
# Real samples have a handful of members.
_LARGEST_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        item: it as an attempt.
        text: of a companion: its first bytes, up to LARGEST_COMPANION; None for all others.
    """

    item: Item
    text: bytes | None = None


def kind_of(path: bytes) -> str:
    """What a member is, in lower case: the part of its name behind the first dot."""
    return _text(path.rpartition(b"/")[2].partition(b".")[2]).lower()


def joined(members: Iterable[Member]) -> Iterator[Item]:
    """The attempts among these members, with what their companions say.

    Companions of nothing are attempts, too: then nobody can say that they are none.
    """
    sample: list[Member] = []
    for member in members:
        if sample and not _continues(sample, member):
            yield from _attempts(sample)
            sample = []
        sample.append(member)
    yield from _attempts(sample)


def _continues(sample: list[Member], member: Member) -> bool:
    """A name that comes a second time begins another sample."""
    path = member.item.path
    return (
        len(sample) < _LARGEST_SAMPLE
        and _key(path) == _key(sample[0].item.path)
        and all(kind_of(other.item.path) != kind_of(path) for other in sample)
    )


def _key(path: bytes) -> bytes:
    folder, slash, name = path.rpartition(b"/")
    return folder + slash + name.partition(b".")[0]


def _attempts(sample: list[Member]) -> Iterator[Item]:
    companions = {kind_of(m.item.path): m.text for m in sample if m.text is not None}
    others = [member.item for member in sample if member.text is None]
    if not companions or not others:
        yield from (member.item for member in sample)
        return
    said = _said(companions)
    for item in others:
        yield replace(item, **said | {"labels": said["labels"] or item.labels})


def _said(companions: dict[str, bytes]) -> dict[str, Any]:
    """Caption, labels and further columns of a sample."""
    texts = {kind: _text(data).strip() for kind, data in companions.items() if kind != "json"}
    caption = texts.get("txt") or texts.get("caption") or None
    labels = split_labels(texts.get("cls") or texts.get("label"))
    extra: dict[str, str] = {}
    if "json" in companions:
        rest = _object(companions["json"])
        if rest is None:
            extra["json"] = _text(companions["json"])
        else:
            caption = _take_caption(rest, caption)
            labels = labels or _take_labels(rest)
            if isinstance(rest.get("url"), str):
                extra["source_url"] = _sound(rest.pop("url"))
            if rest:
                extra["json"] = _spelled(rest) or _text(companions["json"])
    return {"caption": caption, "labels": tuple(labels), "extra": extra}


def _object(data: bytes) -> dict[str, Any] | None:
    """A JSON object; None if it is something else, or too long to have been read to its end."""
    try:
        value = json.loads(data, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _spelled(rest: dict[str, Any]) -> str | None:
    """JSON again; None if it is nested too deep for that."""
    try:
        return _sound(json.dumps(rest, ensure_ascii=False, sort_keys=True))
    except RecursionError:
        return None


def _take_caption(rest: dict[str, Any], known: str | None) -> str | None:
    """The caption; one that says the same again is taken away as well."""
    for name in _CAPTION_NAMES:
        value = rest.get(name)
        if isinstance(value, str) and (found := _sound(value).strip()) and known in (None, found):
            known = found
            del rest[name]
    return known


def _take_labels(rest: dict[str, Any]) -> list[str]:
    for name in _LABEL_NAMES:
        value = rest.get(name)
        values = value if isinstance(value, list) else [value]
        if all(isinstance(each, (str, int)) and each != "" for each in values) and values:
            del rest[name]
            return split_labels(_sound(value)) if isinstance(value, str) else [_sound(str(v)) for v in values]
    return []


def _text(data: bytes) -> str:
    """Bytes that are no text show as \\x escapes; a character that the end cuts in two is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    return decoder.decode(data, final=len(data) < LARGEST_COMPANION)[:LARGEST_COMPANION]


def _sound(text: str) -> str:
    """Halves of characters, which JSON can spell and no file can hold, show as \\u escapes."""
    return text.encode("utf-8", "backslashreplace").decode()[:LARGEST_COMPANION]
