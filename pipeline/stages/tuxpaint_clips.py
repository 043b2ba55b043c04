"""Clips of Tux Paint's stamps: a picture that moves, and a human who says its name.

Debian's package tuxpaint-stamps-default (GPL-2) has pictures of animals, food, vehicles and more, and of each
a recording of its name in several languages: KIND/…/NAME.png and KIND/…/NAME_desc_LANGUAGE.ogg.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import UserError
from pipeline.dag.digests import folder_identity
from pipeline.stages.clip import FPS, RATE, Clip

_FEWEST_PICTURES = 8  # of a kind, of which a quarter is for testing
_PAUSE = 0.25  # seconds between two times that a name is said


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture, what it is a picture of, and a recording of its name."""

    kind: str
    picture: Path
    voice: Path


def stamps_identity(stamps: Path) -> str:
    """What the stamps are.

    Raises:
        UserError: if there are none.
    """
    if not stamps.is_dir():
        raise UserError(
            f"Tux Paint's stamps are not at {stamps}: apt-get install tuxpaint-stamps-default, or name the "
            "folder as recipe.stamps"
        )
    return folder_identity(stamps)


def read_pairs(stamps: Path, rng: np.random.Generator) -> dict[str, list[Pair]]:
    """For "train" and "test" all pairs in a drawn order, kinds in turn; a picture's are all of one of them.

    Raises:
        UserError: if there are not two kinds with enough pictures.
    """
    voices = defaultdict(list)
    for voice in sorted(stamps.rglob("*_desc*.ogg")):
        voices[voice.with_name(voice.name.rpartition("_desc")[0] + ".png")].append(voice)
    pictures = defaultdict(list)
    for picture in sorted(path for path in voices if path.is_file()):
        pictures[picture.relative_to(stamps).parts[0]].append(picture)
    kinds = {kind: of_kind for kind, of_kind in sorted(pictures.items()) if len(of_kind) >= _FEWEST_PICTURES}
    if len(kinds) < 2:
        raise UserError(
            f"{stamps} has {len(kinds)} kinds with {_FEWEST_PICTURES} spoken pictures at least, and two are "
            "needed: apt-get install tuxpaint-stamps-default, or name its folder as recipe.stamps"
        )
    pairs: dict[str, list[list[Pair]]] = {"train": [], "test": []}
    for kind, of_kind in kinds.items():
        drawn = [of_kind[place] for place in rng.permutation(len(of_kind))]
        tests = len(drawn) // 4
        for split, members in (("test", drawn[:tests]), ("train", drawn[tests:])):
            found = [Pair(kind=kind, picture=each, voice=voice) for each in members for voice in voices[each]]
            pairs[split].append([found[place] for place in rng.permutation(len(found))])
    return {
        split: [pair for turn in zip_longest(*of_kinds) for pair in turn if pair is not None]
        for split, of_kinds in pairs.items()
    }


def name_aloud(pair: Pair, rng: np.random.Generator, *, side: int, seconds: float) -> Clip:
    """A clip of a picture that wanders over a ground of one colour, and of its name, said again and again."""
    return Clip(
        frames=_wander(_square(pair.picture, round(side * rng.uniform(0.6, 0.8))), rng, side, seconds),
        sound=_say(_voice(pair.voice), rng, round(seconds * RATE)),
    )


def _square(path: Path, side: int) -> NDArray[np.float64]:
    """(side, side, 4) in 0 to 1, the picture in its middle; the colours are premultiplied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes that could be written better
        image = Image.open(path).convert("RGBA")
    image = image.crop(image.getbbox())
    image.thumbnail((side, side))
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square) / 255
    return np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=2)


def _wander(
    picture: NDArray[np.float64], rng: np.random.Generator, side: int, seconds: float
) -> NDArray[np.uint8]:
    ground = rng.uniform(0.2, 1, 3)
    room = side - len(picture)
    begin, end = rng.uniform(0, room, (2, 2))
    count = round(FPS * seconds)
    frames = np.empty((count, side, side, 3))
    frames[:] = ground
    for frame, way in zip(frames, np.linspace(0, 1, count), strict=True):
        top, left = np.round(begin + (end - begin) * way).astype(int)
        under = frame[top : top + len(picture), left : left + len(picture)]
        under *= 1 - picture[..., 3:]
        under += picture[..., :3]
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _voice(path: Path) -> NDArray[np.float32]:
    import av

    with av.open(path, "r", format="ogg") as file:
        to_mono = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        frames = [made for frame in file.decode(audio=0) for made in to_mono.resample(frame)]
        frames += to_mono.resample(None)
    voice: NDArray[np.float32] = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    return voice


def _say(voice: NDArray[np.float32], rng: np.random.Generator, total: int) -> NDArray[np.float32]:
    """The voice again and again, with pauses, from a drawn moment on."""
    loud = np.flatnonzero(abs(voice) > 0.05 * abs(voice).max())
    spoken = voice[loud[0] : loud[-1] + 1] if len(loud) else voice
    once = np.concatenate([spoken, np.zeros(round(_PAUSE * RATE), np.float32)])
    start = int(rng.integers(len(once)))
    said = np.tile(once, -(-(total + len(once)) // len(once)))[start : start + total]
    noise = rng.normal(0, 10 ** rng.uniform(-3.3, -2.3), total)
    loud_enough = said / max(1e-6, abs(spoken).max()) * rng.uniform(0.4, 0.9)
    heard: NDArray[np.float32] = (loud_enough + noise).clip(-1, 1).astype(np.float32)
    return heard
