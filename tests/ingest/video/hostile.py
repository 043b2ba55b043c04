"""Files that lie, that name others, or that never end: what strangers may send in place of a clip."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

from tests.clips import clip_bytes

PLAYLISTS = {
    "ffconcat": b"ffconcat version 1.0\nfile ../host/ok.mp4\n" + b"#" * 400,
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "text": b"no film",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(600),
}


def larger_than_said(width: int = 16_000, height: int = 8_000) -> bytes:
    """Motion JPEG: the container says 64 x 48, and the pictures something else."""
    data = bytearray(clip_bytes(video="mjpeg", container="avi", audio="libmp3lame"))
    at = 0
    while (at := data.find(b"\xff\xc0\x00\x11\x08", at + 1)) > 0:
        data[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def repeated(*, pictures: int, fps: int, sounds: int) -> bytes:
    """Two packets, so many times each: at this rate, and for 1024 / 8000 s each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        picture = out.add_stream("mpeg4", rate=fps)
        picture.width, picture.height, picture.pix_fmt, picture.gop_size = 16, 16, "yuv420p", 1
        sound = out.add_stream("aac", rate=8_000, layout="mono")
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
        frame.pts = 0
        (still,) = [*picture.encode(frame), *picture.encode(None)]
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4_096), np.float32), format="flt", layout="mono")
        silence.sample_rate = 8_000
        quiet = [*sound.encode(silence), *sound.encode(None)][-1]
        data, quiet_data = bytes(still), bytes(quiet)
        for stream, content, count, base in (
            (picture, data, pictures, Fraction(1, fps)),
            (sound, quiet_data, sounds, Fraction(1_024, 8_000)),
        ):
            for number in range(count):
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, base, number, number
                packet.duration, packet.is_keyframe = 1, True
                out.mux_one(packet)
    return buffer.getvalue()


def claiming(seconds: float) -> bytes:
    """A Matroska file of two seconds whose header says that it is so long."""
    data = clip_bytes(container="matroska")
    at = data.index(b"\x44\x89\x88") + 3
    return data[:at] + struct.pack(">d", 1_000 * seconds) + data[at + 8 :]


def uneven() -> bytes:
    """Pictures at no fixed rate, the first before zero."""
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(clip_bytes())) as source,
        av.open(buffer, "w", format="matroska", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        copies = [out.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.dts is None:
                continue
            if packet.stream_index == 0:
                late = round((packet.pts * packet.time_base) ** 2 * Fraction(1, 2) / packet.time_base)
                packet.pts, packet.dts = late, late
            packet.stream = copies[packet.stream_index]
            out.mux(packet)
    return buffer.getvalue()


def turned(degrees: int) -> bytes:
    """A clip that is to be shown on its side."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip_bytes(2))) as source, av.open(buffer, "w", format="mp4") as out:
        copies = [out.add_stream_from_template(stream) for stream in source.streams]
        copies[0].set_display_rotation(degrees)
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return buffer.getvalue()


def trimmed() -> bytes:
    """A file of three seconds, of which an edit list shows one and a half."""
    data = clip_bytes(seconds=3)
    at = data.index(b"elst") + 12
    return data[:at] + struct.pack(">I", 1_500) + data[at + 4 :]


def shifted(data: bytes, milliseconds: int) -> bytes:
    """The same file, so much later."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as out:
        copies = [out.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts + milliseconds, packet.dts + milliseconds
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return buffer.getvalue()


def of_two_sizes() -> bytes:
    """A file whose pictures are of 64 x 48 pixels, and then of 32 x 24."""
    buffer = io.BytesIO()
    kind = {"container": "avi", "video": "mjpeg", "audio": "libmp3lame"}
    large, small = clip_bytes(1, **kind), clip_bytes(2, **kind, size=(32, 24))
    with (
        av.open(io.BytesIO(large)) as source,
        av.open(io.BytesIO(small)) as other,
        av.open(buffer, "w", format="matroska") as out,
    ):
        copies = [out.add_stream_from_template(stream) for stream in source.streams]
        later = [packet for packet in other.demux(video=0) if packet.dts is not None]
        packets = [packet for packet in source.demux() if packet.dts is not None]
        for packet in packets:
            use = later.pop(0) if packet.stream_index == 0 and packet.pts > 16 and later else packet
            use.pts, use.dts = packet.pts, packet.dts
            use.stream = copies[packet.stream_index]
            out.mux(use)
    return buffer.getvalue()
