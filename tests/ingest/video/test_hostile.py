"""Hostile media end as rows with reasons, within time and memory, and cost their neighbours nothing."""

import socket
import time

import numpy as np
import pytest

from ingest.image.check_pool import Checker
from ingest.image.decode import ImageLimits
from ingest.plan.settings import VIDEOS
from ingest.video.check import VideoTreatment, check
from ingest.video.container import MediaError, open_media, streams_of
from tests.clips import clip_bytes
from tests.ingest.crawl.test_crawl import rows_of
from tests.ingest.video.hostile import (
    PLAYLISTS,
    claiming,
    larger_than_said,
    of_two_sizes,
    repeated,
    shifted,
    trimmed,
    turned,
    uneven,
)

LIMITS = ImageLimits(max_bytes=1 << 28, max_pixels=4_096 * 4_096)


def judged(data, span=None, limits=LIMITS):
    return check(data, VideoTreatment(), limits, span)


@pytest.mark.parametrize("name", PLAYLISTS)
def test_what_names_other_files_or_hosts_is_no_video(name):
    assert judged(PLAYLISTS[name]).reason == "not_a_video"


def test_a_playlist_in_disguise_opens_nothing(tmp_path):
    """FFmpeg is told one format: bytes that begin like a film and go on like a list are a damaged film."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for head in (b"\0\0\0\x14ftypisom\0\0\0\0isom", b"\x1a\x45\xdf\xa3", b"OggS", b"RIFF\0\0\0\0AVI "):
            data = head + b"\n#EXTM3U\nhttp://127.0.0.1:%d/a.ts\n" % port + PLAYLISTS["ffconcat"]
            assert judged(data).status != "kept"
        with pytest.raises(TimeoutError):
            server.accept()


def test_decoders_see_no_more_pixels_than_allowed_nor_other_codecs():
    data = clip_bytes()
    few = ImageLimits(max_bytes=1 << 20, max_pixels=1_000)
    assert judged(data, limits=few).reason == "too_many_pixels"
    # Whatever the container says: the decoder itself refuses.
    assert judged(larger_than_said()).status == "failed"
    small = ImageLimits(max_bytes=1 << 20, max_pixels=64 * 48)
    assert judged(larger_than_said(300, 200), limits=small).reason == "too_many_pixels"
    with (
        pytest.raises(MediaError, match="codec_not_allowed"),
        open_media(clip_bytes(video="ffv1", container="matroska")) as container,
    ):
        streams_of(container)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (clip_bytes()[:-300], "damaged"),  # the end of its table of contents
        (clip_bytes()[:3_000], "damaged"),
        (clip_bytes(seconds=4, container="matroska")[:20_000], "truncated"),
        (clip_bytes(video=None), "no_video"),
        (clip_bytes(audio=None), "no_audio"),
        (clip_bytes(seconds=0.2), "too_short"),
        (b"", "empty"),
        (claiming(60), "truncated"),
    ],
)
def test_what_is_missing_is_told(data, reason):
    assert judged(data).reason == reason


def test_odd_clips_are_kept_and_described():
    late = judged(uneven())
    assert late.status == "kept"
    assert late.columns["audio_start_ms"] < 0 <= late.columns["video_start_ms"]
    part = judged(trimmed())
    assert part.status == "kept" and part.columns["duration_ms"] == pytest.approx(1_500, abs=70)
    upright, sideways = judged(turned(0)), judged(turned(90))
    assert (upright.width, upright.height) == (64, 48)
    assert (sideways.width, sideways.height) == (48, 64)
    assert upright.phash != sideways.phash
    counted = check(turned(90), VideoTreatment(decode=False), LIMITS, None)
    assert (counted.width, counted.height) == (48, 64)
    assert judged(clip_bytes(channels=8)).columns["audio_channels"] == 8


def test_damage_within_packets_is_found_or_harmless(tmp_path):
    """Flipped bytes: a row, whatever it says, from a process that goes on."""
    rng = np.random.default_rng(0)
    damaged = []
    for number in range(40):
        options = (
            {},
            {"container": "matroska"},
            {"container": "mpegts"},
            {"container": "avi", "video": "mpeg4", "audio": "libmp3lame"},
        )
        data = np.frombuffer(clip_bytes(**options[number % 4], seconds=1), np.uint8).copy()
        places = rng.integers(16, len(data), 1 + number // 2)
        data[places] = rng.integers(0, 256, len(places))
        damaged.append(data.tobytes())
    pool = Checker(
        VIDEOS.treatment,
        workers=1,
        seconds=20,
        memory_mb=1_024,
        module="ingest.video.check_worker",
        more={"video": {"segment_seconds": 10.0, "allow_silent": False, "decode": True}},
    )
    with pool:
        found = [verdict for _, _, verdict in pool.run(enumerate(damaged))]
    assert len(found) == len(damaged)
    assert "worker_died" not in {verdict.reason for verdict in found}


@pytest.mark.slow
def test_D2_every_hostile_file_of_a_crawl_is_a_row_and_good_ones_are_kept(tmp_path, crawl):
    folder = tmp_path / "films"
    folder.mkdir()
    files = {f"{name}.mp4": data for name, data in PLAYLISTS.items()}
    files |= {
        "frames.mp4": repeated(pictures=30_000, fps=1_000, sounds=300),
        "silence.mp4": repeated(pictures=10, fps=10, sounds=80_000),
        "endless.mkv": claiming(1e9),
        "lying.mkv": claiming(25),
        "larger.avi": larger_than_said(),
        "cut.mp4": clip_bytes()[:3_000],
        "good.mp4": clip_bytes(1),
        "good.webm": clip_bytes(2, container="webm", video="libvpx", audio="libopus", rate=48_000),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    began = time.process_time()
    report = crawl([folder], tmp_path / "out", **vars(VIDEOS))
    assert time.process_time() - began < 60
    counts = report.counts
    assert counts.kept + sum(counts.rejected.values()) + sum(counts.failed.values()) == counts.planned
    rows = rows_of(tmp_path / "out", report.root)
    reasons = {name: {row["reason"] for row in rows if row["url"] == f"films/{name}"} for name in files}
    assert all(reasons[f"{name}.mp4"] == {"not_a_video"} for name in PLAYLISTS)
    assert reasons["frames.mp4"] == {"too_many_frames"}
    assert sum(row["url"] == "films/frames.mp4" for row in rows) == 3
    assert reasons["endless.mkv"] == {"too_long"}
    assert reasons["lying.mkv"] == {None, "no_keyframe"}
    assert reasons["silence.mp4"] == reasons["good.mp4"] == reasons["good.webm"] == {None}
    assert {row["status"] for row in rows if row["url"] in ("films/larger.avi", "films/cut.mp4")} == {
        "failed"
    }


def test_times_no_clock_shows_and_sizes_that_change_are_refused():
    assert judged(shifted(clip_bytes(container="matroska"), 10**12)).reason == "damaged"
    assert judged(of_two_sizes()).reason == "size_changes"
    late = judged(shifted(clip_bytes(container="matroska"), 50_000_000))
    assert late.status == "kept" and late.columns["duration_ms"] == pytest.approx(2_000, abs=60)
