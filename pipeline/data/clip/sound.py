"""A part of a video's sound as one waveform: decoded from a packet before it, mixed to one channel,
resampled.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.video.scores import LOUDEST, readable
from pipeline.data.clip.media import Track
from pipeline.data.clip.windows import Span
from pipeline.data.reader import BadSampleError

# What decoders need before they are in tune; Opus asks for 80 ms.
_PREROLL_SECONDS = 0.1
# Taps of the resampler's filter, and the share of the band that it lets through: what lies above half the new
# rate is 96 dB lower. FFmpeg's own choice leaves 63.
_TAPS, _CUTOFF = 64, 0.95
# Containers round times to a millisecond; a jump that is longer is one.
_JUMP_SECONDS = 0.02
_LEAST_RATE, _MOST_RATE = 4_000, 384_000
# Of samples, by FFmpeg's name of their format: the type, silence, and the loudest.
_FORMATS = {
    "u8": (np.uint8, 128, 2.0**7),
    "s16": (np.int16, 0, 2.0**15),
    "s32": (np.int32, 0, 2.0**31),
    "flt": (np.float32, 0, 1.0),
}


def waveform(track: Track, span: Span, begin: float, *, samples: int, rate: int) -> NDArray[np.float32]:
    """So many samples of one channel, from `begin` on, at `rate` a second; a shorter span is repeated.

    The same as a part of the whole sound, resampled as a whole, if the codec decodes the same from any packet
    (AAC with noise substitution does not): resampling starts where samples of both rates coincide.

    Args:
        span: in which there is sound.
        begin: seconds of the file's time.

    Raises:
        BadSampleError: there is nothing to hear, or it is not of one rate, or no number.
        FFmpegError: of PyAV, as `BadSampleError`.
    """
    first = math.floor((begin - track.span.begin) * rate)
    count = min(samples, max(1, math.floor((span.end - begin) * rate)))
    grid = _Grid.of(track.stream.codec_context.sample_rate, rate)
    try:
        heard = _decode(track, first=first, count=count, grid=grid)
    except _OtherRateError as error:  # headers of AAC may say half of what is decoded
        grid = _Grid.of(error.rate, rate)
        heard = _decode(track, first=first, count=count, grid=grid)
    resampled = heard if grid.old == grid.new else _resample(heard, grid)
    start = first - grid.start(first) * grid.new
    found = np.zeros(count, np.float32)
    there = resampled[start : start + count]
    found[: len(there)] = there
    if not np.abs(found).max() <= LOUDEST:  # or NaN
        raise BadSampleError("its sound is louder than any, or no number")
    return found if count == samples else np.resize(found, samples)


class _OtherRateError(BadSampleError):
    """Samples that are decoded have another rate than was thought."""

    def __init__(self, rate: int) -> None:
        super().__init__("its sound is not of one rate")
        self.rate = rate


class _Grid:
    """Two rates: every `old` samples of the file coincide with `new` of the result.

    Attributes:
        rate: of the file, and `wanted` of the result, in samples a second.
        reach: samples of the file that a sample of the result depends on, to either side.
    """

    def __init__(self, rate: int, wanted: int) -> None:
        common = math.gcd(rate, wanted)
        self.rate, self.wanted = rate, wanted
        self.old, self.new = rate // common, wanted // common
        self.reach = math.ceil(_TAPS * max(1.0, rate / wanted))

    @classmethod
    def of(cls, rate: int | None, wanted: int) -> _Grid:
        """Raises BadSampleError for a rate that is no sound's."""
        if not rate or not _LEAST_RATE <= rate <= _MOST_RATE:
            raise BadSampleError(f"its sound has {rate} samples a second")
        return cls(rate, wanted)

    def start(self, sample: int) -> int:
        """The last block of the grid from which a sample of the result can be computed; the first is 0."""
        return max(0, (sample * self.old // self.new - self.reach) // self.old)

    def end(self, sample: int) -> int:
        """The sample of the file behind the last that a sample of the result depends on."""
        return -(-sample * self.old // self.new) + self.reach + 1


def _decode(track: Track, *, first: int, count: int, grid: _Grid) -> NDArray[np.float32]:
    """One channel, at the file's rate, of what some samples of the result depend on; silent where there is
    none.
    """
    begin = grid.start(first) * grid.old
    heard = np.zeros(grid.end(first + count) - begin, np.float32)
    end, any_heard = 0, False
    decoder = track.stream.codec_context
    decoder.flush_buffers()  # of what was heard before
    start = _packet_before(track, track.span.begin + begin / grid.rate - _PREROLL_SECONDS)
    for packet in [*track.packets[start:], None]:
        for frame in decoder.decode(packet):
            if frame.sample_rate != grid.rate:
                raise _OtherRateError(frame.sample_rate)
            if frame.pts is not None:
                said = round((frame.pts * track.unit - track.span.begin) * grid.rate) - begin
                end = said if not any_heard or abs(said - end) > _JUMP_SECONDS * grid.rate else end
            any_heard = True
            mono = _mixed(frame)
            low, high = max(end, 0), min(end + len(mono), len(heard))
            if low < high:
                heard[low:high] = mono[low - end : high - end]
            end += len(mono)
        if any_heard and end >= len(heard):
            break
    if not any_heard:
        raise BadSampleError("its sound cannot be decoded")
    return heard


def _packet_before(track: Track, seconds: float) -> int:
    """The last packet that begins no later; the first if there is none."""
    before = np.flatnonzero(track.times * track.unit <= seconds)
    return int(before[-1]) if len(before) else 0


def _mixed(frame: Any) -> NDArray[np.float32]:
    """The mean of a frame's channels, (samples,), full scale at 1."""
    frame = readable(frame)
    samples, channels = frame.samples, frame.layout.nb_channels
    if (name := frame.format.name.removesuffix("p")) not in _FORMATS:
        raise BadSampleError(f"its sound is in samples of {name}")
    kind, silence, loudest = _FORMATS[name]
    # By hand: PyAV's array of all channels, and NumPy's mean over so few, take three times as long.
    if frame.format.is_planar:
        waves = [np.frombuffer(plane, kind, samples) for plane in frame.planes]
    else:
        packed = np.frombuffer(frame.planes[0], kind, samples * channels)
        waves = list(packed.reshape(samples, channels).T)
    mixed: NDArray[np.float32] = waves[0].astype(np.float32)
    for wave in waves[1:]:
        mixed += wave
    mixed -= silence * channels
    mixed /= np.float32(loudest * channels)
    return mixed


def _resample(heard: NDArray[np.float32], grid: _Grid) -> NDArray[np.float32]:
    import av
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = graph.add_abuffer(sample_rate=grid.rate, format="fltp", layout="mono")
    resampler = graph.add("aresample", f"{grid.wanted}:filter_size={_TAPS}:cutoff={_CUTOFF}")
    graph.link_nodes(source, resampler, graph.add("abuffersink")).configure()
    frame = av.AudioFrame.from_ndarray(heard[None], format="fltp", layout="mono")
    frame.sample_rate = grid.rate
    source.push(frame)
    source.push(None)
    parts = []
    while True:
        try:
            parts.append(graph.pull().to_ndarray()[0])
        except (av.EOFError, av.BlockingIOError):
            return np.concatenate(parts)
