"""One self-contained HTML page that shows what is in a dataset: `ingest show`.

Paths and labels come from the wild. The template escapes them, what is unprintable is shown as an escape, and
the page's own policy forbids scripts and anything from elsewhere.
"""

import base64
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from ingest import layout
from ingest.dataset import Dataset
from ingest.histogram import Histogram
from ingest.image import ImageError, ImageLimits, decode
from ingest.stats import Stats
from ingest.store import open_store
from ingest.wording import in_bytes, several, visible

THUMBNAIL = (480, 240)
THUMBNAIL_QUALITY = 80
# Below this a picture is shown in whole pixels, not smoothed.
TINY = 100
COLUMNS = ["status", "slot", "offset", "size", "sha256", "width", "height", "url", "labels"]
BINS = 36
LABELS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One sampled image; jpeg is base64, empty if the sample is damaged."""

    key: str
    label: str
    url: str
    width: int
    height: int
    bytes: str
    ratio: float
    tiny: bool
    jpeg: str
    damage: str


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

    first, last = histogram.smallest // histogram.cell, histogram.largest // histogram.cell
    if last - first < BINS:
        edges = np.arange(first, last + 2)
    else:
        # At least three cells to a bar, or bars of one cell and bars of two would make a comb.
        bins = min(BINS, (last - first) // 3)
        steps = np.geomspace(max(1, first), last + 1, bins + 1).astype(np.int64)
        edges = np.unique(np.concatenate([[first], steps.clip(first, last + 1), [last + 1]]))
    counts = np.add.reduceat(histogram.counts[: last + 1], edges[:-1])
    tallest = int(counts.max())
    starts = [max(histogram.smallest, int(edge) * histogram.cell) for edge in edges[:-1]]
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


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of the picture, base64; pictures smaller than a thumbnail keep their pixels."""
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    quality = 95 if max(image.size) < TINY else THUMBNAIL_QUALITY
    image.save(buffer, "JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _fit(width: int, height: int) -> tuple[int, int]:
    """The size of a picture's thumbnail."""
    scale = min(1.0, THUMBNAIL[0] / width, THUMBNAIL[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_positions(total: int, samples: int, seed: int) -> list[int]:
    """Distinct positions among all kept samples, ascending; memory does not grow with the dataset."""
    return sorted(random.Random(seed).sample(range(total), min(samples, total)))


def sample_photos(dataset: Dataset, *, samples: int, seed: int) -> Iterator[Photo]:
    """Images drawn without regard to anything but the seed, in the dataset's order."""
    ends = np.cumsum(dataset.counts)
    positions = draw_positions(len(dataset), samples, seed)
    placed = [(int(np.searchsorted(ends, position, side="right")), position) for position in positions]
    for unit_index, group in groupby(placed, key=lambda pair: pair[0]):
        first = int(ends[unit_index] - dataset.counts[unit_index])
        with dataset.store.open(dataset.files.name(unit_index, "meta")) as file:
            table = pq.read_table(file, columns=COLUMNS)
        kept = table.filter(pc.equal(table["status"], "kept"))
        rows = kept.take([position - first for _, position in group]).to_pylist()
        for row in rows:
            key = layout.sample_key(int(dataset.units[unit_index]), row["slot"])
            yield _photo(key, row, _read(dataset, unit_index, row))


def _read(dataset: Dataset, unit_index: int, row: dict[str, Any]) -> bytes:
    """An image's bytes; fewer where the shard is damaged, which the page then shows in the image's place."""
    try:
        return dataset.read_shard(unit_index, row["offset"], row["size"])
    except OSError:
        return b""


def _photo(key: str, row: dict[str, Any], data: bytes) -> Photo:
    jpeg = damage = ""
    if hashlib.sha256(data).digest() != row["sha256"]:
        damage = "damaged: not the bytes that were kept"
    limits = ImageLimits(max_bytes=row["size"], max_pixels=row["width"] * row["height"])
    try:
        jpeg = "" if damage else thumbnail(decode(data, limits=limits, at_least=_fit))
    except ImageError as error:
        damage = f"damaged: {error.reason}"
    return Photo(
        key=key,
        label=visible(", ".join(row["labels"])),
        url=visible(row["url"]),
        width=row["width"],
        height=row["height"],
        bytes=in_bytes(row["size"]),
        ratio=min(max(row["width"] / row["height"], 0.45), 3.2),
        tiny=max(row["width"], row["height"]) < TINY,
        jpeg=jpeg,
        damage=damage,
    )


def settings_of(path: str | Path, generations: Sequence[int]) -> list[tuple[str, str]]:
    """How the dataset was made, from its frozen plans, as names and values."""
    store = open_store(path)
    rows: list[tuple[str, str]] = []
    for generation in generations:
        name = layout.plan_name(generation)
        try:
            plan = json.loads(store.read(name))
        except FileNotFoundError:
            # Nothing but the crawl needs the plan: a dataset may be copied without it.
            rows.append((name, "is not here"))
            continue
        for source in plan["sources"]:
            files = f"{several(source['items'], 'file')}, sha256 of their list {source['sha256']}"
            rows.append(("source", f"{source['kind']} {source['name']}: {files}"))
        rows += [(name, str(value)) for name, value in (plan["settings"] | plan["builds"]).items() if value]
    return [(visible(name), visible(value)) for name, value in rows]


def name_of(path: str) -> str:
    """The last part of a dataset's folder or URL."""
    root = open_store(path).root
    return root.resolve().name if isinstance(root, Path) else root.rpartition("/")[2]


def render(stats: Stats, photos: Sequence[Photo], settings: Sequence[tuple[str, str]]) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ingest", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    labels = list(stats.labels.items())
    return environment.get_template("gallery.html").render(
        name=visible(name_of(stats.path)),
        stats=stats,
        image_bytes=in_bytes(stats.image_bytes),
        shares=[
            Bar(label=name, count=count, height=100 * count / max(1, stats.planned))
            for name, count in (("kept", stats.kept), ("rejected", stats.rejected), ("failed", stats.failed))
        ],
        photos=photos,
        histograms=[
            chart("Shorter side", stats.short_sides, unit="px"),
            chart("Longer side", stats.long_sides, unit="px"),
            chart("File size", stats.sizes, unit="B"),
        ]
        if stats.kept
        else [],
        formats=share_bars(list(stats.formats.items())),
        labels=share_bars(labels[:LABELS_SHOWN]),
        labels_left_out=max(0, len(labels) - LABELS_SHOWN),
        losses=[
            {
                "tone": loss.status,
                "status": loss.status,
                "reason": visible(loss.reason),
                "count": loss.count,
                "urls": [visible(url) for url in loss.first_urls],
                "left_out": loss.count - len(loss.first_urls),
            }
            for loss in stats.losses
        ],
        settings=settings,
    )
