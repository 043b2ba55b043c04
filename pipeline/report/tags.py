"""The page of a dataset's tags: how often each is there, and pictures that have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.atomic_file import write_atomically
from ingest.dataset.keys import key_of
from ingest.dataset.open import Dataset
from pipeline.data.tags import Tag, Tags, open_tags
from pipeline.report.gallery import Samples, data_uri
from pipeline.report.page import environment

PAGE = "hashtags.html"
# Pictures of rare tags are looked for in so many units.
_UNITS_LOOKED_AT = 200


class TagRow(NamedTuple):
    """A tag, its share of the most frequent one's count, and pictures that have it."""

    tag: Tag
    share: float
    pictures: list[str]


def write_tags_page(dataset: Dataset, folder: Path) -> None:
    """The page of the tags in a folder, beside them."""
    write_atomically(folder / PAGE, tags_page(dataset, open_tags(folder)))


def tags_page(dataset: Dataset, tags: Tags, *, shown: int = 200, pictures: int = 4) -> str:
    """One HTML page that needs nothing else.

    Args:
        dataset: that the tags are of.
        shown: so many tags have pictures; if there are more, half of these are the most frequent, and half
            the rarest.
        pictures: for each tag.
    """
    vocabulary = tags.vocabulary
    codes = _of_both_ends(len(vocabulary.tags), shown)
    keys = _first_images(dataset, tags, codes, pictures)
    samples = Samples(dataset)
    try:
        # In the order of the keys, so that each unit is opened once.
        made = {key: data_uri(samples.image(key)) for key in sorted(set().union(*keys.values()))}
    finally:
        samples.close()
    most = vocabulary.tags[0].count
    rows = [
        TagRow(tag, tag.count / most, [made[key] for key in keys[tag.index]])
        for tag in (vocabulary.tags[code] for code in codes)
    ]
    return (
        environment()
        .get_template("tags.html")
        .render(
            vocabulary=vocabulary,
            rows=rows,
            others=[tag for tag in vocabulary.tags if tag.index not in keys],
            per_image=sum(tag.count for tag in vocabulary.tags) / vocabulary.tagged,
        )
    )


def _of_both_ends(tags: int, shown: int) -> list[int]:
    if tags <= shown:
        return list(range(tags))
    half = shown // 2
    return [*range(half), *range(tags - half, tags)]


def _first_images(dataset: Dataset, tags: Tags, codes: Sequence[int], count: int) -> dict[int, list[int]]:
    """Keys of the first images of each of these tags; an image is shown once, as long as there are others."""
    keys: dict[int, list[int]] = {code: [] for code in codes}
    spare: dict[int, list[int]] = defaultdict(list)
    taken: set[int] = set()
    for unit in sorted(tags.digests)[:_UNITS_LOOKED_AT]:
        missing = [code for code in codes if len(keys[code]) < count]
        if not missing:
            break
        table = tags.of_unit(unit)
        lists = table["tags"].combine_chunks()
        slots = table["slot"].to_numpy()[lists.value_parent_indices().to_numpy()]
        of_pair = lists.flatten().to_numpy()
        for code in reversed(missing):  # the rare ones choose first
            for slot in slots[of_pair == code][: 50 * count].tolist():
                key = key_of(unit, slot)
                if len(keys[code]) == count:
                    break
                if key in taken:
                    spare[code].append(key)
                    continue
                taken.add(key)
                keys[code].append(key)
    return {code: sorted((found + spare[code])[:count]) for code, found in keys.items()}
