"""Object stores to test with: an S3 server (moto's), a proxy that loses, delays and falsifies its answers and
understands Google's dialect of them, and Azurite.
"""

import base64
import hashlib
import hmac
import http.client
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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

    Google's XML API is S3's with another header for "if there is none"; a request with that is translated.
    `signers` are the access keys of the requests.
    """

    def __init__(self, server_port: int, fault: Fault) -> None:
        self.faults: list[str] = []
        self.signers: list[str] = []
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, server_port, fault))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, server_port: int, fault: Fault) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "Credential=" not in self.headers.get("Authorization", ""):
                self.translate_google()
            by = self.headers.get("Authorization", "").partition("Credential=")[2]
            proxy.signers.append(by.partition("/")[0])
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

        def translate_google(self) -> None:
            path, mark, query = self.path.partition("?")
            self.path = urllib.parse.quote(urllib.parse.unquote(path)) + mark + query
            scope = "Credential=google/20000101/us-east-1/s3/aws4_request"
            del self.headers["Authorization"]
            self.headers["Authorization"] = f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"
            if self.headers.get("x-goog-if-generation-match") == "0":
                self.headers["If-None-Match"] = "*"

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


class Azurite:
    """Microsoft's emulator of Azure Blob Storage, in a process of its own."""

    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self, command: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        self._process = subprocess.Popen(
            [command, "--blobPort", str(port), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{port}/{self.account}"
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise TimeoutError("Azurite does not answer")

    def create_container(self, name: str) -> None:
        now = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        signed = f"x-ms-date:{now}\nx-ms-version:2021-08-06\n/{self.account}/{self.account}/{name}"
        text = "PUT" + "\n" * 12 + f"{signed}\nrestype:container"
        digest = hmac.digest(base64.b64decode(self.key), text.encode(), hashlib.sha256)
        header = {
            "x-ms-date": now,
            "x-ms-version": "2021-08-06",
            "Content-Length": "0",
            "Authorization": f"SharedKey {self.account}:{base64.b64encode(digest).decode()}",
        }
        url = f"{self.url}/{name}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=header)).close()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def azurite_command() -> str | None:
    """Where Azurite is installed, on the path or in the environment's folder; None if it is nowhere."""
    own = Path(__file__).parents[2] / ".venv/azurite/node_modules/.bin/azurite-blob"
    return str(own) if own.exists() else shutil.which("azurite-blob")
