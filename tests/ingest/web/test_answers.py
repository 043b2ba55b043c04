"""Answers that break HTTP's rules are taken as browsers take them, however their packets arrive."""

import asyncio
import socketserver
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import aiohttp
import pytest

from cluster.errors import UserError
from ingest.web import connector
from ingest.web.answer_bytes import AnswerHandler
from ingest.web.errands import Fetched
from ingest.web.fetcher import Fetcher
from ingest.web.settings import FetchSettings

BODY = b"abcdefghi"
GIVES = (200, BODY)
BAD = "bad_http"
CHUNKS = b"4\r\nabcd\r\n5;x=y\r\nefghi\r\n0\r\n\r\n"


def ok(*lines: bytes, body: bytes = BODY) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", body])


LENGTH, CHUNKED = b"Content-Length: 9", b"Transfer-Encoding: chunked"
# What is sent, and what it gives: status and body, or the reason why there is none.
ANSWERS = {
    "plain": (ok(LENGTH), GIVES),
    "until the end": (ok(), GIVES),
    "old": (b"HTTP/1.0 200 OK\r\n\r\n" + BODY, GIVES),
    "LF alone": (ok(LENGTH).replace(b"\r", b""), GIVES),
    "lower case": (ok(LENGTH).replace(b"HTTP", b"http"), GIVES),
    "blank lines before": (b"\r\n\n" + ok(LENGTH), GIVES),
    "promises": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nX: y\r\n\r\n" + ok(LENGTH), GIVES),
    "bytes behind": (ok(LENGTH) + b"<!-- cached -->", GIVES),
    "an answer behind": (ok(LENGTH) * 2, GIVES),
    "bytes behind nothing": (ok(b"Content-Length: 0", body=b"<p>"), (200, b"")),
    "bytes behind chunks": (ok(CHUNKED, body=CHUNKS) + b"<!-- cached -->", GIVES),
    "lines behind chunks": (ok(CHUNKED, body=CHUNKS) + b"a\r\nb\r\n\r\n", GIVES),
    "bytes behind no content": (b"HTTP/1.1 204 No\r\nContent-Length: 9\r\n\r\n" + BODY, "http_204"),
    "one length twice": (ok(LENGTH, LENGTH), GIVES),
    "one length twice in a line": (ok(LENGTH + b", 9"), GIVES),
    "two lengths": (ok(LENGTH, b"Content-Length: 3"), BAD),
    "no number": (ok(b"Content-Length: 9 bytes"), BAD),
    "less than nothing": (ok(b"Content-Length: -9"), BAD),
    "chunks": (ok(CHUNKED, body=CHUNKS), GIVES),
    "chunks and a length": (ok(b"Content-Length: 4", CHUNKED, body=CHUNKS), GIVES),
    "chunks of LF": (ok(CHUNKED, body=CHUNKS.replace(b"\r", b"")), GIVES),
    "chunks and a trailer": (ok(CHUNKED, body=CHUNKS[:-2] + b"X: y\r\n\r\n"), GIVES),
    "chunks of LF at first": (ok(CHUNKED, body=CHUNKS.replace(b"\r", b"", 1)), GIVES),
    "chunks of LF later": (ok(CHUNKED, body=b"4\r\nabcd\r\n5\nefghi\r\n0\r\n\r\n"), BAD),
    "bad chunks of LF": (ok(CHUNKED, body=b"4\nabcd\nno\n"), BAD),
    "bytes behind chunks of LF": (ok(CHUNKED, body=CHUNKS.replace(b"\r", b"") + b"<!-- -->"), GIVES),
    "no chunk": (ok(CHUNKED, body=b""), "truncated_body"),
    "no end of a chunk's size": (ok(CHUNKED, body=b"4"), "truncated_body"),
    "chunks twice": (ok(CHUNKED, CHUNKED, body=CHUNKS), GIVES),
    "bad chunks": (ok(CHUNKED, body=b"4\r\nabcd\r\nno\r\n"), BAD),
    "chunks without end": (ok(CHUNKED, body=CHUNKS[:-7]), "truncated_body"),
    "less than said": (ok(b"Content-Length: 12"), "truncated_body"),
    "identity": (ok(b"Transfer-Encoding: identity", LENGTH), GIVES),
    "blank before colon": (ok(b"X-Foo : 1", LENGTH.replace(b":", b" :")), GIVES),
    "blanks in a name": (ok(b"X Foo Bar: 1", LENGTH), GIVES),
    "no name": (ok(b": 1", LENGTH), GIVES),
    "no colon": (ok(b"hello", LENGTH), GIVES),
    "folded": (ok(b"X-Foo: 1\r\n 2", LENGTH), GIVES),
    "zero byte": (ok(b"X-Foo: \0", LENGTH), BAD),
    "no HTTP": (b"ICY 200 OK\r\n\r\n" + BODY, BAD),
    "no answer": (b"HTTP/1.1 2", "reset"),
    "head without end": (b"HTTP/1.1 200 OK\r\nX: y\r\n", "reset"),
    "long trailers": (ok(CHUNKED, body=CHUNKS[:-2] + (b"X: " + b"x" * 30_000 + b"\r\n") * 40), BAD),
    "many promises": (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000 + ok(LENGTH), BAD),
    "many lines": (ok(*(b":",) * 10_000, LENGTH), BAD),
    "many chunks": (ok(CHUNKED, body=b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"), BAD),
    "many chunks of LF": (ok(CHUNKED, body=b"1\na\n" * 50_000 + b"0\n\n"), BAD),
    "many headers, each allowed": (ok(*(b"X: " + b"x" * 30_000,) * 40, LENGTH), BAD),
    "long head": (ok(b"X: " + b"x" * 300_000, LENGTH), BAD),
}
SMALL = {name: case for name, case in ANSWERS.items() if len(case[0]) < 1000}


class NoSocket(asyncio.Transport):
    closed = False

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed


async def taken(pieces: list[bytes]):
    """What the client's end of a connection makes of these packets, and of the end of the connection."""
    handler, transport = AnswerHandler(asyncio.get_running_loop()), NoSocket()
    handler.connection_made(transport)
    limits = {"max_line_size": 32_768, "max_field_size": 32_768, "max_headers": 256, "read_bufsize": 1 << 18}
    handler.set_response_params(timer=None, read_until_eof=True, auto_decompress=False, **limits)
    for piece in filter(None, pieces):
        if not transport.closed:
            handler.data_received(piece)
    handler.connection_lost(None)
    status = 100
    try:
        while status < 200:
            message, body = await handler.read()
            status = message.code
    except aiohttp.ServerDisconnectedError:
        return "reset"
    except aiohttp.http.HttpProcessingError:
        return "bad_http"
    assert handler.should_close
    try:
        data = await body.read()
        return f"http_{status}" if status != 200 else (status, data)
    except aiohttp.ClientPayloadError:
        return "truncated_body"
    except aiohttp.http.HttpProcessingError:
        return "bad_http"


@pytest.mark.parametrize("name", SMALL)
def test_D4_an_answer_gives_the_same_wherever_it_is_cut(name):
    sent, gives = SMALL[name]

    async def all_cuts():
        cuts = [[sent[:cut], sent[cut:]] for cut in range(len(sent))]
        return [await taken(pieces) for pieces in [*cuts, [sent[at : at + 1] for at in range(len(sent))]]]

    assert set(asyncio.run(all_cuts())) == {gives}


@contextmanager
def serving(handle):
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, address):
            """A client may hang up."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self):
            handle(self)

    with Server(("", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def path_asked(handler) -> str | None:
    """The path of the next request on this connection; None at its end."""
    first = handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return first.split()[1].decode() if first else None


SETTINGS = FetchSettings(
    contact="https://example.org/crawl",
    allow_private=("127.0.0.0/8",),
    tries=1,
    robots=False,
    per_host=16,
    deadline=10,
)


def fetched(urls, settings=SETTINGS):
    with Fetcher(settings) as fetcher:
        outcomes = dict(fetcher.run((url, url) for url in urls))
    return [
        (outcome.http_status, outcome.data) if isinstance(outcome, Fetched) else outcome.reason
        for outcome in map(outcomes.get, urls)
    ]


def test_D4_a_server_that_sends_at_once_and_one_that_takes_its_time_get_the_same_rows():
    sent = [case[0] for case in ANSWERS.values()]

    def handle(handler):
        _, number, pieces = path_asked(handler).split("/")
        data = sent[int(number)]
        step = -(-len(data) // int(pieces))
        for at in range(0, len(data), step):
            handler.wfile.write(data[at : at + step])
            time.sleep(0.002 * (int(pieces) > 1))

    with serving(handle) as port:
        for pieces in (1, 5):
            # Each at a host of its own: the server leaves after an answer without saying so.
            urls = [f"http://127.0.1.{1 + number}:{port}/{number}/{pieces}" for number in range(len(sent))]
            outcomes = fetched(urls)
            assert dict(zip(ANSWERS, outcomes, strict=True)) == {
                name: gives for name, (_, gives) in ANSWERS.items()
            }


def test_a_connection_is_used_again_but_not_after_an_odd_answer():
    kinds = ["plain", "plain", "bytes behind", "chunks", "chunks", "chunks and a length", "plain", "no colon"]
    kinds += ["LF alone", "bytes behind chunks", "bytes behind chunks of LF", "plain"]
    connections = []

    def handle(handler):
        while path := path_asked(handler):
            connections.append(handler)  # its id may be another's later
            handler.wfile.write(ANSWERS[kinds[int(path[1:])]][0])

    with serving(handle) as port:
        web, one_by_one = f"http://127.0.0.1:{port}", replace(SETTINGS, per_host=1)
        assert fetched([f"{web}/{number}" for number in range(len(kinds))], one_by_one) == [GIVES] * len(
            kinds
        )
    ends = [
        kinds[number] for number in range(len(kinds) - 1) if connections[number] != connections[number + 1]
    ]
    assert ends == [
        "bytes behind",
        "chunks and a length",
        "no colon",
        "bytes behind chunks",
        "bytes behind chunks of LF",
    ]


def test_the_rest_of_an_answer_that_comes_late_is_no_part_of_the_next():
    connections = []

    def handle(handler):
        connections.append(handler)
        late = b"<!-- cached -->"
        while path_asked(handler):
            # Of all but the first answer of a connection, what came before is told too late.
            handler.wfile.write(ok(LENGTH) if late else b"<!-- cached -->" + ok(LENGTH))
            late = b""

    with serving(handle) as port:
        web, one_by_one = f"http://127.0.0.1:{port}", replace(SETTINGS, per_host=1)
        assert fetched([f"{web}/{number}" for number in range(4)], one_by_one) == [GIVES] * 4
    assert len(connections) == 4


def test_an_aiohttp_that_has_renamed_its_own_is_told(monkeypatch):
    monkeypatch.setattr(connector, "_OF_HANDLERS", ("_parser", "_renamed"))

    async def connect():
        return connector.Connector(per_address=1)

    with pytest.raises(UserError, match=r"aiohttp \S+ has no _renamed, .*: pip install 'aiohttp>="):
        asyncio.run(connect())
