"""Tags of a dataset: what is written about each image is read, and frequent synsets become a vocabulary.

Two passes over the units, each in as many processes as wanted: the first leaves what each image's text names
in a folder `found-…`, where an interrupted one goes on; the second writes the codes of what was kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.atomic_file import replacing, write_atomically
from cluster.errors import UserError
from cluster.map.tasks import MapTasks
from ingest.dataset.keys import keys_of
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.records import canonical_json
from ingest.dataset.schema import LABELS
from pipeline.data.tags import FILE, TAGS_SCHEMA, UNITS, UNITS_SCHEMA, Tag, Vocabulary, unit_path
from pipeline.hashtags.resample import draw_copies, how_often
from pipeline.hashtags.tagger import Tagger
from pipeline.hashtags.wordnet import PACKED, Synset, wordnet
from pipeline.hashtags.words import words
from pipeline.recipe.stages import HashtagsRecipe, NounKind

_SYNSET = re.compile(r"n\d{8}")
_FOUND_SCHEMA = pa.schema([("slot", pa.uint32()), ("synsets", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class FindTask:
    """One unit, by its place in the dataset, whose text is to be read."""

    path: str
    root: str
    view: str | None
    unit_index: int
    read: tuple[str, ...]
    kinds: tuple[NounKind, ...]
    found: str


@dataclass(frozen=True, kw_only=True)
class CodeTask:
    """One unit's findings, to be written as codes: each synset's place among `kept`. `often` is how often an
    epoch has an image of each.
    """

    found: str
    unit: int
    slots: int
    kept: tuple[str, ...]
    often: tuple[float, ...]
    folder: str


def make_tags(
    dataset: Dataset, recipe: HashtagsRecipe, folder: Path, *, map_tasks: MapTasks
) -> dict[str, float]:
    """Write a dataset's tags into a folder, see `pipeline.data.tags`; says what came of it.

    Args:
        dataset: opened as the recipe says, with its view.

    Raises:
        UserError: fewer than two tags are frequent enough, or something is damaged.
    """
    wanted = None if recipe.only is None else _synsets(recipe.only)
    found = folder / f"found-{_digest(dataset, recipe)}"
    found.mkdir(parents=True, exist_ok=True)
    tasks = [
        FindTask(
            path=dataset.path,
            root=dataset.root,
            view=recipe.view,
            unit_index=unit_index,
            read=recipe.read,
            kinds=recipe.kinds,
            found=str(found / f"{unit:08d}.parquet"),
        )
        for unit_index, unit in enumerate(dataset.units.tolist())
    ]
    counts: Counter[str] = Counter()
    for of_unit in map_tasks(find, tasks):
        counts.update(of_unit)
    if wanted is not None:
        counts = Counter({name: count for name, count in counts.items() if name in wanted})
    kept = _frequent(counts, recipe, dataset)
    often = tuple(how_often([counts[name] for name in kept], recipe).tolist())
    slots = dict(zip(dataset.units.tolist(), _slots(dataset), strict=True))
    coding = [
        CodeTask(found=task.found, unit=unit, slots=slots[unit], kept=kept, often=often, folder=str(folder))
        for task, unit in zip(tasks, slots, strict=True)
    ]
    listing = _write_listing(folder, (row for row in map_tasks(encode, coding) if row is not None))
    by_name = {synset.name: synset for synset in wordnet().synsets()}
    vocabulary = Vocabulary(
        root=dataset.root,
        view=None if dataset.view is None else dataset.view.digest,
        made_by=recipe.model_dump(mode="json", exclude={"run"}),
        images=len(dataset),
        tagged=sum(listing["kept"].to_pylist()),
        units_sha256=hashlib.sha256((folder / UNITS).read_bytes()).hexdigest(),
        tags=tuple(_tag(index, by_name[name], counts[name]) for index, name in enumerate(kept)),
    )
    write_atomically(folder / FILE, canonical_json(vocabulary.model_dump(mode="json")).decode())
    shutil.rmtree(found)
    return _summary(vocabulary, sum(listing["copies"].to_pylist()))


def find(task: FindTask) -> dict[str, int]:
    """Write what a unit's texts name, unless that was done before; in how many images, for each synset."""
    path = Path(task.found)
    if not _readable(path):
        dataset = _opened(task.path, task.root, task.view)
        rows = dataset.kept_rows(task.unit_index, task.read)
        texts = [_of_column(rows, column) for column in task.read if column in rows.column_names]
        tagger = Tagger(wordnet(), task.kinds)
        synsets = [_named(tagger, image) for image in zip(*texts, strict=True)] or [[]] * len(rows)
        table = pa.table({"slot": rows["slot"], "synsets": synsets}, schema=_FOUND_SCHEMA)
        with replacing(path, survives_power_cut=False) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    column = pq.read_table(path, columns=["synsets"], use_threads=False)["synsets"].combine_chunks()
    return {count["values"]: count["counts"] for count in column.flatten().value_counts().to_pylist()}


def _readable(path: Path) -> bool:
    """Whether a file of findings is there and whole: it was not made to survive a power cut."""
    try:
        pq.read_table(path, use_threads=False)
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return True


def encode(task: CodeTask) -> dict[str, Any] | None:
    """Write a unit's codes; its row of the list of units, or None if none of its images has a tag."""
    table = pq.read_table(task.found, use_threads=False)
    lists = table["synsets"].combine_chunks()
    codes = pc.index_in(lists.flatten(), value_set=pa.array(task.kept, pa.string()))
    image = lists.value_parent_indices()
    there = codes.is_valid()
    codes, image = codes.filter(there).to_numpy(), image.filter(there).to_numpy()
    if not len(codes):
        return None
    order = np.lexsort((codes, image))
    images, starts = np.unique(image[order], return_index=True)
    slots = table["slot"].to_numpy()[images]
    copies = draw_copies(
        keys_of(task.unit, slots), np.maximum.reduceat(np.array(task.often)[codes[order]], starts)
    )
    lists = pa.ListArray.from_arrays(
        pa.array([*starts, len(codes)], pa.int32()), pa.array(codes[order], pa.int32())
    )
    path = unit_path(Path(task.folder), task.unit)
    path.parent.mkdir(exist_ok=True)
    with replacing(path, survives_power_cut=False) as temporary:
        columns = {"slot": slots, "tags": lists, "copies": copies}
        pq.write_table(pa.table(columns, schema=TAGS_SCHEMA), temporary, compression="zstd")
        digest = hashlib.sha256(temporary.read_bytes()).digest()
    bits = np.zeros(task.slots, np.bool_)
    bits[slots] = True
    return {
        "unit": task.unit,
        "slots": task.slots,
        "kept": len(slots),
        "copies": int(copies.sum()),
        "bitmap": np.packbits(bits, bitorder="little").tobytes(),
        "sha256": digest,
    }


@lru_cache(maxsize=1)
def _opened(path: str, root: str, view: str | None) -> Dataset:
    return open_dataset(path, sealed=root, view=view)


def _of_column(rows: pa.Table, column: str) -> list[list[tuple[str, str]]]:
    """Of each image its texts, each with what it was read from."""
    values = rows[column].to_pylist()
    if rows[column].type == LABELS:
        return [[(column, text) for text in texts or []] for texts in values]
    return [[] if text is None else [(column, text)] for text in values]


def _named(tagger: Tagger, image: Iterable[list[tuple[str, str]]]) -> list[str]:
    """What an image's texts name: each synset once."""
    names: dict[str, Synset] = {}
    for texts in image:
        for column, text in texts:
            names |= tagger.of_caption(text) if column == "caption" else tagger.of_label(text)
    return list(names)


def _synsets(said: Iterable[str]) -> set[str]:
    """The names of synsets that are said by name or by a noun.

    Raises:
        UserError: one is neither.
    """
    names = set()
    for each in said:
        found = wordnet().find(" ".join(words(each)))
        if found is None and not _SYNSET.fullmatch(each):
            raise UserError(
                f"only: {each!r} is no noun of WordNet, and no synset such as n02132136: leave it out, or "
                "say it otherwise"
            )
        names.add(each if found is None else found.name)
    return names


def _frequent(counts: Mapping[str, int], recipe: HashtagsRecipe, dataset: Dataset) -> tuple[str, ...]:
    """The synsets that become tags, the most frequent first."""
    order = sorted(counts, key=lambda name: (-counts[name], name))
    kept = [name for name in order if counts[name] >= recipe.min_images][: recipe.max_tags]
    if len(kept) < 2:
        remedy = "look at what else is written about them with read=[caption,labels], or for other kinds"
        if len(order) >= 2:
            remedy = f"min_images={counts[order[1]]} would keep two"
        raise UserError(
            f"{dataset.path}: {' and '.join(recipe.read)} of {len(dataset):,} images name {len(order):,} "
            f"things, {len(kept)} of them in at least min_images={recipe.min_images}, and a training needs "
            f"two at least: {remedy}"
        )
    return tuple(kept)


def _slots(dataset: Dataset) -> list[int]:
    """How many slots each unit has, those included that the view leaves out."""
    if dataset.view is None:
        return [int(count) for count in dataset.counts]
    places = np.searchsorted(dataset.view.units, dataset.units)
    return [int(slots) for slots in dataset.view.slots[places]]


def _write_listing(folder: Path, rows: Iterable[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(list(rows), schema=UNITS_SCHEMA)
    with replacing(folder / UNITS) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return table


def _tag(index: int, synset: Synset, count: int) -> Tag:
    return Tag(index=index, synset=synset.name, kind=synset.file, nouns=synset.nouns, count=count)


def _digest(dataset: Dataset, recipe: HashtagsRecipe) -> str:
    """Of all that the first pass depends on."""
    view = None if dataset.view is None else dataset.view.digest
    nouns = hashlib.sha256(PACKED.read_bytes()).hexdigest()
    return hashlib.sha256(
        json.dumps([dataset.root, view, recipe.read, recipe.kinds, nouns]).encode()
    ).hexdigest()[:12]


def _summary(vocabulary: Vocabulary, copies: int) -> dict[str, float]:
    pairs = sum(tag.count for tag in vocabulary.tags)
    return {
        "images": vocabulary.images,
        "tagged": vocabulary.tagged,
        "tagged_share": vocabulary.tagged / vocabulary.images,
        "tags": len(vocabulary.tags),
        "tags_per_tagged_image": pairs / vocabulary.tagged,
        "samples_of_an_epoch": copies,
    }
