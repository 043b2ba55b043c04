"""Crawls of videos: from folders, tars, lists of files and of URLs, to sealed datasets of clips."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.schema import META_SCHEMA, VIDEO_SCHEMA
from ingest.dataset.verify import Level, read_seal, verify_units
from ingest.plan.plan import read_plans
from ingest.plan.segmented import Segmented, seconds_in, span_of
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.sources.opening import open_listing, open_planned
from ingest.sources.url_list import Columns
from ingest.store.open import open_store
from ingest.video.check import VideoTreatment
from ingest.video.segments import Span
from ingest.video.stripping import stripped
from ingest.web.settings import FetchSettings
from tests.clips import clip_bytes, write_clips
from tests.ingest.crawl.test_crawl import dataset_bytes, rows_of, whole

SHORT = replace(VIDEOS, video=VideoTreatment(segment_seconds=3.0), unit_rows=4)


def crawl_videos(source, output, *, workers=1, settings=SHORT, **options):
    return crawl_shards(
        [str(source)], output, settings, workers=workers, progress=lambda counts: None, **options
    )


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Five clips of 2 s, one film of 10 s, one without a sound, and a text."""
    folder = tmp_path_factory.mktemp("source") / "films"
    write_clips(folder, 5)
    (folder / "red" / "long.mkv").write_bytes(clip_bytes(7, seconds=10, container="matroska"))
    (folder / "green" / "mute.mp4").write_bytes(clip_bytes(8, audio=None))
    (folder / "green" / "notes.md").write_text("no film")
    return folder


@pytest.fixture(scope="module")
def made(films, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "clips"
    return output, crawl_videos(films, output)


def test_D2_a_folder_of_videos_becomes_clips_and_every_part_has_a_row(films, made):
    output, report = made
    rows = rows_of(output, report.root)
    counts = report.counts
    assert counts.planned == counts.kept + sum(counts.rejected.values()) + sum(counts.failed.values()) == 10
    assert counts.rejected == {"no_audio": 1, "not_a_video": 1}
    kept = [row for row in rows if row["status"] == "kept"]
    assert list(rows[0]) == [*META_SCHEMA.names, *VIDEO_SCHEMA.names]
    assert {row["labels"][0] for row in kept} == {"red", "green"}
    parts = [row["parent"] for row in kept if row["url"] == "films/red/long.mkv"]
    assert parts == [f"films/red/long.mkv#t={part}" for part in ("0,3", "3,6", "6,10.043")]
    assert [row["parent"] for row in kept if row["format"] == "mp4"] == [None] * 5
    opened = open_dataset(output)
    for row in (row for row in kept if row["format"] == "mp4"):
        stored = opened.read_shard(row["unit"], row["offset"], row["size"])
        original = (films.parent / row["url"]).read_bytes()
        # All but the name of the program that wrote it.
        assert stored == stripped(original, "mp4")
        assert len(stored) == len(original)
    assert whole(output) == report.root


@pytest.mark.slow
def test_D1_same_root_for_any_number_of_workers_and_after_a_kill(films, made, tmp_path):
    output, report = made
    assert crawl_videos(films, tmp_path / "three", workers=3).root == report.root
    command = [sys.executable, "-c", "from ingest.cli import main; main()", "crawl-shards", films]
    command += ["--output", tmp_path / "killed", "--video", "--segment-seconds", "3", "--unit-rows", "4"]
    command += ["--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("commits/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert whole(tmp_path / "killed") == report.root
    assert dataset_bytes(tmp_path / "killed") == dataset_bytes(tmp_path / "three") == dataset_bytes(output)


def test_a_tar_of_videos_brings_captions_and_labels(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number in range(2):
            for name, data in (
                (f"{number}.mp4", clip_bytes(number, seconds=7 if number else 2)),
                (f"{number}.json", json.dumps({"caption": f"film {number}", "label": "x", "id": 3}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = crawl_videos(tmp_path / "set.tar", tmp_path / "out")
    rows = rows_of(tmp_path / "out", report.root)
    assert [(row["caption"], row["labels"], row["parent"]) for row in rows] == [
        ("film 0", ["x"], None),
        ("film 1", ["x"], "set.tar/1.mp4#t=0,3"),
        ("film 1", ["x"], "set.tar/1.mp4#t=3,7"),
    ]


def test_a_list_of_files_names_the_parts(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip_bytes(1, seconds=12))
    (tmp_path / "list.csv").write_text(
        "path,start,end,label,frames,source_frames\n"
        "a.mp4,1,3.5,first,9,7\n"
        "a.mp4,0:05,11,second,9,7\n"
        "a.mp4,9,,third,9,7\n"
        "a.mp4,,,all,9,7\n"
        "a.mp4,4,2,wrong,9,7\n"
        "gone.mp4,0,1,gone,9,7\n"
    )
    report = crawl_videos(tmp_path / "list.csv", tmp_path / "out", settings=replace(SHORT, unit_rows=64))
    rows = rows_of(tmp_path / "out", report.root)
    found = [(row["labels"][0], row["reason"], (row["parent"] or "#t=").partition("#t=")[2]) for row in rows]
    assert found == [
        ("first", None, "1,3.5"),
        ("second", None, "5,8"),
        ("second", None, "8,11"),
        ("third", None, "9,12"),
        ("all", None, "0,3"),
        ("all", None, "3,6"),
        ("all", None, "6,9"),
        ("all", None, "9,12"),
        ("wrong", "misread_value", ""),
        ("gone", "file_missing", "0,1"),
    ]
    lengths = {row["parent"]: row["duration_ms"] for row in rows if row["status"] == "kept"}
    assert all(length <= 5_000 for length in lengths.values())
    # Columns of clips are ours; a list's own are called otherwise, and none takes another's name.
    assert rows[0]["frames"] != 9
    assert (rows[0]["source_source_frames"], rows[0]["source_frames"]) == ("9", "7")


def test_a_part_without_a_start_begins_at_the_beginning(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip_bytes(1, seconds=12))
    (tmp_path / "both.csv").write_text("path,start,end\na.mp4,,2\na.mp4,,\n")
    (tmp_path / "ends.csv").write_text("path,end\na.mp4,2\na.mp4,0:07\na.mp4,\na.mp4,0\na.mp4,late\n")

    def parts_of(name):
        listing = open_listing(str(tmp_path / name), Columns())
        record = SourceRecord(kind=listing.kind, name=listing.name)
        with closing(Segmented(listing, open_planned(record, str(tmp_path / name)), SHORT)) as parts:
            rows = [row for table in parts.rows() for row in table.to_pylist()]
        return [(span_of(row), row["problem"]) for row in rows]

    whole = [(Span(start, start + 3), "") for start in (0, 3, 6, 9)]
    assert parts_of("both.csv") == [(Span(0, 2), ""), *whole]
    assert parts_of("ends.csv") == [
        (Span(0, 2), ""),
        (Span(0, 3), ""),
        (Span(3, 7), ""),
        *whole,
        (None, "misread_value"),
        (None, "misread_value"),
    ]


def test_no_column_of_a_list_of_images_is_taken_for_a_part(tmp_path):
    (tmp_path / "list.csv").write_text("path,span_start_ms,span_end_ms\na.png,5,9\n")
    names = open_listing(str(tmp_path / "list.csv"), Columns()).extra.names
    assert names == ["source_span_start_ms", "source_span_end_ms"]


@contextmanager
def serving(files):
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *words):
            """Not in a test's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_list_of_URLs_gives_one_clip_each_or_the_parts_it_names_and_asks_once(tmp_path):
    fetch = FetchSettings(contact="https://example.org/us", allow_private=("127.0.0.1/32",), tries=1)
    with serving({"/long.mp4": clip_bytes(1, seconds=12), "/b.mp4": clip_bytes(2)}) as (site, asked):
        (tmp_path / "list.csv").write_text(
            "url,start,end,label\n"
            f"{site}/long.mp4,0,3,one\n{site}/long.mp4,6,9,two\n{site}/long.mp4,6,9,again\n"
            f"{site}/b.mp4,,,short\n{site}/no.mp4,1,2,gone\n"
        )
        (tmp_path / "plain.csv").write_text(f"url\n{site}/long.mp4\n")
        parts = crawl_videos(tmp_path / "list.csv", tmp_path / "parts", settings=replace(SHORT, fetch=fetch))
        assert asked["/long.mp4"] == 1
        plain = crawl_videos(tmp_path / "plain.csv", tmp_path / "plain", settings=replace(SHORT, fetch=fetch))
    rows = rows_of(tmp_path / "parts", parts.root)
    assert {(row["labels"][0], row["status"], row["reason"]) for row in rows} == {
        ("one", "kept", None),
        ("two", "kept", None),
        ("short", "kept", None),
        ("gone", "failed", "http_404"),
    }
    assert parts.counts.merged == 1
    (row,) = rows_of(tmp_path / "plain", plain.root)
    assert row["status"] == "kept" and row["duration_ms"] == pytest.approx(3_000, abs=600)


def test_settings_are_written_down_and_read_again_and_images_have_none():
    settings = replace(VIDEOS, video=VideoTreatment(segment_seconds=7.5, allow_silent=True, decode=False))
    assert CrawlSettings.from_flags(settings.flags()) == settings
    assert "--video" not in CrawlSettings().flags().plain()


def test_another_length_is_another_crawl(films, made):
    output, _ = made
    with pytest.raises(UserError, match=r"was planned with --segment-seconds 3\.0, not 4\.0: use"):
        crawl_videos(films, output, settings=replace(SHORT, video=VideoTreatment(segment_seconds=4.0)))


@pytest.mark.parametrize(
    ("text", "seconds"), [("12.5", 12.5), (3, 3), ("1:02:03.5", 3_723.5), ("0:05", 5), (" 7 ", 7)]
)
def test_moments_are_seconds_or_a_clock(text, seconds):
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "nan", "inf", "1e300"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ValueError):
        seconds_in(text)


@pytest.mark.slow
def test_the_commands_know_clips(made, tmp_path, monkeypatch):
    output, _ = made
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = CliRunner().invoke(cli.app(), [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "is whole, at level decode (8 clips read)" in run("verify", output, "--level", "decode")
    found = json.loads(run("stats", output, "--json"))["clips"]
    assert (found["clips"], found["quiet"], found["still"]) == (8, 0, 0)
    assert found["video_codecs"] == {"h264": 8}
    assert run("show", output).startswith("clips.html shows 8 clips of 8")
    page = (tmp_path / "clips.html").read_text()
    assert page.count("<video controls") == page.count('<svg class="wave"') == 8
    assert "media-src data:" in page
    card = run("card", output)
    assert "- video-classification" in card and "8 clips" in card and "length, ms" in card
    for view in (
        run("dedup", output, "--name", "once"),
        run("view", output, "--name", "red", "--per-label", 9),
    ):
        assert "of 8 clips\n" in view and "image" not in view


def test_verify_decodes_clips_in_a_process_that_is_bounded_and_says_what_it_needs(made, monkeypatch):
    output, _ = made
    seal, _ = read_seal(output)

    def faults(**bounds):
        units = verify_units(output, seal, Level.DECODE, workers=2, **bounds)
        return [damage.sentence.rpartition(") ")[2] for unit in units for damage in unit.damages]

    assert faults() == []
    assert len(told := faults(memory_mb=1)) == 8 and all(
        each.startswith("does not decode: ") for each in told
    )
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="video needs PyAV: pip install"):
        faults()


def test_a_PyAV_that_breaks_behind_the_fence_is_no_damage_of_clips(made, monkeypatch, tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('libx.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seal, _ = read_seal(made[0])
    with pytest.raises(UserError, match="PyAV cannot be imported where clips are decoded"):
        list(verify_units(made[0], seal, Level.DECODE, workers=1, memory_mb=999))


@pytest.mark.parametrize("how", ["absent", "null"])
def test_clips_of_others_are_shown_with_what_is_known_of_them(made, tmp_path, how):
    output = shutil.copytree(made[0], tmp_path / "theirs")
    for meta in (output / "meta").rglob("*.parquet"):
        table = pq.read_table(meta)
        unknown = [field for field in VIDEO_SCHEMA if field.name != "media"]
        table = table.drop_columns([field.name for field in unknown])
        for field in unknown if how == "null" else ():
            table = table.append_column(field, pa.nulls(len(table), field.type))
        pq.write_table(table, meta)
    page = tmp_path / "page.html"
    for words, said in (
        (["stats", output], "clips"),
        (["card", output], "## Clips"),
        (["show", output, "--output", page], "shows 8 clips of 8"),
    ):
        result = CliRunner().invoke(cli.app(), [str(word) for word in words])
        assert result.exit_code == 0, result.output
        assert said in result.stdout
    assert page.read_text().count("<video controls") == 8
    assert "no sound" not in page.read_text()  # nobody knows


def test_options_of_videos_and_of_images_are_not_mixed(tmp_path):
    for words, said in (
        (["--segment-seconds", "5"], "--segment-seconds is of videos"),
        (["--video", "--resize", "5"], "--resize is of images"),
        (["--video", "--segment-seconds", "0"], "--segment-seconds must be from 1 to"),
        (["--video", "--max-pixels", "100000000"], "--max-pixels 100000000 is more than"),
    ):
        result = CliRunner().invoke(
            cli.app(), ["crawl-shards", str(tmp_path), "--output", str(tmp_path / "out"), *words]
        )
        assert result.exit_code != 0
        assert said in result.output


def test_a_crawl_of_images_says_of_videos_that_they_are_none(films, tmp_path):
    report = crawl_shards(
        [str(films)], tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None
    )
    assert report.counts.rejected == {"not_an_image": 8}
    (plan,) = read_plans(open_store(tmp_path / "out"))
    assert "av" not in plan.record.builds
    assert os.path.exists(tmp_path / "out" / "DATASET.json")  # noqa: PTH110


def test_one_film_is_no_source_and_without_PyAV_one_sentence_says_so(films, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"long\.mkv is a video: give its folder"):
        crawl_videos(films / "red" / "long.mkv", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="video needs PyAV: pip install"):
        crawl_videos(films, tmp_path / "out")
