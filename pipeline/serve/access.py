"""Who may ask the page, and what a browser may do with what it gets.

Other pages in the same browser can send requests to the loopback: a name of theirs that is made to lead there
(DNS rebinding) is refused by the Host header. Elsewhere than on the loopback a token is asked for.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import socket

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

# All that a page of this server needs comes from it; nothing inline runs, and no other page frames it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# What runs have written is shown with its own styles and pictures, as nobody: it runs no script, has no
# cookie and asks for nothing.
FILE_POLICY = (
    "sandbox; default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PORT = re.compile(r":[0-9]{1,5}$")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(32)


def guard(host: str, token: str | None) -> Middleware:
    """What stands before every request.

    Args:
        host: that the server is bound to.
        token: which has to be in a first request, as `?token=`; from then on a cookie has it. None: anybody
            on this machine may look.
    """
    names = {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        return _refusal(request, names, token) or await handler(request)

    return middleware


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """What every answer says, also that to a mistake; a signal of aiohttp's."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Content-Security-Policy", PAGE_POLICY)


def _refusal(request: web.Request, names: set[str], token: str | None) -> web.Response | None:
    """What is answered in place of what was asked for; None to let it in."""
    if not _is_ours(request.headers.get("Host", ""), names):
        sentence = (
            "This page is not known by that name: open it by the name or the address of its machine, or "
            "start `submit serve` with that name as --host.\n"
        )
        return web.Response(status=421, text=sentence)
    if token is None:
        return None
    cookie = _cookie(request)
    if _same(request.query.get("token", ""), token):
        # Away from the address, which browsers remember and people copy; to the page, whatever path was asked
        # for: //elsewhere would lead there.
        answer = web.Response(status=303, headers={"Location": "/"})
        answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
        return answer
    if _same(request.cookies.get(cookie, ""), token):
        return None
    sentence = (
        "Open this page by the address that `submit serve` has printed: the token in it is missing here.\n"
    )
    return web.Response(status=403, text=sentence)


def _is_ours(header: str, names: set[str]) -> bool:
    """Names can be made to lead here by whoever owns them; addresses cannot."""
    name = _PORT.sub("", header).lower()
    if name in names:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _cookie(request: web.Request) -> str:
    """Cookies know no ports: two servers of one machine have two names."""
    port = _PORT.search(request.headers.get("Host", ""))
    return f"submit-serve{port[0].replace(':', '-') if port else ''}"
