"""A part of a video as a file of its own, by copying packets: nothing is encoded again.

The part begins at the first keyframe in it, and goes on to the keyframe at which the next part begins, or for
as long as a clip may be; the sound is cut to the picture. Both keep their timing to each other. Equal input
gives equal bytes.
"""

import io
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ingest.video.container import MediaError, Streams, open_media, streams_of
from ingest.video.segments import Span

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

# In these, a keyframe is found without reading all that is before it.
_SEEKABLE = ("mov", "matroska")
# Reading begins so long before the part: sounds lie a little behind their pictures.
_LEAD = 0.5


def cut(data: bytes, span: Span, *, longest: float, max_pixels: int) -> tuple[bytes, str]:
    """The part as a file, and its container, a key of `container.CONTAINERS`.

    Args:
        data: the whole file.
        span: the part, from the beginning of the picture on.
        longest: how long the clip may be, seconds.
        max_pixels: of a frame.

    Raises:
        MediaError: there is no keyframe in it, or it cannot be read or written.
    """
    import av

    with open_media(data, max_pixels=max_pixels) as container:
        streams = streams_of(container, max_pixels=max_pixels)
        try:
            packets = _packets(container, streams, span, longest)
            if not packets.pictures:
                raise MediaError("no_keyframe")
            return _written(container, streams, packets)
        except MemoryError:
            raise MediaError("memory_limit") from None
        except (av.FFmpegError, ValueError) as error:
            raise MediaError("damaged") from error


class _Packets:
    """The packets of a part as they come, each stream's in the order of decoding.

    Args:
        start, end: of the part, in the file's time.
        longest: that it may be, seconds.
    """

    def __init__(self, start: float, end: float, longest: float) -> None:
        self._start, self._end, self._longest = start, end, longest
        self.pictures: list[Packet[Any]] = []
        self._sounds: list[Packet[Any]] = []
        self._first: float | None = None
        self.stop: float | None = None

    def add_picture(self, packet: "Packet[Any]", time: float) -> None:
        """Take it if it belongs to the part; `stop` says when the part is over."""
        if self.stop is not None:
            return
        is_long = self._first is not None and time >= self._first + self._longest
        if is_long or (packet.is_keyframe and time >= self._end):
            self.stop = time
        elif self._first is None:
            if packet.is_keyframe and time >= self._start:
                self._first = time
                self.pictures.append(packet)
        elif time >= self._first:  # those shown before it need frames that are not here
            self.pictures.append(packet)

    def add_sound(self, packet: "Packet[Any]", time: float) -> None:
        """Take it if it may belong to the part."""
        if self._start - _LEAD <= time < self._end + self._longest:
            self._sounds.append(packet)

    def sounds(self) -> "list[Packet[Any]]":
        """Those that are heard while there is a picture."""
        first = min(map(_time, self.pictures))
        last = max(map(_end, self.pictures))
        return [packet for packet in self._sounds if _end(packet) > first and _time(packet) < last]


def _packets(container: "InputContainer", streams: Streams, span: Span, longest: float) -> _Packets:
    video = streams.video
    unit = video.time_base or Fraction(1)
    zero = float((video.start_time or 0) * unit)
    start = zero + span.start
    if span.start > 0 and container.format.name.startswith(_SEEKABLE):
        container.seek(int((start - _LEAD) / unit), stream=video, backward=True)
    packets = _Packets(start, zero + span.end, longest)
    for packet in container.demux(streams.both):
        if packet.pts is None and packet.dts is None:
            continue  # the last one, without data
        time = _time(packet)
        if packet.stream is video:
            packets.add_picture(packet, time)
        else:
            packets.add_sound(packet, time)
        is_whole = streams.audio is None or not packets.pictures or packet.stream is streams.audio
        if packets.stop is not None and is_whole and time >= packets.stop:
            break
    return packets


def _written(container: "InputContainer", streams: Streams, packets: _Packets) -> tuple[bytes, str]:
    import av

    kind = "mp4" if container.format.name.startswith("mov") else "matroska"
    _fill_in(packets.pictures)
    both = sorted([*packets.pictures, *packets.sounds()], key=_decoded_at)
    zero = Fraction(min(map(_time, both)))
    shifts = {stream.index: round(zero / (stream.time_base or 1)) for stream in streams.both}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind, options={"fflags": "+bitexact"}) as out:
        copies = {stream.index: out.add_stream_from_template(stream) for stream in streams.both}
        for packet in both:
            shift = shifts[packet.stream_index]
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = copies[packet.stream_index]
            out.mux(packet)
    return buffer.getvalue(), kind


def _fill_in(pictures: "list[Packet[Any]]") -> None:
    """Matroska's first pictures do not say when they are decoded."""
    for before, packet in reversed(list(pairwise(pictures))):
        if before.dts is None and packet.dts is not None:
            before.dts = packet.dts - max(1, before.duration or 0)


def _time(packet: "Packet[Any]") -> float:
    """When it is shown or heard, seconds: the nearest number, so that equal times are equal."""
    return _seconds(packet, packet.pts if packet.pts is not None else packet.dts)


def _decoded_at(packet: "Packet[Any]") -> float:
    return _seconds(packet, packet.dts if packet.dts is not None else packet.pts)


def _end(packet: "Packet[Any]") -> float:
    begins = packet.pts if packet.pts is not None else packet.dts
    return _seconds(packet, (begins or 0) + (packet.duration or 0))


def _seconds(packet: "Packet[Any]", ticks: int | None) -> float:
    unit = packet.time_base
    return (ticks or 0) * unit.numerator / unit.denominator
