"""The requests that a browser may make, all of them to look: each answers with what was read in a thread."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

import pipeline.report.page
from cluster.errors import UserError
from cluster.wording import visible
from pipeline.serve.access import FILE_POLICY, add_headers, guard
from pipeline.serve.below import open_below
from pipeline.serve.datasets import Datasets
from pipeline.serve.graphs import Graphs, graph_in_full, graphs_in_short
from pipeline.serve.live_curves import MOST_RUNS, LiveCurves
from pipeline.serve.lookout import Lookout
from pipeline.serve.one_run import history, read_text, texts
from pipeline.serve.pages import Page, Pages, pages_in_short
from pipeline.serve.run_list import Entry, RunList, path_id

T = TypeVar("T")

_HERE = Path(__file__).parent
_ASSETS = {
    "/": (_HERE / "page.html", "text/html"),
    "/serve.js": (_HERE / "serve.js", "text/javascript"),
    "/serve.css": (_HERE / "serve.css", "text/css"),
    # The colours, tables and charts of all our pages.
    "/page.css": (Path(pipeline.report.page.__file__).parent / "page.css", "text/css"),
}
_PIECE = 1 << 18  # bytes of a file that are sent at a time


@dataclass
class Served:
    """What is looked at, and how often at most."""

    folder: Path
    runs: Lookout[RunList]
    graphs: Lookout[Graphs]
    pages: Lookout[Pages]
    datasets: Lookout[Datasets]
    curves: LiveCurves
    drawing: asyncio.Lock


def make_app(folder: Path, data: tuple[Path, ...], *, host: str, token: str | None) -> web.Application:
    """The server of a folder of runs and of folders with datasets.

    Args:
        host: that it is bound to.
        token: see `access.guard`.
    """
    folder, data = folder.absolute(), tuple(dict.fromkeys(each.absolute() for each in data))
    roots = (folder, *(each for each in data if not each.is_relative_to(folder)))
    served = Served(
        folder=folder,
        runs=Lookout(RunList(folder).look, pause=1.0),
        graphs=Lookout(Graphs(folder).look, pause=4.0),
        pages=Lookout(Pages(roots).look, pause=15.0),
        datasets=Lookout(Datasets(roots).look, pause=4.0),
        curves=LiveCurves(folder),
        drawing=asyncio.Lock(),
    )
    requests = Requests(served)

    async def look_at_once(app: web.Application) -> None:
        served.runs.begin()  # who opens the page finds the list ready

    app = web.Application(middlewares=[guard(host, token)])
    app.on_startup.append(look_at_once)
    app.on_response_prepare.append(add_headers)
    for path, (file, media_type) in _ASSETS.items():
        app.router.add_get(path, _asset(file, media_type))
    app.router.add_get("/api/runs", requests.runs)
    app.router.add_get("/api/run", requests.run)
    app.router.add_get("/api/curves", requests.curves)
    app.router.add_get("/api/text", requests.text)
    app.router.add_get("/api/graphs", requests.graphs)
    app.router.add_get("/api/graph", requests.graph)
    app.router.add_get("/api/pages", requests.pages)
    app.router.add_get("/api/datasets", requests.datasets)
    app.router.add_get("/file/{id}", requests.file)
    return app


class Requests:
    """One method for each."""

    def __init__(self, served: Served) -> None:
        self._served = served

    async def runs(self, request: web.Request) -> web.StreamResponse:
        """`?since=`: the runs that have changed since that version of the list."""
        runs = await self._served.runs.found()
        return _answer({"folder": str(self._served.folder), **runs.since(_number(request, "since") or 0)})

    async def run(self, request: web.Request) -> web.StreamResponse:
        """`?id=`: all that is known of a run."""
        runs, graphs = await self._served.runs.found(), await self._served.graphs.found()
        pages = await self._served.pages.found()
        entry = _entry(runs, request.query.get("id", ""))
        told = {
            **entry.known,
            "texts": await asyncio.to_thread(texts, entry.run),
            "pages": pages_in_short(pages, below=entry.run.path),
            "graph": path_id(entry.run.path.parent) if graphs.stage_of(entry.run.path) else None,
            **await asyncio.to_thread(history, self._served.folder, entry.run),
        }
        return _answer(told)

    async def curves(self, request: web.Request) -> web.StreamResponse:
        """`?id=&id=&have=`: charts of one or several runs, unless the browser has them already."""
        ids = list(dict.fromkeys(request.query.getall("id", [])))[:MOST_RUNS]
        runs = await self._served.runs.found()
        wanted = [(entry.known["run"], entry.run.path) for entry in (_entry(runs, each) for each in ids)]
        async with self._served.drawing:  # one thread at a time reads on
            have = request.query.get("have", "")
            found = await _read(lambda: self._served.curves.panels(wanted, have=have))
        return web.Response(status=204) if found is None else _answer(found)

    async def text(self, request: web.Request) -> web.StreamResponse:
        """`?id=&name=&at=`: a piece of a log, of stacks or of an error, from a byte on; else its end."""
        entry = _entry(await self._served.runs.found(), request.query.get("id", ""))
        name, at = request.query.get("name", ""), _number(request, "at")
        return _answer(await _read(lambda: read_text(self._served.folder, entry.run, name, at)))

    async def graphs(self, request: web.Request) -> web.StreamResponse:
        """All graphs."""
        runs, graphs = await self._served.runs.found(), await self._served.graphs.found()
        return _answer({"graphs": await asyncio.to_thread(graphs_in_short, graphs, runs)})

    async def graph(self, request: web.Request) -> web.StreamResponse:
        """`?id=`: a graph's stages, and what each was made from."""
        runs, graphs = await self._served.runs.found(), await self._served.graphs.found()
        known_as, pages = request.query.get("id", ""), await self._served.pages.found()
        told = await _read(lambda: graph_in_full(graphs, known_as, runs, pages))
        return _answer(told)

    async def pages(self, request: web.Request) -> web.StreamResponse:
        """All reports, galleries, figures and cards."""
        return _answer({"pages": pages_in_short(await self._served.pages.found())})

    async def datasets(self, request: web.Request) -> web.StreamResponse:
        """All datasets; those that a graph has made, with the name of their stage."""
        graphs, datasets = await self._served.graphs.found(), await self._served.datasets.found()
        stages = {path_id(stage.folder): stage.name for each in graphs.found.values() for stage in each}
        rows = await asyncio.to_thread(datasets.told)
        return _answer({"datasets": [row | {"stage": stages.get(row["id"])} for row in rows]})

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A report, gallery, figure or card, as it lies there, but unable to do anything."""
        page = (await self._served.pages.found()).found.get(request.match_info["id"])
        if page is None:
            raise web.HTTPNotFound(reason="There is no such page any more.")
        response = web.StreamResponse(headers={"Content-Security-Policy": FILE_POLICY})
        response.content_type, _, charset = page.media_type.partition("; charset=")
        response.charset = charset
        pieces = _pieces(page)
        first = await _read(lambda: next(pieces, b""))
        await response.prepare(request)
        await response.write(first)
        async for piece in _in_thread(pieces):
            await response.write(piece)
        return response


def _asset(file: Path, media_type: str) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=file.read_bytes(), content_type=media_type, charset="utf-8")

    return handler


def _pieces(page: Page) -> Iterator[bytes]:
    with open_below(page.root, page.path) as file:
        while piece := file.read(_PIECE):
            yield piece


async def _in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece


def _entry(runs: RunList, known_as: str) -> Entry:
    if (entry := runs.entries.get(known_as)) is None:
        raise web.HTTPNotFound(reason="There is no such run any more.")
    return entry


def _number(request: web.Request, name: str) -> int | None:
    with suppress(ValueError):
        return max(0, int(request.query.get(name, "")))
    return None


async def _read(look: Callable[[], T]) -> T:
    """What a thread reads; if it cannot, an answer that says so."""
    try:
        return await asyncio.to_thread(look)
    except UserError as error:
        raise web.HTTPNotFound(reason=_sentence(str(error))) from error
    except OSError as error:
        raise web.HTTPNotFound(reason=_sentence(f"{error.filename}: {error.strerror}")) from error


def _sentence(text: str) -> str:
    """As the reason of an answer, which is one line."""
    return visible(text).encode("ascii", "backslashreplace").decode()[:500]


def _answer(value: Any) -> web.Response:
    response = web.Response(
        text=json.dumps(_shown(value), separators=(",", ":")), content_type="application/json"
    )
    response.enable_compression()
    return response


def _shown(value: Any) -> Any:
    """As a page may show it: without characters that turn others, or numbers that JSON does not know."""
    match value:
        case str():
            return value if value.isprintable() else visible(value, but="\n\t")
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {_shown(str(key)): _shown(each) for key, each in value.items()}
        case list() | tuple():
            return [_shown(each) for each in value]
    return value
