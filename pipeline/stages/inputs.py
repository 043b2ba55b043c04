"""Datasets that stages are given: whole, or the part that a stage `subset` has drawn."""

from __future__ import annotations

from ingest.dataset.open import Dataset, open_dataset
from pipeline.dag.stage import Input


def pinned(source: Input) -> dict[str, str]:
    """Where the dataset is, its root, and the view to see it through, if it is a part: as recipes say it."""
    metrics = source.receipt.metrics
    return {"root": str(source.path), "sealed": metrics["root"]} | (
        {"view": metrics["view"]} if "view" in metrics else {}
    )


def opened(source: Input) -> Dataset:
    """The dataset as it was when the stage that made or named it had run."""
    metrics = source.receipt.metrics
    return open_dataset(source.path, sealed=metrics.get("root"), view=metrics.get("view"))
