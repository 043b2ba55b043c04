"""The crawl: plan, read, check, shard, commit, seal. Running it again finishes what is missing."""

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from cluster.errors import UserError
from cluster.output_trouble import writing
from ingest.crawl.kept import remove_rest
from ingest.crawl.make_units import crawl_units
from ingest.dataset import layout
from ingest.dataset.commit import read_commits
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.dataset.seal import seal
from ingest.dataset.vocabulary import LABEL_COLUMNS, distinct_labels, publish_vocabulary
from ingest.labels.labelled import Labelling, labelled, read_labelling
from ingest.plan.freeze import freeze
from ingest.plan.label_doubts import label_doubts
from ingest.plan.plan import Plan, read_plans
from ingest.plan.segmented import Segmented
from ingest.plan.settings import CrawlSettings, with_labelling
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.sources.expand import expand
from ingest.sources.folder_values import InValuedFolder, folder_values
from ingest.sources.opening import open_listing, open_planned, refuse_unused, written_down
from ingest.sources.source import Listing
from ingest.sources.url_list import Columns
from ingest.store.open import open_store
from ingest.store.store import Store
from ingest.video.container import library_versions
from ingest.web.settings import FetchSettings

logger = logging.getLogger(__name__)
NAMES_TELL = Columns()


def crawl_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    workers: int,
    progress: Progress,
    columns: Columns = NAMES_TELL,
    labels_from: str | None = None,
    labels: Sequence[str] = (),
    extend: bool = False,
) -> CrawlReport:
    """Turn images into a sealed dataset; go on where an earlier run of the same crawl stopped.

    Args:
        sources, output, settings, columns, labels_from, labels, extend: see `plan_shards`.
        workers: checking processes; does not change the result.
        progress: is told how far the crawl is.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    counts = Counts()
    plan = plan_shards(
        sources,
        output,
        settings,
        progress=progress,
        counts=counts,
        columns=columns,
        labels_from=labels_from,
        labels=labels,
        extend=extend,
    )
    return crawl_plan(plan, fetch=settings.fetch, workers=workers, progress=progress, counts=counts)


def plan_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    progress: Progress,
    counts: Counts,
    columns: Columns = NAMES_TELL,
    labels_from: str | None = None,
    labels: Sequence[str] = (),
    extend: bool = False,
    follow_links: bool = False,
) -> Plan:
    """Freeze what there is to do, or find the plan of an earlier run of the same crawl.

    Args:
        sources: folders, local tars, and lists of URLs, in the order of their images in the dataset; rows of
            lists come last, in lanes: see `ingest.plan.by_lane`.
        output: the dataset's folder, outside the sources, or its URL in a bucket.
        settings: what is made of each image.
        progress: is told how many attempts have been found, in `counts`.
        columns: which columns of lists mean what.
        labels_from: how labels are seen from paths, see `ingest.labels.rule`; None: as the sources have them.
        labels: files that say what images show, see `ingest.labels.label_list`.
        extend: add these sources to a dataset that was made from others; what it knows is left out.
        follow_links: of folders, those that lead out of them, and to folders.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    store = open_store(output)
    if not sources:
        raise UserError("a crawl needs at least one source: a folder, a tar, or a list of URLs")
    if settings.video is not None:
        # Before an hour of planning: is there what decodes them?
        library_versions()
    named = [(text, place) for text in sources for place in expand(text)]
    places = [place for _, place in named]
    refuse_repeated([place if "://" in place else written_down(place) for place in places])
    refuse_unused(columns, places)
    labelling = read_labelling(labels_from, labels, places)
    listings: list[Listing] = []
    for text, place in named:
        listing = open_listing(place, columns, heeded=settings.fetch.heeded, follow_links=follow_links)
        values = folder_values(text, place)
        listing = InValuedFolder(listing, values) if values else listing
        if settings.video is not None:
            listing = _segmented(listing, place, settings, follow_links=follow_links)
        listings.append(listing)
    if isinstance(store.root, Path):
        _refuse_output_inside([*sources, *places], store.root)
    # Before an hour of planning, too.
    if settings.video is not None:
        library_versions()  # or it says what to install
    _refuse_without_contact(settings.fetch, any(listing.kind.is_fetched for listing in listings))
    return plan_listings(
        listings,
        store,
        settings,
        labelling,
        locations=[written_down(place) for place in places],
        extend=extend,
        progress=progress,
        counts=counts,
    )


def _segmented(listing: Listing, place: str, settings: CrawlSettings, *, follow_links: bool) -> Listing:
    if listing.kind is SourceKind.IMAGE_TABLE:
        raise UserError(f"{place} is a table of images, and --video is given: leave one of them out")
    if listing.kind.is_fetched:
        return Segmented(listing, None, settings)
    record = SourceRecord(kind=listing.kind, name=listing.name, follow_links=follow_links)
    return Segmented(listing, open_planned(record, written_down(place)), settings)


def plan_listings(
    listings: Sequence[Listing],
    store: Store,
    settings: CrawlSettings,
    labelling: Labelling | None,
    *,
    locations: Sequence[str],
    extend: bool,
    progress: Progress,
    counts: Counts,
) -> Plan:
    """Freeze the rows of opened sources, which are closed, and say what looks wrong about their labels.

    Args:
        listings: the sources, in order.
        store: the dataset's files.
        settings: without the labelling.
        labelling: what images are said to show instead of what their sources say; None: as these say.
        locations: of the sources, so that others can open them.
        extend, progress, counts: see `plan_shards`.

    Raises:
        UserError: see `freeze`; or the output cannot be written.
    """

    def listed(items: int) -> None:
        counts.planned = items
        progress(counts)

    with ExitStack() as stack, writing(store.root):
        for listing in listings:
            stack.callback(listing.close)
        store.prepare()
        plan = freeze(
            store,
            labelled(listings, labelling),
            with_labelling(settings, labelling),
            listed=listed,
            extend=extend,
            locations=locations,
            more=(lambda: {}) if labelling is None else labelling.outcome,
        )
        # At once: after the crawl it would be too late.
        for doubt in label_doubts(plan):
            logger.warning(doubt)
        return plan


def crawl_plan(
    plan: Plan, *, fetch: FetchSettings, workers: int, progress: Progress, counts: Counts
) -> CrawlReport:
    """Do what is left of a plan, and seal the dataset.

    Raises:
        UserError: an earlier generation is not finished, a unit was made under another plan, or the output
            cannot be written.
    """
    refuse_to_start(plan, fetch)
    count_planned(plan, counts)
    with writing(plan.store.root):
        crawl_units(plan, plan.units, fetch=fetch, workers=workers, progress=progress, counts=counts)
        root = seal_plan(plan)
    progress(counts)
    return CrawlReport(output=plan.store.root, root=root, counts=counts)


def count_planned(plan: Plan, counts: Counts) -> None:
    """What there is to do, and what was left out of it."""
    counts.units, counts.planned = len(plan.units), plan.rows
    counts.merged, counts.known = plan.record.repeated or 0, plan.record.known or 0
    counts.over_per_site = plan.record.over_per_site or 0


def refuse_to_start(plan: Plan, fetch: FetchSettings) -> None:
    """Look before anything is fetched.

    Raises:
        UserError: nobody could be reached about the requests, an earlier generation is not finished, or this
            one was planned by a version whose order is not known any more.
    """
    has_urls = any(source.kind.is_fetched for source in plan.sources)
    _refuse_without_contact(fetch, has_urls)
    if has_urls and plan.record.lanes is None and not _is_made(plan):
        raise UserError(
            f"the plan of {plan.store.root} is of an earlier version, which put its URLs in another order: "
            "finish it with that one, or use another --output"
        )
    for earlier in read_plans(plan.store)[: plan.generation]:
        if not _is_made(earlier):
            raise UserError(
                f"{plan.store.root} is not finished: run the crawl of generation {earlier.generation} first"
            )


def _is_made(plan: Plan) -> bool:
    return all(record is not None for _, record in read_commits(plan.store, plan.units))


def seal_plan(plan: Plan) -> str:
    """Seal the dataset of this generation and those before; its root, hex. Sealing again changes nothing.

    Raises:
        UserError: a unit is missing, or was made under another plan.
    """
    plans = read_plans(plan.store)[: plan.generation + 1]
    fingerprints = {unit: each.fingerprint for each in plans for unit in each.units}
    root = seal(plan.store, fingerprints)
    if not plan.store.exists(layout.sealed_name(root, "labels.parquet")):
        # The plan has the labels of all rows in one file; reading each unit's would take long.
        labelled = (each.columns_of_units(LABEL_COLUMNS) for each in plans if each.has_labels())
        publish_vocabulary(plan.store, root, distinct_labels(chain.from_iterable(labelled)))
    remove_rest(plan.store, fingerprints)
    return root


def refuse_repeated(locations: Sequence[str]) -> None:
    """Each source is there once: its images would all be there twice.

    Raises:
        UserError: one is not.
    """
    repeated = [location for location, times in Counter(locations).items() if times > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is given twice: leave one of them out")


def _refuse_without_contact(fetch: FetchSettings, urls: bool) -> None:
    if urls and not fetch.contact:
        raise UserError(
            "webmasters must be able to reach you: give a web page or an e-mail address with --contact"
        )


def _refuse_output_inside(sources: Sequence[str], output: Path) -> None:
    for text in sources:
        if output.resolve().is_relative_to(Path(text).resolve()):
            raise UserError(f"--output {output} lies inside the source {text}: choose a folder outside it")
