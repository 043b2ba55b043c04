"""What plan.json says: everything that decides what a generation gives, and the list of its units."""

from contextlib import suppress
from enum import StrEnum

from pydantic import ConfigDict, Field

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.records import Record
from ingest.image.check import Crop, Encoding
from ingest.store.store import Store


class SourceKind(StrEnum):
    """What a source of images is."""

    FOLDER = "folder"
    TAR = "tar"
    WARC = "warc"
    URLS = "urls"
    FILES = "files"
    IMAGE_TABLE = "image_table"
    TAR_IN_PLACE = "tar_in_place"

    @property
    def is_fetched(self) -> bool:
        """Whether its items are URLs, which are asked for, site by site."""
        return self is SourceKind.URLS

    @property
    def stays_in_place(self) -> bool:
        """Whether its images stay where they lie, and no shard is written for them."""
        return self is SourceKind.TAR_IN_PLACE


class SourceRecord(Record):
    """A source as it was when it was planned.

    Attributes:
        kind, name: what it is, and the last part of its location.
        bytes: of an archive as a file.
        columns: of a list, and of a table of images: which are URL or image, caption and labels.
        follow_links: of a folder: links that lead out of it, and to folders, are followed.
        items: how many were listed; None of a list.
        sha256: of the list of its items; of a list, of its bytes.
    """

    kind: SourceKind
    name: str
    bytes: int | None = None
    columns: dict[str, str | None] | None = None
    follow_links: bool | None = None
    items: int | None = None
    sha256: str | None = None


class Flags(Record):
    """The settings of a crawl, by the option that sets each; one without a value is True or None."""

    model_config = ConfigDict(alias_generator=lambda name: "--" + name.replace("_", "-"))

    unit_rows: int
    resize: int | None
    crop: Crop
    encoding: Encoding
    quality: int
    no_icc: bool | None = None  # of plans in format 2, profiles were not followed
    no_phash: bool | None
    max_bytes: int
    max_pixels: int
    # A number that was given as a whole one stays one: its spelling is part of the fingerprint.
    seconds: int | float
    memory_mb: int
    deadline: int | float
    tries: int = Field(alias="--attempts")  # as the option is called
    max_redirects: int
    ignore_robots: bool | None
    ignore_x_robots: bool | None
    # Of plans in format 2, nobody looked for these.
    ignore_tdm_reservation: bool | None = None
    ignore_content_signal: bool | None = None
    ignore_content_usage: bool | None = None
    allow_private: list[str] | None
    # Only of crawls that were given them.
    deny_network: list[str] | None = None
    labels_from: str | None = None
    labels: list[str] | None = None
    per_site: int | None = None
    # Only of crawls of videos.
    video: bool | None = None
    segment_seconds: int | float | None = None
    allow_silent: bool | None = None
    no_decode: bool | None = None


class Identity(Record):
    """Everything that decides a generation's output: its sha256 is the fingerprint.

    Attributes:
        format: of datasets.
        settings: what is made of the sources.
        builds: versions of what makes bytes.
        sources: by their numbers.
        extends: fingerprints of the generations before.
        retries: of another try: the generations whose attempts are made again.
    """

    format: int
    settings: Flags
    builds: dict[str, str | None]
    sources: tuple[SourceRecord, ...]
    extends: tuple[str, ...]
    retries: tuple[int, ...] | None = None


class ItemsRecord(Record):
    """The Parquet file that lists a generation's attempts, one row group for each unit."""

    name: str
    sha256: str


class PlanRecord(Identity):
    """A frozen generation.

    Attributes:
        generation: its number; the first is 0.
        first_unit, units: unit numbers go on from the generation before.
        lanes: how many units each lane has; these are the last units, those of rows with URLs. None of plans
            that know no lanes: their units are sorted by site.
        rows: attempts planned, over all units.
        items: the file that lists them.
        fingerprint: sha256 of the identity, hex.
        locations: where each source was.
        contact: whom webmasters were told of.
        repeated, known: rows that were left out because they came before: their URL in these sources, or they
            in generations before.
        over_per_site: rows that were left out because their site had as many as --per-site says.
        labels_unused: entries of --labels that name no image.
    """

    generation: int
    first_unit: int
    units: int
    lanes: tuple[int, ...] | None = None
    rows: int
    items: ItemsRecord
    fingerprint: str
    locations: tuple[str, ...]
    contact: str | None = None
    repeated: int | None = None
    known: int | None = None
    over_per_site: int | None = None
    labels_unused: int | None = None


def read_plan(store: Store, generation: int) -> PlanRecord | None:
    """The record of a generation; None if it was never planned, or is not here.

    Raises:
        UserError: it is damaged.
    """
    name = layout.plan_name(generation)
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    remedy = (
        "restore it from a copy, or remove it and give the command that planned it again, with the same "
        "sources and options"
    )
    return PlanRecord.read(data, where=store.where(name), remedy=remedy)


def noun_of(store: Store) -> str:
    """What a sample of a dataset is called: a clip, if the dataset was planned of videos."""
    with suppress(UserError, OSError):  # of a damaged plan, others tell: a word is no reason to stop
        plan = read_plan(store, 0)
        return "image" if plan is None or not plan.settings.video else "clip"
    return "image"
