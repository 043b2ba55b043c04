"""The crawl: plan, read, check, shard, commit, seal. Running it again finishes what is missing."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.errors import UserError
from cluster.output_trouble import writing
from ingest.crawl.make_units import crawl_units
from ingest.dataset.commit import read_commits
from ingest.dataset.seal import seal
from ingest.plan.freeze import freeze
from ingest.plan.plan import Plan, read_plans
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns, expand
from ingest.store.open import open_store
from ingest.web.settings import FetchSettings

NAMES_TELL = Columns()


def crawl_shards(
    sources: Sequence[str],
    output: str | Path,
    settings: CrawlSettings,
    *,
    workers: int,
    progress: Progress,
    columns: Columns = NAMES_TELL,
    extend: bool = False,
) -> CrawlReport:
    """Turn images into a sealed dataset; go on where an earlier run of the same crawl stopped.

    Args:
        sources, output, settings, columns, extend: see `plan_shards`.
        workers: checking processes; does not change the result.
        progress: is told how far the crawl is.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    counts = Counts()
    plan = plan_shards(
        sources, output, settings, progress=progress, counts=counts, columns=columns, extend=extend
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
    extend: bool = False,
) -> Plan:
    """Freeze what there is to do, or find the plan of an earlier run of the same crawl.

    Args:
        sources: folders, local tars, and lists of URLs, in the order of their images in the dataset; rows of
            lists come last, sorted by site.
        output: the dataset's folder, outside the sources, or its URL in a bucket.
        settings: what is made of each image.
        progress: is told how many attempts have been found, in `counts`.
        columns: which columns of lists mean what.
        extend: add these sources to a dataset that was made from others; URLs that it knows are left out.

    Raises:
        UserError: a source cannot be used, the output was planned for other work, or cannot be written.
    """
    store = open_store(output)
    if not sources:
        raise UserError("a crawl needs at least one source: a folder, a tar, or a list of URLs")
    places = [place for text in sources for place in expand(text)]
    opened = [open_listing(place, columns) for place in places]
    if isinstance(store.root, Path):
        _refuse_output_inside(places, store.root)
    # Before an hour of planning, too.
    _refuse_without_contact(settings.fetch, any(source.kind.is_fetched for source in opened))

    def listed(items: int) -> None:
        counts.planned = items
        progress(counts)

    with ExitStack() as stack, writing(store.root):
        for source in opened:
            stack.callback(source.close)
        store.prepare()
        locations = [place if "://" in place else str(Path(place).resolve()) for place in places]
        return freeze(store, opened, settings, listed=listed, extend=extend, locations=locations)


def crawl_plan(
    plan: Plan, *, fetch: FetchSettings, workers: int, progress: Progress, counts: Counts
) -> CrawlReport:
    """Do what is left of a plan, and seal the dataset.

    Raises:
        UserError: an earlier generation is not finished, a unit was made under another plan, or the output
            cannot be written.
    """
    refuse_to_start(plan, fetch)
    counts.units, counts.planned = len(plan.units), plan.rows
    with writing(plan.store.root):
        crawl_units(plan, plan.units, fetch=fetch, workers=workers, progress=progress, counts=counts)
        root = seal_plan(plan)
    progress(counts)
    return CrawlReport(output=plan.store.root, root=root, counts=counts)


def refuse_to_start(plan: Plan, fetch: FetchSettings) -> None:
    """Look before anything is fetched.

    Raises:
        UserError: nobody could be reached about the requests, or an earlier generation is not finished.
    """
    _refuse_without_contact(fetch, any(source.kind.is_fetched for source in plan.sources))
    for earlier in read_plans(plan.store)[: plan.generation]:
        if any(record is None for _, record in read_commits(plan.store, earlier.units)):
            raise UserError(
                f"{plan.store.root} is not finished: run the crawl of generation {earlier.generation} first"
            )


def seal_plan(plan: Plan) -> str:
    """Seal the dataset of this generation and those before; its root, hex. Sealing again changes nothing.

    Raises:
        UserError: a unit is missing, or was made under another plan.
    """
    plans = read_plans(plan.store)[: plan.generation + 1]
    return seal(plan.store, {unit: each.fingerprint for each in plans for unit in each.units})


def _refuse_without_contact(fetch: FetchSettings, urls: bool) -> None:
    if urls and not fetch.contact:
        raise UserError(
            "webmasters must be able to reach you: give a web page or an e-mail address with --contact"
        )


def _refuse_output_inside(sources: Sequence[str], output: Path) -> None:
    for text in sources:
        if output.resolve().is_relative_to(Path(text).resolve()):
            raise UserError(f"--output {output} lies inside the source {text}: choose a folder outside it")
