"""Embeddings of videos and of their sound, by both trunks and heads of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.clip.evaluation import audio_inputs, clip_batches, clip_inputs
from pipeline.transfer.features import Features
from pipeline.transfer.labels import classes_of
from pipeline.trunks.embedder import Embedder


def embed_videos(
    embedder: Embedder,
    dataset: Dataset,
    *,
    windows: int,
    workers: int,
    device: torch.device,
) -> tuple[Features, Features]:
    """Embeddings of all videos of a labelled dataset, and of their sound: means over windows, of unit length.

    Raises:
        UserError: if there is no sample, or one cannot be read, or has not one label, or an embedding is not
            finite.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.path} has no video to embed: see `ingest stats {dataset.path}`")
    positions = np.arange(len(dataset))
    classes, y = classes_of(dataset, positions)
    embedder = embedder.to(device)
    found: list[tuple[Tensor, Tensor]] = []
    keys: list[Tensor] = []
    for batch in clip_batches(
        dataset,
        positions,
        clip=embedder.clip,
        audio=embedder.sound,
        windows=windows,
        workers=workers,
        pin_memory=device.type == "cuda",
    ):
        assert batch.clips is not None
        assert batch.waveforms is not None
        with torch.inference_mode():
            both = embedder(
                clip_inputs(batch.clips, embedder.clip, device),
                audio_inputs(batch.waveforms, embedder.sound, device),
            )
        video, audio = (F.normalize(each.float().unflatten(0, (-1, windows)).mean(1), dim=1) for each in both)
        if not bool((video.isfinite() & audio.isfinite()).all()):
            raise UserError(
                f"the embeddings of {dataset.path} are not finite: the run's weights are broken; give a run "
                "that has not diverged"
            )
        found.append((video.cpu(), audio.cpu()))
        keys.append(batch.keys.clone())
    video, audio = (torch.cat(each) for each in zip(*found, strict=True))
    of_video = Features(x=video, y=torch.from_numpy(y), keys=torch.cat(keys), classes=classes)
    return of_video, replace(of_video, x=audio)
