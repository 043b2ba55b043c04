"""Which moments of a video are shown: pure arithmetic on drawn numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """From `begin` until `end`, in seconds of the file's own time; empty if they are the wrong way round."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length; negative if it is empty."""
        return self.end - self.begin

    def within(self, other: Span) -> Span:
        """What both have."""
        return Span(max(self.begin, other.begin), min(self.end, other.end))

    def clamp(self, begin: float, seconds: float) -> float:
        """The nearest begin of so many seconds that lie inside; `begin` of the span if it is shorter."""
        return max(self.begin, min(begin, self.end - seconds))


def sound_begin(span: Span, seconds: float, draw: float) -> float:
    """Where so many seconds of sound begin, uniform in the span; where it begins, if it is shorter."""
    return span.begin + draw * max(0.0, span.seconds - seconds)


def clip_begin(span: Span, seconds: float, draw: float, *, sound: Span | None, offset: float) -> float:
    """Where so many seconds of pictures begin.

    Args:
        span: they lie within it, if it is long enough.
        draw: uniform in (0, 1).
        sound: where there is some, they lie within it, too, but for `offset` seconds to either side.
    """
    around = span if sound is None else span.within(Span(sound.begin - offset, sound.end + offset))
    if around.seconds < seconds:
        return span.clamp((around.begin + around.end - seconds) / 2, seconds)
    return around.begin + draw * (around.seconds - seconds)


def frame_times(span: Span, begin: float, *, frames: int, fps: float) -> NDArray[np.float64]:
    """(frames,) seconds of the file's time at which pictures are looked at; a shorter span is repeated."""
    times = begin + np.arange(frames) / fps
    if frames / fps <= span.seconds:
        return times
    return span.begin + (times - span.begin) % span.seconds


def evenly_spaced_begins(span: Span, seconds: float, count: int) -> NDArray[np.float64]:
    """(count,) begins of windows from the span's first to its last; the one in the middle if `count` is 1."""
    room = max(0.0, span.seconds - seconds)
    return span.begin + room * (np.array([0.5]) if count == 1 else np.linspace(0.0, 1.0, count))
