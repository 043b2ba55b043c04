"""D4: pictures that take long to decode, by their scans, or in any other way."""

import contextlib
import io
import signal
import struct
import threading
import time

import pytest
from PIL import Image

from ingest.image import decode as decoding
from ingest.image.check import Treatment, check
from ingest.image.decode import ImageError, ImageLimits, decode
from ingest.image.header import jpeg_scans


@pytest.fixture(scope="module")
def progressive() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((640, 480), 50).convert("RGB").save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


def repeated(data: bytes, times: int) -> bytes:
    """The JPEG with its last scan once more, so many times."""
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[table:-2] * times + data[-2:]


def why_not(data: bytes) -> str:
    with pytest.raises(ImageError) as error:
        decode(data)
    return error.value.reason


def test_D4_a_jpeg_of_too_many_scans_is_rejected_before_any_decoder(scan_bomb, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    started = time.thread_time()
    for treatment in (Treatment(), Treatment(resize=100), Treatment(phash=False)):
        verdict = check(scan_bomb, treatment)
        assert (verdict.status, verdict.reason, verdict.format) == ("rejected", "too_many_scans", "jpeg")
    assert why_not(scan_bomb) == "too_many_scans"
    assert time.thread_time() - started < 1


@pytest.mark.parametrize(("size", "most"), [((8000, 8000), 32), ((4000, 4000), 128), ((100, 50), 31_250)])
def test_D4_the_largest_picture_may_have_32_scans_and_a_smaller_one_more(size, most):
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    assert not decoding._has_too_many_scans(b"\xff\xd8" + scan * most, size, ImageLimits())
    assert decoding._has_too_many_scans(b"\xff\xd8" + scan * (most + 1), size, ImageLimits())


def test_a_jpeg_of_one_scan_has_one_whatever_follows(scene, encode):
    data = encode(scene(), "JPEG")
    scan = data[data.index(b"\xff\xda") :]
    assert jpeg_scans(data, most=100) == jpeg_scans(data[:-2] + scan * 50, most=100) == 1


@pytest.mark.parametrize("progressive", [False, True])
def test_D4_scans_for_each_colour_are_counted(progressive, scene, encode):
    """Also of a picture that is not progressive: it is kept in memory as one that is."""
    data = bytearray(encode(scene(), "JPEG", progressive=progressive))
    first = data.index(b"\xff\xda")
    one = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + b"\x55" * 20
    assert jpeg_scans(bytes(data[:first] + one * 7) + b"\xff\xd9", most=100) == 7


def test_scans_are_counted_as_libjpeg_meets_them(progressive):
    own = jpeg_scans(progressive, most=0)
    assert own == 1  # more than none; no further
    own = jpeg_scans(progressive, most=1000)
    assert 8 <= own <= 12
    assert jpeg_scans(repeated(progressive, 5), most=1000) == own + 5
    # What lies within a segment, or behind the end, is none: thumbnails, films behind a phone's pictures.
    hidden = b"\xff\xe5" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    assert jpeg_scans(progressive[:2] + hidden + progressive[2:] + b"\xff\xda" * 200, most=100) == own
    # Fill bytes before a mark are part of it, and FF 00 and restart marks are data.
    inside = b"\xff\x00\xff\xd0\xff\xff\xda\0\2\xff\x00"
    assert jpeg_scans(progressive[:-2] + inside + progressive[-2:], most=own) == own + 1


@pytest.mark.parametrize(
    "part", [b"\xff\xda\0\2", b"\xff\xe0\0\2", b"\xff\xd0", b"\xff", b"\xff\xda\xff\xff", b"\xff\0"]
)
def test_D4_scans_are_counted_in_bounded_time(part):
    data = b"\xff\xd8" + b"\xff\xda" * 40 + part * ((8 << 20) // len(part))
    started = time.thread_time()
    jpeg_scans(data, most=32)
    jpeg_scans(data, most=31_250)
    assert time.thread_time() - started < 1


def test_D4_a_jpeg_of_two_sizes_is_not_decoded(progressive, monkeypatch):
    """libjpeg takes the first, Pillow the last."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    frame = progressive.index(b"\xff\xc2")
    length = int.from_bytes(progressive[frame + 2 : frame + 4], "big")
    second = bytearray(progressive[frame : frame + 2 + length])
    second[5:9] = struct.pack(">HH", 8, 8)
    assert (
        why_not(
            progressive[:frame]
            + progressive[frame : frame + 2 + length]
            + second
            + progressive[frame + 2 + length :]
        )
        == "undecodable"
    )


@pytest.fixture
def slow(monkeypatch) -> bytes:
    """Long enough for a clock, and without end within Python, whatever Pillow is installed."""
    real = decoding.open_image

    def endless(data, limits):
        while data.startswith(b"slow"):
            # As Pillow's plugins do with what they cannot read.
            with contextlib.suppress(ValueError):
                data.index(b"end")
        return real(data, limits)

    monkeypatch.setattr(decoding, "open_image", endless)
    return b"slow" + bytes(decoding._SHORT)


def test_D4_a_picture_that_takes_too_long_ends(slow, monkeypatch, progressive):
    monkeypatch.setattr(decoding, "SECONDS", 0.2)
    started = time.thread_time()
    assert why_not(slow) == "time_limit"
    assert time.thread_time() - started < 2
    assert decode(progressive).size == (640, 480)


def test_the_clock_stops_with_the_picture(slow, monkeypatch, progressive):
    monkeypatch.setattr(decoding, "SECONDS", 0.05)
    for data in (slow, progressive):
        with contextlib.suppress(ImageError):
            decode(data)
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_who_counts_the_time_already_goes_on_doing_so(monkeypatch, progressive):
    heard = []
    before = signal.signal(signal.SIGPROF, lambda *_: heard.append(1))
    monkeypatch.setattr(decoding, "SECONDS", 0.0)
    monkeypatch.setattr(decoding, "_SHORT", 0)
    signal.setitimer(signal.ITIMER_PROF, 0.001)
    while not heard:
        decode(progressive)
    signal.signal(signal.SIGPROF, before)


def test_other_threads_decode_without_a_clock(progressive):
    sizes = []
    thread = threading.Thread(target=lambda: sizes.append(decode(progressive).size))
    thread.start()
    thread.join()
    assert sizes == [(640, 480)]
