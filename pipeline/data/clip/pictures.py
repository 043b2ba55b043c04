"""The pictures that a video shows at given moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.image.orientation import upright
from ingest.video.scores import orientation_of
from pipeline.data.clip.media import Track
from pipeline.data.reader import BadSampleError

# From a keyframe to the last picture that is wanted: two minutes, or one at twice the rate.
_MOST_DECODED = 4096


def pictures(track: Track, times: NDArray[np.float64]) -> Iterator[Image.Image]:
    """What is shown at each of some moments, upright: the last picture whose time has come.

    Args:
        times: seconds of the file's time.

    Raises:
        BadSampleError: a picture cannot be decoded, or is of another size than the first.
        FFmpegError: of PyAV, as `BadSampleError`.
    """
    from av.video.reformatter import Interpolation, VideoReformatter

    # The same bytes on every processor.
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    reformatter, size = VideoReformatter(), None
    last, image = None, None
    for frame in _shown_at(track, times):
        if frame is not last or image is None:
            rgb = reformatter.reformat(frame, format="rgb24", interpolation=exact, threads=1).to_ndarray()
            last, image = frame, upright(Image.fromarray(rgb), orientation_of(frame))
            size = size or image.size
            if image.size != size:
                raise BadSampleError("its pictures change their size")
        yield image


def _shown_at(track: Track, times: NDArray[np.float64]) -> list[Any]:
    """The decoded frame of each moment."""
    shown = np.sort(track.times[[not packet.is_discard for packet in track.packets]])
    units = np.floor(times / track.unit + 1e-6)
    wanted: list[int] = shown[np.maximum(np.searchsorted(shown, units, side="right") - 1, 0)].tolist()
    found = _decoded(track, wanted, skip=True)
    if any(time not in found or found[time].pts != time for time in wanted):
        # Times of packets are not always those of the pictures in them: all are looked at.
        found = _decoded(track, wanted, skip=False)
    first = min(found.values(), key=lambda frame: int(frame.pts), default=None)
    if first is None:
        raise BadSampleError("none of its pictures can be decoded")
    return [found.get(time, first) for time in wanted]


def _decoded(track: Track, wanted: list[int], *, skip: bool) -> dict[int, Any]:
    """For each time that is wanted the last frame up to it, from the keyframe before the first on.

    Args:
        skip: leave pictures out that no other picture needs, and that are not wanted.
    """
    decoder, found, missing = track.stream.codec_context, dict[int, Any](), set(wanted)
    decoder.flush_buffers()  # of what was looked at before
    start = _keyframe_before(track, min(missing))
    times = track.times.tolist()
    for number, packet in enumerate([*track.packets[start:], None], start):
        if number == start + _MOST_DECODED:
            raise BadSampleError(f"it has more than {_MOST_DECODED} pictures after a keyframe")
        needed = packet is None or not skip or times[number] in missing
        decoder.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in decoder.decode(packet):
            if frame.pts is None:
                continue
            for time in missing:
                if frame.pts <= time and (time not in found or found[time].pts < frame.pts):
                    found[time] = frame
            missing -= {frame.pts}
        if not missing:
            break
    return found


def _keyframe_before(track: Track, time: int) -> int:
    """The last packet from which the picture of a time can be decoded."""
    keys = [number for number, packet in enumerate(track.packets) if packet.is_keyframe]
    before = [number for number in keys if track.times[number] <= time]
    return max(before, default=keys[0] if keys else 0)
