"""How long a video is, by its headers: a fenced process reads them (`ingest.fence.reader`)."""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from cluster.errors import UserError
from ingest.fence.reading import read_fenced
from ingest.video.container import Streams, open_media, streams_of

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream


def seconds_of(file: io.BufferedIOBase, *, place: str, max_pixels: int) -> float | None:
    """How long there are pictures and sound, as the headers say; None if that cannot be told.

    Args:
        file: a stranger's.
        place: what to call it.
        max_pixels: of a frame.
    """
    try:
        tables = list(read_fenced(read_seconds, [file], {"max_pixels": max_pixels}, place=place))
    except UserError:
        # It has crashed what reads it, or taken too long: who checks it will tell.
        return None
    return tables[0]["seconds"][0].as_py() if tables else None


def read_seconds(
    opened: Callable[[], AbstractContextManager[io.BufferedIOBase]], *, max_pixels: int
) -> Iterator[pa.Table]:
    """One row, with the seconds; null if they cannot be told."""
    seconds: float | None = None
    with opened() as file:
        try:
            with open_media(file, max_pixels=max_pixels) as container:
                seconds = float(_seconds(container, streams_of(container, max_pixels=max_pixels)))
        except Exception:
            # Strangers' bytes: the check will tell what is wrong.
            seconds = None
    yield pa.table({"seconds": pa.array([seconds], pa.float64())})


def _seconds(container: "InputContainer", streams: Streams) -> Fraction:
    claimed = [length for stream in streams.both if (length := _claimed(stream))]
    if len(claimed) == len(streams.both):
        return min(claimed)
    if container.duration:
        return Fraction(container.duration, 1_000_000)
    # What was recorded live has no length in its header.
    last = Fraction(0)
    for packet in container.demux([cast("Stream", streams.video)]):
        if packet.pts is not None and packet.time_base is not None:
            last = max(last, (packet.pts + (packet.duration or 0)) * packet.time_base)
    return last


def _claimed(stream: "Stream") -> Fraction | None:
    return stream.duration * stream.time_base if stream.duration and stream.time_base else None
