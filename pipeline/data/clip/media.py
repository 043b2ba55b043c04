"""A video's packets, taken from the file's bytes all at once: what is decoded of them is chosen by their
times.

No seeking: formats seek differently, and some to other packets than were asked for. Passing over the packets
of a clip of seconds costs a twentieth of decoding a few of its frames, and tells what spans its streams have,
whatever its header says. So what is cut depends on the bytes and the drawn numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ingest.video.container import MediaError, open_media, pyav, streams_of
from pipeline.data.clip.windows import Span
from pipeline.data.reader import BadSampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream

# Of minutes; a clip of ten seconds has a thousand.
_MOST_PACKETS = 1 << 17


@dataclass(frozen=True, eq=False)
class Track:
    """One stream of a file.

    Attributes:
        stream: PyAV's.
        packets: in the order in which they are decoded.
        times: (n,) int64, when what is in each packet is presented, in the stream's units.
        unit: seconds.
        span: in which it has something to show.
    """

    stream: Any
    packets: list[Any]
    times: NDArray[np.int64]
    unit: float
    span: Span


@dataclass(frozen=True, eq=False)
class Media:
    """The streams that were asked for, and the span in which all of them have something."""

    video: Track | None
    audio: Track | None
    span: Span


@contextmanager
def opened(data: bytes, *, video: bool, audio: bool) -> Iterator[Media]:
    """The first stream of each kind that is asked for, of a file.

    Raises:
        BadSampleError: also from what is done within: there is no picture, or no sound though it is asked
            for; a codec is none of those that are allowed, or the file is damaged; or the streams have no
            moment in common.
        UserError: PyAV is not installed.
    """
    av = pyav()
    try:
        with open_media(data) as container:
            yield _read(container, video=video, audio=audio)
    except (MediaError, av.FFmpegError) as error:
        raise BadSampleError(f"no clip can be taken from it: {error}") from error


def _read(container: InputContainer, *, video: bool, audio: bool) -> Media:
    found = streams_of(container)
    if audio and found.audio is None:
        raise BadSampleError("it has no sound")
    wanted = ((found.video, video), (found.audio, audio))
    streams: list[Stream] = [stream for stream, asked in wanted if stream is not None and asked]
    packets: dict[int, list[Any]] = {stream.index: [] for stream in streams}
    for number, packet in enumerate(container.demux(streams)):
        if number == _MOST_PACKETS:
            raise BadSampleError(f"it has more than {_MOST_PACKETS} packets")
        if packet.size:
            packets[packet.stream.index].append(packet)
    tracks = [_track(stream, packets[stream.index]) for stream in streams]
    span = tracks[0].span
    for track in tracks[1:]:
        span = span.within(track.span)
    if span.seconds <= 0:
        raise BadSampleError("its picture and its sound have no moment in common")
    return Media(video=tracks[0] if video else None, audio=tracks[-1] if audio else None, span=span)


def _track(stream: Stream, packets: list[Any]) -> Track:
    if not packets or not stream.time_base:
        raise BadSampleError(f"its {stream.type} has no packets")
    unit = float(stream.time_base)
    times = _times(packets)
    shown = np.array([not packet.is_discard for packet in packets])
    if not shown.any():
        raise BadSampleError(f"its {stream.type} shows nothing")
    lasting = np.array([packet.duration or 0 for packet in packets], np.int64)
    begin = int(times[shown].min())
    if stream.type == "audio" and stream.start_time is not None:
        begin = max(begin, stream.start_time)  # before it lies what the decoder needs, and drops
    return Track(
        stream=stream,
        packets=packets,
        times=times,
        unit=unit,
        span=Span(begin * unit, float((times + lasting)[shown].max()) * unit),
    )


def _times(packets: list[Any]) -> NDArray[np.int64]:
    """When each is presented; if it does not say, when it is decoded, or when the one before it is."""
    times = np.zeros(len(packets), np.int64)
    last = 0
    for number, packet in enumerate(packets):
        said = packet.dts if packet.pts is None else packet.pts
        times[number] = last = last if said is None else said
    return times
