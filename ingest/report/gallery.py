"""One self-contained HTML page that shows what is in a dataset: `ingest show`.

Paths and labels come from the wild. The template escapes them, what is unprintable is shown as an escape, and
the page's own policy forbids scripts and anything from elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import numpy as np

from cluster.wording import in_bytes, several, visible
from ingest.dataset.cells import cells_of, starts_of
from ingest.dataset.open import Dataset, open_dataset, sealed_head
from ingest.report.duplicate_groups import Group, Groups, Member, read_groups
from ingest.report.histogram import Histogram
from ingest.report.lost_samples import Loss, sample_losses
from ingest.report.provenance import made_of
from ingest.report.stats import Losses, Stats
from ingest.report.thumbnails import Photo, photos_of, sample_photos
from ingest.store.open import name_of

BINS = 36
LABELS_SHOWN = 20
HOSTS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar; height is a percentage."""

    label: str
    count: int
    height: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[str, ...]
    quantiles: str


def chart(title: str, histogram: Histogram, *, unit: str) -> Chart:
    """Bars of equal width on a logarithmic axis, from the smallest to the largest of at least one value."""

    def show(value: float) -> str:
        return in_bytes(value) if unit == "B" else f"{value:,.0f} {unit}"

    first, last = cells_of(np.array([histogram.smallest, histogram.largest])).tolist()
    if last - first < BINS:
        edges = np.arange(first, last + 2)
    else:
        # At least three cells to a bar, or bars of one cell and bars of two would make a comb.
        bins = min(BINS, (last - first) // 3)
        steps = np.geomspace(max(1, histogram.smallest), histogram.largest + 1, bins + 1)[1:-1]
        between = cells_of(steps.astype(np.int64)).clip(first, last + 1)
        edges = np.unique(np.concatenate([[first], between, [last + 1]]))
    counts = np.add.reduceat(histogram.counts[: last + 1], edges[:-1])
    tallest = max(1, int(counts.max()))
    starts = np.maximum(starts_of(edges[:-1]), histogram.smallest).tolist()
    bars = tuple(
        Bar(label=f"from {show(start)}", count=int(count), height=100 * int(count) / tallest)
        for start, count in zip(starts, counts, strict=True)
    )
    ticks = dict.fromkeys([histogram.smallest, starts[len(starts) // 2], histogram.largest])
    low, half, high = (show(histogram.percentile(percent)) for percent in (5, 50, 95))
    spread = f"5 % up to {low}, half up to {half}, 95 % up to {high}"
    return Chart(
        title=title,
        bars=bars,
        ticks=tuple(show(tick) for tick in ticks),
        quantiles=spread if histogram.smallest < histogram.largest else "all of them",
    )


def share_bars(counts: Sequence[tuple[str, int]]) -> tuple[Bar, ...]:
    """Bars as shares of the largest."""
    largest = max((count for _, count in counts), default=0) or 1
    return tuple(
        Bar(label=visible(label), count=count, height=100 * count / largest) for label, count in counts
    )


class Page(NamedTuple):
    """A page, and how many images are on it as they are: damaged ones are not."""

    text: str
    shown: int


def show(dataset: str, stats: Stats, *, view: str | None, samples: int, seed: int) -> Page:
    """The page of a dataset that was counted, or of one of its views.

    Raises:
        UserError: there is no such view, or something is damaged.
    """
    opened = open_dataset(dataset, sealed=stats.root, view=view)
    groups = None if view is None else read_groups(dataset, view, seed=seed)
    whole = opened if view is None else open_dataset(dataset, sealed=stats.root)
    photos = list(sample_photos(opened, samples=samples, seed=seed))
    text = render(
        stats,
        sample_losses(stats),
        photos,
        made_of(dataset, sealed_head(dataset, stats.root).generations),
        view=None if view is None else (view, len(opened)),
        duplicates=None if groups is None else _duplicates(groups, whole),
    )
    return Page(text, _shown(photos))


def _shown(photos: Sequence[Photo]) -> int:
    return sum(bool(photo.jpeg) for photo in photos)


def _duplicates(groups: Groups, dataset: Dataset) -> dict[str, Any]:
    """What the template shows of groups: each sample with its picture, None where the dataset has none."""
    shown = [*groups.largest, *groups.drawn]
    photos = photos_of(dataset, [key for group in shown for key in group.keys])

    def described(group: Group) -> dict[str, Any]:
        return {
            "winner": None if group.evaluation else photos.get(group.winner),
            "evaluation": visible(group.evaluation[:12]),
            "dropped": group.dropped,
            "members": [(photos.get(member.key), _likeness(member)) for member in group.members],
            "left_out": group.dropped - len(group.members),
        }

    return {
        "groups": groups.groups,
        "dropped": groups.dropped,
        "largest": [described(group) for group in groups.largest],
        "drawn": [described(group) for group in groups.drawn],
    }


def _likeness(member: Member) -> str:
    return "equal bytes" if member.exact else f"{several(member.distance, 'bit')} apart"


def render(
    stats: Stats,
    lost: Sequence[Sequence[Loss]],
    photos: Sequence[Photo],
    made: Sequence[tuple[str, str]],
    *,
    view: tuple[str, int] | None = None,
    duplicates: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        stats: of the whole dataset.
        lost: some of each of its losses.
        photos: samples of it, or of the view.
        made: how it was made, names and values.
        view: its name, and how many samples it has.
        duplicates: groups of them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ingest.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    labels = list(stats.labels.items())
    return environment.get_template("gallery.html").render(
        name=visible(name_of(stats.path)),
        noun=stats.noun,
        length=f"{stats.clips.hours:,.2f} hours",
        stats=stats,
        image_bytes=in_bytes(stats.image_bytes),
        shares=[
            Bar(label=name, count=count, height=100 * count / max(1, stats.planned))
            for name, count in (("kept", stats.kept), ("rejected", stats.rejected), ("failed", stats.failed))
        ],
        photos=photos,
        view=None if view is None else {"name": view[0], "kept": view[1]},
        shown=_shown(photos),
        shown_of=stats.kept if view is None else view[1],
        duplicates=duplicates,
        histograms=[
            chart("Shorter side", stats.short_sides, unit="px"),
            chart("Longer side", stats.long_sides, unit="px"),
            chart("File size", stats.sizes, unit="B"),
            *(
                chart(title, histogram, unit="ms")
                for title, histogram in (
                    ("Length", stats.clips.milliseconds),
                    ("Longest time between keyframes", stats.clips.gaps),
                )
                if histogram.counts.any()
            ),
        ]
        if stats.kept
        else [],
        formats=share_bars(list(stats.formats.items())),
        codecs=share_bars([*stats.clips.video_codecs.items(), *stats.clips.audio_codecs.items()]),
        labels=share_bars(labels[:LABELS_SHOWN]),
        labels_left_out=max(0, len(labels) - LABELS_SHOWN),
        losses=[_loss(*each) for each in zip(stats.losses, lost, strict=True)],
        hosts=stats.hosts,
        host_bars={
            "URLs by host": share_bars(
                [(host.host, host.attempts) for host in stats.hosts.most_attempts[:HOSTS_SHOWN]]
            ),
            "Failed URLs by host": share_bars(
                [(host.host, host.failed) for host in stats.hosts.most_failed[:HOSTS_SHOWN]]
            ),
            "HTTP status": share_bars([(str(x), count) for x, count in stats.http_statuses.items()]),
        },
        made=[(visible(name), visible(value)) for name, value in made],
    )


def _loss(loss: Losses, samples: Sequence[Loss]) -> dict[str, Any]:
    return {
        "status": loss.status,
        "reason": visible(loss.reason),
        "count": loss.count,
        "retryable": loss.retryable,
        "samples": [(visible(lost.url), lost.http_status) for lost in samples],
        "left_out": loss.count - len(samples),
    }
