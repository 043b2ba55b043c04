"""A web server, and a name server, that do everything wrong: real sockets, in a thread of their own.

Every case has an address of its own in 127.0.1.0/24, so that the troubles of one do not count against
another. A crawl must be allowed that network, and nothing else: what leads to 127.0.0.1 or beyond is
trespassing, and is counted. `HostileServer.cases()` gives each case's URL and the reason that its row must
have, "" for an image.
"""

import asyncio
import gzip
import io
import ipaddress
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import brotli
import numpy as np
import trustme
from PIL import Image

Writer = asyncio.StreamWriter
Handler = Callable[["HostileServer", Writer], Awaitable[None]]

ALLOWED = ("127.0.1.0/24",)


def _noise() -> bytes:
    """A picture of 2 KB that no compression makes smaller."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 28, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = _noise()

_CASES: dict[str, tuple[str, Handler]] = {}
_ROBOTS: dict[str, Handler] = {}


def case(reason: str, name: str = "") -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        _CASES[name or handler.__name__] = (reason, handler)
        return handler

    return add


def head(status: str = "200 OK", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(data: bytes = GOOD, status: str = "200 OK", **headers: object) -> bytes:
    return head(status, Content_Length=len(data), **headers) + data


def fixed(name: str, reason: str, reply: bytes) -> None:
    async def handler(server: "HostileServer", writer: Writer) -> None:
        writer.write(reply)

    _CASES[name] = (reason, handler)


def robots(name: str, reason: str, reply: bytes, image: bytes = b"") -> None:
    fixed(name, reason, image or whole())

    async def handler(server: "HostileServer", writer: Writer) -> None:
        writer.write(reply)

    _ROBOTS[name] = handler


async def forever(writer: Writer, piece: bytes, pause: float = 0.0) -> None:
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)


fixed("good", "", whole())
fixed("good_203", "", whole(status="203 Non-Authoritative Information"))
fixed("lying_type", "", whole(Content_Type="text/html"))
fixed("created", "", whole(status="201 Created"))
fixed("accepted", "", whole(status="202 Accepted"))
fixed("all_of_it", "", whole(status="206 Partial", Content_Range=f"bytes 0-{len(GOOD) - 1}/{len(GOOD)}"))
fixed("some_of_it", "http_206", whole(status="206 Partial", Content_Range=f"bytes 0-{len(GOOD) - 1}/9999"))
fixed("gzip", "", whole(gzip.compress(GOOD), Content_Encoding="gzip"))
fixed("brotli", "", whole(brotli.compress(GOOD), Content_Encoding="br"))
fixed("unknown_encoding", "", whole(Content_Encoding="utf-8"))
fixed("empty", "", whole(b""))
fixed("other_robots_tag", "", whole(X_Robots_Tag="otherbot: noindex, noai"))
fixed("not_found", "http_404", whole(b"no", "404 Not Found"))
fixed("no_content", "http_204", head("204 No Content"))
fixed("not_modified", "http_304", head("304 Not Modified"))
fixed("partial", "http_206", whole(status="206 Partial Content"))
fixed("odd_status", "http_299", whole(status="299 Odd"))
fixed("server_error", "http_500", whole(b"", "500 Oops"))
fixed("longer_than_said", "", head(Content_Length=len(GOOD)) + GOOD * 3)
fixed("shorter_than_said", "truncated_body", head(Content_Length=len(GOOD) * 2, Connection="close") + GOOD)
fixed(
    "two_lengths", "bad_http", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 9\r\n\r\nabcabcabc"
)
fixed("negative_length", "bad_http", head(Content_Length=-5) + GOOD)
fixed("ten_gigabytes", "too_many_bytes", head(Content_Length=10 << 30) + GOOD)
fixed("not_gzip", "bad_encoding", whole(Content_Encoding="gzip"))
fixed("zstd", "bad_encoding", whole(Content_Encoding="zstd"))
fixed("stacked_encodings", "bad_encoding", whole(Content_Encoding="gzip, gzip"))
fixed("cut_gzip", "truncated_body", whole(gzip.compress(GOOD)[:-20], Content_Encoding="gzip"))
fixed("gzip_bomb", "decompression_bomb", whole(gzip.compress(bytes(3 << 20)), Content_Encoding="gzip"))
fixed("brotli_bomb", "decompression_bomb", whole(brotli.compress(bytes(3 << 20)), Content_Encoding="br"))
fixed("bad_chunk", "bad_http", head(Transfer_Encoding="chunked") + b"zzz\r\nhello\r\n0\r\n\r\n")
fixed(
    "missing_chunk",
    "truncated_body",
    head(Transfer_Encoding="chunked", Connection="close") + b"5\r\nhello\r\n",
)
fixed("garbage", "bad_http", bytes(range(256)) * 40)
fixed("long_header", "bad_http", head(X_Long="x" * 500_000) + GOOD)
fixed("many_headers", "bad_http", head(**{f"X_{n}": "x" for n in range(5000)}) + GOOD)
fixed("silent_close", "reset", b"")
fixed("robots_tag", "x_robots_tag", whole(X_Robots_Tag="noai"))
fixed("robots_tag_for_us", "x_robots_tag", whole(X_Robots_Tag="seer-ingest: noimageindex"))
fixed("tdm", "tdm_reservation", whole(TDM_Reservation=1))
fixed("signal", "content_signal", whole(Content_Signal="search=yes, ai-train=no"))
fixed("usage", "content_usage", whole(Content_Usage="train-ai=n"))
fixed("to_file", "redirect_not_http", head("302 Found", Location="file:///etc/passwd", Content_Length=0))
fixed("to_nowhere", "redirect_bad_url", head("302 Found", Location="http://[::1", Content_Length=0))
fixed(
    "to_odd_address", "redirect_bad_url", head("302 Found", Location="http://2130706433/", Content_Length=0)
)
fixed("to_mail", "blocked_port", head("302 Found", Location="http://127.0.1.1:25/", Content_Length=0))
fixed("to_private", "private_address", head("302 Found", Location="http://10.0.0.1/", Content_Length=0))
fixed(
    "to_metadata", "private_address", head("302 Found", Location="http://169.254.169.254/", Content_Length=0)
)
fixed("to_old_encoding", "", head("301 Moved", Location="/caf\xe9", Content_Length=0))
fixed("to_backslash", "", head("301 Moved", Location="\\good", Content_Length=0))
fixed("to_good_without_end", "", b"HTTP/1.1 301 Moved\r\nLocation: /good\r\n")
fixed("empty_location", "http_302", head("302 Found", Location="", Content_Length=0))
fixed("no_location", "http_302", head("302 Found", Content_Length=0))

NO_ROBOTS = whole(b"", "404 Not Found")
EVERYBODY_OUT = whole(b"User-agent: *\nDisallow: /")
robots("robots_all", "robots_disallowed", EVERYBODY_OUT)
robots("robots_us", "robots_disallowed", whole(b"User-agent: Seer-Ingest\nDisallow: /robots_us"))
robots("robots_others", "", whole(b"User-agent: otherbot\nDisallow: /\n\nUser-agent: *\nAllow: /"))
robots("robots_403", "", whole(b"", "403 Forbidden"))
robots("robots_signal", "content_signal", whole(b"User-agent: *\nContent-Signal: ai-train=no\nAllow: /"))
robots("robots_usage", "content_usage", whole(b"User-agent: *\nContent-Usage: /robots train-ai=n\nAllow: /"))
robots("robots_204", "", head("204 No Content"))
robots("robots_zstd", "robots_unreachable", whole(b"\x28\xb5\x2f\xfd rules", Content_Encoding="zstd"))
robots("robots_503", "robots_unreachable", whole(b"", "503 Service Unavailable"))
robots("robots_gone", "robots_unreachable", b"")
robots("robots_binary", "", whole(bytes(range(256)) * 4000))
robots("robots_bomb", "", whole(gzip.compress(bytes(20 << 20)), Content_Encoding="gzip"))
robots(
    "robots_quadratic",
    "",
    whole(b"".join(b"User-agent: a%d\n" % n for n in range(15_000)) + b"Disallow: /x\n" * 20_000),
)


@case("")
async def redirected(server: "HostileServer", writer: Writer) -> None:
    writer.write(head("301 Moved", Location=server.url("good"), Content_Length=0))


@case("robots_disallowed")
async def to_disallowed(server: "HostileServer", writer: Writer) -> None:
    writer.write(head("301 Moved", Location=server.url("robots_all"), Content_Length=0))


@case("private_address")
async def to_this_machine(server: "HostileServer", writer: Writer) -> None:
    writer.write(head("302 Found", Location=f"http://127.0.0.1:{server.port}/good", Content_Length=0))


@case("private_address")
async def to_mapped(server: "HostileServer", writer: Writer) -> None:
    location = f"http://[::ffff:127.0.0.1]:{server.port}/good"
    writer.write(head("302 Found", Location=location, Content_Length=0))


@case("too_many_redirects")
async def redirect_loop(server: "HostileServer", writer: Writer) -> None:
    number = server.visits["redirect_loop"]
    location = f"/redirect_loop?{number}" if number < 300 else server.url("good")
    writer.write(head("302 Found", Location=location, Content_Length=0))


@case("deadline")
async def slow_head(server: "HostileServer", writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await forever(writer, b"X-Slow: 1\r\n", 0.1)


@case("deadline")
async def slow_body(server: "HostileServer", writer: Writer) -> None:
    writer.write(head(Content_Length=100_000))
    await forever(writer, b"x", 0.05)


@case("deadline")
async def nothing(server: "HostileServer", writer: Writer) -> None:
    await asyncio.sleep(60)


@case("deadline")
async def longer_than_comes(server: "HostileServer", writer: Writer) -> None:
    writer.write(head(Content_Length=2 * len(GOOD)) + GOOD)
    await asyncio.sleep(60)


@case("deadline")
async def only_promises(server: "HostileServer", writer: Writer) -> None:
    await forever(writer, b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)


@case("too_many_bytes")
async def endless(server: "HostileServer", writer: Writer) -> None:
    writer.write(head())
    await forever(writer, bytes(1 << 16))


@case("too_many_bytes")
async def endless_chunks(server: "HostileServer", writer: Writer) -> None:
    writer.write(head(Transfer_Encoding="chunked"))
    await forever(writer, b"2000\r\n" + bytes(0x2000) + b"\r\n")


@case("truncated_body")
async def reset_in_body(server: "HostileServer", writer: Writer) -> None:
    writer.write(head(Content_Length=1 << 20) + GOOD)
    await writer.drain()
    await asyncio.sleep(0.05)
    abort(writer)


@case("reset")
async def reset_at_once(server: "HostileServer", writer: Writer) -> None:
    abort(writer)


def abort(writer: Writer) -> None:
    """End with RST, not FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
    writer.transport.abort()


@case("")
async def later(server: "HostileServer", writer: Writer) -> None:
    busy = server.visits["later"] == 1
    writer.write(whole(b"", "429 Too Many Requests", Retry_After=1) if busy else whole())


@case("")
async def later_by_date(server: "HostileServer", writer: Writer) -> None:
    if server.visits["later_by_date"] == 1:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
        writer.write(whole(b"", "503 Service Unavailable", Retry_After=date))
    else:
        writer.write(whole())


@case("host_asks_to_wait")
async def much_later(server: "HostileServer", writer: Writer) -> None:
    writer.write(whole(b"", "503 Service Unavailable", Retry_After=86_400))


NAMES = {
    "private.test": (["10.0.0.1"], []),
    "mixed.test": (["93.184.216.34", "127.0.0.1"], []),
    "mapped.test": ([], ["::ffff:127.0.0.1"]),
    "metadata.test": (["169.254.169.254"], []),
    "good.test": (["127.0.1.1"], []),
    "-good-.test": (["127.0.1.1"], []),
    "single": (["127.0.1.1"], []),
    "public": (["93.184.216.34"], []),
}
# All names below this one have one address, as of a shared host.
CROWD = "crowd.test"
CROWDED = "127.0.1.250"
# The first answer is allowed, all that follow are not.
REBINDING = "rebinding.test"


class HostileServer:
    """Started in a thread by `with`.

    Args:
        folder: for `ca.pem`, which a client must trust (SSL_CERT_FILE) to get at "tls_good".

    Attributes:
        port: of HTTP.
        nameserver: address and port of a DNS server that knows NAMES.
        requests: (address asked, request line and headers), in order.
        visits: requests by case.
        trespasses: connections to 127.0.0.1.
    """

    def __init__(self, folder: Path) -> None:
        self.ca_file = folder / "ca.pem"
        self.requests: list[tuple[str, str]] = []
        self.visits: Counter[str] = Counter()
        self.name_questions: Counter[str] = Counter()
        self.trespasses = 0
        self.port = 0
        self.nameserver = ""
        self._tls: dict[str, tuple[str, int]] = {}
        self._addresses = {name: f"127.0.1.{1 + number}" for number, name in enumerate(_CASES)}
        self._names = {address: name for name, address in self._addresses.items()}
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def url(self, name: str) -> str:
        return f"http://{self._addresses[name]}:{self.port}/{name}"

    def cases(self) -> dict[str, str]:
        """Reason by URL, for addresses alone."""
        plain = {self.url(name): reason for name, (reason, _) in _CASES.items()}
        tls = {f"https://127.0.1.200:{port}/{name}": reason for name, (reason, port) in self._tls.items()}
        return plain | tls

    def name_cases(self) -> dict[str, str]:
        """Reason by URL, for a client that asks `nameserver`."""
        forbidden = dict.fromkeys(NAMES, "private_address") | {"unknown.test": "dns_not_found"}
        forbidden |= {"broken.test": "dns_failed", "public": "private_name"} | dict.fromkeys(
            ("good.test", "-good-.test", "single"), ""
        )
        return {f"http://{name}:{self.port}/good": reason for name, reason in forbidden.items()}

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        mine = [*self._addresses.values()]
        first = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = first.sockets[0].getsockname()[1]
        self._servers = [first, await asyncio.start_server(self._serve, mine, self.port)]
        for name, (reason, context) in _certificates(self.ca_file).items():
            server = await asyncio.start_server(self._serve, "127.0.1.200", 0, ssl=context)
            self._tls[name] = (reason, server.sockets[0].getsockname()[1])
            self._servers.append(server)
        plain = await asyncio.start_server(lambda _, writer: writer.write(NO_ROBOTS), "127.0.1.200", 0)
        self._tls["tls_spoken_to_http"] = ("tls_invalid", plain.sockets[0].getsockname()[1])
        self._servers.append(plain)
        names, _ = await self._loop.create_datagram_endpoint(lambda: _NameServer(self), ("127.0.0.1", 0))
        self._names_transport = names
        self.nameserver = f"127.0.0.1:{names.get_extra_info('sockname')[1]}"

    async def _stop(self) -> None:
        self._names_transport.close()
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        address = writer.get_extra_info("sockname")[0]
        self.trespasses += address == "127.0.0.1"
        try:
            # One request per connection but for good ones: many of the replies leave nothing to go on from.
            while await self._answer(address, reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, address: str, reader: asyncio.StreamReader, writer: Writer) -> bool:
        request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.requests.append((address, request))
        path = request.split(" ")[1]
        if path == "/robots.txt":
            handler = _ROBOTS.get(self._names.get(address, ""))
            if handler is None:
                writer.write(NO_ROBOTS)
            else:
                await handler(self, writer)
            await writer.drain()
            return handler is None
        name = path[1:].partition("?")[0]
        self.visits[name] += 1
        await _CASES[name if name in _CASES else "good"][1](self, writer)
        await writer.drain()
        return name not in _CASES or name == "good"


class _NameServer(asyncio.DatagramProtocol):
    def __init__(self, server: HostileServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, sender: tuple[str, int]) -> None:
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode("latin-1").lower())
            at += 1 + length
        (kind,) = struct.unpack(">H", data[at + 1 : at + 3])
        name = ".".join(labels)
        self._server.name_questions[name] += 1
        code, addresses = self._addresses(name, kind)
        answers = b"".join(
            b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 0, len(address)) + address for address in addresses
        )
        flags = struct.pack(">HHHHH", 0x8180 | code, 1, len(addresses), 0, 0)
        reply = data[:2] + flags + data[12 : at + 5] + answers
        self._transport.sendto(reply, sender)  # type: ignore[attr-defined]

    def _addresses(self, name: str, kind: int) -> tuple[int, list[bytes]]:
        if name == "broken.test":
            return 2, []
        if name == REBINDING:
            first = self._server.name_questions[name] <= 2
            four, six = (["127.0.1.1"] if first else ["127.0.0.1"]), []
        elif name.endswith(CROWD):
            four, six = [CROWDED], []
        elif name in NAMES:
            four, six = NAMES[name]
        else:
            return 3, []
        if kind == 1:
            return 0, [bytes(map(int, address.split("."))) for address in four]
        return 0, [ipaddress.IPv6Address(address).packed for address in six] if kind == 28 else []


def _certificates(ca_file: Path) -> dict[str, tuple[str, ssl.SSLContext]]:
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(str(ca_file))
    past = datetime.now(UTC) - timedelta(days=1)
    issued = {
        "tls_good": ("", ours.issue_cert("127.0.1.200")),
        "tls_expired": ("tls_invalid", ours.issue_cert("127.0.1.200", not_after=past)),
        "tls_wrong_host": ("tls_invalid", ours.issue_cert("example.org")),
        "tls_self_signed": ("tls_invalid", theirs.issue_cert("127.0.1.200")),
    }
    contexts = {}
    for name, (reason, certificate) in issued.items():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        contexts[name] = (reason, context)
    return contexts
