"""What a classifier says of every image of a labelled dataset, one row each, and how often it is right.

With the rows on disk, any two classifiers can be compared on the same images (`submit compare`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.atomic_file import replacing
from cluster.errors import UserError
from cluster.rank.torch_dist import World
from cluster.wording import visible
from ingest.dataset.open import Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.shown import shown_inputs
from pipeline.recipe.transfer import Predict
from pipeline.transfer.scores import with_interval
from pipeline.trunks.classifier import ExportedClassifier

TOP = 5
WINDOWS = 10  # of a video, if nothing is said
# A row for each image: its labels; the likeliest classes and the first one's probability; and the place among
# them of the first that is right, 0 if that is the likeliest, -1 if none is.
SCHEMA = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("labels", pa.list_(pa.dictionary(pa.int32(), pa.string())), nullable=False),
        pa.field("top", pa.list_(pa.dictionary(pa.int32(), pa.string())), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("right_at", pa.int8(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Which class is right for which label, and which classes may be said at all.

    Attributes:
        right: label → the classes that are right for it, as places among the logits.
        allowed: (classes,) bool.
    """

    right: Mapping[str, NDArray[np.int64]]
    allowed: Tensor


def read_answers(classes: Sequence[str], labels: Sequence[str], recipe: Predict) -> Answers:
    """How the labels of a test set and the classes of a classifier go together: by name, or by the file that
    the recipe names.

    Args:
        labels: all that the test images have.

    Raises:
        UserError: if a label has no class, or the file is not as it should be.
    """
    place = {name: index for index, name in enumerate(classes)}
    pairs = [(name, name) for name in labels] if recipe.classes is None else _read_map(Path(recipe.classes))
    found: dict[str, list[int]] = {}
    for label, name in pairs:
        if name in place:
            found.setdefault(label, []).append(place[name])
        elif recipe.classes is not None:
            raise UserError(f"{recipe.classes}: the classifier has no class {visible(name)}")
    missing = [label for label in labels if label not in found]
    if missing:
        named = ", ".join(visible(label) for label in missing[:5])
        raise UserError(
            f"the classifier has no class for {len(missing)} of the test set's {len(labels)} labels, such as "
            f"{named}: give classes=FILE, a CSV file with the columns label and class"
        )
    allowed = torch.ones(len(classes), dtype=torch.bool)
    if recipe.only_shared:
        allowed[:] = False
        allowed[[index for label in labels for index in found[label]]] = True
    return Answers(right={label: np.array(found[label], np.int64) for label in found}, allowed=allowed)


def _read_map(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark in front
            rows = csv.DictReader(file)
            if not {"label", "class"} <= set(rows.fieldnames or ()):
                raise UserError(f"{path} needs the columns label and class in its first line")
            pairs = []
            for row in rows:
                if not row["label"] or not row["class"]:
                    raise UserError(f"{path}, line {rows.line_num}: a label or a class is missing")
                pairs.append((row["label"], row["class"]))
            return pairs
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}): give a file with label,class") from error


def predict(
    classifier: ExportedClassifier,
    dataset: Dataset,
    recipe: Predict,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int,
    device: torch.device,
    cache: CachePlace | None = None,
    busy: Callable[[str], None] = lambda what: None,
) -> pa.Table:
    """Show a classifier every labelled image of a dataset once. Those without a label are passed over.

    Args:
        classifier: on `device`.
        rank, ranks: of equal parts of these images, in dataset order, only this one.
        busy: told of every batch.

    Returns:
        `SCHEMA`, in dataset order; its metadata name the dataset's root.

    Raises:
        UserError: if no image has a label, a label has no class, an image cannot be read, or an answer is not
            finite.
    """
    positions, labels = _labelled(dataset)
    names = dataset.vocabulary.names
    answers = read_answers(classifier.spec.classes, _used(names, labels), recipe)
    schema = SCHEMA.with_metadata({"dataset": dataset.root})
    mine = slice(len(labels) * rank // ranks, len(labels) * (rank + 1) // ranks)
    positions, labels = positions[mine], labels[mine]
    if not labels:
        return schema.empty_table()
    right_for = [np.concatenate([answers.right[names[code]] for code in of_one]) for of_one in labels]
    allowed = answers.allowed.to(device)
    view = classifier.spec.preprocessing
    batches = shown_inputs(
        dataset,
        positions,
        view,
        windows=recipe.windows or WINDOWS,
        workers=workers,
        device=device,
        batch_size=recipe.batch_size,
        cache=cache,
    )
    keys, tops, sure = [], [], []
    with torch.inference_mode():
        for number, batch in enumerate(batches, start=1):
            busy(f"predicting, batch {number}")
            logits = classifier(batch.inputs).float()
            shares = logits.masked_fill(~allowed, -torch.inf).softmax(1)
            shares = shares.unflatten(0, (len(batch.keys), -1)).mean(1)  # over the windows of a video
            best = shares.topk(min(TOP, int(allowed.sum())), dim=1)
            keys.append(batch.keys.numpy().copy())
            tops.append(best.indices.cpu().numpy())
            sure.append(best.values[:, 0].cpu().numpy())
            if not np.isfinite(sure[-1]).all():
                raise UserError(
                    f"what the classifier says of images of {dataset.path} is not finite: its weights are "
                    "broken; export an earlier checkpoint"
                )
    top = np.concatenate(tops)
    hits = np.array([np.isin(said, of_one) for said, of_one in zip(top, right_for, strict=True)])
    right_at = np.where(hits.any(1), hits.argmax(1), -1)
    lengths = np.cumsum([0, *map(len, labels)])
    return pa.Table.from_arrays(
        [
            pa.array(np.concatenate(keys)),
            pa.ListArray.from_arrays(
                pa.array(lengths, pa.int32()), _named(np.concatenate(labels), dataset.vocabulary.names)
            ),
            pa.ListArray.from_arrays(
                pa.array(np.arange(len(top) + 1) * top.shape[1], pa.int32()),
                _named(top.ravel(), classifier.spec.classes),
            ),
            pa.array(np.concatenate(sure), pa.float32()),
            pa.array(right_at, pa.int8()),
        ],
        schema=schema,
    )


def predict_together(
    classifier: ExportedClassifier,
    dataset: Dataset,
    recipe: Predict,
    path: Path,
    *,
    world: World,
    workers: int,
    cache: CachePlace | None = None,
    busy: Callable[[str], None] = lambda what: None,
) -> None:
    """The same on all ranks of a job, each its part; the first one writes the whole, then all return."""
    predictions = predict(
        classifier,
        dataset,
        recipe,
        rank=world.rank,
        ranks=world.size,
        workers=workers,
        device=world.device,
        cache=cache,
        busy=busy,
    )
    parts = [path.with_name(f".{path.stem}-{rank}.parquet") for rank in range(world.size)]
    write_predictions(predictions, parts[world.rank])
    world.barrier()
    if world.is_first:
        whole = pa.concat_tables([read_predictions(part) for part in parts], promote_options="none")
        write_predictions(whole.unify_dictionaries(), path)
        for part in parts:
            part.unlink()
    world.barrier()


def check_test_set(dataset: Dataset, classes: Sequence[str], recipe: Predict) -> None:
    """Refuse a test set that a classifier of these classes cannot be shown, before it is trained.

    Raises:
        UserError: if no image has a label, or a label has no class.
    """
    _, labels = _labelled(dataset)
    read_answers(classes, _used(dataset.vocabulary.names, labels), recipe)


def _used(names: Sequence[str], labels: Sequence[NDArray[np.int32]]) -> list[str]:
    return sorted({names[code] for of_one in labels for code in of_one})


def _labelled(dataset: Dataset) -> tuple[NDArray[np.int64], list[NDArray[np.int32]]]:
    """Positions on the dataset's global axis that have a label, ascending, and their labels, but for those to
    ignore.
    """
    labels: list[NDArray[np.int32]] = []
    for unit in range(len(dataset.units)):
        of_unit = dataset.unit_labels(unit)
        labels += [np.setdiff1d(of_unit.of(row), of_unit.ignored_of(row)) for row in range(len(of_unit))]
    kept = np.array([len(each) > 0 for each in labels], bool)
    if not kept.any():
        raise UserError(
            f"no image of {dataset.path} has a label: crawl it with --labels-from or --labels to be told how "
            "often the classifier is right"
        )
    return np.flatnonzero(kept), [each for each in labels if len(each)]


def _named(codes: NDArray[np.int32], names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))


def summarise(predictions: pa.Table) -> dict[str, float]:
    """How often the classifier is right: top-1 with Wilson's 95 % interval, and top-5."""
    right_at, samples = predictions["right_at"].to_numpy(), len(predictions)
    return {
        **with_interval(float((right_at == 0).mean()), samples),
        "top5": float((right_at >= 0).mean()),
        "samples": samples,
    }


def write_predictions(predictions: pa.Table, path: Path) -> None:
    """Write them as Parquet, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(predictions, temporary, compression="zstd")


def read_predictions(path: Path) -> pa.Table:
    """Read what `write_predictions` wrote.

    Raises:
        UserError: if it is something else.
    """
    try:
        table = pq.read_table(path)
        table = table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))
        (table.schema.metadata or {})[b"dataset"].decode()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: `submit predict --output {path}` writes one") from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} holds no predictions ({error}): `submit predict --output` writes them"
        ) from error
    return table
