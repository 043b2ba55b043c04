"""The crawl as a whole: same bytes whatever happens on the way, every attempt accounted for."""

import errno
import gc
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset, sealed_units
from ingest.image.check import Treatment
from ingest.image.decode import ImageLimits
from ingest.plan.settings import CrawlSettings
from ingest.store.posix import PosixStore

UNIT_ROWS = 4


def dataset_bytes(output):
    """Every file that readers can see, and its bytes."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.parent.parent.name != "plan"
    }


def rows_of(output, root):
    metas = sealed_units(output, root)["meta"].to_pylist()
    return [row for meta in metas for row in pq.read_table(output / meta).to_pylist()]


def whole(output):
    """The dataset's root, after every name that its seal reaches was found whole."""
    opened = open_dataset(output)
    for unit in sealed_units(output, opened.root).to_pylist():
        for kind in ("shard", "meta"):
            data = (output / unit[kind]).read_bytes()
            assert len(data) == unit[f"{kind}_bytes"]
            assert hashlib.sha256(data).digest() == unit[f"{kind}_sha256"]
    return opened.root


@pytest.mark.slow
@pytest.mark.parametrize("treatment", [Treatment(), Treatment(resize=12)])
def test_D1_same_bytes_for_any_number_of_workers(treatment, tmp_path, folder, crawl):
    source = folder(count=30)
    outputs = [tmp_path / str(workers) for workers in (1, 2, 5)]
    roots = {
        crawl([source], output, workers=workers, unit_rows=7, treatment=treatment).root
        for output, workers in zip(outputs, (1, 2, 5), strict=True)
    }
    assert len(roots) == 1
    first, *others = [dataset_bytes(output) for output in outputs]
    assert others == [first, first]
    assert len([name for name in first if name.endswith(".tar")]) == 5


def test_D1_a_tar_and_a_folder_of_the_same_files_hold_the_same_images(tmp_path, folder, crawl):
    source = folder(count=6)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.*"))
    subprocess.run(["tar", "-czf", tmp_path / "x.tar.gz", "-C", source, *names], check=True)
    reports = [crawl([given], tmp_path / f"{given.name}.out") for given in (source, tmp_path / "x.tar.gz")]
    rows = [rows_of(report.output, report.root) for report in reports]
    for columns in (("sha256", "phash", "status", "slot", "offset", "labels"), ("width", "reason", "format")):
        assert [[row[name] for name in columns] for row in rows[0]] == [
            [row[name] for name in columns] for row in rows[1]
        ]
    assert rows[1][0]["url"] == f"x.tar.gz/{names[0]}"
    assert rows[0][0]["url"] == f"pictures/{names[0]}"


def test_sources_are_joined_in_the_order_given(tmp_path, folder, crawl):
    report = crawl([folder("b", 3), folder("a", 3)], tmp_path / "out", unit_rows=3)
    urls = [row["url"] for row in rows_of(report.output, report.root)]
    assert [url[0] for url in urls] == ["b"] * 4 + ["a"] * 4


def test_a_crawl_leaves_the_collector_of_cycles_as_it_was(tmp_path, folder, crawl):
    before = gc.get_threshold(), gc.get_freeze_count()
    crawl([folder()], tmp_path / "out")
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_second_run_changes_nothing(tmp_path, folder, crawl):
    source = folder()
    first = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = crawl([source], tmp_path / "out", unit_rows=UNIT_ROWS)
    assert second.root == first.root
    assert (second.counts.resumed, second.counts.bytes_read) == (11, 0)
    assert (second.counts.kept, second.counts.rejected) == (first.counts.kept, first.counts.rejected)
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_D2_every_attempt_has_a_row_and_a_reason(tmp_path, folder, crawl):
    source = folder(count=8)
    (source / "dog" / "empty.png").write_bytes(b"")
    (source / "dog" / "cut.png").write_bytes((source / "cat" / "004.png").read_bytes()[:300])
    (source / "dog" / "gone.jpg").symlink_to(source / "nothing")
    (source / "dog" / "large.jpg").write_bytes(b"\xff\xd8\xff" + b"\0" * 5000)
    told = []
    report = crawl_shards(
        [str(source)],
        tmp_path / "out",
        CrawlSettings(unit_rows=5, treatment=Treatment(limits=ImageLimits(max_bytes=5000))),
        workers=2,
        progress=lambda counts: told.append((counts.planned, counts.done, counts.units_done)),
    )
    counts = report.counts
    assert (
        counts.planned == counts.done == counts.kept + counts.rejected.total() + counts.failed.total() == 13
    )
    assert counts.rejected == {"not_an_image": 1, "empty": 1, "too_many_bytes": 1}
    assert counts.failed == {"truncated": 1, "io_error": 1}
    rows = rows_of(tmp_path / "out", report.root)
    assert len(rows) == len({row["url"] for row in rows}) == 13
    assert {row["url"].rpartition("/")[2]: row["reason"] for row in rows if row["status"] != "kept"} == {
        "cut.png": "truncated",
        "empty.png": "empty",
        "gone.jpg": "io_error",
        "large.jpg": "too_many_bytes",
        "note.jpg": "not_an_image",
    }
    assert [row["url"] for row in rows if row["retryable"]] == ["pictures/dog/gone.jpg"]
    assert told[-1] == (13, 13, 3)
    assert all(before[1] <= after[1] for before, after in pairwise(told))


def test_output_inside_a_source_is_refused(tmp_path, folder, crawl):
    source = folder()
    with pytest.raises(UserError, match="lies inside the source"):
        crawl([source], source / "out")
    with pytest.raises(UserError, match="at least one source"):
        crawl([], tmp_path / "out")


def test_output_that_cannot_be_written_is_told_and_gone_on_with(tmp_path, folder, crawl, monkeypatch):
    source = folder()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*file/out: not a directory; mend that, then run"):
        crawl([source], tmp_path / "file" / "out")
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(PosixStore, "create_if_absent", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"cannot write .*out: no space left on device"):
            crawl([source], tmp_path / "out")
    assert crawl([source], tmp_path / "out").counts.kept == 10


def crawl_with_death_at(step, source, output):
    """Crawl in a child that SIGKILLs itself at its step-th visible act; returns whether it lived on."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        acts = 0

        def act(*_):
            nonlocal acts
            acts += 1
            if acts == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor, real=os.fsync):
            act()
            real(descriptor)
            act()

        visible = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "subprocess.Popen"}
        os.fsync = fsync
        sys.addaudithook(lambda event, _: act() if event in visible else None)
        settings = CrawlSettings(unit_rows=UNIT_ROWS)
        crawl_shards([str(source)], output, settings, workers=1, progress=lambda counts: None)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_D1_D3_killed_at_any_act_then_run_again(tmp_path, folder, crawl):
    source = folder(count=9)
    expected = crawl([source], tmp_path / "whole", unit_rows=UNIT_ROWS)
    lived, deaths, step = False, 0, 1
    while not lived:
        output = tmp_path / f"killed-{step}"
        lived = crawl_with_death_at(step, source, output)
        deaths += not lived
        try:
            assert whole(output) == expected.root
        except UserError:
            assert not lived
        assert crawl([source], output, unit_rows=UNIT_ROWS).root == expected.root
        assert whole(output) == expected.root
        assert dataset_bytes(output) == dataset_bytes(tmp_path / "whole")
        step += 5
    assert deaths > 20


def start(source, output, *, workers=2):
    program = (
        "import sys\n"
        "from ingest.plan.settings import CrawlSettings\n"
        "from ingest.crawl.crawl import crawl_shards\n"
        "crawl_shards(sys.argv[1:2], sys.argv[2], CrawlSettings(unit_rows=40), workers=int(sys.argv[3]),"
        " progress=lambda counts: None)"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(source), str(output), str(workers)])


@pytest.mark.slow
def test_D1_killed_at_random_moments_until_done(tmp_path, folder, crawl):
    source = folder(count=400)
    expected = crawl([source], tmp_path / "whole", unit_rows=40)
    output = tmp_path / "out"
    checkers = []
    for delay in (0.0, 0.03, 0.1):
        process, before = start(source, output), len(list(output.glob("commits/*.json")))
        # Not while it starts: the first new commit is when its writes begin.
        while process.poll() is None and len(list(output.glob("commits/*.json"))) == before:
            time.sleep(0.005)
        time.sleep(delay)
        checkers += psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
    _, orphans = psutil.wait_procs(checkers, timeout=30)
    assert orphans == []
    assert crawl([source], output, unit_rows=40).root == expected.root
    assert dataset_bytes(output) == dataset_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_D1_D3_two_crawls_of_one_output_at_once(tmp_path, folder, crawl):
    source = folder(count=120)
    expected = crawl([source], tmp_path / "whole", unit_rows=40)
    output = tmp_path / "out"
    processes = [start(source, output, workers=1) for _ in range(2)]
    roots = set()
    while any(process.poll() is None for process in processes):
        if (output / "DATASET.json").exists():
            roots.add(whole(output))
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0]
    assert roots | {whole(output)} == {expected.root}
    assert dataset_bytes(output) == dataset_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_D4_hostile_sources_end_as_rows(tmp_path, scene, encode, crawl, scan_bomb, gif_of_comments, huge):
    source = tmp_path / "in"
    source.mkdir()
    png = bytearray(encode(scene(), "PNG"))
    struct.pack_into(">II", png, 16, 50_000, 50_000)
    jpeg = encode(scene(), "JPEG")
    hostile = {
        "bomb.png": bytes(png),
        "scans.jpg": scan_bomb,
        "slow.gif": gif_of_comments,
        "huge.png": huge,
        "page.jpg": b"<html><script>alert(1)</script></html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "zip.jpg": jpeg + b"PK\3\4" + b"\0" * 100,
        "script.gif": b"GIF89a/*" + b"A" * 100 + b"*/=1;alert(1)",
        "nothing.png": b"",
    }
    for name, data in hostile.items():
        (source / name).write_bytes(data)
    os.mkfifo(source / "pipe.jpg")
    (source / "passwd.jpg").symlink_to("/etc/passwd")
    with (source / "endless.jpg").open("wb") as file:
        file.truncate(1 << 40)
    scene().save(os.fsencode(source) + b"/caf\xe9\n.png", "PNG")
    report = crawl([source], tmp_path / "out", workers=2, seconds=2.0, memory_mb=60)
    rows = rows_of(tmp_path / "out", report.root)
    assert {row["url"].removeprefix("in/"): row["reason"] for row in rows} == {
        "bomb.png": "too_many_pixels",
        "caf\\xe9\n.png": None,
        "cut.jpg": "truncated",
        "endless.jpg": "too_many_bytes",
        "huge.png": "memory_limit",
        "nothing.png": "empty",
        "page.jpg": "not_an_image",
        "passwd.jpg": "link_outside",
        "pipe.jpg": "not_a_file",
        "script.gif": "too_many_pixels",
        "scans.jpg": "too_many_scans",
        "slow.gif": "time_limit",
        "zip.jpg": None,
    }
    assert json.loads((tmp_path / "out" / "DATASET.json").read_bytes())["sealed"] == report.root


def test_nothing_is_written_beside_the_output(tmp_path, folder, crawl):
    source = folder()
    crawl([source], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.slow
def test_D4_files_as_large_as_may_be_fit_into_the_least_memory_that_may_be_given(tmp_path, crawl):
    source = tmp_path / "in"
    source.mkdir()
    (source / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes((100 << 20) - 8))
    treatment = Treatment(limits=ImageLimits(max_bytes=100 << 20))
    with pytest.raises(UserError, match=r"--memory-mb 115 cannot hold .* give at least --memory-mb 116,"):
        crawl([source], tmp_path / "out", treatment=treatment, memory_mb=115)
    report = crawl([source], tmp_path / "out", treatment=treatment, memory_mb=116)
    assert report.counts.failed.total() == 1
