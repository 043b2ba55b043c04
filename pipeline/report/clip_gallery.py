"""Videos for a report: to be played, with their sound as a trunk is shown it, and those that are near."""

from __future__ import annotations

import base64
import json
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


def labels_of(dataset: Dataset) -> dict[int, str]:
    """Position → label of all videos; empty if some have none, or several."""
    try:
        classes, y = classes_of(dataset, np.arange(len(dataset)))
    except UserError:
        return {}
    return {position: classes[label] for position, label in enumerate(y.tolist())}


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


def read_positives(run: Path) -> tuple[NDArray[np.int64], dict[str, float], int] | None:
    """The positives that a run's newest checkpoint went by, (N, P), the bank's health, and the step at which
    they were sought; None if it had none.
    """
    checkpoint = latest(run)
    name = checkpoint and json.loads((checkpoint / "state.json").read_text()).get("positives")
    if not name:
        return None
    folder = run / "positives" / Path(name).name
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = [np.load(folder / Path(file).name, allow_pickle=False) for file in sorted(manifest["files"])]
    return np.concatenate(parts).astype(np.int64), manifest["health"], int(manifest["step"])


def positive_sets(
    run: Path, dataset: Dataset, sound: AudioPreprocessing, *, sets: int, shown: int, seed: int
) -> PositiveSets | None:
    """What CMA takes for the same as some videos, drawn by the seed; None if the run sought no positives."""
    read = read_positives(run)
    if read is None:
        return None
    positives, health, step = read
    labels = labels_of(dataset)
    right = chance = None
    if labels:
        y = np.unique([labels[row] for row in range(len(labels))], return_inverse=True)[1]
        right = float((y[positives] == y[:, None]).mean())
        share = np.bincount(y) / len(y)
        chance = float((share**2).sum())
    chosen = np.random.default_rng(seed).choice(len(positives), min(sets, len(positives)), replace=False)
    rows = [(int(row), [(int(other), 0.0) for other in positives[row, :shown]]) for row in chosen]
    played = players(
        dataset, [row for row, _ in rows] + [o for _, near in rows for o, _ in near], sound, labels
    )
    return PositiveSets(
        step=step,
        positives=positives.shape[1],
        samples=len(positives),
        right=right,
        chance=chance,
        health=health,
        rows=[
            NearRow(
                player=played[row],
                near=[
                    Near(player=played[other], right=same_label(played[row], played[other]), said="")
                    for other, _ in near
                ],
            )
            for row, near in rows
        ],
    )
