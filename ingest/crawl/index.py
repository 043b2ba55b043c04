"""`ingest index`: tars that others made become a dataset without a copy of their images.

Plan, check, commit and seal are those of a crawl, and so is going on after a kill. Only the shards are not
written: a unit's shard is the tar that its images are in, and a tar of many images is the shard of several
units.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import UserError
from ingest.crawl.crawl import crawl_plan, plan_listings, refuse_repeated
from ingest.dataset import layout
from ingest.labels.labelled import read_labelling
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.sources.expand import expand
from ingest.sources.image_listing import ImageListing
from ingest.sources.tar import is_tar
from ingest.sources.tar_bytes import is_compressed
from ingest.sources.tar_in_place import ForeignTar
from ingest.store.clients import is_bucket
from ingest.store.open import open_store
from ingest.store.store import Store


def index_tars(
    tars: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    workers: int,
    progress: Progress,
    labels_from: str | None = None,
    labels: Sequence[str] = (),
    extend: bool = False,
) -> CrawlReport:
    """Make the rows of tars, and seal them as a dataset; go on where an earlier run stopped.

    Args:
        tars: uncompressed tars in the order of their images in the dataset: paths, or URLs in buckets;
            with * in the name, all that match.
        output: the dataset's folder, which may be the tars' own, or one in a bucket.
        settings: of the checks; images are kept as they are whatever it says of resizing.
        workers: checking processes; does not change the result.
        progress: is told how far it is.
        labels_from, labels: see `plan_shards`.
        extend: add these tars to a dataset that was made from others.

    Raises:
        UserError: a tar cannot be used in place, or has changed since a part of it was indexed; the output
            was planned for other work, or cannot be written.
    """
    store = open_store(output)
    places = [place for text in tars for place in map(_place, expand(text))]
    refuse_repeated(places)
    names = [_name(store, place) for place in places]
    counts = Counts()
    plan = plan_listings(
        [ImageListing(ForeignTar(*pair)) for pair in zip(places, names, strict=True)],
        store,
        settings,
        read_labelling(labels_from, labels, places),
        locations=places,
        extend=extend,
        progress=progress,
        counts=counts,
    )
    return crawl_plan(plan, fetch=settings.fetch, workers=workers, progress=progress, counts=counts)


def _place(text: str) -> str:
    """An absolute path, or a URL in a bucket, of a tar that can be used in place."""
    if "://" in text and not is_bucket(text):
        raise UserError(f"{text} cannot be used in place: copy it to a folder or a bucket")
    # Links are not resolved: what they lead to may move.
    place = text if "://" in text else os.path.abspath(text)  # noqa: PTH100
    where = place if "://" in place else Path(place)
    try:
        place.encode()
        if not is_tar(where):
            raise UserError(f"{place} is not a readable tar: give tars, such as a/*.tar")
        if is_compressed(where):
            raise UserError(
                f"{place} is compressed, and its images cannot be read where they lie: unpack it first, or "
                "copy its images with `ingest crawl-shards`"
            )
    except UnicodeEncodeError:
        shown = os.fsencode(place).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown} has a name that is no UTF-8: rename it") from None
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror or error}") from error
    return place


def _name(store: Store, place: str) -> str:
    """What the dataset calls the tar: a dataset and tars in its own folder can be moved together."""
    root = str(store.root) if "://" in str(store.root) else os.path.abspath(store.root)  # noqa: PTH100
    if not place.startswith(f"{root}/"):
        return place
    name = place.removeprefix(f"{root}/")
    own = (layout.SHARDS, layout.META, layout.COUNTS, layout.WAITING)  # in which `ingest gc` removes files
    if name.startswith(tuple(f"{folder}/" for folder in own)):
        raise UserError(f"{place} lies among the dataset's own files: move it, or use another --output")
    return name
