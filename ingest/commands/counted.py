"""A dataset's numbers, for commands that show them."""

from rich.console import Console

from ingest.progress.crawl_progress import Meter
from ingest.report.stats import Stats, count


def counted(dataset: str) -> Stats:
    """Count it, and show how far that is."""
    with Meter(Console(stderr=True)) as meter:
        return count(
            dataset, progress=lambda done, total: meter.tell("counting units", done=done, total=total)
        )
