"""Sources with the labels that a rule and side lists give their images, in place of those they come with."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from cluster.wording import several
from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.schema import LABELS
from ingest.labels.label_list import LabelList, read_label_list, voc_list
from ingest.labels.rule import Rule, read_rule
from ingest.labels.said import NOTHING, Said
from ingest.labels.voc import files_in_source
from ingest.sources.source import Found, Listing

# Annotations are called as the images that they are about.
_NO_IMAGES = {"xml", "json", "txt", "csv", "mat"}
logger = logging.getLogger(__name__)
COLUMNS = pa.schema([pa.field("split", pa.string()), pa.field("ignore", LABELS)])


@dataclass(kw_only=True)
class Labelling:
    """A rule, and lists: of an image's labels, its split and what to ignore, the first that says it counts.

    Lists come before the rule. One that has labels says those of all images that it names, if only that they
    have none.

    Attributes:
        rule: None: only the lists speak.
        lists: see `LabelList`.
        named: entries of the lists that named an image.
        images: that were looked for in the lists.
    """

    rule: Rule | None
    lists: Sequence[LabelList]
    named: set[str] = field(default_factory=set)
    images: int = 0
    _by_name: dict[str, str] = field(default_factory=dict)

    @property
    def identities(self) -> tuple[str, ...]:
        """Of the lists, for the fingerprint."""
        return tuple(each.identity for each in self.lists)

    def of(self, path: str, source: str) -> Said:
        """What is said of an image.

        Raises:
            UserError: a list names it by a name that another image has, too.
        """
        whole = path if "://" in path else f"{source}/{path}"
        self.images += 1
        by_rule = self.rule.of(whole) if self.rule else NOTHING
        said: list[Said] = []
        labels: tuple[str, ...] | None = None
        for number, each in enumerate(self.lists):
            if (entry := self._entry(each, path, whole)) is not None:
                self.named.add(f"{number} {entry}")
                said.append(each.said[entry])
                labels = said[-1].labels if each.has_labels and labels is None else labels
        return Said(
            labels=by_rule.labels if labels is None else labels,
            split=next((each.split for each in said if each.split), by_rule.split),
            ignore=next((each.ignore for each in said if each.ignore), by_rule.ignore),
        )

    @property
    def has_labels(self) -> bool:
        """Whether labels are those that it says, and no longer the sources' own."""
        return bool(self.rule and self.rule.has_labels) or any(each.has_labels for each in self.lists)

    def _entry(self, listed: LabelList, path: str, whole: str) -> str | None:
        """What the list calls the image: its path, its key, or its name, with its ending or without."""
        folder, slash, name = path.rpartition("/")
        key = folder + slash + name.partition(".")[0]
        for entry in (path, whole, key):
            if entry in listed.said:
                return entry
        stem, _, ending = name.rpartition(".")
        if ending.lower() in _NO_IMAGES:
            return None
        for entry in (name, stem, name.partition(".")[0]):
            if entry and entry in listed.said:
                other = self._by_name.setdefault(entry, whole)
                if other != whole:
                    raise UserError(
                        f"--labels names {entry}, which is the name of {other} and of {whole}: give "
                        "the paths instead of the names"
                    )
                return entry
        return None

    def outcome(self) -> dict[str, Any]:
        """What the plan says of it, when all images were looked for.

        Raises:
            UserError: there are lists, and they name no image at all.
        """
        if not self.lists:
            return {}
        if self.images and not self.named:
            listed = next((entry for each in self.lists for entry in each.said), None)
            raise UserError(
                f"--labels names none of the {several(self.images, 'image')} of the sources"
                + (": it is empty" if listed is None else f": it has names like {listed}")
                + "; use paths relative to the source, names of files, or keys"
            )
        return {"labels_unused": sum(len(each.said) for each in self.lists) - len(self.named)}


def read_labelling(labels_from: str | None, lists: Sequence[str], places: Sequence[str]) -> Labelling | None:
    """What --labels-from and --labels say; None if neither is given.

    Args:
        labels_from: a rule, see `ingest.labels.rule`.
        lists: files of labels, see `ingest.labels.label_list`.
        places: the sources, in which VOC's files are looked for.

    Raises:
        UserError: one of them cannot be used.
    """
    rule = None if labels_from is None else read_rule(labels_from)
    read = [read_label_list(location) for location in lists]
    for location, each in zip(lists, read, strict=True):
        if each.unnamed:
            logger.warning(
                "the labels in %s are numbers, as training sets do not call them: put the file with their "
                "names beside it, meta.mat of ImageNet's devkit or categories_places365.txt",
                location,
            )
    if rule is not None and rule.split_files:
        found: dict[str, bytes] = {}
        for place in places:
            found |= files_in_source(place)
        if not found and not read:
            raise UserError(
                f"--labels-from {rule.given} finds no ImageSets/Main/aeroplane_train.txt or the like in "
                f"{', '.join(places)}: give VOCdevkit/VOC2007, or name the folder with --labels"
            )
        read += [voc_list(found)] if found else []
    return Labelling(rule=rule, lists=read) if rule or read else None


def labelled(listings: Sequence[Listing], labelling: Labelling | None) -> list[Listing]:
    """The sources with these labels; as they are, if there are none."""
    return [listing if labelling is None else Labelled(listing, labelling) for listing in listings]


class Labelled:
    """A `Listing` whose labels are those of a labelling."""

    def __init__(self, listing: Listing, labelling: Labelling) -> None:
        self.name = listing.name
        self.kind = listing.kind
        self._listing = listing
        self._labelling = labelling
        # A tar that is used where it lies is called by its whole path.
        self._short_name = PurePosixPath(listing.name).name

    @property
    def extra(self) -> pa.Schema:
        """Those of the source, and what labellings say besides labels."""
        others = [each for each in self._listing.extra if each.name not in COLUMNS.names]
        return pa.schema([*others, *COLUMNS])

    def rows(self) -> Iterator[pa.Table]:
        for table in self._listing.rows():
            yield self._labelled(table)

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        return self._listing.describe(listed, found)

    def close(self) -> None:
        self._listing.close()

    def _labelled(self, table: pa.Table) -> pa.Table:
        paths = [path.decode("utf-8", "backslashreplace") for path in table["path"].to_pylist()]
        said = [self._labelling.of(path, self._short_name) for path in paths]
        splits: list[Any] = [each.split for each in said]
        if "split" in table.column_names:  # a list's own column
            own = table["split"].cast(pa.string()).to_pylist()
            splits = [split or before for split, before in zip(splits, own, strict=True)]
        labels = table["labels"]
        if self._labelling.has_labels:
            labels = pa.array([each.labels for each in said], LABELS)
        columns = {
            "labels": labels,
            "split": pa.array(splits, pa.string()),
            "ignore": pa.array([each.ignore or None for each in said], LABELS),
        }
        kept = {name: table[name] for name in table.column_names if name not in columns}
        return pa.table(kept | columns)
