"""The verdict on one clip, and the bytes to store: sniff, bound, cut or keep, decode completely.

Bytes come from strangers. Time and memory are bounded by the process that calls
(`ingest.video.check_worker`), not here.
"""

import hashlib
from dataclasses import dataclass

from ingest.image.check import Checked
from ingest.image.decode import ImageLimits
from ingest.video.container import MediaError, sniff_container
from ingest.video.cut import cut
from ingest.video.segments import SLACK, Span
from ingest.video.stripping import KEPT_AS_THEY_ARE, stripped
from ingest.video.watch import Bounds, Watched, watch

# Slow motion is made at 240 frames a second.
_MOST_FRAMES_A_SECOND = 250
# A window of training has two seconds of sound, and half a second of pictures.
_SHORTEST = 0.5


@dataclass(frozen=True, kw_only=True)
class VideoTreatment:
    """What a crawl makes of a video.

    Attributes:
        segment_seconds: how long a clip may be. What is longer by no more than `SLACK` is one clip, too.
        allow_silent: clips without a sound are kept.
        decode: both streams are decoded completely. Otherwise packets are counted, there are no hash and no
            scores, and damage within packets shows to whoever decodes them.
    """

    segment_seconds: float = 10.0
    allow_silent: bool = False
    decode: bool = True


def check(data: bytes, treatment: VideoTreatment, limits: ImageLimits, span: Span | None) -> Checked:
    """Judge one clip of a file and make the bytes to store, which carry no metadata.

    Args:
        data: the whole file.
        treatment, limits: what is made of it, and what is refused.
        span: which part of it; None: all of it if it is short enough, else its beginning.
    """
    kind = sniff_container(data)
    try:
        if not data:
            raise MediaError("empty")
        if len(data) > limits.max_bytes:
            raise MediaError("too_many_bytes")
        if kind is None:
            raise MediaError("not_a_video")
        return _judged(data, kind, treatment, limits, span)
    except MediaError as error:
        return Checked(status=error.status, reason=error.reason, format=kind)
    except MemoryError:
        return Checked(status="failed", reason="memory_limit", format=kind)
    except Exception:
        # Whatever FFmpeg makes of strangers' bytes, and we of that: it is one row.
        return Checked(status="failed", reason="damaged", format=kind)


def _judged(
    data: bytes, kind: str, treatment: VideoTreatment, limits: ImageLimits, span: Span | None
) -> Checked:
    longest = treatment.segment_seconds + SLACK
    bounds = Bounds(
        pixels=limits.max_pixels, frames=round(_MOST_FRAMES_A_SECOND * longest), seconds=longest + 0.5
    )
    if span is None and kind not in KEPT_AS_THEY_ARE:
        span = Span(0.0, longest)
    if span is None:
        try:
            stored = stripped(data, kind)
            watched = watch(stored, bounds, decode=treatment.decode)
        except MediaError as error:
            if error.reason != "too_long":
                raise
            span = Span(0.0, treatment.segment_seconds)
    if span is not None:
        stored, kind = cut(data, span, longest=longest, max_pixels=limits.max_pixels)
        watched = watch(stored, bounds, decode=treatment.decode)
    if not watched.has_sound and not treatment.allow_silent:
        raise MediaError("no_audio")
    if watched.seconds < _SHORTEST:
        raise MediaError("too_short")
    return _kept(data, stored, kind, watched)


def _kept(data: bytes, stored: bytes, kind: str, watched: Watched) -> Checked:
    return Checked(
        status="kept",
        format=kind,
        width=watched.width,
        height=watched.height,
        original_width=watched.original_width,
        original_height=watched.original_height,
        sha256=hashlib.sha256(stored).hexdigest(),
        phash=watched.phash,
        data=None if stored is data else stored,
        columns=dict(watched.columns),
    )
