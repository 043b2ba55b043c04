"""What decides a crawl's output, and in words what keeps two crawls apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_args

import PIL
import pyarrow as pa
from PIL import features

from cluster.errors import UserError
from ingest.dataset.keys import KEY_SLOTS
from ingest.dataset.plan_record import Flags, Identity, SourceRecord
from ingest.image.check import Crop, Encoding, Treatment
from ingest.image.decode import ImageLimits
from ingest.labels.labelled import Labelling
from ingest.video.check import VideoTreatment
from ingest.video.container import MAX_PIXELS, library_versions
from ingest.web.addresses import AddressPolicy
from ingest.web.opt_outs import OptOut
from ingest.web.settings import FetchSettings

FORMAT = 3
# Of a checking process, besides the image that it was sent: its batch, and what reading takes.
_CHECKER_ROOM = 16 << 20
# A clip is read as a whole for a window of seconds.
LONGEST_SEGMENT = 120


@dataclass(frozen=True, kw_only=True)
class CrawlSettings:
    """What a crawl makes of its sources. Every field decides output bytes, and so belongs to the fingerprint.

    Attributes:
        unit_rows: attempts per unit.
        treatment: of each image: limits, what is stored, and whether it is hashed.
        seconds: CPU time one image may take.
        memory_mb: memory that checking one image may take, MiB.
        fetch: which bytes a URL gives. Whom to contact, and how many requests there are at a time, decide
            nothing, and are no flags.
        labels_from: the rule that labels come by, as it was given.
        labels: names and digests of the lists that labels come from.
        per_site: rows of lists of URLs that are planned of a site, at most; None for all.
        video: what is made of videos, if the sources are such; then `treatment` counts by its limits only.
    """

    unit_rows: int = 16_384
    treatment: Treatment = field(default_factory=Treatment)
    seconds: float = 10.0
    memory_mb: int = 768
    fetch: FetchSettings = field(default_factory=FetchSettings)
    labels_from: str | None = None
    labels: tuple[str, ...] = ()
    per_site: int | None = None
    video: VideoTreatment | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.unit_rows <= KEY_SLOTS:
            raise UserError(f"--unit-rows must be from 1 to {KEY_SLOTS:,}, not {self.unit_rows}")
        if self.treatment.resize is not None and self.treatment.resize < 1:
            raise UserError(f"--resize must be at least 1 pixel, not {self.treatment.resize}")
        if self.treatment.crop not in get_args(Crop):
            raise UserError(f"--crop must be one of {', '.join(get_args(Crop))}, not {self.treatment.crop}")
        if self.treatment.encoding not in get_args(Encoding):
            known = ", ".join(get_args(Encoding))
            raise UserError(f"--encoding must be one of {known}, not {self.treatment.encoding}")
        if not 1 <= self.treatment.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, not {self.treatment.quality}")
        if self.seconds <= 0 or self.memory_mb < 1:
            raise UserError("--seconds and --memory-mb must be greater than 0")
        max_bytes = self.treatment.limits.max_bytes
        if self.memory_mb << 20 < max_bytes + _CHECKER_ROOM:
            raise UserError(
                f"--memory-mb {self.memory_mb} cannot hold a file of --max-bytes {max_bytes}: give at least "
                f"--memory-mb {-(-(max_bytes + _CHECKER_ROOM) // (1 << 20))}, or fewer --max-bytes"
            )
        if self.video is not None and not 1 <= self.video.segment_seconds <= LONGEST_SEGMENT:
            raise UserError(
                f"--segment-seconds must be from 1 to {LONGEST_SEGMENT}, not {self.video.segment_seconds:g}"
            )
        if self.video is not None and self.treatment.limits.max_pixels > MAX_PIXELS:
            raise UserError(
                f"--max-pixels {self.treatment.limits.max_pixels} is more than clips can be trained on with: "
                f"give at most {MAX_PIXELS}"
            )
        fetch = self.fetch
        if min(fetch.deadline, fetch.tries, fetch.per_host, fetch.per_address, fetch.connections) <= 0:
            raise UserError(
                "--deadline, --attempts, --per-host, --per-address and --connections must be greater than 0"
            )
        AddressPolicy(fetch.allow_private, fetch.deny_network)

    @classmethod
    def from_flags(cls, flags: Flags) -> Self:
        """The settings that `flags` wrote down."""
        return cls(
            unit_rows=flags.unit_rows,
            treatment=Treatment(
                limits=ImageLimits(max_bytes=flags.max_bytes, max_pixels=flags.max_pixels),
                resize=flags.resize,
                crop=flags.crop,
                encoding=flags.encoding,
                quality=flags.quality,
                icc=flags.no_icc is None,
                phash=flags.no_phash is None,
            ),
            seconds=flags.seconds,
            memory_mb=flags.memory_mb,
            fetch=FetchSettings(
                deadline=flags.deadline,
                tries=flags.tries,
                max_redirects=flags.max_redirects,
                robots=flags.ignore_robots is None,
                heeded=frozenset(each for each in OptOut if flags.plain().get(each.option) is None),
                allow_private=tuple(flags.allow_private or ()),
                deny_network=tuple(flags.deny_network or ()),
            ),
            labels_from=flags.labels_from,
            labels=tuple(flags.labels or ()),
            per_site=flags.per_site,
            video=VideoTreatment(
                segment_seconds=flags.segment_seconds or VideoTreatment().segment_seconds,
                allow_silent=bool(flags.allow_silent),
                decode=flags.no_decode is None,
            )
            if flags.video
            else None,
        )

    def flags(self) -> Flags:
        """The settings as they are written down."""
        limits = self.treatment.limits
        given: dict[str, Any] = {
            "--deny-network": list(self.fetch.deny_network) or None,
            "--labels-from": self.labels_from,
            "--labels": list(self.labels) or None,
            "--per-site": self.per_site,
        }
        if self.video is not None:
            given |= {
                "--video": True,
                "--segment-seconds": self.video.segment_seconds,
                "--allow-silent": self.video.allow_silent or None,
                "--no-decode": None if self.video.decode else True,
            }
        return Flags.model_validate(
            {
                "--unit-rows": self.unit_rows,
                "--resize": self.treatment.resize,
                "--crop": self.treatment.crop,
                "--encoding": self.treatment.encoding,
                "--quality": self.treatment.quality,
                "--no-icc": None if self.treatment.icc else True,
                "--no-phash": None if self.treatment.phash else True,
                "--max-bytes": limits.max_bytes,
                "--max-pixels": limits.max_pixels,
                "--seconds": self.seconds,
                "--memory-mb": self.memory_mb,
                "--deadline": self.fetch.deadline,
                "--attempts": self.fetch.tries,
                "--max-redirects": self.fetch.max_redirects,
                "--ignore-robots": None if self.fetch.robots else True,
                **{each.option: None if each in self.fetch.heeded else True for each in OptOut},
                "--allow-private": list(self.fetch.allow_private) or None,
                **{flag: value for flag, value in given.items() if value is not None},
            }
        )


# What videos are given that images are not: larger files, more time, more memory, and fewer in a shard.
VIDEOS = CrawlSettings(
    unit_rows=1_024,
    treatment=Treatment(limits=ImageLimits(max_bytes=256 << 20, max_pixels=4_096 * 4_096)),
    seconds=60.0,
    memory_mb=1_536,
    video=VideoTreatment(),
)


def with_labelling(settings: CrawlSettings, labelling: Labelling | None) -> CrawlSettings:
    """The settings, and how labels come about."""
    if labelling is None:
        return settings
    given = None if labelling.rule is None else labelling.rule.given
    return replace(settings, labels_from=given, labels=labelling.identities)


def builds(*, video: bool = False) -> dict[str, str | None]:
    """Versions of what makes bytes. pillow-simd resizes differently from Pillow: its version has .post."""
    names = ("libjpeg_turbo", "zlib", "webp", "libtiff", "avif", "littlecms2")
    codecs = {name: features.version(name) for name in names}
    return {"pillow": PIL.__version__, **codecs, "pyarrow": pa.__version__} | (
        library_versions() if video else {}
    )


def identity_of(
    settings: CrawlSettings, sources: Sequence[SourceRecord], *, extends: Sequence[str]
) -> Identity:
    """Everything that decides the output of a generation that extends those with these fingerprints."""
    return Identity(
        format=FORMAT,
        settings=settings.flags(),
        builds=builds(video=settings.video is not None),
        sources=tuple(sources),
        extends=tuple(extends),
    )


def difference(theirs: Identity, ours: Identity) -> str:
    """What keeps these two plans apart, as the middle of a sentence, most likely cause first."""
    if theirs.format != FORMAT:
        return f"in format {theirs.format}, not {FORMAT}: use the version that made it to go on with it"
    old, new = theirs.settings.plain(), ours.settings.plain()
    flags = [flag for flag in new | old if old.get(flag) != new.get(flag)]
    if flags:
        values = [settings.get(flags[0]) for settings in (old, new)]
        brief = len(flags) == 1 and None not in values
        given = _shown(values[1]) if brief else _options(flags, new, "with", "without")
        return (
            f"{_options(flags, old, 'with', 'without')}, not {given}: "
            f"{_options(flags, old, 'use', 'leave out')} to go on with it"
        )
    if theirs.sources != ours.sources:
        before, now = (", ".join(map(_source, plan.sources)) for plan in (theirs, ours))
        if before == now:
            return f"from {before}, in which names or sizes have changed since: restore them to go on with it"
        return f"from {before}, not from {now}: give it the same sources to go on with it"
    changed = [name for name in ours.builds if theirs.builds.get(name) != ours.builds[name]]
    wanted = ", ".join(f"{name} {theirs.builds.get(name)}" for name in changed)
    given = ", ".join(f"{name} {ours.builds[name]}" for name in changed)
    return f"with {wanted}, and here is {given}, which makes other bytes: use the former to go on with it"


def _options(flags: Sequence[str], settings: Mapping[str, object], present: str, absent: str) -> str:
    given = [(flag, settings.get(flag)) for flag in flags if settings.get(flag) is not None]
    there = " ".join(flag if value is True else f"{flag} {_shown(value)}" for flag, value in given)
    missing = " ".join(flag for flag in flags if settings.get(flag) is None)
    return " and ".join(f"{word} {names}" for word, names in ((present, there), (absent, missing)) if names)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(source: SourceRecord) -> str:
    if source.items is not None:
        return f"{source.name} ({source.items:,} files)"
    return f"{source.name} (sha256 {(source.sha256 or '')[:8]})"
