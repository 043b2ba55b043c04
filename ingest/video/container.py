"""Opening audio-visual bytes of strangers without what FFmpeg would do for them.

FFmpeg guesses formats, and some of them name other files, hosts or ports: a list of 36 bytes opens a file of
this machine, a text of the SDP format listens on the network. So the container is recognised here, by its
first bytes, and FFmpeg may take that format only, from memory only, with no protocol at all.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cluster.errors import UserError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

# What FFmpeg calls the demuxer of each container that is recognised.
CONTAINERS = {"mp4": "mov", "matroska": "matroska", "avi": "avi", "ogg": "ogg", "mpegts": "mpegts"}
VIDEO_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "theora"})
AUDIO_CODECS = frozenset(
    {"aac", "mp3", "opus", "vorbis", "flac", "ac3", "mp2"}
    | {"pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_u8"}
)
# The decoders of these, as FFmpeg calls them: no other is opened, neither to decode nor to look at a stream.
_DECODERS = VIDEO_CODECS | AUDIO_CODECS | {"libdav1d", "mp3float", "mp2float", "libopus"}
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,mpegts"
MAX_PIXELS = 1 << 26
# FFmpeg counts widths that are rounded up to 64, of at most 65,536 lines, and what decoders keep around a
# picture: so much is added to what it is told. What a stream claims, and what comes out, is counted exactly.
_ROOM_PIXELS = 64 * 65_536
_QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_TS_PACKET = 188
_BEGINNING = 2 * _TS_PACKET + 1
_FAILURES = frozenset({"damaged", "truncated", "memory_limit"})


class MediaError(Exception):
    """These bytes are no clip that can be used.

    Attributes:
        reason: one word for the row and the statistics.
        status: "rejected", we do not want it; or "failed", it could not be read.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status: Literal["rejected", "failed"] = "failed" if reason in _FAILURES else "rejected"


class Streams(NamedTuple):
    """What is used of a container: its first picture and its first sound."""

    video: "VideoStream"
    audio: "AudioStream | None"

    @property
    def both(self) -> "list[Stream]":
        """Those that there are."""
        return [self.video] if self.audio is None else [self.video, self.audio]


def pyav() -> Any:
    """PyAV.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError("video needs PyAV: pip install 'av>=18,<20'") from error
    except ImportError as error:
        raise UserError(
            f"video needs PyAV, which cannot be imported ({error}): "
            "pip install --force-reinstall 'av>=18,<20'"
        ) from error
    return av


def library_versions() -> dict[str, str]:
    """Versions of what makes packets and pixels.

    Raises:
        UserError: PyAV is not installed.
    """
    av = pyav()
    numbers = {name: av.library_versions[name] for name in ("libavformat", "libavcodec")}
    return {"av": av.__version__} | {name: ".".join(map(str, number)) for name, number in numbers.items()}


def sniff_container(data: bytes) -> str | None:
    """The container by its first bytes, a key of `CONTAINERS`; None if it is none of them."""
    if data[4:8] in _QUICKTIME:
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith(b"OggS"):
        return "ogg"
    if len(data) > 2 * _TS_PACKET and data[0] == data[_TS_PACKET] == data[2 * _TS_PACKET] == 0x47:
        return "mpegts"
    return None


@contextmanager
def open_media(
    data: bytes | io.BufferedIOBase, *, max_pixels: int = MAX_PIXELS
) -> Iterator["InputContainer"]:
    """The container in these bytes, or in this file, to be read on one thread.

    Args:
        max_pixels: of a frame; a decoder refuses many more before it takes memory for them, also while FFmpeg
            looks at the streams.

    Raises:
        MediaError: `not_a_video` if no container is recognised, `damaged` if it cannot be read.
        UserError: PyAV is not installed.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    kind = sniff_container(file.read(_BEGINNING))
    file.seek(0)
    if kind is None:
        raise MediaError("not_a_video")
    av = pyav()
    most_pixels = str(max_pixels + _ROOM_PIXELS)
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "none",
        "codec_whitelist": ",".join(sorted(_DECODERS)),
        # Of decoders: FFmpeg opens some to learn what a stream is.
        "max_pixels": most_pixels,
        "threads": "1",
    }
    try:
        container = av.open(file, "r", format=CONTAINERS[kind], options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise MediaError("damaged") from error
    with container:
        for stream in container.streams:
            context = getattr(stream, "codec_context", None)
            if context is not None:
                # Bit-exact: the same pixels on every processor.
                context.options = {"max_pixels": most_pixels, "flags": "+bitexact"}
                context.thread_count = 1
                context.thread_type = "NONE"
        yield container


def streams_of(container: "InputContainer", *, max_pixels: int = MAX_PIXELS) -> Streams:
    """The streams that are used; FFmpeg drops the packets of all others.

    Raises:
        MediaError: there is no picture, it claims too many pixels, or a codec is not one that is opened.
    """
    from av.stream import Discard, Disposition

    # The cover of an album is a stream, too.
    pictures = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    sounds = list(container.streams.audio)
    if not pictures:
        raise MediaError("no_video")
    video, audio = pictures[0], sounds[0] if sounds else None
    for stream in container.streams:
        if stream is not video and stream is not audio:
            stream.discard = Discard.all
    if _codec(video) not in VIDEO_CODECS or (audio is not None and _codec(audio) not in AUDIO_CODECS):
        raise MediaError("codec_not_allowed")
    if video.width * video.height > max_pixels:
        raise MediaError("too_many_pixels")
    return Streams(video, audio)


def _codec(stream: "Stream") -> str:
    context = stream.codec_context
    return "" if context is None else context.codec.canonical_name
