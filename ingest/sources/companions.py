"""WebDataset's convention, for tars and folders: members that follow each other under one key are one sample.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ingest.sources.column_values import split_labels
from ingest.sources.source import Item

COMPANIONS = (b"txt", b"caption", b"cls", b"label", b"json")
# What a companion may say; the rest of a longer one is not read.
LARGEST_COMPANION = 1 << 16
COLUMNS = pa.schema([pa.field("source_url", pa.string()), pa.field("json", pa.string())])
_CAPTION_NAMES = ("caption", "text", "alt")
_LABEL_NAMES = ("labels", "label", "hashtags")
# Real samples have a handful of members, and tens of labels: those beyond these are left out.
_LARGEST_SAMPLE = 64
MOST_LABELS = 1_000


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        item: it as an attempt.
        key: what it shares with the other members of its sample.
        kind: what it is, in lower case: the part of its name behind the first dot.
        text: of a companion: its first bytes, up to LARGEST_COMPANION; None for all others.
    """

    item: Item
    key: bytes
    kind: bytes
    text: bytes | None


def member_of(item: Item, beginning: Callable[[Item], bytes | None]) -> Member:
    """A member; `beginning` is called for what may be a companion, and gives None if it cannot be read."""
    folder, slash, name = item.path.rpartition(b"/")
    key, _, kind = name.partition(b".")
    kind = kind.lower()
    text = beginning(item) if kind in COMPANIONS and not item.problem else None
    return Member(item, folder + slash + key, kind, text)


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
    return (
        len(sample) < _LARGEST_SAMPLE
        and member.key == sample[0].key
        and all(member.kind != other.kind for other in sample)
    )


def _attempts(sample: list[Member]) -> Iterator[Item]:
    companions = {member.kind: member.text for member in sample if member.text is not None}
    others = [member.item for member in sample if member.text is None]
    if not companions or not others:
        yield from (member.item for member in sample)
        return
    said = _said(companions)
    for item in others:
        # What a folder's metadata says stays where companions are silent.
        yield replace(
            item,
            caption=said["caption"] or item.caption,
            labels=said["labels"] or item.labels,
            extra={**item.extra, **said["extra"]},
        )


def _said(companions: dict[bytes, bytes]) -> dict[str, Any]:
    """Caption, labels and further columns of a sample."""
    texts = {kind: _text(data).strip() for kind, data in companions.items() if kind != b"json"}
    caption = texts.get(b"txt") or texts.get(b"caption") or None
    labels = split_labels(texts.get(b"cls") or texts.get(b"label"))
    if b"json" not in companions:
        return {"caption": caption, "labels": tuple(labels[:MOST_LABELS]), "extra": {}}
    original = _text(companions[b"json"])
    rest = _object(companions[b"json"])
    if rest is None:
        return {"caption": caption, "labels": tuple(labels[:MOST_LABELS]), "extra": {"json": original}}
    return said_by(rest, caption=caption, labels=labels, original=original)


def said_by(
    rest: dict[str, Any], *, caption: str | None = None, labels: Sequence[str] = (), original: str = ""
) -> dict[str, Any]:
    """Caption, labels and further columns of a sample, of which a JSON object says what is not known.

    Args:
        rest: the object; what is taken is removed.
        caption, labels: that are known.
        original: the object's text, for what cannot be spelled again.
    """
    extra: dict[str, str] = {}
    caption = _take_caption(rest, caption)
    labels = labels or _take_labels(rest)
    if isinstance(rest.get("url"), str):
        extra["source_url"] = _sound(rest.pop("url"))
    if rest:
        extra["json"] = _spelled(rest) or original
    return {"caption": caption, "labels": tuple(labels[:MOST_LABELS]), "extra": extra}


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
            if isinstance(value, str):
                return split_labels(_sound(value))
            return [_sound(str(each)) for each in values[:MOST_LABELS]]
    return []


def _text(data: bytes) -> str:
    """Bytes that are no text show as \\x escapes; a character that the end cuts in two is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    return decoder.decode(data, final=len(data) < LARGEST_COMPANION)[:LARGEST_COMPANION]


def _sound(text: str) -> str:
    """Halves of characters, which JSON can spell and no file can hold, show as \\u escapes."""
    return text.encode("utf-8", "backslashreplace").decode()[:LARGEST_COMPANION]
