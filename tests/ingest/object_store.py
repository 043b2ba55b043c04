"""An S3 server (moto's), and a proxy that loses, delays and falsifies its answers."""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Fault = Callable[[str, str], str | None]


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


def start_server() -> tuple[Any, int]:
    """Serve S3 until its `shutdown` is called; returns the server and its port."""
    application, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: Any, answer: Any) -> Any:
        # S3's conditional writes are atomic; moto looks first and then writes.
        with one:
            return list(application(environ, answer))

    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_port


class Proxy:
    """Forwards requests; `fault(method, path)` names what goes wrong with one, or None.

    drop: the request takes effect, and the connection is closed without an answer.
    refuse: the connection is closed, and nothing happened.
    500, 503: that is the answer, and nothing happened; done-500: although it took effect.
    stall: it takes effect, and no answer ever comes.
    cut: half of the answer comes.
    unconditional: it is done whatever its If-None-Match says.
    """

    def __init__(self, server_port: int, fault: Fault) -> None:
        self.faults: list[str] = []
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, server_port, fault))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, server_port: int, fault: Fault) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind = fault(self.command, self.path)
            if kind == "unconditional":
                del self.headers["If-None-Match"]
            if kind in (None, "unconditional"):
                self.answer(*self.ask(body))
                return
            proxy.faults.append(kind)
            self.close_connection = True
            if kind in ("500", "503"):
                self.fail(int(kind))
            elif kind != "refuse":
                answer = self.ask(body)
                if kind == "done-500":
                    self.fail(500)
                elif kind == "cut":
                    self.answer(*answer, cut=True)
                elif kind == "stall":
                    proxy.ended.wait(30)

        def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            server = http.client.HTTPConnection("127.0.0.1", server_port)
            server.request(self.command, self.path, body, dict(self.headers))
            reply = server.getresponse()
            answer = reply.status, reply.getheaders(), reply.read()
            server.close()
            return answer

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body[: len(body) // 2] if cut else body)

        def fail(self, status: int) -> None:
            code = {500: "InternalError", 503: "SlowDown"}[status]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>x</Message></Error>"
            self.answer(status, [("Content-Type", "application/xml")], text.encode())

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

    return Handler
