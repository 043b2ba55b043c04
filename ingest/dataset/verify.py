"""Is a sealed dataset whole? Four levels, each with all that the ones before it check.

names   the seal is what it says, and every file that it names is there
sizes   every file has the size that was sealed
sha     every shard, metadata file and image has the sha256 that was sealed, and the commits give the root
decode  every image, and every clip to its end, decodes to the size that its row says, within bounds of CPU
        time and memory, in a process that can do no harm

Nothing is mended and nothing stops at the first fault: each damaged thing is told in a sentence of its own.
"""

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.keys import key_name, key_of
from ingest.dataset.parquet import read_parquet
from ingest.dataset.records import CommitRecord
from ingest.dataset.schema import META_SCHEMA, UNITS_SCHEMA
from ingest.dataset.seal import merkle_root
from ingest.image.check import Checked, Treatment
from ingest.image.check_pool import Checker
from ingest.store.open import home_of, open_store
from ingest.store.store import Store
from ingest.video.container import CONTAINERS, pyav
from ingest.video.decode_worker import NO_PYAV

# Of CPU time and memory for one image or clip: several times what a crawl allows, if nothing else is said.
DECODE_SECONDS = 600.0
DECODE_MB = 4_096
# Threads that read objects, each with some MB of them, and those that ask for nothing but sizes.
_WORKERS_THAT_WAIT = 16
_WORKERS_THAT_ASK = 64
# What is compared with the images.
_OF_IMAGES = ["status", "slot", "offset", "size", "sha256", "format", "width", "height"]

# A row, as a dictionary.
_Sample = dict[str, Any]


class Level(IntEnum):
    """How far to look."""

    NAMES = 0
    SIZES = 1
    SHA = 2
    DECODE = 3


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged thing.

    Attributes:
        what: the file's path in the dataset, or the image's key.
        sentence: what is wrong with it.
    """

    what: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What was found in one unit, and how many of its images were looked at one by one."""

    unit: int
    images: int
    damages: tuple[Damage, ...]


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What was sealed: the root, and one row per unit as `schema.UNITS_SCHEMA` has them."""

    root: str
    units: tuple[dict[str, Any], ...]


def read_seal(path: str | Path) -> tuple[Seal | None, list[Damage]]:
    """The latest seal, and what is wrong with it; None if it cannot say which files belong to the dataset.

    Raises:
        UserError: there is no sealed dataset.
    """
    store = open_store(path)
    try:
        pointer = store.read(layout.DATASET)
    except (FileNotFoundError, NotADirectoryError):
        wrong = f"{path} is not a sealed dataset: it has no {layout.DATASET}"
        raise UserError(f"{wrong}; finish its crawl, or check the path") from None
    root = _text_at(pointer, "sealed")
    if root is None or len(root) != 64 or not set(root) <= set("0123456789abcdef"):
        return None, [_damage(layout.DATASET, "does not name a sealed root")]
    head_name, list_name = layout.sealed_name(root, "json"), layout.sealed_name(root, "parquet")
    head_bytes, list_bytes = _bytes_of(store, head_name), _bytes_of(store, list_name)
    absent = [n for n, data in ((head_name, head_bytes), (list_name, list_bytes)) if data is None]
    if head_bytes is None or list_bytes is None:
        return None, [_damage(name, "is missing") for name in absent]
    if _text_at(head_bytes, "root") != root:
        return None, [_damage(head_name, "is not the head of this root")]
    if _text_at(head_bytes, "units_sha256") != hashlib.sha256(list_bytes).hexdigest():
        mend = "remove it and run the crawl again, which makes it from the commits"
        return None, [_damage(list_name, f"is not the list that was sealed: {mend}")]
    head = json.loads(head_bytes)
    rows = read_parquet(io.BytesIO(list_bytes), schema=UNITS_SCHEMA).to_pylist()
    counted = {"units": len(rows), "planned": _total(rows, "rows"), "kept": _total(rows, "kept")}
    counted |= {status: _total(rows, status) for status in ("rejected", "failed")}
    said = {name: _number_said(name, head.get(name)) for name in counted}
    damages = [
        _damage(head_name, f"says {name} = {said[name]}, and its list of units gives {count}")
        for name, count in counted.items()
        if said[name] != count
    ]
    return Seal(root=root, units=tuple(rows)), damages


def verify_units(
    path: str | Path,
    seal: Seal,
    level: Level,
    *,
    workers: int,
    seconds: float = DECODE_SECONDS,
    memory_mb: int = DECODE_MB,
) -> Iterator[UnitReport]:
    """Check every unit, in order; `workers` threads share the work, each with a process that decodes. More of
    them ask an object store, which answers late, and many at once.

    Args:
        path, seal, level, workers: see above.
        seconds: CPU time that one image or clip may take.
        memory_mb: and memory.

    Raises:
        UserError: there are clips to decode, and PyAV cannot be imported.
    """
    store = open_store(path)
    if level < Level.DECODE and not isinstance(store.root, Path):
        workers = max(workers, _WORKERS_THAT_WAIT if level >= Level.SHA else _WORKERS_THAT_ASK)
    with ExitStack() as stack:
        decoders = deque(stack.enter_context(_decoder(seconds, memory_mb)) for _ in range(workers))

        def verified(unit: tuple[dict[str, Any], bool]) -> UnitReport:
            decoder = decoders.pop()
            try:
                return _verify_unit(store, *unit, level=level, decoder=decoder)
            finally:
                decoders.append(decoder)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(verified, _first_of_shard(seal.units))


def _decoder(seconds: float, memory_mb: int) -> Checker[_Sample]:
    """Starts its process when it is first asked."""
    return Checker(
        Treatment(),
        workers=1,
        seconds=seconds,
        memory_mb=memory_mb,
        module="ingest.video.decode_worker",
        detail=lambda sample: [sample["format"], sample["width"], sample["height"]],
    )


def _first_of_shard(units: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each unit, and whether it is the first of its shard: a foreign tar, the shard of many, is read once."""
    seen: set[tuple[str, bytes]] = set()
    for row in units:
        shard = (row["shard"], row["shard_sha256"])
        yield row, shard not in seen
        seen.add(shard)


def verify_root(path: str | Path, seal: Seal) -> list[Damage]:
    """The Merkle root, computed again from the commits; and each commit against the list that was sealed."""
    damages: list[Damage] = []
    leaves = []
    names = [layout.commit_name(row["unit"]) for row in seal.units]
    commits = open_store(path).read_many(names)
    for row, name, data in zip(seal.units, names, commits, strict=True):
        if data is None:
            continue  # told by its unit
        leaves.append(data)
        if not _agrees(data, row):
            damages.append(_damage(name, "is not the commit that was sealed"))
    if len(leaves) < len(seal.units) or damages:
        return damages
    root = merkle_root(leaves)
    if root != seal.root:
        damages.append(_damage("commits", f"give root {root[:12]}, not the sealed {seal.root[:12]}"))
    return damages


def _agrees(commit: bytes, row: dict[str, Any]) -> bool:
    """Whether a commit says what the sealed list says of its unit."""
    try:
        record = CommitRecord.model_validate_json(commit)
    except ValidationError:
        return False
    said: dict[str, Any] = record.model_dump(include={"unit", "generation", "rows", "kept"})
    said |= {"rejected": sum(record.rejected.values()), "failed": sum(record.failed.values())}
    for kind, file in (("shard", record.shard), ("meta", record.meta)):
        said |= {kind: file.name, f"{kind}_bytes": file.bytes, f"{kind}_sha256": bytes.fromhex(file.sha256)}
    return said == row


def _verify_unit(
    store: Store, row: dict[str, Any], first: bool, *, level: Level, decoder: Checker[_Sample]
) -> UnitReport:
    damages: list[Damage] = []
    images = 0
    if not store.exists(layout.commit_name(row["unit"])):
        damages.append(_damage(layout.commit_name(row["unit"]), "is missing"))
    there = []
    for kind in ("shard", "meta"):
        told = first or kind == "meta"
        found, is_there = _file_damage(store, row, kind, level if told else Level.NAMES)
        there.append(is_there)
        damages += [found] if found and told else []
    if level >= Level.SHA and all(there):
        members, images = _verify_images(store, row, decoder if level >= Level.DECODE else None)
        damages += members
    return UnitReport(unit=row["unit"], images=images, damages=tuple(damages))


def _file_damage(store: Store, row: dict[str, Any], kind: str, level: Level) -> tuple[Damage | None, bool]:
    """The first thing that is wrong with a shard or metadata as a whole file, and whether there is one."""
    home, name = home_of(store, row[kind])
    try:
        size, sealed = home.size(name), row[f"{kind}_bytes"]
        if level >= Level.SIZES and size != sealed:
            return _damage(row[kind], f"has {size:,} bytes, and {sealed:,} were sealed"), True
        if level >= Level.SHA:
            with home.open(name) as file:
                if hashlib.file_digest(file, "sha256").digest() != row[f"{kind}_sha256"]:
                    return _damage(row[kind], "does not have the sha256 that was sealed"), True
    except (FileNotFoundError, NotADirectoryError):
        return _damage(row[kind], "is missing"), False
    except OSError as error:
        return _damage(row[kind], f"cannot be read: {error.strerror}"), True
    return None, True


def _verify_images(
    store: Store, row: dict[str, Any], decoder: Checker[_Sample] | None
) -> tuple[list[Damage], int]:
    """Each image of a unit against its row; and the rows against what was sealed."""
    try:
        with store.open(row["meta"]) as file:
            table = read_parquet(file, columns=_OF_IMAGES, schema=META_SCHEMA)
    except (pa.ArrowException, OSError):
        return [
            _damage(row["meta"], "is not readable Parquet: what it lists cannot be checked one by one")
        ], 0
    damages = []
    kept = table.filter(pc.equal(table["status"], "kept")).to_pylist()
    if (table.num_rows, len(kept)) != (row["rows"], row["kept"]):
        text = (
            f"has {table.num_rows} rows and {len(kept)} kept, and {row['rows']} and {row['kept']} were sealed"
        )
        damages.append(_damage(row["meta"], text))
    home, name = home_of(store, row["shard"])
    try:
        shard = home.open(name)
    except OSError:
        return damages, 0  # told of the shard as a whole
    faults: dict[int, str] = {}

    def intact() -> Iterator[tuple[_Sample, bytes]]:
        """Those whose bytes are those that were kept."""
        for sample in kept:
            data, fault = _read(shard, sample)
            if fault:
                faults[sample["slot"]] = fault
                continue
            if sample["format"] in CONTAINERS and decoder is not None:
                pyav()  # or it says what to install
            yield sample, data

    with shard:
        if decoder is None:
            deque(intact(), maxlen=0)
        else:
            for sample, _, checked in decoder.run(intact()):
                if checked.reason == NO_PYAV:
                    raise UserError(
                        "PyAV cannot be imported where clips are decoded, so that none can be verified: "
                        "pip install --force-reinstall 'av>=18,<20'"
                    )
                faults[sample["slot"]] = _decode_fault(sample, checked)
    for sample in kept:
        if found := faults.get(sample["slot"]):
            key = key_name(key_of(row["unit"], sample["slot"]))
            damages.append(_damage(key, f"(slot {sample['slot']} of {row['shard']}) {found}"))
    return damages, len(kept)


def _read(shard: io.BufferedIOBase, sample: _Sample) -> tuple[bytes, str]:
    """An image's bytes, and what is wrong with them, in words; empty if nothing is."""
    try:
        shard.seek(sample["offset"])
        data = shard.read(sample["size"])
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"
    if len(data) < sample["size"]:
        return data, "is cut off: its shard ends before it"
    if hashlib.sha256(data).digest() != sample["sha256"]:
        return data, "does not have the sha256 of its row"
    return data, ""


def _decode_fault(sample: _Sample, decoded: Checked) -> str:
    """Whether the picture, or the clip, is still the one that was kept; empty if it is."""
    if decoded.status != "kept":
        return f"does not decode: {decoded.reason}"
    if (decoded.width, decoded.height) != (sample["width"], sample["height"]):
        return (
            f"decodes to {decoded.width} x {decoded.height}, and its row says "
            f"{sample['width']} x {sample['height']}"
        )
    return ""


def _damage(what: str, problem: str) -> Damage:
    return Damage(what=what, sentence=f"{what} {problem}")


def _bytes_of(store: Store, name: str) -> bytes | None:
    """The file, or None if there is none; a file that cannot be read has no bytes to agree with."""
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


def _text_at(data: bytes, key: str) -> str | None:
    """A text value of a JSON object, or None if there is no such thing in these bytes."""
    try:
        value = json.loads(data)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _number_said(name: str, value: Any) -> Any:
    """A count of a seal's head, summed over its reasons where it has them; damaged ones as they are."""
    if name in ("rejected", "failed") and isinstance(value, dict):
        if not all(type(count) is int for count in value.values()):
            return value
        return sum(value.values())
    return value


def _total(rows: list[dict[str, Any]], name: str) -> int:
    return sum(row[name] for row in rows)
