"""Connections, and how many of them are kept for later."""

import resource
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from cluster.errors import UserError
from ingest.web.answer_bytes import AnswerHandler, Opened

# aiohttp keeps these to itself, and may rename them one day.
_OF_HANDLERS = ("_exception", "_parser", "_payload", "_should_close")
# Connections beyond which none is kept, and how much of the limit of open files they may be.
_MOST_CONNECTIONS = 4096
_SHARE_OF_FILES = 0.5


class Connector(aiohttp.TCPConnector):
    """Connections whose answers are taken as browsers take them; kept as long as there are not too many.

    Args:
        per_address: connections to an address beyond which none is kept.
    """

    def __init__(self, *, per_address: int, **options: Any) -> None:
        super().__init__(**options)
        self._opened = Opened()
        handler = AnswerHandler(self._loop, opened=self._opened)
        missing = [name for name in _OF_HANDLERS if not hasattr(handler, name)]
        if missing or not hasattr(self, "_factory"):
            raise UserError(
                f"aiohttp {aiohttp.__version__} has no {', '.join(missing) or '_factory'}, which answers are "
                "read with: pip install 'aiohttp>=3.14.1,<3.15'"
            )
        self._per_address = per_address
        self._factory: Any = partial(AnswerHandler, loop=self._loop, opened=self._opened)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = _MOST_CONNECTIONS if files == resource.RLIM_INFINITY else int(files * _SHARE_OF_FILES)
        self._most = min(_MOST_CONNECTIONS, share)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        assert isinstance(protocol, AnswerHandler)
        many = self._opened.at[protocol.peer] > self._per_address or self._opened.in_all > self._most
        super()._release(key, protocol, should_close=should_close or many)
