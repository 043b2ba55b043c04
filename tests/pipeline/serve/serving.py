"""A server of folders that a test has made, and a client of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import CookieJar, DummyCookieJar
from aiohttp.test_utils import TestClient, TestServer

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.serve.app import make_app

Client = TestClient[Any, Any]


@asynccontextmanager
async def serving(
    folder: Path, *data: Path, token: str | None = None, cookies: bool = False
) -> AsyncIterator[Client]:
    """A client of a server on the loopback; it follows no redirects."""
    server = TestServer(make_app(folder, data, host="127.0.0.1", token=token))
    jar = CookieJar(unsafe=True) if cookies else DummyCookieJar()
    async with TestClient(server, cookie_jar=jar) as client:
        yield client


def asked(folder: Path, ask: Callable[[Client], Awaitable[Any]], *data: Path) -> Any:
    """What a client comes to that asks a server of these folders."""

    async def run() -> Any:
        async with serving(folder, *data) as client:
            return await ask(client)

    return asyncio.run(run())


async def told(client: Client, path: str, **query: Any) -> Any:
    """The JSON of an answer."""
    async with client.get(path, params={key: str(value) for key, value in query.items()}) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def ids(client: Client) -> dict[str, str]:
    """Name → id of all runs."""
    return {run["name"]: run["id"] for run in (await told(client, "/api/runs"))["runs"]}


def make_run(folder: Path, **changes: Any) -> RunFolder:
    """A run that was completed, or is as `changes` to its status say."""
    values: dict[str, Any] = {
        "state": State.COMPLETED,
        "name": folder.name,
        "executor": "local",
        "id": "7",
        "ranks": 1,
        "attempt": 1,
        "submitted": 1.0,
    }
    run = RunFolder.create(folder)
    run.write_status(Status(**(values | changes)))
    return run


def add_rows(run: RunFolder, steps: range, name: str = "metrics.jsonl", **values: float) -> None:
    """Rows at the end of a file of a run, with a loss of 1 / step, and these values."""
    with (run.path / name).open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / step, **values}) + "\n")
