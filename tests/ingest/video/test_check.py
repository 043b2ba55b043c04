"""What a check says of a clip, and what it stores."""

import hashlib
import io
import sys
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.image.decode import ImageLimits
from ingest.video.check import VideoTreatment, check
from ingest.video.container import sniff_container
from ingest.video.cut import cut
from ingest.video.decode_worker import _decoded
from ingest.video.preview import preview_of
from ingest.video.segments import SLACK, Span, segments
from tests.clips import clip_bytes
from tests.ingest.video.hostile import repeated

LIMITS = ImageLimits(max_bytes=1 << 26, max_pixels=1 << 22)
WEBM = {"container": "webm", "video": "libvpx", "audio": "libopus", "rate": 48_000}
AVI = {"container": "avi", "video": "mpeg4", "audio": "libmp3lame"}
TS = {"container": "mpegts"}


def judged(data, span=None, **treatment):
    return check(data, VideoTreatment(**treatment), LIMITS, span)


@pytest.mark.parametrize(
    ("options", "kind", "codecs"),
    [
        ({}, "mp4", ("h264", "aac")),
        (WEBM, "matroska", ("vp8", "opus")),
        (AVI, "avi", ("mpeg4", "mp3")),
        (TS, "matroska", ("h264", "aac")),
        ({"container": "matroska", "audio": "pcm_s16le"}, "matroska", ("h264", "pcm_s16le")),
    ],
)
def test_a_clip_is_kept_and_its_row_says_what_it_is(options, kind, codecs):
    data = clip_bytes(3, **options)
    verdict = judged(data)
    assert (verdict.status, verdict.reason, verdict.format) == ("kept", "", kind)
    assert (verdict.width, verdict.height) == (64, 48)
    said = verdict.columns
    assert (said["media"], said["video_codec"], said["audio_codec"]) == ("video", *codecs)
    assert Fraction(said["fps_num"], said["fps_den"]) == 16
    assert said["frames"] in (32, 33) and said["keyframes"] in (3, 4)
    assert said["duration_ms"] == pytest.approx(2_000, abs=70)
    assert said["max_keyframe_gap_ms"] == pytest.approx(500, abs=300)
    assert (said["audio_rate"], said["audio_channels"]) == (options.get("rate", 24_000), 1)
    # A sine of amplitude 0.3: -13.5 dB.
    assert said["loudness_db"] == pytest.approx(-13.5, abs=0.6)
    assert said["still"] == 0
    stored = data if verdict.data is None else verdict.data
    assert verdict.sha256 == hashlib.sha256(stored).hexdigest()
    assert sniff_container(stored) == kind


@pytest.mark.parametrize("options", [{}, WEBM, AVI, TS])
def test_a_clip_may_have_as_many_pixels_as_is_said_whatever_its_width(options):
    """FFmpeg counts widths that are rounded up."""
    data = clip_bytes(seconds=0.6, size=(66, 50), **options)
    for pixels, reason in ((66 * 50, ""), (66 * 50 - 1, "too_many_pixels")):
        limits = ImageLimits(max_bytes=1 << 20, max_pixels=pixels)
        assert check(data, VideoTreatment(), limits, None).reason == reason


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (clip_bytes(seconds=0.6, size=(66, 50)), (66, 50)),
        (repeated(pictures=3_100, fps=1_000, sounds=25), (16, 16)),
    ],
)
def test_verify_finds_no_fault_with_clips_of_odd_sizes_or_many_frames(data, size):
    decoded = _decoded(data, ["mp4", *size])
    assert (decoded.status, decoded.width, decoded.height) == ("kept", *size)


def test_without_PyAV_a_sentence_says_what_to_install(monkeypatch):
    data = clip_bytes(seconds=0.6)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install"):
        preview_of(data, size=(48, 48), place="a clip")


def test_what_does_not_move_and_what_is_not_heard_is_told_by_scores():
    quiet = judged(clip_bytes(still=True, volume=0.0)).columns
    assert quiet["still"] == 1
    assert quiet["loudness_db"] == -120
    louder, softer = (judged(clip_bytes(volume=volume)).columns["loudness_db"] for volume in (0.5, 0.05))
    assert louder - softer == pytest.approx(20, abs=0.3)


def test_the_hash_is_that_of_the_middle_frame_whatever_the_encoding():
    hashes = [judged(clip_bytes(4, still=True, **options)).phash for options in ({}, WEBM, TS)]
    assert all((hashes[0] ^ other).bit_count() <= 6 for other in hashes)
    assert (hashes[0] ^ judged(clip_bytes(5, still=True)).phash).bit_count() > 10


def test_clips_without_sound_are_rejected_unless_they_are_wanted():
    silent = clip_bytes(audio=None)
    assert judged(silent).reason == "no_audio"
    verdict = judged(silent, allow_silent=True)
    assert verdict.status == "kept"
    assert "audio_codec" not in verdict.columns
    assert verdict.columns["duration_ms"] == 2_000


def test_without_decoding_the_row_has_no_scores():
    verdict = judged(clip_bytes(), decode=False)
    assert (verdict.status, verdict.phash) == ("kept", None)
    assert verdict.columns["loudness_db"] is None and verdict.columns["still"] is None
    decoded = judged(clip_bytes()).columns
    known = {name for name in decoded if name not in ("loudness_db", "still")}
    assert {name: verdict.columns[name] for name in known} == {name: decoded[name] for name in known}


@pytest.mark.parametrize(
    ("seconds", "parts"),
    [(9.0, None), (12.0, None), (12.5, [(0, 10), (10, 12.5)]), (32.0, [(0, 10), (10, 20), (20, 32)])],
)
def test_segments_follow_each_other_and_only_the_last_may_be_longer(seconds, parts):
    assert segments(seconds, 10) == (None if parts is None else [Span(*part) for part in parts])


@pytest.mark.parametrize("seconds", [12.01, 19.9, 22.0, 22.1, 100.3, 4_000.0])
def test_segments_leave_nothing_out_and_are_no_longer_than_asked(seconds):
    found = segments(seconds, 10)
    assert found[0].start == 0 and found[-1].end == seconds
    assert all(before.end == after.start for before, after in pairwise(found))
    assert all(0 < part.end - part.start <= 10 + SLACK for part in found)


# ----------------------------------------------------------------------------------------------- cuts


def flashes(*, container="mp4", video="libx264", audio="aac", rate=44_100, frames_between=2):
    """11 s with a white frame and a beep at the same time, every 1.12 s."""
    fps, seconds = 25, 11
    buffer = io.BytesIO()
    lit = [index % 28 == 5 for index in range(seconds * fps)]
    wave = np.zeros(seconds * rate, np.float32)
    for index in np.flatnonzero(lit):
        start = index * rate // fps
        wave[start : start + rate // fps] = 0.8 * np.sin(0.3 * np.arange(rate // fps))
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as out:
        picture = out.add_stream(video, rate=fps)
        picture.width, picture.height, picture.pix_fmt, picture.gop_size = 64, 48, "yuv420p", 25
        if video == "libx264":
            picture.options = {"preset": "ultrafast", "x264-params": f"bframes={frames_between}:scenecut=0"}
        else:
            picture.options = {"deadline": "realtime", "cpu-used": "8"}
        sound = out.add_stream(audio, rate=rate, layout="mono")
        todo = []
        for index, bright in enumerate(lit):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 255 * bright, np.uint8), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            todo.append((index / fps, picture, frame))
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="flt", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            todo.append((start / rate, sound, frame))
        for _, stream, frame in sorted(todo, key=lambda each: each[0]):
            out.mux(stream.encode(frame))
        for stream in (picture, sound):
            out.mux(stream.encode(None))
    return buffer.getvalue()


def lit_and_heard(data):
    """When there is light, and when beeps begin, in seconds."""
    with av.open(io.BytesIO(data)) as container:
        lit = [
            frame.time for frame in container.decode(video=0) if frame.to_ndarray(format="gray").mean() > 128
        ]
    with av.open(io.BytesIO(data)) as container:
        loud = [
            frame.time + place / frame.sample_rate
            for frame in container.decode(audio=0)
            for place in np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.3)
        ]
    begins = [now for before, now in zip([-1.0, *loud], loud, strict=False) if now - before > 0.2]
    return np.array(lit), np.array(begins)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"container": "matroska"}, {"container": "mpegts"}, WEBM])
def test_a_cut_keeps_picture_and_sound_together_and_loses_no_keyframe_group(options):
    source = flashes(**options)
    lit, heard = lit_and_heard(source)
    assert len(lit) == len(heard)
    found = 0
    for span in segments(11, 4):
        stored, kind = cut(source, span, longest=6, max_pixels=1 << 20)
        assert sniff_container(stored) == kind
        lit, heard = lit_and_heard(stored)
        # A beep may begin in the last moment of the sound, with the next part's first picture.
        assert np.abs(lit[:, None] - heard).min(axis=1).max() < 0.003
        found += len(lit)
        verdict = judged(source, span, segment_seconds=4)
        assert (verdict.status, verdict.data) == ("kept", stored)
        assert verdict.columns["duration_ms"] <= 6_000
    assert found == 10


def test_a_cut_is_the_same_bytes_every_time():
    source = flashes()
    assert (
        len(
            {
                hashlib.sha256(cut(source, Span(4, 8), longest=6, max_pixels=1 << 20)[0]).digest()
                for _ in range(10)
            }
        )
        == 1
    )


def test_a_long_clip_without_a_part_named_is_cut_to_its_beginning():
    verdict = judged(clip_bytes(seconds=14), segment_seconds=5)
    assert verdict.columns["duration_ms"] == pytest.approx(5_000, abs=100)


def test_a_part_without_a_keyframe_has_a_reason():
    source = clip_bytes(seconds=6, keyframe_every=1_000)
    assert judged(source, Span(1, 3), segment_seconds=2).reason == "no_keyframe"


# ------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("options", [{}, {"container": "matroska"}, AVI, WEBM])
def test_titles_places_and_dates_are_left_out_and_packets_stay(options):
    data = clip_bytes(title="SECRET", **options)
    assert data.count(b"SECRET") == 2
    verdict = judged(data)
    assert verdict.status == "kept"
    assert b"SECRET" not in verdict.data and len(verdict.data) == len(data)
    # Once more there is nothing left to take away.
    assert judged(verdict.data).data is None


@settings(max_examples=8, deadline=None)
@given(
    number=st.integers(0, 99),
    keyframe_every=st.integers(2, 20),
    container=st.sampled_from(["mp4", "matroska", "mpegts"]),
    longest=st.sampled_from([2.0, 2.5, 3.0]),
    seconds=st.floats(6, 9),
)
def test_D1_parts_of_any_film_hold_every_frame_once_and_are_the_same_bytes_again(
    number, keyframe_every, container, longest, seconds
):
    film = clip_bytes(number, seconds=seconds, keyframe_every=keyframe_every, container=container)
    with av.open(io.BytesIO(film)) as opened:
        frames = sum(1 for _ in opened.decode(video=0))
        length = float(opened.duration / 1e6)
    verdicts = [
        [judged(film, span, segment_seconds=longest) for span in segments(length, longest)] for _ in range(2)
    ]
    assert [verdict.status for verdict in verdicts[0]] == ["kept"] * len(verdicts[0])
    assert [verdict.data for verdict in verdicts[0]] == [verdict.data for verdict in verdicts[1]]
    assert sum(verdict.columns["frames"] for verdict in verdicts[0]) == frames
