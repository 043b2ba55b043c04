"""Opening audio-visual bytes of strangers without what FFmpeg would do for them.

FFmpeg guesses formats, and some of them name other files, hosts or ports: a list of 36 bytes opens a file of
this machine, a text of the SDP format listens on the network. So the container is recognised here, by its
first bytes, and FFmpeg may take that format only, from memory only, with no protocol at all.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer

# What FFmpeg calls the demuxer of each container that is recognised.
CONTAINERS = {"mp4": "mov", "matroska": "matroska", "avi": "avi", "ogg": "ogg", "mpegts": "mpegts"}
VIDEO_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "theora"})
AUDIO_CODECS = frozenset({"aac", "mp3", "opus", "vorbis", "flac", "ac3", "mp2"})
_QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_TS_PACKET = 188


class MediaError(Exception):
    """These bytes are no clip that can be used; `reason` is one word of the dataset's list."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
def open_media(data: bytes, *, max_pixels: int = 1 << 26) -> Iterator["InputContainer"]:
    """The container in these bytes, to be read on one thread.

    Args:
        max_pixels: of a frame; a decoder refuses more before it takes memory for them.

    Raises:
        MediaError: `not_a_video` if no container is recognised, `damaged` if it cannot be read.
        UserError: if PyAV is not installed.
    """
    kind = sniff_container(data)
    if kind is None:
        raise MediaError("not_a_video")
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError("video needs PyAV: pip install 'av>=18,<20'") from error
    options = {
        "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,mpegts",
        "protocol_whitelist": "none",
    }
    try:
        container = av.open(io.BytesIO(data), "r", format=CONTAINERS[kind], options=options)
    except (av.FFmpegError, ValueError) as error:
        raise MediaError("damaged") from error
    with container:
        for stream in container.streams:
            context = getattr(stream, "codec_context", None)
            if context is not None:
                context.options = {"max_pixels": str(max_pixels)}
                context.thread_count = 1
                context.thread_type = "NONE"
        yield container
