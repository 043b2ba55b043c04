"""How a dataset was made, in words, from its frozen plans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.wording import several
from ingest.dataset import layout
from ingest.dataset.plan_record import PlanRecord, SourceKind, SourceRecord, read_plan
from ingest.store.open import open_store
from ingest.web.opt_outs import OptOut

# Flags by what they make a crawl ignore.
OPT_OUTS = {"robots.txt": "--ignore-robots"} | {each.header: each.option for each in OptOut}

ANOTHER_TRY = "another try at what had failed"


def read_generations(path: str | Path, numbers: Sequence[int]) -> dict[int, PlanRecord | None]:
    """The plans of these generations; None if one is not here, as only crawls need it.

    Raises:
        UserError: one is damaged.
    """
    store = open_store(path)
    return {number: read_plan(store, number) for number in numbers}


def source_words(source: SourceRecord) -> str:
    """What a source was: its kind, name, and the digest that pins it."""
    digest = "" if source.sha256 is None else f": sha256 {source.sha256}"
    if source.items is not None:
        digest = f": {several(source.items, 'file')}, sha256 of their list {source.sha256}"
    return f"{source.kind} {source.name}{digest}"


def are_answers(plan: PlanRecord) -> bool:
    """Whether images of this plan are answers of the web's servers, fetched or archived."""
    return any(source.kind.is_fetched or source.kind is SourceKind.WARC for source in plan.sources)


def opt_outs(plan: PlanRecord) -> dict[str, str]:
    """Whether each way to opt out was honoured or ignored, by its name."""
    settings = plan.settings.plain()
    told = {name: _heeded(settings, flag) for name, flag in OPT_OUTS.items()}
    if not any(source.kind.is_fetched for source in plan.sources):
        told["robots.txt"] = "not asked for, as the answers are archived"
    return told


def _heeded(settings: dict[str, Any], flag: str) -> str:
    if flag not in settings:
        return "not looked for by the version that planned it"
    return "honoured" if settings[flag] is None else f"IGNORED ({flag})"


def setting_words(plan: PlanRecord) -> dict[str, str]:
    """The settings that are set, and the builds, by their names; opt-outs are apart."""
    settings = {flag: value for flag, value in plan.settings.plain().items() if flag not in OPT_OUTS.values()}
    if settings.get("--resize") is None:
        for flag in ("--crop", "--encoding", "--quality"):
            settings.pop(flag, None)  # of what was not done
    values = {name: value for name, value in (settings | plan.builds).items() if value not in (None, "")}
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in values.items()
    }


def made_of(path: str | Path, generations: Sequence[int]) -> list[tuple[str, str]]:
    """All of it as names and values, one generation after the other."""
    rows: list[tuple[str, str]] = []
    for number, plan in read_generations(path, generations).items():
        if plan is None:
            rows.append((layout.plan_name(number), "is not here"))
            continue
        if plan.retries is not None:
            rows.append(("source", ANOTHER_TRY))
        else:
            rows += [("source", source_words(source)) for source in plan.sources]
        if are_answers(plan):
            rows += opt_outs(plan).items()
        rows += setting_words(plan).items()
    return rows
