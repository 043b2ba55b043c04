"""The dataset card: what a dataset is made of, for whoever uses it, or finds an image of theirs in it.

Markdown with the YAML head that the Hugging Face hub reads. It says what the dataset's own files say, and no
more: the same dataset gives the same card.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from cluster.wording import in_bytes, several, visible
from ingest.dataset import layout
from ingest.dataset.open import sealed_head
from ingest.dataset.plan_record import PlanRecord
from ingest.dataset.unit_counts import QUIET_DB
from ingest.dataset.view import read_view, view_names
from ingest.report.clips import ClipStats
from ingest.report.histogram import Histogram
from ingest.report.provenance import (
    ANOTHER_TRY,
    OPT_OUTS,
    are_answers,
    opt_outs,
    read_generations,
    setting_words,
    source_words,
)
from ingest.report.stats import Stats
from ingest.web.opt_outs import OptOut

HOSTS_LISTED = 20
# All of most data sets that are tested on.
LABELS_LISTED = 1_000
# Reasons that say: the site does not want this.
OPT_OUT_REASONS = {"robots.txt": "robots_disallowed"} | {each.header: each.value for each in OptOut}
READING = """Shards are WebDataset tars. `meta/` has one Parquet row per attempt, kept or not, with its URL or
path, its place in the shard, sha256 and perceptual hash. `ingest verify` checks all of it against the root.
"""
IN_PLACE = """Images lie in the WebDataset tars that are named as sources, as their makers wrote them,
the metadata of cameras included; whoever moves the dataset moves these, too. `meta/` has one Parquet row
per attempt, kept or not, with its place in the tar, sha256 and perceptual hash. `ingest verify` checks all
of it against the root.
"""
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")

Plans = Mapping[int, PlanRecord | None]


def dataset_card(path: str, stats: Stats, *, name: str) -> str:
    """The card of a dataset that was counted.

    Args:
        path: the dataset's folder or URL.
        stats: its numbers.
        name: what to call it.

    Raises:
        UserError: the dataset is damaged.
    """
    head = sealed_head(path, stats.root)
    plans = read_generations(path, head.generations)
    parts = [
        _front_matter(name, stats, _tars(plans)),
        f"# {_words(name)}\n",
        _summary(stats),
        "## Sources\n\n" + "\n".join(_sources(plans)),
        "## Opt-outs\n\n" + "\n".join(_opt_outs(stats, plans)),
        "## Licences and removal\n\n" + "\n".join(_licences(stats, plans)),
        "## What became of the attempts\n\n" + _attempts(stats),
        f"## {stats.noun.title()}s\n\n" + _images(stats),
        *([] if not stats.labels else ["## Labels\n\n" + "\n".join(_labels(stats))]),
        *([] if not stats.hosts.hosts else ["## Hosts\n\n" + _hosts(stats)]),
        "## Views\n\n" + "\n".join(_views(path, stats)),
        "## How it was made\n\n" + "\n".join(_made(plans)),
        "## How to read it\n\n" + (IN_PLACE if _in_place(plans) else READING),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _in_place(plans: Plans) -> list[str]:
    """The tars that others made, as the dataset names them."""
    sources = [source for plan in plans.values() if plan is not None for source in plan.sources]
    return [source.name for source in sources if source.kind.stays_in_place]


def _tars(plans: Plans) -> list[str]:
    """Patterns of the tars in the dataset's folder that its images are in."""
    own = [name for name in _in_place(plans) if not name.startswith("/") and "://" not in name]
    copies = any(
        not source.kind.stays_in_place
        for plan in plans.values()
        if plan is not None
        for source in plan.sources
    )
    return ([f"{layout.SHARDS}/*/*.tar"] if copies or not _in_place(plans) else []) + own


def _front_matter(name: str, stats: Stats, tars: Sequence[str]) -> str:
    """JSON strings are YAML strings, whatever characters are in them."""
    files = [
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        # JSON is YAML.
        f"    path: {tars[0] if len(tars) == 1 and '*' in tars[0] else json.dumps(tars)}",
    ]
    return "\n".join(
        [
            "---",
            f"pretty_name: {json.dumps(visible(name))}",
            "license: unknown",
            "task_categories:",
            "- video-classification" if stats.noun == "clip" else "- image-feature-extraction",
            "tags:",
            "- webdataset",
            "size_categories:",
            f"- {_size_category(stats.kept)}",
            *(files if tars else []),
            "---\n",
        ]
    )


def _size_category(images: int) -> str:
    """As the hub spells them: n<1K, 1K<n<10K, … n>1T."""
    steps = next((step for step in range(len(_SIZES)) if images < 1000 * 10**step), len(_SIZES))
    if steps == 0:
        return "n<1K"
    return f"n>{_SIZES[-1]}" if steps == len(_SIZES) else f"{_SIZES[steps - 1]}<n<{_SIZES[steps]}"


def _summary(stats: Stats) -> str:
    return "\n".join(
        [
            f"{several(stats.kept, stats.noun)} ({_how_much(stats)}) of "
            f"{several(stats.planned, 'attempt')}, in {several(stats.units, 'shard')}. Nobody curated them:",
            "they may show anything, and labels and captions, where there are any, are their sources' own.\n",
            f"Root: `{stats.root}`",
        ]
    )


def _how_much(stats: Stats) -> str:
    length = f", {stats.clips.hours:,.2f} hours" if stats.clips.clips else ""
    return in_bytes(stats.image_bytes) + length


def _sources(plans: Plans) -> Iterator[str]:
    for number, plan in plans.items():
        if plan is None:
            yield f"- generation {number}: its plan is not here"
            continue
        of_generation = f" (generation {number})" if number else ""
        if plan.retries is not None:
            yield f"- {ANOTHER_TRY}{of_generation}"
            continue
        for source in plan.sources:
            yield f"- {_code(source_words(source))}{of_generation}"


def _opt_outs(stats: Stats, plans: Plans) -> Iterator[str]:
    asked = {number: plan for number, plan in plans.items() if plan is not None and are_answers(plan)}
    if not asked:
        yield f"No {stats.noun} of this dataset was fetched from the web, or is from an archive of it."
        return
    lost = {loss.reason: loss.count for loss in stats.losses}
    for name in OPT_OUTS:
        told = sorted({opt_outs(plan)[name] for plan in asked.values()})
        if len(told) == 1:
            how = told[0]
        else:
            how = ", ".join(f"{opt_outs(plan)[name]} in generation {n}" for n, plan in asked.items())
        left_out = lost.get(OPT_OUT_REASONS[name], 0)
        yield f"- {name}: {how}; {several(left_out, 'URL')} left out because of it"
    if unreachable := lost.get("robots_unreachable", 0):
        yield f"- {several(unreachable, 'URL')} not asked for, as the site's robots.txt could not be read"


def _licences(stats: Stats, plans: Plans) -> Iterator[str]:
    noun, removed = stats.noun, f"{'a clip' if stats.noun == 'clip' else 'an image'} removed"
    yield f"The licence of each {noun} is unknown: {noun}s belong to their owners. That one could be had does"
    yield "not mean that it may be copied, shown or trained on; whoever uses this dataset must find out.\n"
    contacts = sorted({plan.contact for plan in plans.values() if plan is not None and plan.contact})
    if contacts:
        yield f"To have {removed}, write to {' or '.join(_code(contact) for contact in contacts)}:"
    else:
        yield f"To have {removed}, ask whoever gave you this dataset (it has no contact on record):"
    yield "give its URL or its key. A view without it can then be made with `ingest view`."


def _attempts(stats: Stats) -> str:
    rows: list[tuple[str, str, int, int | str]] = [("kept", "", stats.kept, "")]
    rows += [(loss.status, _code(loss.reason), loss.count, loss.retryable or "") for loss in stats.losses]
    rows.append(("**all**", "", stats.planned, stats.retryable or ""))
    table = _table(("status", "reason", "attempts", "may succeed later"), rows, numbers=2)
    if not stats.http_statuses:
        return table
    statuses = ", ".join(
        f"HTTP {status} {several(count, 'time')}" for status, count in stats.http_statuses.items()
    )
    return f"{table}\n\nBy the server's last answer: {statuses}."


def _images(stats: Stats) -> str:
    if not stats.kept:
        return "There are none."
    formats = ", ".join(f"{_words(name)} {count:,}" for name, count in stats.formats.items())
    rows: list[tuple[str, Histogram]] = [
        ("width, pixels", stats.widths),
        ("height, pixels", stats.heights),
        ("shorter side, pixels", stats.short_sides),
        ("longer side, pixels", stats.long_sides),
        ("file, bytes", stats.sizes),
    ]
    lines = [f"Formats: {formats}.\n"]
    if stats.clips.clips:
        rows += [
            ("length, ms", stats.clips.milliseconds),
            ("longest time between keyframes, ms", stats.clips.gaps),
        ]
        lines += [*_clips(stats.clips), ""]
    columns = ("", *rows[0][1].summary())
    lines.append(_table(columns, [(name, *each.summary().values()) for name, each in rows], numbers=7))
    if stats.columns:
        lines.append(f"\nFurther columns: {', '.join(map(_code, stats.columns))}.")
    return "\n".join(lines)


def _clips(clips: ClipStats) -> Iterator[str]:
    codecs = [*clips.video_codecs.items(), *clips.audio_codecs.items()]
    yield f"Codecs: {', '.join(f'{_words(name)} {count:,}' for name, count in codecs)}."
    yield (
        f"Without a sound: {clips.without_sound:,}; with one that is hardly heard (below {QUIET_DB:.0f} dB): "
        f"{clips.quiet:,}; in which nothing moves: {clips.still:,}."
    )


def _labels(stats: Stats) -> Iterator[str]:
    about = "At least " if stats.labels_missing_at_most else ""
    without = stats.kept - stats.labelled
    yield (
        f"{about}{several(len(stats.labels), 'label')} on {several(stats.labelled, stats.noun)}, of which "
        f"{stats.many_labels:,} have several; {several(without, stats.noun)} without one.\n"
    )
    if stats.splits:
        shown = ", ".join(f"{_code(split)} {count:,}" for split, count in list(stats.splits.items())[:20])
        yield f"Splits: {shown}. `ingest view --where 'split = …'` makes a view of one.\n"
    named = list(stats.labels.items())[:LABELS_LISTED]
    which = "" if len(named) == len(stats.labels) else f"The {len(named):,} most frequent: "
    yield which + ", ".join(f"{_code(label)} {count:,}" for label, count in named) + "."


def _hosts(stats: Stats) -> str:
    about = "At least " if stats.hosts.missing_at_most else ""
    rows = [
        (_code(host.host), host.attempts, host.rejected, host.failed)
        for host in stats.hosts.most_attempts[:HOSTS_LISTED]
    ]
    table = _table(("host", "attempts", "rejected", "failed"), rows, numbers=3)
    which = "" if stats.hosts.hosts <= HOSTS_LISTED else "; those with most URLs are"
    return f"{about}{several(stats.hosts.hosts, 'host')}{which}:\n\n{table}"


def _views(path: str, stats: Stats) -> Iterator[str]:
    """Those of this root; a view of an older one says nothing about this dataset."""
    views = [read_view(path, name, root=None) for name in view_names(path)]
    found = [
        (_code(view.name), f"`{view.digest}`", int(view.kept.sum()))
        for view in views
        if view.root == stats.root
    ]
    yield _table(("view", "sha256", f"{stats.noun}s"), found, numbers=1) if found else "There are none."


def _made(plans: Plans) -> Iterator[str]:
    for number, plan in plans.items():
        if plan is None:
            continue
        if len(plans) > 1:
            yield f"Generation {number}:\n"
        rows = [(_code(name), _code(value)) for name, value in setting_words(plan).items()]
        yield _table(("setting or build", "value"), rows, numbers=0)
        yield f"\nFingerprint: `{plan.fingerprint}`\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: int) -> str:
    """`numbers` is how many columns, after those of words, are aligned to the right."""
    words = len(columns) - numbers
    lines = [columns, ["---"] * words + ["---:"] * numbers]
    lines += [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    """Text from the wild as code, which nothing in it can end."""
    shown = visible(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown or shown != shown.strip() or not shown else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _words(text: str) -> str:
    """Text from the wild as text, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~$])", r"\\\1", visible(text))
