"""What decoded frames say of a clip: a hash of the picture in the middle, stillness, loudness."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ingest.image.phash import perceptual_hash
from ingest.video.container import MediaError

if TYPE_CHECKING:
    from av import AudioFrame, VideoFrame

# How a frame is turned to stand upright, degrees against the clock, as EXIF numbers it.
_ORIENTATIONS = {0: 1, 90: 8, 180: 3, 270: 6}
SILENCE_DB = -120.0
# Of full scale; some files have whole numbers of 32 bits as floats. The power of more is no float32.
LOUDEST = 2.0**31
# Frames so far apart are compared, at so many places a side. The picture stands still if fewer than so many
# of them differ by more than so many levels of 256, as coding alone makes them differ.
_APART_SECONDS = 0.5
_PLACES = 32
_SHARE = 0.01
_LEVELS = 8
# That FFmpeg's frames have in themselves.
_PLANES = 8


class PictureScores:
    """Of a video stream's frames.

    Args:
        middle: the first frame that is so many seconds after the first one is hashed; the last one if there
            is none.

    Attributes:
        frames: how many there were.
        orientation: how the picture is turned to stand upright, EXIF's.
        phash: of the frame in the middle, upright.
    """

    def __init__(self, middle: float) -> None:
        self._middle = middle
        self.frames = 0
        self.orientation = 1
        self._size = 0, 0
        self._start = 0.0
        self._compared_at = -math.inf
        self._compared: NDArray[np.int16] | None = None
        self._same: list[bool] = []
        self._hash: int | None = None
        self._last: VideoFrame | None = None

    def add(self, frame: "VideoFrame") -> None:
        """Take account of a frame, in the order of presentation.

        Raises:
            MediaError: it has damaged parts, or another size than the frames before.
        """
        if frame.is_corrupt:
            raise MediaError("damaged")
        time = frame.time if frame.time is not None else self._compared_at + _APART_SECONDS
        if not self.frames:
            self._start = time
            self._size = frame.width, frame.height
            self.orientation = orientation_of(frame)
        elif (frame.width, frame.height) != self._size:
            raise MediaError("size_changes")
        self.frames += 1
        self._last = frame
        if self._hash is None and time >= self._start + self._middle:
            self._hash = self._hash_of(frame)
        if time >= self._compared_at + _APART_SECONDS:
            small = _places(luma(frame))
            if self._compared is not None:
                self._same.append(float((np.abs(small - self._compared) > _LEVELS).mean()) < _SHARE)
            self._compared, self._compared_at = small, time

    @property
    def phash(self) -> int | None:
        if self._hash is None and self._last is not None:
            return self._hash_of(self._last)
        return self._hash

    def still(self) -> float:
        """Of pairs of frames half a second apart, the share without a difference; 1 if there are none."""
        return round(sum(self._same) / len(self._same), 3) if self._same else 1.0

    def _hash_of(self, frame: "VideoFrame") -> int:
        return perceptual_hash(Image.fromarray(luma(frame)), orientation=self.orientation)


def luma(frame: "VideoFrame") -> NDArray[np.uint8]:
    """How bright a frame is, (height, width), as its decoder says it: no scaler, which processors round
    differently, comes between.
    """
    kind = frame.format
    if kind.components[0].bits == 8 and kind.is_planar and not kind.is_rgb:
        return _plane(frame, np.dtype(np.uint8))
    if (
        kind.components[0].bits in (10, 12)
        and kind.is_planar
        and not kind.is_rgb
        and kind.name.endswith("le")
    ):
        return (_plane(frame, np.dtype("<u2")) >> (kind.components[0].bits - 8)).astype(np.uint8)
    return frame.reformat(format="gray", threads=1).to_ndarray().astype(np.uint8, copy=False)


def _plane(frame: "VideoFrame", dtype: np.dtype[Any]) -> NDArray[Any]:
    plane = frame.planes[0]
    lines: NDArray[Any] = np.frombuffer(plane, dtype)  # type: ignore[call-overload]
    return lines.reshape(-1, plane.line_size // dtype.itemsize)[: frame.height, : frame.width]


def _places(picture: NDArray[np.uint8]) -> NDArray[np.int16]:
    rows, columns = ((2 * np.arange(_PLACES) + 1) * side // (2 * _PLACES) for side in picture.shape)
    places: NDArray[np.int16] = picture[rows[:, None], columns].astype(np.int16)
    return places


def orientation_of(frame: "VideoFrame") -> int:
    """How the picture is turned to stand upright, EXIF's."""
    return _ORIENTATIONS.get(frame.rotation % 360, 1)


def readable(frame: "AudioFrame") -> "AudioFrame":
    """The frame with planes that can be read: of eight and more, PyAV reads one too many, beyond them all."""
    if not frame.format.is_planar or frame.layout.nb_channels < _PLANES:
        return frame
    import av

    (packed,) = av.AudioResampler(format=frame.format.packed).resample(frame)
    return packed


def wave_of(frame: "AudioFrame") -> NDArray[np.float32]:
    """Its samples from -1 to 1, of all channels."""
    wave: Any = readable(frame).to_ndarray()
    if wave.dtype == np.uint8:
        unsigned: NDArray[np.float32] = (wave.astype(np.float32) - 128) / 128
        return unsigned
    if wave.dtype.kind == "i":
        wave = wave.astype(np.float32) / np.float32(-float(np.iinfo(wave.dtype).min))
    samples: NDArray[np.float32] = wave.astype(np.float32, copy=False)
    return samples


class SoundScores:
    """Of an audio stream's frames."""

    def __init__(self) -> None:
        self._energy = 0.0
        self._samples = 0
        self._rate: int | None = None

    def add(self, frame: "AudioFrame") -> None:
        """Take account of a frame.

        Raises:
            MediaError: it has another rate than the frames before, or what is no sample.
        """
        self._rate = self._rate or frame.sample_rate
        if frame.sample_rate != self._rate:
            raise MediaError("rate_changes")
        if frame.format.name == "fltp" and frame.layout.nb_channels < _PLANES:
            # Nearly all are: without a copy.
            waves = [np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]  # type: ignore[call-overload]
        else:
            waves = [wave_of(frame).ravel()]
        for wave in waves:
            # NaNs are in strangers' floats, too.
            with np.errstate(over="ignore", invalid="ignore"):
                energy = float(np.dot(wave, wave))
            if not energy <= LOUDEST**2 * wave.size:
                raise MediaError("damaged")
            self._energy += energy
            self._samples += wave.size

    def loudness_db(self) -> float:
        """The root of the mean square, in dB below a full-scale square wave; to a tenth, as decoders differ
        by less.
        """
        power = self._energy / max(1, self._samples)
        return round(max(SILENCE_DB, 10 * math.log10(power)), 1) if power else SILENCE_DB
