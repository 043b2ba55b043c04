"""A clip from its first frame to its last: all of it is decoded once, and what its row says is noted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ingest.video.container import MAX_PIXELS, MediaError, Streams, open_media, pyav, streams_of
from ingest.video.scores import PictureScores, SoundScores

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

_NO_MEMORY = 12
# By so much a header may say that a file is longer than its packets are.
_ROUNDING = Fraction(1)
# A day is what clocks of broadcasts count to.
_LATEST = 2 * 86_400


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is refused of a clip: frames of more pixels, a stream of more frames or more seconds."""

    pixels: int = MAX_PIXELS
    frames: float = math.inf
    seconds: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A clip that decodes completely.

    Attributes:
        width, height: of the upright picture.
        original_width, original_height: as it lies.
        has_sound: whether there is a sound.
        seconds: how long there is a picture, and a sound if there is one at all.
        phash: of the frame in the middle, upright; None if it was not decoded.
        columns: what its row says besides.
    """

    width: int
    height: int
    original_width: int
    original_height: int
    has_sound: bool
    seconds: float
    phash: int | None
    columns: Mapping[str, Any]


class _Extent:
    """Of a stream's packets: when they begin and end, and when there are keyframes, in the stream's units.

    Args:
        stream: whose packets these are.
        bounds: how long it may be.
    """

    def __init__(self, stream: "Stream | None", bounds: Bounds) -> None:
        self.unit = (stream.time_base if stream is not None else None) or Fraction(1)
        self._first_said = None if stream is None else stream.start_time
        self._longest = math.inf if bounds.seconds == math.inf else int(Fraction(bounds.seconds) / self.unit)
        self.packets = 0
        self._first: int | None = None
        self._end = 0
        self._keyframes: list[int] = []

    def add(self, packet: "Packet[Any]") -> None:
        """Take account of a packet.

        Raises:
            MediaError: it is too late.
        """
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            return  # the last one, without data
        end = time + (packet.duration or 0)
        if self._first is None:
            self._first = time
        self._first, self._end = min(self._first, time), max(self._end, end)
        self.packets += 1
        if packet.is_keyframe:
            self._keyframes.append(time)
        if self._end - self._first > self._longest:
            raise MediaError("too_long")

    @property
    def is_empty(self) -> bool:
        return self._first is None

    @property
    def start(self) -> Fraction:
        """Seconds. The first packets of some sounds are there only to be left out."""
        first = self._first or 0
        return min(max(first, first if self._first_said is None else self._first_said), self._end) * self.unit

    @property
    def end(self) -> Fraction:
        """Seconds."""
        return self._end * self.unit

    @property
    def keyframes(self) -> int:
        return len(self._keyframes)

    def largest_gap(self) -> Fraction:
        """The longest time from a keyframe to the next one, or to the end, seconds."""
        times = sorted(self._keyframes)
        gaps = (late - early for early, late in zip(times, [*times[1:], self._end], strict=True))
        return max(gaps, default=0) * self.unit


def watch(data: bytes, bounds: Bounds, *, decode: bool = True) -> Watched:
    """Decode a clip completely, both streams.

    Args:
        data: the whole file.
        bounds: what is refused.
        decode: without, packets behind the first picture's are only counted: there are no hash and no scores,
            and damage within them shows to whoever decodes them.

    Raises:
        MediaError: something is refused or damaged, or there is no picture.
        UserError: PyAV is not installed.
    """
    av = pyav()
    with open_media(data, max_pixels=bounds.pixels) as container:
        streams = streams_of(container, max_pixels=bounds.pixels)
        picture, sound = _Extent(streams.video, bounds), _Extent(streams.audio, bounds)
        seen, heard = PictureScores(_claimed_seconds(container, streams.video) / 2), SoundScores()
        try:
            for packet in container.demux(streams.both):
                is_picture = packet.stream is streams.video
                (picture if is_picture else sound).add(packet)
                if picture.packets > bounds.frames:
                    raise MediaError("too_many_frames")
                # How the picture is turned, its first frame tells.
                if decode or (is_picture and not seen.frames):
                    scores = seen if is_picture else heard
                    for frame in packet.decode():
                        scores.add(frame)  # type: ignore[arg-type]
        except MemoryError:
            raise MediaError("memory_limit") from None
        except av.FFmpegError as error:
            raise MediaError("memory_limit" if error.errno == _NO_MEMORY else "damaged") from error
        if _is_cut_off(container, streams.video, picture, sound):
            raise MediaError("truncated")
        if picture.is_empty or not seen.frames:
            raise MediaError("damaged")
        if streams.video.width * streams.video.height > bounds.pixels:  # by now it is what came out
            raise MediaError("too_many_pixels")
        if not picture.keyframes:
            raise MediaError("no_keyframe")
        if max(abs(picture.start), abs(sound.start)) > _LATEST:
            raise MediaError("damaged")
        return _noted(streams, picture, sound, seen, heard, decoded=decode)


def _is_cut_off(container: "InputContainer", video: "VideoStream", picture: _Extent, sound: _Extent) -> bool:
    """Whether there is less than the header says."""
    if container.format.name.startswith("mov"):
        # Not those of its table: an edit list may leave some of them out.
        return picture.packets < len(video.index_entries)
    claimed = Fraction(container.duration or 0, 1_000_000)
    there = [each for each in (picture, sound) if not each.is_empty]
    # Some headers count from zero, and some from the first packet.
    first = min((each.start for each in there if each.start < 0), default=Fraction(0))
    return claimed > _ROUNDING + max((each.end for each in there), default=first) - first


def _noted(
    streams: Streams,
    picture: _Extent,
    sound: _Extent,
    seen: PictureScores,
    heard: SoundScores,
    *,
    decoded: bool,
) -> Watched:
    video, audio = streams
    context = video.codec_context
    has_sound = audio is not None and not sound.is_empty
    start, end = picture.start, picture.end
    columns: dict[str, Any] = {
        "media": "video",
        "video_codec": context.codec.canonical_name,
        "frames": seen.frames if decoded else picture.packets,
        "video_start_ms": _ms(start),
        "keyframes": picture.keyframes,
        "max_keyframe_gap_ms": _ms(picture.largest_gap()),
        "still": seen.still() if decoded else None,
    }
    if audio is not None and has_sound:
        columns |= {
            "audio_codec": audio.codec_context.codec.canonical_name,
            "audio_rate": audio.codec_context.sample_rate,
            "audio_channels": audio.codec_context.channels,
            "audio_start_ms": _ms(sound.start),
            "loudness_db": heard.loudness_db() if decoded else None,
        }
        start, end = max(start, sound.start), min(end, sound.end)
    seconds = max(Fraction(0), end - start)
    rate = (
        video.average_rate
        or video.guessed_rate
        or Fraction(picture.packets) / max(seconds, Fraction(1, 1000))
    )
    rate = rate.limit_denominator(1_001)
    columns |= {"fps_num": rate.numerator, "fps_den": rate.denominator, "duration_ms": _ms(seconds)}
    turned = seen.orientation in (6, 8)
    size = context.width, context.height
    return Watched(
        width=size[turned],
        height=size[not turned],
        original_width=context.width,
        original_height=context.height,
        has_sound=has_sound,
        seconds=float(seconds),
        phash=seen.phash if decoded else None,
        columns=columns,
    )


def _claimed_seconds(container: "InputContainer", video: "VideoStream") -> float:
    if video.duration and video.time_base:
        return float(video.duration * video.time_base)
    return (container.duration or 0) / 1e6


def _ms(seconds: Fraction) -> int:
    return round(seconds * 1000)
