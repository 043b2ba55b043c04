"""A clip as people see it on a page: one picture, and how loud it is along its way.

A fenced process makes it (`ingest.fence.reader`): a dataset may have come from anywhere.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.errors import UserError
from ingest.fence.reading import read_fenced
from ingest.image.orientation import upright
from ingest.video.container import MediaError, open_media, pyav, streams_of
from ingest.video.scores import orientation_of, wave_of

if TYPE_CHECKING:
    from av import AudioFrame

COLUMNS = 96
# Samples that one amplitude stands for, of packed channels together.
_MOMENT = 256


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What is shown of a clip.

    Attributes:
        jpeg: a frame of its middle, upright; empty if there is a problem.
        peaks: the largest amplitude in each of COLUMNS equal parts of its sound, 0 to 1; none if silent.
        problem: why there is nothing.
    """

    jpeg: bytes = b""
    peaks: tuple[float, ...] = ()
    problem: str = ""


def preview_of(data: bytes, *, size: tuple[int, int], place: str) -> Preview:
    """The preview of a clip; `size` is the largest of the picture, (width, height).

    Raises:
        UserError: PyAV is not installed.
    """
    pyav()
    try:
        (table,) = read_fenced(read_preview, [io.BytesIO(data)], {"size": list(size)}, place=place)
    except UserError as error:
        return Preview(problem=str(error))
    (row,) = table.to_pylist()
    return Preview(jpeg=row["jpeg"], peaks=tuple(row["peaks"]), problem=row["problem"])


def read_preview(
    opened: Callable[[], AbstractContextManager[io.BufferedIOBase]], *, size: list[int]
) -> Iterator[pa.Table]:
    """One row: jpeg, peaks, problem."""
    with opened() as file:
        try:
            found = _read(file, (size[0], size[1]))
        except MediaError as error:
            found = Preview(problem=error.reason)
        except Exception:
            # Strangers' bytes: whatever FFmpeg makes of them, it is one picture that is missing.
            found = Preview(problem="damaged")
    yield pa.table(
        {
            "jpeg": pa.array([found.jpeg], pa.binary()),
            "peaks": pa.array([found.peaks], pa.list_(pa.float64())),
            "problem": [found.problem],
        }
    )


def _read(file: io.BufferedIOBase, size: tuple[int, int]) -> Preview:
    import av

    with open_media(file) as container:
        middle = (container.duration or 0) / 2e6
        picture: av.VideoFrame | None = None
        loud: list[tuple[float, float]] = []
        for packet in container.demux(streams_of(container).both):
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame):
                    loud += _loudest(frame)
                elif isinstance(frame, av.VideoFrame) and (picture is None or (frame.time or 0.0) <= middle):
                    picture = frame
        if picture is None:
            raise MediaError("damaged")
        pixels = picture.reformat(format="rgb24", threads=1).to_ndarray()
        image = upright(Image.fromarray(pixels), orientation_of(picture))
    image.thumbnail(size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return Preview(jpeg=buffer.getvalue(), peaks=_peaks(loud))


def _loudest(frame: "AudioFrame") -> Iterator[tuple[float, float]]:
    """Moments in a frame, and the largest amplitude about each."""
    wave = np.abs(wave_of(frame)).max(axis=0, initial=0)
    for place in range(0, len(wave), _MOMENT):
        yield (frame.time or 0.0) + place / frame.sample_rate, float(wave[place : place + _MOMENT].max())


def _peaks(loud: list[tuple[float, float]]) -> tuple[float, ...]:
    if not loud:
        return ()
    times, values = np.array(loud).T
    first, last = times.min(), times.max()
    parts = ((times - first) / max(last - first, 1e-6) * (COLUMNS - 1)).astype(int)
    peaks = np.zeros(COLUMNS)
    np.maximum.at(peaks, parts, np.nan_to_num(values).clip(0, 1))
    return tuple(round(float(peak), 3) for peak in peaks)
