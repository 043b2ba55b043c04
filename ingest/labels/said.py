"""What is said of an image: its labels, its split, and which labels are to be ignored."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Said:
    """What a rule or a list says of an image.

    Attributes:
        labels: what it shows.
        split: which part of the data set it belongs to.
        ignore: labels that an evaluation must count neither as right nor as wrong of it.
    """

    labels: tuple[str, ...] = ()
    split: str | None = None
    ignore: tuple[str, ...] = ()


NOTHING = Said()


def joined(first: Said, second: Said) -> Said | None:
    """Both together, each label once; None if they name different splits."""
    if None not in (first.split, second.split) and first.split != second.split:
        return None
    return Said(
        labels=_each_once((*first.labels, *second.labels)),
        split=first.split or second.split,
        ignore=_each_once((*first.ignore, *second.ignore)),
    )


def _each_once(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(labels))
