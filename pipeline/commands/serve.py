"""`submit serve`: a page that shows runs, graphs, reports and datasets, and does nothing else."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from pipeline.commands.options import Runs

PORT = 7337


def serve(
    folder: Runs = Path("runs"),
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="A dataset, or a folder of datasets; by default, out. Repeatable.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host", help="The address to listen on; any but the loopback address requires a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port to listen on; 0 for any free one.")
    ] = PORT,
    token: Annotated[
        bool,
        typer.Option(
            "--token", help="Require a token on the loopback address too, on a machine that others use."
        ),
    ] = False,
) -> None:
    """Show runs, graphs, reports and datasets in a browser. It is read-only."""
    from aiohttp import web

    from pipeline.serve.access import is_loopback, new_token
    from pipeline.serve.app import make_app

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the folder of your runs as --folder")
    missing = [each for each in data or [] if not each.is_dir()]
    if missing:
        raise UserError(f"--data {missing[0]} is not a folder; name one with datasets in it")
    needed = new_token() if token or not is_loopback(host) else None
    folders = tuple(data) if data else tuple(each for each in [Path("out")] if each.is_dir())
    app = make_app(folder, folders, host=host, token=needed)
    logging.getLogger("aiohttp").setLevel(logging.ERROR)
    with _listening(host, port) as listener:
        bound = listener.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{name}:{bound}/{'' if needed is None else f'?token={needed}'}")
        if is_loopback(host):
            here = socket.gethostname()
            typer.echo(f"from your own machine, first run: ssh -L {bound}:{name}:{bound} {here}")
            if needed is None:
                typer.echo("other users of this machine can open it too; --token keeps them out")
        else:
            typer.echo("it is not encrypted; an ssh tunnel to --host 127.0.0.1 is")
        typer.echo("Ctrl-C stops it")
        web.run_app(app, sock=listener, print=None, access_log=None, handler_cancellation=True)


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror as error:
        raise UserError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use: choose another --port, or --port 0 for any free one"
            ) from error
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or --port"
        ) from error
