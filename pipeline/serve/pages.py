"""Reports, galleries, figures and cards that this product has written below the served folders: only these
are handed out as files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from pipeline.serve.below import open_below
from pipeline.serve.run_list import path_id

# What every page of ours says before anything else: see report/policy.html, and the gallery's of ingest.
_OURS = re.compile(
    rb'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:'
)
_TITLE = re.compile(rb"<title>([^<]{1,300})</title>")
_HEAD = 4096  # bytes
# Folders of files that are not for people, and of which there may be a million.
_NOT_THERE = {
    *(
        "checkpoints",
        "commits",
        "errors",
        "jobs",
        "latest",
        "logs",
        "meta",
        "plan",
        "sealed",
        "shards",
        "source",
    ),
    *("stacks", "tensorboard", "views"),
}
_DEEP = 4  # folders below a served one
_MOST_FOLDERS, _MOST_PAGES = 50_000, 5_000
# A name → the file beside it by which we know that it is ours.
_CARDS = {
    "README.md": ("trunk.json", "classifier.json", "DATASET.json"),
    "results.md": ("results.html",),
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """A file for people to look at."""

    root: Path
    path: Path
    kind: str
    title: str
    written: float
    bytes: int

    @property
    def media_type(self) -> str:
        """As which a browser is to take it."""
        return TYPES[self.path.suffix]


@dataclass
class Pages:
    """What there is to look at below some folders. To be looked at by one thread at a time.

    Attributes:
        found: id → page, the newest first.
    """

    roots: tuple[Path, ...]
    found: dict[str, Page] = field(default_factory=dict)
    _before: dict[Path, tuple[tuple[int, int], Page | None]] = field(default_factory=dict)

    def look(self) -> Pages:
        """Look again; of a file that has not changed only its name and time are looked at."""
        read: dict[Path, tuple[tuple[int, int], Page | None]] = {}
        for root in self.roots:
            for folder, names in _folders(root):
                for name in names:
                    if Path(name).suffix in TYPES and len(read) < _MOST_PAGES:
                        self._consider(root, folder / name, set(names), read)
        pages = sorted(
            (page for _, page in read.values() if page is not None), key=lambda page: -page.written
        )
        self.found, self._before = {path_id(page.path): page for page in pages}, read
        return self

    def _consider(
        self,
        root: Path,
        path: Path,
        beside: set[str],
        read: dict[Path, tuple[tuple[int, int], Page | None]],
    ) -> None:
        try:
            status = path.lstat()
        except OSError:
            return
        seen = status.st_mtime_ns, status.st_size
        before = self._before.get(path)
        read[path] = before if before and before[0] == seen else (seen, _page(root, path, beside, status))


def pages_in_short(pages: Pages, *, below: Path | None = None) -> list[dict[str, Any]]:
    """Rows of the page of reports; only those below a folder, if one is given."""
    return [
        {
            "id": known_as,
            "kind": page.kind,
            "title": page.title,
            "name": page.path.name,
            "folder": str(page.path.parent.relative_to(page.root.parent)),
            "written": page.written,
            "bytes": page.bytes,
        }
        for known_as, page in pages.found.items()
        if below is None or str(page.path).startswith(f"{below}/")
    ]


def _folders(root: Path) -> list[tuple[Path, list[str]]]:
    found: list[tuple[Path, list[str]]] = []
    for place, folders, names in os.walk(root):
        folder = Path(place)
        deep = len(folder.relative_to(root).parts) >= _DEEP
        folders[:] = (
            [] if deep else sorted(n for n in folders if n not in _NOT_THERE and not n.startswith("."))
        )
        found.append((folder, names))
        if len(found) == _MOST_FOLDERS:
            break
    return found


def _page(root: Path, path: Path, beside: set[str], status: os.stat_result) -> Page | None:
    """What a file is; None if it is none of ours."""
    kind, title = "", path.name
    try:
        with open_below(root, path) as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if path.suffix == ".html" and _OURS.search(head):
        named = _TITLE.search(head)
        title = unescape(named[1].decode(errors="replace")) if named else path.name
        kind = "page"
    elif path.suffix == ".svg" and path.parent.name == "charts" and head.lstrip().startswith(b"<svg"):
        kind = "figure"
    elif beside.intersection(_CARDS.get(path.name, ())):
        title = f"{path.parent.name}: {path.name}"
        kind = "card"
    if not kind:
        return None
    return Page(root=root, path=path, kind=kind, title=title, written=status.st_mtime, bytes=status.st_size)
