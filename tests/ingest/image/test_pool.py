"""Processes that check images: what takes too much time or memory, or kills, costs one row."""

import os
import time

import psutil
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from ingest.image.channel import SHARED_BYTES
from ingest.image.check import Treatment, check
from ingest.image.check_pool import Checker
from ingest.problem import Problem


def checked(images, *, workers=1, seconds=10.0, memory_mb=768):
    with Checker(Treatment(), workers=workers, seconds=seconds, memory_mb=memory_mb) as checker:
        return [
            (token, verdict.status, verdict.reason) for token, _, verdict in checker.run(enumerate(images))
        ]


@pytest.mark.slow
def test_D4_an_image_that_takes_too_long_costs_one_row(scene, encode, gif_of_comments):
    good = encode(scene(), "PNG")
    started = time.monotonic()
    assert checked([good, good, gif_of_comments, good], seconds=2.0) == [
        (0, "kept", ""),
        (1, "kept", ""),
        (2, "failed", "time_limit"),
        (3, "kept", ""),
    ]
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("kind", ["PNG", "AVIF"])
def test_D4_an_image_that_takes_too_much_memory_costs_one_row(kind, scene, encode, huge):
    if kind == "AVIF":
        if not features.check("avif"):
            pytest.skip("this Pillow was built without AVIF")
        huge = encode(Image.new("RGB", (4000, 4000)), "AVIF", speed=10)
    good = encode(scene(), "PNG")
    assert checked([good, huge, good], memory_mb=40) == [
        (0, "kept", ""),
        (1, "failed", "memory_limit"),
        (2, "kept", ""),
    ]


def test_images_and_what_is_made_of_them_may_be_larger_than_the_shared_memory(scene, encode):
    noise = Image.frombytes("RGB", (1000, 1000), os.urandom(3_000_000))
    described = PngInfo()
    described.add_text("Comment", "words")
    images = [encode(noise, "PNG", compress_level=0, pnginfo=described), encode(scene(), "PNG")]
    assert len(images[0]) > SHARED_BYTES
    with Checker(Treatment(), workers=1, seconds=10, memory_mb=768) as checker:
        verdicts = [verdict for _, _, verdict in checker.run(enumerate([*images, *images]))]
    assert [verdict.data for verdict in verdicts] == [
        check(each, Treatment()).data for each in [*images, *images]
    ]
    assert len(verdicts[0].data) > SHARED_BYTES


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Checkers that abort, as a crashing decoder would, on images that begin with these bytes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\n"
        "from ingest.image import check as image\n"
        "def check(data, treatment, real=image.check):\n"
        "    return os.abort() if data.startswith(b'DEADLY') else real(data, treatment)\n"
        "image.check = check\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return b"DEADLY"


def test_D4_an_image_that_kills_its_checker_costs_one_row(deadly, scene, encode, caplog):
    good = encode(scene(), "PNG")
    results = checked([deadly, good, b"text", deadly, Problem("failed", "io_error"), good], workers=2)
    assert [reason for _, _, reason in results] == [
        "worker_died",
        "",
        "not_an_image",
        "worker_died",
        "io_error",
        "",
    ]
    assert "kills its checker: exit status -6" in caplog.text


@pytest.mark.slow
def test_D1_checkers_killed_from_outside_change_nothing(scene, encode):
    images = [encode(scene(number, 200, 150), "PNG") for number in range(160)]
    results, killed, before = [], 0, set(psutil.Process().children())
    with Checker(Treatment(resize=100), workers=2, seconds=60, memory_mb=768) as checker:
        for token, _, verdict in checker.run(enumerate(images)):
            results.append((token, verdict.status))
            if token % 40 == 20:
                (set(psutil.Process().children()) - before).pop().kill()
                killed += 1
    assert results == [(number, "kept") for number in range(160)]
    assert killed == 4


@pytest.mark.slow
def test_D1_a_machine_that_stands_still_fails_no_image(scene, encode):
    images = [encode(scene(number, 200, 150), "PNG") for number in range(160)]
    verdicts, before = [], set(psutil.Process().children())
    with Checker(Treatment(resize=100), workers=1, seconds=0.2, memory_mb=768) as checker:
        for token, _, verdict in checker.run(enumerate(images)):
            verdicts.append((verdict.status, verdict.reason))
            if token % 20 == 10:
                (child,) = set(psutil.Process().children()) - before
                child.suspend()
                time.sleep(0.4)  # longer than an image may take
                child.resume()
    assert verdicts == [("kept", "")] * 160


def test_checkers_that_cannot_start_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no room')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)die before their first image: exit status 1.*no room"):
        checked([b"x"])


def test_checkers_end_with_an_error_in_the_caller(scene, encode):
    before = set(psutil.Process().children())
    good = encode(scene(), "PNG")
    with (
        pytest.raises(ZeroDivisionError),
        Checker(Treatment(), workers=2, seconds=10, memory_mb=768) as checker,
    ):
        for _ in checker.run((number, good) for number in range(1000)):
            raise ZeroDivisionError
    assert set(psutil.Process().children()) == before


def test_reorder_buffer_is_bounded(scene, encode):
    read = 0

    def rows():
        nonlocal read
        for number in range(5000):
            read += 1
            yield number, b"text"

    with Checker(Treatment(), workers=2, seconds=10, memory_mb=768) as checker:
        for number, _, _ in checker.run(rows()):
            assert read - number <= 64 * 6


def test_rows_that_come_slowly_do_not_wait_for_a_whole_batch(monkeypatch):
    monkeypatch.setattr("ingest.image.check_pool._BATCH_SECONDS", 0.0)  # as if each came after the time
    read = 0

    def rows():
        nonlocal read
        for number in range(300):
            read += 1
            yield number, b"text"

    with Checker(Treatment(), workers=2, seconds=10, memory_mb=768) as checker:
        answers = [number for number, _, _ in checker.run(rows()) if read - number <= 3 * 2]
    assert answers == list(range(300))
