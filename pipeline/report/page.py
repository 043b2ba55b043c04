"""What every page shows alike."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def duration(seconds: float) -> str:
    """Seconds for people: 7 s, 4 min 5 s, 2 h 10 min, 3 d 4 h."""
    rest, parts = round(seconds), list[str]()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or (parts and len(parts) < 2) or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def environment() -> Environment:
    """The templates of this folder, with what they write numbers by."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}"
    made.filters["thousands"] = lambda value: f"{value:,}"
    made.filters["duration"] = duration
    return made
