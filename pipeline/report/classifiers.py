"""The page of a comparison of classifiers."""

from __future__ import annotations

from pipeline.report.page import environment
from pipeline.transfer.compare import Comparison


def classifiers_page(found: Comparison, title: str) -> str:
    """One HTML page that needs nothing else: accuracies with their intervals, and each pair."""
    return (
        environment()
        .get_template("classifiers.html")
        .render(
            title=title,
            scores=found.scores,
            pairs=found.pairs,
            samples=next(iter(found.scores.values()))["samples"],
        )
    )
