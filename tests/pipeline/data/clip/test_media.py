"""What is decoded of a video: the pictures and the sound of the moments that were asked for."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ingest.video.container import MediaError
from ingest.video.watch import Bounds, watch
from pipeline.data.clip import media as media_module
from pipeline.data.clip import pictures as pictures_module
from pipeline.data.clip.media import opened
from pipeline.data.clip.pictures import pictures
from pipeline.data.clip.sound import waveform
from pipeline.data.clip.windows import frame_times
from pipeline.data.reader import BadSampleError
from tests.clips import clip_bytes
from tests.ingest.video.hostile import PLAYLISTS, larger_than_said, turned, uneven

# Pictures of one grey each, which tells their number.
GREYS = 12


def grey_clip(codec: str, container: str, *, times: list[int] | None = None, **options: str) -> bytes:
    """Picture k is grey, in `GREYS` steps; at every twentieth of a second, or those in `times`. No sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 20)
        stream.options = options
        for number, time in enumerate(times or range(GREYS * 2)):
            pixels = np.full((32, 32, 3), 40 + 16 * (number % GREYS), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 20)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def numbers_at(data: bytes, times: list[float]) -> list[int]:
    """Which of the grey pictures is shown at each moment after the first."""
    with opened(data, video=True, audio=False) as media:
        assert media.video is not None
        shown = pictures(media.video, np.array(times) + media.span.begin)
        return [round((float(np.asarray(image).mean()) - 40) / 16) for image in shown]


CODECS = [
    ("libx264", "mp4", {"g": "12", "bf": "3"}),
    ("libx264", "mp4", {"x264-params": "open-gop=1:keyint=8:bframes=2:scenecut=0"}),
    ("libx264", "matroska", {"g": "250", "bf": "3"}),
    ("libx264", "mpegts", {"g": "6"}),
    ("libx265", "mp4", {"x265-params": "log-level=none:keyint=8:pools=1:frame-threads=1"}),
    ("mpeg4", "avi", {"g": "12", "bf": "2"}),
    ("libx264", "avi", {"g": "12", "bf": "2"}),
    ("libvpx", "ogg", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
    ("libvpx-vp9", "webm", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
]


@pytest.mark.parametrize(("codec", "container", "options"), CODECS)
def test_the_picture_of_a_moment_is_the_last_one_up_to_it(
    codec: str, container: str, options: dict[str, str]
) -> None:
    data = grey_clip(codec, container, **options)
    moments = [0.0, 0.06, 0.24, 0.51, 0.56, 0.58, 1.01, 1.16]
    expected = [round(moment * 20 - 0.499) % GREYS for moment in moments]
    assert numbers_at(data, moments) == expected


@pytest.mark.parametrize(("codec", "container", "options"), CODECS[:3])
def test_pictures_that_nobody_needs_are_left_out_without_a_trace(
    codec: str, container: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clip_bytes(3, seconds=2.0, video=codec, container=container, keyframe_every=32)

    def shown() -> list[Image.Image]:
        with opened(data, video=True, audio=False) as media:
            assert media.video is not None
            return list(pictures(media.video, np.arange(0.7, 1.2, 0.11)))

    fast, plain = shown(), pictures_module._decoded
    monkeypatch.setattr(pictures_module, "_decoded", lambda *whole, skip: plain(*whole, skip=False))
    assert [image.tobytes() for image in fast] == [image.tobytes() for image in shown()]


def test_pictures_of_a_variable_rate_are_chosen_by_time() -> None:
    data = grey_clip("libx264", "matroska", times=[0, 1, 2, 10, 11, 30, 31], g="3")
    assert numbers_at(data, [0.0, 0.07, 0.3, 0.49, 0.52, 0.57, 1.4, 1.56]) == [0, 1, 2, 2, 3, 4, 4, 6]


def test_a_rotated_video_is_shown_upright() -> None:
    data = bytearray(clip_bytes(0, seconds=0.5, size=(64, 48), audio=None))
    place = data.find(b"tkhd") + 4 + 4 + 36  # version and flags, then what comes before the matrix
    quarter = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4").tobytes()
    assert np.frombuffer(bytes(data[place : place + 4]), ">i4")[0] == 0x10000
    data[place : place + 36] = quarter

    def first(of: bytes) -> Image.Image:
        with opened(of, video=True, audio=False) as media:
            assert media.video is not None
            return next(pictures(media.video, np.array([0.0])))

    plain, turned = first(clip_bytes(0, seconds=0.5, size=(64, 48), audio=None)), first(bytes(data))
    assert turned.size == (48, 64)
    assert turned.tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_half_a_turn_and_times_before_zero() -> None:
    def first(data: bytes) -> Image.Image:
        with opened(data, video=True, audio=True) as media:
            assert media.video is not None
            return next(pictures(media.video, np.array([media.span.begin])))

    assert (
        first(turned(180)).tobytes() == first(clip_bytes(2)).transpose(Image.Transpose.ROTATE_180).tobytes()
    )
    assert first(uneven()).size == (64, 48)


def with_sound(
    wave: NDArray[Any], codec: str, container: str, layout: str, rate: int, **options: str
) -> bytes:
    """One small picture, and a wave of float32 (samples, channels)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        picture = out.add_stream("mpeg4", rate=1)
        picture.width, picture.height, picture.pix_fmt = 16, 16, "yuv420p"
        stream = out.add_stream(codec, rate=rate, layout=layout)
        stream.options = options
        out.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        out.mux(picture.encode(None))
        resampler = av.AudioResampler(format=stream.codec_context.format.name)
        for start in range(0, len(wave), 1024):
            part = np.ascontiguousarray(wave[start : start + 1024].reshape(1, -1), np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            for converted in resampler.resample(frame):
                out.mux(stream.encode(converted))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def noisy_sound(rate: int, codec: str, container: str, layout: str, **options: str) -> bytes:
    """Two seconds of noise in each channel."""
    noise = np.random.default_rng(1).normal(0, 0.1, (2 * rate, av.AudioLayout(layout).nb_channels))
    return with_sound(noise, codec, container, layout, rate, **options)


def heard(data: bytes, begin: float, samples: int, rate: int) -> NDArray[np.float32]:
    with opened(data, video=False, audio=True) as media:
        assert media.audio is not None
        return waveform(media.audio, media.span, begin, samples=samples, rate=rate)


@pytest.mark.parametrize(
    ("codec", "rate", "layout", "options"),
    [
        ("aac", 44_100, "stereo", {"aac_pns": "0"}),
        ("aac", 48_000, "mono", {"aac_pns": "0"}),
        ("flac", 44_100, "stereo", {}),
        ("flac", 22_050, "7.1", {}),
        ("libopus", 48_000, "stereo", {}),
    ],
)
def test_a_cut_of_the_sound_is_a_part_of_the_whole(
    codec: str, rate: int, layout: str, options: dict[str, str]
) -> None:
    """Sample by sample, wherever it begins: it is resampled on the same grid."""
    data = noisy_sound(rate, codec, "mp4", layout, **options)
    whole = heard(data, 0.0, 40_000, 24_000)
    for first in (3, 4_801, 13_337, 30_000):
        cut = heard(data, (first + 0.5) / 24_000, 5_000, 24_000)
        error = (cut - whole[first : first + 5_000]).std() / cut.std()
        # Opus fills bands with noise that depends on what was decoded before.
        assert error == 0 if codec == "flac" else error < {"aac": 1e-5, "libopus": 0.1}[codec]


def test_a_container_that_rounds_times_moves_the_sound_by_a_millisecond_at_most() -> None:
    data = noisy_sound(44_100, "flac", "matroska", "mono")
    whole, cut = heard(data, 0.0, 40_000, 44_100), heard(data, 0.5, 5_000, 44_100)
    assert any(np.array_equal(cut, whole[22_050 + by : 27_050 + by]) for by in range(-44, 45))


def test_the_sound_is_where_it_was() -> None:
    """A tone keeps its phase, whatever its rate was; samples of the same rate are the same."""
    time = np.arange(2 * 44_100) / 44_100
    data = with_sound(0.5 * np.sin(2 * np.pi * 440 * time)[:, None], "flac", "mp4", "mono", 44_100)
    moments = 12_345 / 24_000 + np.arange(4_000) / 24_000
    found = heard(data, moments[0] + 1e-6, 4_000, 24_000)
    assert np.abs(found - 0.5 * np.sin(2 * np.pi * 440 * moments)).max() < 2e-3
    noise = np.random.default_rng(2).normal(0, 0.1, (24_000, 1)).astype(np.float32)
    same = heard(with_sound(noise, "flac", "mp4", "mono", 24_000), 0.25 + 1e-6, 6_000, 24_000)
    assert np.abs(same - noise[6_000:12_000, 0]).max() < 1e-4


def test_a_header_that_says_half_the_rate_is_not_believed() -> None:
    data = noisy_sound(44_100, "aac", "mp4", "stereo", aac_pns="0")
    with opened(data, video=False, audio=True) as media:
        assert media.audio is not None
        context = media.audio.stream.codec_context
        half = SimpleNamespace(sample_rate=22_050, decode=context.decode, flush_buffers=context.flush_buffers)
        lying = replace(media.audio, stream=SimpleNamespace(codec_context=half))
        found = waveform(lying, media.span, 0.7, samples=5_000, rate=24_000)
    assert np.array_equal(found, heard(data, 0.7, 5_000, 24_000))


def test_a_video_may_be_looked_at_again_after_its_end() -> None:
    with opened(grey_clip("libx264", "mp4", g="12"), video=True, audio=False) as media:
        assert media.video is not None
        looks = [
            [image.tobytes() for image in pictures(media.video, np.array([0.2, at]))]
            for at in (0.3, 1.19, 0.3)
        ]
    assert looks[0] == looks[2] != looks[1]


def test_channels_are_averaged_and_full_scale_is_one() -> None:
    data = clip_bytes(0, seconds=1.0, rate=24_000, channels=2, volume=0.5, audio="flac", container="matroska")
    found = heard(data, 0.2, 12_000, 24_000)
    assert abs(float(np.abs(found).max()) - 0.5) < 0.01


def test_what_is_above_half_the_new_rate_is_not_heard() -> None:
    """A tone of 13.5 kHz, which 24 kHz would turn to 10.5."""
    tone = 0.9 * np.sin(2 * np.pi * 13_500 * np.arange(48_000) / 48_000)
    found = heard(with_sound(tone[:, None], "flac", "mp4", "mono", 48_000), 0.2, 12_000, 24_000)
    assert 20 * np.log10(float(found.std()) / (tone.std())) < -80


@pytest.mark.parametrize("amplitude", [1e12, 1e30, np.nan])
def test_samples_that_no_sound_has_are_refused_by_the_crawl_and_in_training(amplitude: float) -> None:
    """The power of such is no number."""
    data = with_sound(np.full((12_000, 1), amplitude), "pcm_f32le", "matroska", "mono", 24_000)
    with pytest.raises(BadSampleError, match="louder than any"):
        heard(data, 0.1, 1_000, 8_000)
    with pytest.raises(MediaError, match="damaged"):
        watch(data, Bounds())


def test_a_short_clip_is_repeated() -> None:
    data = clip_bytes(0, seconds=0.5, rate=24_000, audio="flac", container="matroska")
    found = heard(data, 0.0, 30_000, 24_000)
    assert np.array_equal(found[:12_000], found[12_000:24_000])
    moving = grey_clip("libx264", "matroska", times=[0, 1, 2], g="3")
    with opened(moving, video=True, audio=False) as media:
        span = media.span
    times = frame_times(span, span.begin, frames=7, fps=20) - span.begin + 1e-3
    assert numbers_at(moving, times.tolist()) == [0, 1, 2, 0, 1, 2, 0]


def hostile() -> Iterator[tuple[str, Callable[[], bytes]]]:
    whole = clip_bytes(0, seconds=1.0)
    yield "nothing", lambda: b""
    yield "a text", lambda: b"hello " * 100
    for kind, playlist in PLAYLISTS.items():
        yield kind, partial(bytes, playlist)
    yield "pictures that are larger than is said", larger_than_said
    yield "half a file", lambda: whole[: len(whole) // 2]
    yield "only its head", lambda: whole[:64]
    yield (
        "noise behind a head",
        lambda: whole[:32] + bytes(np.random.default_rng(0).integers(0, 256, 9000, np.uint8)),
    )
    yield "no sound", lambda: clip_bytes(0, seconds=1.0, audio=None)
    yield "no picture", lambda: clip_bytes(0, seconds=1.0, video=None)
    yield (
        "a codec of nobody",
        lambda: clip_bytes(0, seconds=1.0, video="ffv1", container="matroska", keyframe_every=1),
    )
    yield "damaged pictures", lambda: damaged(whole)


def damaged(data: bytes) -> bytes:
    broken = bytearray(data)
    start = broken.find(b"mdat") + 200
    broken[start : start + 4000] = b"\xff" * 4000
    return bytes(broken)


@pytest.mark.parametrize(("name", "make"), list(hostile()), ids=[name for name, _ in hostile()])
def test_what_is_no_clip_is_a_bad_sample(name: str, make: Callable[[], bytes]) -> None:
    def all_of_it(data: bytes) -> Any:
        with opened(data, video=True, audio=True) as media:
            assert media.video is not None and media.audio is not None
            begin = media.span.begin
            return (
                list(pictures(media.video, begin + np.arange(8) / 8)),
                waveform(media.audio, media.span, begin, samples=8000, rate=8000),
            )

    with pytest.raises(BadSampleError):
        all_of_it(make())


@pytest.mark.parametrize(
    ("module", "limit"), [(media_module, "_MOST_PACKETS"), (pictures_module, "_MOST_DECODED")]
)
def test_there_is_an_end_to_what_is_read_and_decoded(
    module: ModuleType, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 20)
    with (
        pytest.raises(BadSampleError, match="more than 20"),
        opened(clip_bytes(0, seconds=2.0, keyframe_every=250), video=True, audio=False) as media,
    ):
        assert media.video is not None
        list(pictures(media.video, np.array([1.9])))
