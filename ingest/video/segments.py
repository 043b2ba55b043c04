"""Which parts of a video become clips: a function of its length, so that all are known before any is cut."""

from typing import NamedTuple

# A clip may be longer than asked for by so much, seconds: what is left over at a video's end is no clip of
# its own, and cuts are made at keyframes only.
SLACK = 2.0


class Span(NamedTuple):
    """A part of a video, in seconds from its beginning."""

    start: float
    end: float

    @property
    def fragment(self) -> str:
        """As the fragment of an address says it, to a millisecond: t=10,20.5."""
        return "t=" + ",".join(f"{moment:.3f}".rstrip("0").rstrip(".") for moment in self)


def segments(seconds: float, longest: float, *, start: float = 0.0) -> list[Span] | None:
    """The spans of a video, or of a part of one, that follow each other without a gap.

    Args:
        seconds: of it.
        longest: of a span; the last one may be longer by SLACK.
        start: where it begins.

    Returns:
        None if it is one clip as it is.
    """
    if seconds <= longest + SLACK:
        return None
    count = max(1, -int(-(seconds - SLACK) // longest))
    starts = [start + number * longest for number in range(count)]
    return [Span(a, b) for a, b in zip(starts, [*starts[1:], start + seconds], strict=True)]
