"""Who may look at the page, and what a browser may do with it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serving import asked, make_run, serving
from typer.testing import CliRunner
from yarl import URL

from pipeline.cli import app

PATHS = ("/", "/serve.js", "/api/runs", "/api/run?id=1", "/file/1", "/nothing", "/file/..%2f..%2fpasswd")


def test_S1_every_answer_forbids_what_the_page_does_not_need(tmp_path: Path) -> None:
    async def ask(client: Any) -> list[tuple[int, Any]]:
        answers = [await client.get(path) for path in PATHS]
        return [(answer.status, answer.headers) for answer in answers]

    for status, headers in asked(tmp_path, ask):
        assert status in (200, 404)
        policy = headers["Content-Security-Policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert "unsafe" not in str(policy) and "*" not in str(policy) and "http" not in str(policy)
        assert {"frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} < set(policy)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("[::1]:80", 200),
        (f"{socket.gethostname()}:80", 200),
        ("evil.example", 421),
        ("evil.example:7337", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.", 421),
        ("localhost:80@evil.example", 421),
        ("", 421),
    ],
)
def test_S1_a_name_that_was_made_to_lead_here_is_refused(tmp_path: Path, host: str, status: int) -> None:
    async def ask(client: Any) -> int:
        async with client.get("/api/runs", headers={"Host": host}) as answer:
            return int(answer.status)

    assert asked(tmp_path, ask) == status


def test_S1_nothing_is_taken_but_requests_to_look(tmp_path: Path) -> None:
    async def ask(client: Any) -> set[int]:
        found = set()
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            for path in ("/", "/api/runs", "/file/1"):
                async with client.request(method, path, data=b"x") as answer:
                    found.add(answer.status)
        return found

    assert asked(tmp_path, ask) == {405}


def test_S1_with_a_token_nothing_is_told_without_it(tmp_path: Path) -> None:
    token = "a-token-of-a-test"

    async def run() -> None:
        async with serving(tmp_path, token=token) as client:
            for query in ("", "?token=", "?token=a-token-of-a-tes", "?token=%C3%A4%FF", f"?x={token}"):
                for path in ("/", "/serve.js", "/api/runs", "/file/1"):
                    async with client.get(path + query) as answer:
                        assert answer.status == 403
                        assert token not in await answer.text()
            for path in ("//elsewhere.example/", "/%0d%0aSet-Cookie:x", "/"):
                address = URL(f"{client.make_url('/').origin()}{path}?token={token}", encoded=True)
                async with client.session.get(address, allow_redirects=False) as answer:
                    assert (answer.status, answer.headers["Location"]) == (303, "/")
                cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
            name = cookie.partition("=")[0]
            assert name.endswith(f"-{client.port}")  # two servers of a machine do not forget each other's
            for value, status in ((token, 200), (token[:-1], 403), ("", 403)):
                async with client.get("/api/runs", headers={"Cookie": f"{name}={value}"}) as answer:
                    assert answer.status == status

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ([], False),
        (["--host", "localhost"], False),
        (["--token"], True),
        (["--host", "0.0.0.0"], True),
    ],
)
def test_S1_elsewhere_than_on_the_loopback_a_new_token_is_needed_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], needed: bool
) -> None:
    make_run(tmp_path / "runs" / "one")
    served: list[web.Application] = []
    monkeypatch.setattr("aiohttp.web.run_app", lambda app, **_: served.append(app))
    words = ["serve", "--folder", str(tmp_path / "runs"), "--port", "0", *options]
    told = [CliRunner().invoke(app, words).output for _ in range(2)]
    assert len(served) == 2
    tokens = {text.split("?token=")[1].split()[0] for text in told if "?token=" in text}
    assert len(tokens) == (2 if needed else 0)
    assert all(len(token) > 30 and sum(text.count(token) for text in told) == 1 for token in tokens)


def test_what_cannot_be_served_is_told_in_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, sentence in (
            (["--folder", str(tmp_path / "none")], "name the folder of your runs as --folder"),
            (["--folder", str(tmp_path), "--data", str(tmp_path / "none")], "is not a folder"),
            (["--folder", str(tmp_path), "--port", port], f"port {port} is in use: choose another"),
            (["--folder", str(tmp_path), "--host", "host.invalid"], "--host host.invalid is not an address"),
        ):
            result = CliRunner().invoke(app, ["serve", *words])
            assert (result.exit_code, sentence in result.output) == (2, True), result.output
