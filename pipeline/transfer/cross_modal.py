"""Retrieval across modalities: of a picture the nearest of all sounds, and of a sound the nearest picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.transfer.statistics import wilson

_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class CrossModalScores:
    """The ranks of N partners, see `partner_ranks`, by direction; and at which ranks recall is told."""

    ranks: dict[str, NDArray[np.int64]]
    at: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`: for each direction and k the share of queries whose partner
        is among the k nearest, with its interval, and the median place of partners, from 1.
        """
        found: dict[str, float] = {}
        for direction, ranks in self.ranks.items():
            for k in self.at:
                hits, name = int((ranks < k).sum()), f"{direction}_recall_{k}"
                interval = wilson(hits, len(ranks))
                found |= {name: hits / len(ranks), f"{name}_low": interval.low, f"{name}_high": interval.high}
            found[f"{direction}_median"] = float(np.median(ranks)) + 1
            found["clips"] = len(ranks)
        return found


def cross_modal(
    video: Tensor, audio: Tensor, *, at: tuple[int, ...] = (1, 5, 10), device: torch.device | None = None
) -> CrossModalScores:
    """Look for the sound of each picture, and for the picture of each sound.

    Args:
        video, audio: (N, d) embeddings of the same clips in the same order.
        at: ranks of which recall is told.
    """
    return CrossModalScores(
        ranks={
            "video_to_audio": partner_ranks(video, audio, device=device),
            "audio_to_video": partner_ranks(audio, video, device=device),
        },
        at=at,
    )


def partner_ranks(
    queries: Tensor, answers: Tensor, *, device: torch.device | None = None
) -> NDArray[np.int64]:
    """For each query how many answers come before its own, by cosine similarity, (n,); of equals its own is
    last.

    Args:
        queries, answers: (n, d); a query's own answer is in its row.
    """
    bank = F.normalize(answers.float().to(device), dim=1)
    found = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        asked = F.normalize(queries[start : start + _QUERIES_AT_ONCE].float().to(device), dim=1)
        similarity = asked @ bank.T
        rows = torch.arange(len(asked), device=similarity.device)
        own = similarity[rows, rows + start, None]
        found.append(((~(similarity < own)).sum(1) - 1).cpu())  # NaN counts against it, too
    return torch.cat(found).numpy()
