"""A web of realistic JPEGs on this machine: made from photographs, served by nginx over HTTP and HTTPS."""

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from PIL import Image

HOSTS = [f"127.0.1.{number}" for number in range(1, 65)]
_SUFFIXES = (".jpg", ".jpeg", ".png")
_CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; types {{ image/jpeg jpg; }}
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen {http_port} backlog=4096; listen {https_port} ssl backlog=4096; root {root};
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
  }}
}}
"""


def make_corpus(photos: Path, folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of about 100 KB, 800 x 600 or upright, cut from larger photographs; made if absent."""
    paths = [folder / f"{number % 100:02d}" / f"{number:06d}.jpg" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    if not missing:
        return paths
    files = [path for path in sorted(photos.iterdir()) if path.suffix.lower() in _SUFFIXES]
    large = [image for path in files if min((image := Image.open(path)).size) >= 600]
    large = [image.convert("RGB") for image in large[:40]]
    for number, path in missing:
        chance = random.Random(number)
        photo = chance.choice(large)
        size = (800, 600) if photo.width >= photo.height else (600, 800)
        zoom = min(photo.width / size[0], photo.height / size[1]) * chance.uniform(0.6, 1.0)
        width, height = zoom * size[0], zoom * size[1]
        left, top = chance.uniform(0, photo.width - width), chance.uniform(0, photo.height - height)
        piece = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.save(path, quality=chance.choice((88, 90, 93)))
    return paths


@dataclass(frozen=True)
class LocalWeb:
    """A running nginx.

    Attributes:
        root: the folder that it serves.
        ports: by scheme, "http" and "https", on every address of HOSTS.
        ca_file: what clients must trust (SSL_CERT_FILE).
    """

    root: Path
    ports: dict[str, int]
    ca_file: Path

    def urls(self, scheme: str, paths: list[Path]) -> list[str]:
        """Of these files, the hosts taking turns."""
        return [
            f"{scheme}://{HOSTS[number % len(HOSTS)]}:{self.ports[scheme]}/{path.relative_to(self.root)}"
            for number, path in enumerate(paths)
        ]


@contextmanager
def serving(root: Path, folder: Path, nginx: str) -> Iterator[LocalWeb]:
    """Serve the files below `root`; what nginx needs of its own lies in `folder`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert(*HOSTS)
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    (folder / "server.pem").write_bytes(chain)
    certificate.private_key_pem.write_to_path(str(folder / "server.key"))
    http_port, https_port = _free_ports(2)
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(folder=folder, root=root, http_port=http_port, https_port=https_port))
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(config)])
    try:
        for port in (http_port, https_port):
            _wait_for(port, process, folder / "nginx.log")
        ports = {"http": http_port, "https": https_port}
        yield LocalWeb(root=root, ports=ports, ca_file=folder / "ca.pem")
    finally:
        process.terminate()
        process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("0.0.0.0", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        if process.poll() is not None:
            raise RuntimeError(f"nginx ended: {log.read_text()}")
        try:
            socket.create_connection((HOSTS[0], port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"nginx does not answer: {log.read_text()}")
