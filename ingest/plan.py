"""Sources become immutable units of work, frozen with everything that decides the output.

A plan is published once, as a folder that appears whole. Whoever comes to the same output later lists the
sources
again and compares: the same inputs, settings and builds go on with it, anything else is refused in one
    sentence.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import features

from cluster.errors import UserError
from ingest import layout
from ingest.commit import canonical, make_durable, make_folder, sync_folder
from ingest.image import Crop, Encoding, Treatment
from ingest.sources.folder import FolderSource
from ingest.sources.source import Item, Source
from ingest.sources.tar import TarSource, is_tar

T = TypeVar("T")
# 2: what is stored carries no metadata; another perceptual hash.
FORMAT = 2
_ITEMS_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("source", pa.uint32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("size", pa.uint64(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CrawlSettings:
    """What a crawl makes of its sources. Every field decides output bytes, and so belongs to the fingerprint.

    Attributes:
        unit_rows: attempts per unit.
        treatment: of each image: limits, what is stored, and whether it is hashed.
        seconds: CPU time one image may take.
        memory_mb: memory that checking one image may take, MiB.
    """

    unit_rows: int = 16_384
    treatment: Treatment = field(default_factory=Treatment)
    seconds: float = 10.0
    memory_mb: int = 768

    def __post_init__(self) -> None:
        if not 1 <= self.unit_rows <= layout.KEY_SLOTS:
            raise UserError(f"--unit-rows must be from 1 to {layout.KEY_SLOTS:,}, not {self.unit_rows}")
        if self.treatment.resize is not None and self.treatment.resize < 1:
            raise UserError(f"--resize must be at least 1 pixel, not {self.treatment.resize}")
        if self.treatment.crop not in get_args(Crop):
            raise UserError(f"--crop must be one of {', '.join(get_args(Crop))}, not {self.treatment.crop}")
        if self.treatment.encoding not in get_args(Encoding):
            known = ", ".join(get_args(Encoding))
            raise UserError(f"--encoding must be one of {known}, not {self.treatment.encoding}")
        if not 1 <= self.treatment.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, not {self.treatment.quality}")
        if self.seconds <= 0 or self.memory_mb < 1:
            raise UserError("--seconds and --memory-mb must be greater than 0")

    def flags(self) -> dict[str, Any]:
        """The settings by the command's option that sets them; an option without a value is True or None."""
        limits = self.treatment.limits
        return {
            "--unit-rows": self.unit_rows,
            "--resize": self.treatment.resize,
            "--crop": self.treatment.crop,
            "--encoding": self.treatment.encoding,
            "--quality": self.treatment.quality,
            "--no-phash": None if self.treatment.phash else True,
            "--max-bytes": limits.max_bytes,
            "--max-pixels": limits.max_pixels,
            "--seconds": self.seconds,
            "--memory-mb": self.memory_mb,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen generation of units.

    Attributes:
        output: the dataset's folder.
        generation: its number; the first is 0.
        fingerprint: sha256 of all that decides the output, hex.
        units: unit numbers.
        rows: attempts planned, over all units.
    """

    output: Path
    generation: int
    fingerprint: str
    units: range
    rows: int

    def items(self, unit: int) -> list[tuple[int, Item]]:
        """The unit's attempts in order: the source's number, and the item."""
        path = self.output / layout.plan_folder(self.generation) / "units.parquet"
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(unit - self.units.start)
        columns = [table.column(name).to_pylist() for name in ("source", "path", "offset", "size", "problem")]
        return [(source, Item(*item)) for source, *item in zip(*columns, strict=True)]


def open_source(text: str) -> Source:
    """A folder or a local tar.

    Raises:
        UserError: it is neither.
    """
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"source {text} does not exist")
    if path.is_file() and os.access(path, os.R_OK) and is_tar(path):
        return TarSource(path)
    raise UserError(f"source {text} is neither a folder nor a readable tar (plain, gzip, bzip2 or xz)")


def freeze(
    output: Path, sources: Sequence[Source], settings: CrawlSettings, *, listed: Callable[[int], None]
) -> Plan:
    """The plan of this output: made now, or the one that is there if it is for the same work.

    Args:
        output: the dataset's folder.
        sources: where images come from, in order.
        settings: what is made of them.
        listed: called now and then with the number of items listed so far.

    Raises:
        UserError: there is nothing to ingest, or the output was planned for other work.
    """
    folder = output / layout.plan_folder(0)
    if (folder / "plan.json").exists():
        ours = _describe(sources, settings, listed, None)
    else:
        ours = _publish(folder, sources, settings, listed)
    theirs = json.loads((folder / "plan.json").read_bytes())
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise UserError(f"{output} was planned {_difference(theirs, ours)}, or another --output")
    return Plan(
        output=output,
        generation=0,
        fingerprint=theirs["fingerprint"],
        units=range(theirs["units"]),
        rows=theirs["rows"],
    )


def builds() -> dict[str, str | None]:
    """Versions of what makes bytes. pillow-simd resizes differently from Pillow: its version has .post."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "zlib", "webp", "libtiff")}
    return {"pillow": PIL.__version__, **codecs, "pyarrow": pa.__version__}


def _publish(
    folder: Path, sources: Sequence[Source], settings: CrawlSettings, listed: Callable[[int], None]
) -> dict[str, Any]:
    """Write the plan under a hidden name, then move the whole folder; of several at once, the first wins."""
    draft = folder.parent / f".{secrets.token_hex(8)}.tmp"
    make_folder(draft)
    try:
        with (draft / "units.parquet").open("xb") as file:
            with pq.ParquetWriter(file, _ITEMS_SCHEMA, compression="zstd") as writer:
                description = _describe(sources, settings, listed, writer)
            make_durable(file)
        with (draft / "plan.json").open("xb") as file:
            file.write(canonical(description))
            make_durable(file)
        sync_folder(draft)
        try:
            draft.rename(folder)
        except OSError as error:
            # A folder that has files is not replaced: another worker's plan is there.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return description


def _describe(
    sources: Sequence[Source],
    settings: CrawlSettings,
    listed: Callable[[int], None],
    writer: pq.ParquetWriter | None,
) -> dict[str, Any]:
    """List the sources, unit by unit, into `writer` if there is one; returns the content of plan.json."""
    digests = [hashlib.sha256() for _ in sources]
    counts = [0] * len(sources)
    units = 0
    every = ((number, item) for number, source in enumerate(sources) for item in source.items())
    for batch in batched(every, settings.unit_rows):
        for number, item in batch:
            digests[number].update(
                struct.pack("<IQQI", len(item.path), item.offset, item.size, len(item.problem))
                + item.path
                + item.problem.encode()
            )
            counts[number] += 1
        if writer is not None:
            writer.write_table(_items_table(units, batch))
        units += 1
        listed(sum(counts))
    if units == 0:
        raise UserError(f"there is nothing to ingest in {', '.join(source.name for source in sources)}")
    identity = {
        "format": FORMAT,
        "settings": settings.flags(),
        "sources": [
            source.describe() | {"items": count, "sha256": digest.hexdigest()}
            for source, count, digest in zip(sources, counts, digests, strict=True)
        ],
        "builds": builds(),
    }
    return identity | {
        "generation": 0,
        "units": units,
        "rows": sum(counts),
        "fingerprint": hashlib.sha256(canonical(identity)).hexdigest(),
    }


def _items_table(unit: int, batch: Sequence[tuple[int, Item]]) -> pa.Table:
    """One unit is one row group, so that a worker reads its own alone."""
    return pa.table(
        {
            "unit": [unit] * len(batch),
            "source": [number for number, _ in batch],
            **{
                name: [getattr(item, name) for _, item in batch]
                for name in ("path", "offset", "size", "problem")
            },
        },
        schema=_ITEMS_SCHEMA,
    )


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What keeps these two plans apart, as the middle of a sentence, most likely cause first."""
    if theirs.get("format") != FORMAT:
        return (
            f"in format {theirs.get('format')}, not {FORMAT}: use the version that made it to go on with it"
        )
    old, new = theirs["settings"], ours["settings"]
    flags = [flag for flag in new if old.get(flag) != new[flag]]
    if flags:
        values = [settings.get(flags[0]) for settings in (old, new)]
        brief = len(flags) == 1 and None not in values
        given = str(values[1]) if brief else _options(flags, new, "with", "without")
        return (
            f"{_options(flags, old, 'with', 'without')}, not {given}: "
            f"{_options(flags, old, 'use', 'leave out')} to go on with it"
        )
    if theirs["sources"] != ours["sources"]:
        before, now = (", ".join(_source(source) for source in plan["sources"]) for plan in (theirs, ours))
        if before == now:
            return f"from {before}, in which names or sizes have changed since: restore them to go on with it"
        return f"from {before}, not from {now}: give it the same sources to go on with it"
    changed = [name for name in ours["builds"] if theirs["builds"].get(name) != ours["builds"][name]]
    wanted = ", ".join(f"{name} {theirs['builds'].get(name)}" for name in changed)
    given = ", ".join(f"{name} {ours['builds'][name]}" for name in changed)
    return f"with {wanted}, and here is {given}, which makes other bytes: use the former to go on with it"


def _options(flags: Sequence[str], settings: dict[str, Any], present: str, absent: str) -> str:
    given = [(flag, settings.get(flag)) for flag in flags if settings.get(flag) is not None]
    there = " ".join(flag if value is True else f"{flag} {value}" for flag, value in given)
    missing = " ".join(flag for flag in flags if settings.get(flag) is None)
    return " and ".join(f"{word} {names}" for word, names in ((present, there), (absent, missing)) if names)


def _source(source: dict[str, Any]) -> str:
    return f"{source['name']} ({source['items']:,} files)"


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter. (itertools.batched came with Python 3.12.)"""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
