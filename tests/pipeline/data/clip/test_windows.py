"""Which moments are drawn: always inside what there is, and the pictures near their sound."""

import numpy as np
from hypothesis import given
from hypothesis.strategies import floats

from pipeline.data.clip.windows import Span, clip_begin, evenly_spaced_begins, frame_times, sound_begin

BEGINS = floats(-3, 40)
LENGTHS = floats(0.05, 20)
DRAWS = floats(1e-6, 1 - 1e-6)


@given(
    begin=BEGINS,
    length=LENGTHS,
    heard=floats(0.1, 5),
    seen=floats(0.1, 5),
    offset=floats(0, 1),
    u=DRAWS,
    v=DRAWS,
)
def test_windows_lie_within_the_span_and_near_each_other(
    begin: float, length: float, heard: float, seen: float, offset: float, u: float, v: float
) -> None:
    span = Span(begin, begin + length)
    sound = sound_begin(span, heard, u)
    clip = clip_begin(span, seen, v, sound=Span(sound, sound + heard), offset=offset)
    for first, seconds in ((sound, heard), (clip, seen)):
        assert first >= span.begin - 1e-9
        assert first + seconds <= span.end + 1e-9 or (first == span.begin and seconds >= length - 1e-9)
    if seen <= min(heard, length):
        assert sound - offset - 1e-9 <= clip <= min(sound + heard, span.end) + offset - seen + 1e-9


def test_draws_reach_both_ends() -> None:
    span, sound = Span(1.0, 11.0), Span(4.0, 6.0)
    assert [sound_begin(span, 2.0, u) for u in (0.0, 1.0)] == [1.0, 9.0]
    assert [clip_begin(span, 0.5, u, sound=sound, offset=0.5) for u in (0.0, 1.0)] == [3.5, 6.0]
    assert [clip_begin(span, 0.5, u, sound=None, offset=0.5) for u in (0.0, 1.0)] == [1.0, 10.5]


@given(begin=BEGINS, length=LENGTHS, fps=floats(1, 60), u=DRAWS)
def test_pictures_are_looked_at_within_the_span(begin: float, length: float, fps: float, u: float) -> None:
    span = Span(begin, begin + length)
    times = frame_times(span, clip_begin(span, 8 / fps, u, sound=None, offset=0), frames=8, fps=fps)
    assert times.shape == (8,)
    assert np.all((times >= span.begin - 1e-9) & (times <= span.end + 1e-9))


def test_evenly_spaced_windows_cover_a_video() -> None:
    span = Span(1.0, 5.0)
    assert evenly_spaced_begins(span, 1.0, 4).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert evenly_spaced_begins(span, 1.0, 1).tolist() == [2.5]
    assert evenly_spaced_begins(span, 9.0, 3).tolist() == [1.0, 1.0, 1.0]
