"""Videos for a report: to be played, with their sound as a trunk is shown it, and those that are near."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.checkpoint.files import latest
from pipeline.data.clip.encode import encode_clip
from pipeline.data.clip.evaluation import AudioPreprocessing, ClipPreprocessing, audio_inputs, clip_batches
from pipeline.data.evaluation import Preprocessing
from pipeline.report.gallery import data_uri
from pipeline.transfer.features import Features
from pipeline.transfer.labels import classes_of

_SIDE, _FPS = 96, 12  # of what is played
_SAMPLED = 2_000  # videos whose positives are looked at
# From silence to the loudest: red, green and blue.
_COLOURS = ((13, 17, 43), (62, 40, 112), (158, 56, 104), (231, 125, 67), (252, 233, 164))


@dataclass(frozen=True, kw_only=True)
class Player:
    """A video's middle: `video` and `spectrogram` as data URIs, and its label, where it has one."""

    video: str
    picture: str
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Near:
    """A video near another one: `right` if they share the label, None if one has none; and how near it is."""

    player: Player
    right: bool | None
    said: str


@dataclass(frozen=True, kw_only=True)
class NearRow:
    """A video, and those that are near it, the nearest first."""

    player: Player
    near: list[Near]


@dataclass(frozen=True, kw_only=True)
class PositiveSets:
    """CMA's positives of all videos at a step: the share of them that has its label, and that of any two
    videos, or None where there are no labels. And some of the sets.
    """

    step: int
    positives: int
    samples: int
    right: float | None
    chance: float | None
    health: Mapping[str, float]
    rows: list[NearRow]


def players(
    dataset: Dataset, positions: Sequence[int], sound: AudioPreprocessing, labels: Mapping[int, str]
) -> dict[int, Player]:
    """By its position on the dataset's global axis, each of some videos.

    Args:
        sound: how much of each, and how its spectrogram is made.
        labels: position → label, where it is known.
    """
    wanted = np.unique(np.asarray(positions, np.int64))
    seen = Preprocessing(
        image_size=_SIDE, resize=_SIDE, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
    )
    clip = ClipPreprocessing(frames=max(1, round(_FPS * sound.audio.seconds)), fps=_FPS, pictures=seen)
    found = {}
    batches = clip_batches(dataset, wanted, clip=clip, audio=sound, windows=1, workers=0, batch_size=8)
    place = iter(wanted.tolist())
    for batch in batches:
        assert batch.clips is not None
        assert batch.waveforms is not None
        inputs = audio_inputs(batch.waveforms, sound, torch.device("cpu"))
        for frames, heard, bins in zip(batch.clips[:, 0], batch.waveforms[:, 0], inputs[:, 0], strict=True):
            position = next(place)
            data = encode_clip(frames.numpy(), heard.clamp(-1, 1).numpy(), fps=_FPS, rate=sound.audio.rate)
            found[position] = Player(
                video="data:video/mp4;base64," + base64.b64encode(data).decode(),
                picture=data_uri(spectrogram_picture(bins, sound), longest=240),
                label=labels.get(position),
            )
    return found


def spectrogram_picture(inputs: Tensor, sound: AudioPreprocessing) -> Image.Image:
    """A spectrogram as a trunk is shown it, (frames, bins): time from left to right, low tones below."""
    mean, std = torch.tensor(sound.mean), torch.tensor(sound.std)
    decibels = (inputs * std + mean).T.flip(0).numpy()
    loudness = 1 - (decibels.max() - decibels) / sound.audio.top_db
    stops = np.linspace(0, 1, len(_COLOURS))
    pixels = np.stack(
        [np.interp(loudness, stops, channel) for channel in zip(*_COLOURS, strict=True)], axis=2
    )
    return Image.fromarray(pixels.round().astype(np.uint8)).resize((240, 96), Image.Resampling.NEAREST)


def labels_of(dataset: Dataset, positions: NDArray[np.int64]) -> dict[int, str]:
    """Position → label of videos at ascending positions; empty if some have none, or several."""
    try:
        classes, y = classes_of(dataset, positions)
    except UserError:
        return {}
    return {position: classes[label] for position, label in zip(positions.tolist(), y.tolist(), strict=True)}


def across(
    queries: Features, answers: Features, chosen: Sequence[int], neighbours: int
) -> list[tuple[int, list[tuple[int, float]]]]:
    """For each chosen query its nearest answers: rows and cosines, the nearest first.

    Args:
        queries, answers: embeddings of unit length of the same videos, of one modality each.
    """
    similarity = queries.x[list(chosen)] @ answers.x.T
    best = similarity.topk(min(neighbours, len(answers.y)), dim=1)
    return [
        (row, list(zip(index.tolist(), value.tolist(), strict=True)))
        for row, index, value in zip(chosen, best.indices, best.values, strict=True)
    ]


def near_rows(
    found: Sequence[tuple[int, list[tuple[int, float]]]], shown: Mapping[int, Player]
) -> list[NearRow]:
    """As they are shown; a video that is near itself is its own partner."""
    return [
        NearRow(
            player=shown[row],
            near=[
                Near(
                    player=shown[other],
                    right=same_label(shown[row], shown[other]),
                    said=f"cosine {value:.2f}" + (", its own" if other == row else ""),
                )
                for other, value in near
            ],
        )
        for row, near in found
    ]


def same_label(one: Player, other: Player) -> bool | None:
    """Whether they have the same, if both have one."""
    return None if one.label is None or other.label is None else one.label == other.label


def positive_sets(
    run: Path, dataset: Dataset, sound: AudioPreprocessing, *, sets: int, shown: int, seed: int
) -> PositiveSets | None:
    """What CMA takes for the same as some videos, drawn by the seed; None if the run sought no positives.

    Args:
        run: the positives that its newest checkpoint went by are read.
        dataset: the run's, seen through its view.
    """
    checkpoint = latest(run)
    name = checkpoint and json.loads((checkpoint / "state.json").read_text()).get("positives")
    if not name:
        return None
    folder = run / "positives" / Path(name).name
    manifest = json.loads((folder / "manifest.json").read_text())
    count = int(manifest["samples"])
    order = np.random.default_rng(seed).choice(count, min(_SAMPLED, count), replace=False)
    rows, drawn = np.sort(order), order[:sets]
    positives = _read_rows(folder, manifest["files"], rows)
    labels = labels_of(dataset, np.union1d(rows, positives))
    right, chance = _share_right(rows, positives, labels) if labels else (None, None)
    some = {int(row): positives[np.searchsorted(rows, row), :shown].tolist() for row in drawn}
    played = players(dataset, [*some, *(other for near in some.values() for other in near)], sound, labels)
    return PositiveSets(
        step=int(manifest["step"]),
        positives=positives.shape[1],
        samples=count,
        right=right,
        chance=chance,
        health=manifest["health"],
        rows=[
            NearRow(
                player=played[row],
                near=[
                    Near(player=played[other], right=same_label(played[row], played[other]), said="")
                    for other in near
                ],
            )
            for row, near in some.items()
        ],
    )


def _read_rows(
    folder: Path, files: Mapping[str, Mapping[str, int]], rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Some rows, ascending, of positives that lie in several files."""
    parts = []
    for name, entry in sorted(files.items()):
        here = rows[(rows >= entry["first"]) & (rows < entry["first"] + entry["rows"])] - entry["first"]
        parts.append(np.load(folder / Path(name).name, mmap_mode="r", allow_pickle=False)[here])
    return np.concatenate(parts).astype(np.int64)


def _share_right(
    rows: NDArray[np.int64], positives: NDArray[np.int64], labels: Mapping[int, str]
) -> tuple[float, float]:
    """The share of positives that have their video's label, and that of any two videos that have the same."""
    same = [labels[row] == labels[other] for row, near in zip(rows, positives, strict=True) for other in near]
    share = np.array([*Counter(labels[row] for row in rows).values()]) / len(rows)
    return float(np.mean(same)), float((share**2).sum())
