"""What there is to read of one run: its logs, its stacks, how it came to be."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.json_rows import parse_row
from cluster.run.folder import RunFolder
from pipeline.serve.below import open_below, read_below

TAIL = 64 << 10  # bytes of a log that are shown at first
AT_ONCE = 256 << 10  # bytes that are sent at a time
_MOST_STARTS = 50
_MOST_TEXT, _MOST_ROWS = 1 << 20, 8 << 20  # bytes
_TEXTS = re.compile(r"(?:logs/rank-|errors/(?:rank|hang)-|stacks/rank-)[0-9]{1,9}\.(?:log|json|txt)")


def texts(run: RunFolder) -> list[str]:
    """Logs, errors and stacks, as paths in the run's folder, by rank."""
    found = []
    for folder in ("logs", "errors", "stacks"):
        try:
            names = [path.name for path in (run.path / folder).iterdir()]
        except OSError:
            continue
        found += [name for each in names if _TEXTS.fullmatch(name := f"{folder}/{each}")]
    return sorted(found, key=lambda name: (name.partition("/")[0], len(name), name))


def read_text(root: Path, run: RunFolder, name: str, at: int | None) -> dict[str, Any]:
    """A piece of such a text; the end of one begins with a whole line.

    Args:
        at: the byte at which the last piece ended; None for the end of the text.

    Raises:
        UserError: if there is no such text.
        OSError: if it cannot be read.
    """
    if not _TEXTS.fullmatch(name):
        raise UserError("there is no such log")
    with open_below(root, run.path / name) as file:
        size = os.fstat(file.fileno()).st_size
        anew = at is None or at > size
        start = max(0, size - TAIL) if at is None or at > size else at
        file.seek(start)
        data = file.read(AT_ONCE)
    if anew and start > 0:
        cut = data.find(b"\n") + 1
        data, start = data[cut:], start + cut
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    pending, _ = decoder.getstate()  # the beginning of a character, of which the rest is not there yet
    return {"text": text, "at": start + len(data) - len(pending), "size": size, "anew": anew}


def history(root: Path, run: RunFolder) -> dict[str, Any]:
    """How it came to be: its recipe, and the starts of its ranks, the last first."""
    return {
        "recipe": _recipe(root, run.path / "recipe.yaml"),
        "starts": _starts(root, run.path / "attempts.jsonl"),
    }


def _recipe(root: Path, path: Path) -> str:
    try:
        return read_below(root, path, most=_MOST_TEXT).decode(errors="replace")
    except OSError:
        return ""


def _starts(root: Path, path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_below(root, path, most=_MOST_ROWS).splitlines()
    except OSError:
        return []
    rows = [parse_row(line) for line in reversed(lines[-_MOST_STARTS:])]
    return [row for row in rows if row is not None]
