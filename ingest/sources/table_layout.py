"""What the columns of a table of images are: seen from names, types, values, and Hugging Face's metadata."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset.schema import TAKEN_NAMES
from ingest.image.header import sniff
from ingest.sources.text_blocks import Opened
from ingest.sources.url_list import CAPTION_NAMES, LABEL_NAMES, PARQUET_BUFFER, Columns, shown

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
_LOOKED_AT = 16


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """What a table's columns are.

    Attributes:
        image, caption, labels: their names, as far as there are such.
        has_path: it is a struct with a field `path`.
        names: of classes, by columns of numbers.
        others: further columns, and what rows call them.
    """

    image: str
    has_path: bool
    caption: str | None
    labels: str | None
    names: Mapping[str, Sequence[str]]
    others: Mapping[str, pa.Field]


def image_column(opened: Opened, chosen: str | None) -> str | None:
    """The column of a Parquet file that has images in it; None if none has, or it cannot be read.

    Args:
        opened: opens it.
        chosen: the only column to look at.
    """
    try:
        with opened() as file, pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
            schema = parquet.schema_arrow
            names = Counter(schema.names)
            order = [*_IMAGE_NAMES, *schema.names] if chosen is None else [chosen]
            for name in (name for name in dict.fromkeys(order) if names[name] == 1):
                kind = schema.field(name).type
                if _is_struct_of_bytes(kind) or (_is_binary(kind) and _begins_with_images(parquet, name)):
                    return name
    except MemoryError:
        raise
    except (pa.ArrowException, ValueError, OSError):
        return None  # whoever opens it next tells what is wrong
    return None


def read_layout(location: str, schema: pa.Schema, image: str, columns: Columns) -> TableLayout:
    """The layout of a table with such a column of images.

    Raises:
        UserError: it has no column that is asked for.
    """
    names = _class_names(schema)
    free = [each.name for each in schema if each.name != image]

    def find(option: str, chosen: str | None, usual: Iterable[str]) -> str | None:
        if chosen is not None and chosen not in free:
            raise UserError(f"{location} has no column {chosen!r}: give {option} one of {shown(free)}")
        lower = {name.lower(): name for name in reversed(free)}
        return chosen or next((lower[name] for name in usual if name in lower), None)

    caption = find("--caption-column", columns.caption, CAPTION_NAMES)
    labels = find("--label-column", columns.labels, LABEL_NAMES) or next(iter(names), None)
    kind = schema.field(image).type
    others = {
        each.name: pa.field(
            own_name(each.name), each.type if stays(each.type) and each.name not in names else pa.string()
        )
        for each in schema
        if each.name not in (image, caption, labels)
        and not _is_struct_of_bytes(each.type)
        and not _is_binary(each.type)
    }
    return TableLayout(
        image=image,
        has_path=pa.types.is_struct(kind) and kind.get_field_index("path") >= 0,
        caption=caption,
        labels=labels,
        names=names,
        others=others,
    )


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of classes by column, from Hugging Face's metadata; none if it has none, or is not sound."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {}
        for column, given in features.items():
            feature = given
            while isinstance(feature, list) or "feature" in feature:  # of a list of labels
                feature = feature[0] if isinstance(feature, list) else feature["feature"]
            if feature.get("_type") == "ClassLabel" and column in schema.names:
                found[column] = [str(name) for name in feature["names"]]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return {}
    return found


def own_name(name: str) -> str:
    """What rows call a further column: what is called like one of ours gets `source_` before its name."""
    return f"source_{name}" if name in TAKEN_NAMES else name


def _begins_with_images(parquet: pq.ParquetFile, column: str) -> bool:
    first = next(parquet.iter_batches(_LOOKED_AT, columns=[column], use_threads=False), None)
    return first is not None and any(value and sniff(value) for value in first.column(0).to_pylist())


def _is_struct_of_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_binary(kind.field("bytes").type)
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def stays(kind: pa.DataType) -> bool:
    """Whether filters can work on it as it is; all else is text."""
    number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(number or pa.types.is_temporal(kind))
