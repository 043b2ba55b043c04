"""What is on disk, opened by everybody; and for users of the webdataset library, `webdataset`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def webdataset(
    path: str | Path,
    view: str | None = None,
    columns: Sequence[str] = ("caption", "labels"),
    *,
    shardshuffle: int = 0,
    seed: int | None = None,
) -> Any:
    """A pipeline of the webdataset library over a sealed dataset, or a view of it, here or on S3.

    Nodes and workers share the shards as `split_by_node` and `split_by_worker` do. A sample is a dictionary:

    `__key__`, `__url__`    its key in the dataset, and its shard
    `jpg`, `png`, `webp`, … the image, under the one name that its format has
    `json`                  the columns, as an object; of `labels`, all of them
    `txt`                   the caption, if that is among the columns and there is one
    `cls`                   the label's code in `Dataset.vocabulary`, if labels are among the columns and
                            there is exactly one

    All values are bytes, for `.decode("pil")` to decode; `.shuffle`, `.to_tuple` and so on follow as usual.

    Args:
        path: the dataset's folder or URL.
        view: name of a view to see it through.
        columns: of the rows that samples come with.
        shardshuffle: shards that are shuffled among each other; 0: they come in order.
        seed: makes that order the same each time, another in each epoch; None: it is always another.

    Raises:
        UserError: there is no such dataset, view or column, or the library is not installed. While samples
            are read: one is damaged.
    """
    from ingest.dataset.webdataset_pipeline import make_pipeline

    return make_pipeline(path, view, columns, shardshuffle=shardshuffle, seed=seed)
