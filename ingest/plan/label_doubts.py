"""What looks wrong about the labels of a plan, while there is time to mend it."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from cluster.wording import several, visible
from ingest.labels.rule import PRESETS
from ingest.plan.plan import Plan
from ingest.sources.source import first_folder

# No known data set has more classes: what has more labels is none of those that are doubted.
_MOST = 10_000
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}


def label_doubts(plan: Plan) -> list[str]:
    """Sentences for people, most serious first; none if nothing looks wrong."""
    labels, unlabelled = _labels(plan)
    return [*_doubts(plan, labels, unlabelled), *_too_far_up(plan, labels)]


def _too_far_up(plan: Plan, labels: set[str]) -> Iterator[str]:
    """If labels are first folders, and the images of the first unit all lie deeper."""
    settings = plan.settings
    if settings.labels_from is not None or settings.labels or len(labels) < 2:
        return
    table = plan.table(plan.units.start)
    rows = zip(table["path"].to_pylist(), map(tuple, table["labels"].to_pylist()), strict=True)
    labelled = [(path, named) for path, named in rows if named]
    if labelled and all(named == first_folder(path) and path.count(b"/") > 1 for path, named in labelled):
        deep = visible("/".join(labelled[0][0].decode("utf-8", "backslashreplace").split("/")[:2]))
        yield (
            f"labels are the first folders, and all files lie in folders below those, such as {deep}: "
            "--labels-from inat18 takes the last folder, and path:REGEX any"
        )


def _labels(plan: Plan) -> tuple[set[str], int]:
    """The distinct labels, or many of them, and how many rows without one there were until then."""
    found: set[str] = set()
    unlabelled = 0
    if plan.has_labels():
        for table in plan.columns_of_units(["labels"]):
            labels = table["labels"].combine_chunks()
            found.update(pc.unique(labels.flatten()).to_pylist())
            unlabelled += pc.sum(pc.equal(pc.list_value_length(labels), pa.scalar(0))).as_py() or 0
            if len(found) > _MOST:
                break
    else:
        unlabelled = plan.rows
    return found, unlabelled


def _doubts(plan: Plan, labels: set[str], unlabelled: int) -> Iterator[str]:
    settings = plan.settings
    rule = PRESETS.get(settings.labels_from or "")
    asked = settings.labels_from is not None or bool(settings.labels)
    # What VOC's files do not name are annotations and masks.
    if (asked and unlabelled == plan.rows) or (asked and unlabelled and not (rule and rule.split_files)):
        given = "--labels" if settings.labels_from is None else f"--labels-from {settings.labels_from}"
        whose = "none of" if unlabelled == plan.rows else f"{unlabelled:,} of"
        verb = "has a label" if unlabelled == plan.rows else "have no label"
        yield f"{whose} the {several(plan.rows, 'file')} {verb} by {visible(given)}: is it the right one?"
    if unused := plan.record.labels_unused:
        entries = "1 entry of --labels names" if unused == 1 else f"{unused:,} entries of --labels name"
        yield f"{entries} no file"
    if rule is not None and rule.classes is not None and 0 < len(labels) < rule.classes:
        yield (
            f"there are {several(len(labels), 'label')}, and {rule.given} has {rule.classes:,} classes: is "
            "the source all of it?"
        )
    elif len(labels) == 1:
        only = visible(next(iter(labels)))
        yield f"every labelled file has the one label {only}: --labels-from and --labels say what they show"
    elif settings.labels_from is None and "JPEGImages" in labels:
        yield "JPEGImages is the folder in which VOC has all images: see --labels-from voc07"
    if len(labels) > 1 and labels <= _SPLITS:
        names = ", ".join(sorted(labels))
        yield f"the labels are {names}, which are splits: --labels-from imagefolder takes what is below them"
    elif len(labels) > 1 and all(len(label) == 1 and label.isalpha() for label in labels):
        names = ", ".join(visible(label) for label in sorted(labels)[:5])
        yield (
            f"all labels are single letters ({names}): folders that sort classes by their initial are none; "
            "see --labels-from places365"
        )
