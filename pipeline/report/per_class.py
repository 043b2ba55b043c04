"""Which labels a trunk tells apart, and which it takes for which: kNN on its features, label by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from cluster.errors import UserError
from pipeline.report.figures import WIDTH, Bar, bar_chart, svg
from pipeline.transfer.features import Features
from pipeline.transfer.knn import knn_votes
from pipeline.transfer.scores import shared_labels
from pipeline.transfer.statistics import wilson

MOST_LABELS = 40  # that a screen has room for
_MOST_SAMPLES = 10_000
_LONGEST = 14  # characters of a label beside a chart


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """Charts of the accuracy of each label, with its interval, and of what is taken for what."""

    samples: int
    accuracies: Markup
    confusion: Markup


def per_class(
    train: Features, test: Features, *, k: int, temperature: float, seed: int, device: torch.device
) -> PerClass | None:
    """None if there are more labels than a page can show, or images have several.

    Args:
        k, temperature: of the kNN whose accuracy the page shows.
        seed: draws the test images, of which there may be very many.
    """
    try:
        names, train_y, test_y = shared_labels(train, test)
    except UserError:
        return None
    if len(names) > MOST_LABELS:
        return None
    order = torch.randperm(len(test_y), generator=torch.Generator().manual_seed(seed))
    drawn = order[:_MOST_SAMPLES].sort().values
    votes = knn_votes(
        train.x,
        train_y,
        test.x[drawn],
        classes=len(names),
        k=(min(k, len(train_y)),),
        temperature=temperature,
        device=device,
    )
    (said,) = (each.argmax(dim=1).cpu() for each in votes.values())
    counts = torch.bincount(test_y[drawn] * len(names) + said, minlength=len(names) ** 2)
    table = counts.reshape(len(names), len(names)).numpy()
    return PerClass(
        samples=len(drawn), accuracies=_accuracies(names, table), confusion=confusion_chart(names, table)
    )


def confusion_chart(names: Sequence[str], counts: NDArray[np.int64]) -> Markup:
    """A row for each label: the darker a cell, the more of its images were given the label of the column.

    Args:
        counts: (n, n), of images with the label of the row that were given that of the column.
    """
    cell = min(20.0, 300 / len(names))
    left, top = 104.0, 6.0
    size, letters = cell * len(names), min(11.0, cell)
    bottom = top + size
    parts = []
    for row, name in enumerate(names):
        total = int(counts[row].sum())
        y = top + cell * row
        middle = cell * (row + 0.5)
        parts.append(
            Markup(
                '<text class="tick" style="font-size:{:.1f}px" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
                '<text class="tick" style="font-size:{:.1f}px" text-anchor="end" '
                'transform="translate({:.1f} {:.1f}) rotate(-60)">{}</text>'
            ).format(
                *(letters, left - 5, top + middle + 0.35 * letters, _short(name)),
                *(letters, left + middle + 0.35 * letters, bottom + 9, _short(name)),
            )
        )
        for column in np.flatnonzero(counts[row]).tolist():
            count = int(counts[row, column])
            parts.append(
                Markup(
                    '<rect class="{}" fill-opacity="{:.2f}" x="{:.1f}" y="{:.1f}" width="{w:.1f}" '
                    'height="{w:.1f}"><title>{}</title></rect>'
                ).format(
                    "t1" if row == column else "t4",
                    0.12 + 0.88 * count / total,
                    left + cell * column,
                    y,
                    f"{name} taken for {names[column]}: {count} of {total}",
                    w=cell,
                )
            )
    parts.append(
        Markup('<path class="frame" d="M{left} {top}H{right:.1f}V{bottom:.1f}H{left}Z"/>').format(
            left=left, top=top, right=left + size, bottom=bottom
        )
    )
    right = int(np.trace(counts))
    description = f"{right} of {int(counts.sum())} images were given their label"
    # Of few labels no wider than of many: text is as large in both.
    return svg("What is taken for what", description, parts, max(WIDTH, left + size + 6), bottom + 96)


def _accuracies(names: Sequence[str], counts: NDArray[np.int64]) -> Markup:
    bars = []
    shares = _shares(counts)
    for row in sorted(range(len(names)), key=lambda row: -shares[row]):
        if not (total := int(counts[row].sum())):
            continue  # no test image has it
        right = int(counts[row, row])
        interval = wilson(right, total)
        bars.append(
            Bar(
                name=_short(names[row]),
                value=right / total,
                low=interval.low,
                high=interval.high,
                tone="t1",
            )
        )
    return bar_chart([("", bars)], title="Accuracy of each label")


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts.diagonal() / np.maximum(counts.sum(axis=1), 1), np.float64)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
