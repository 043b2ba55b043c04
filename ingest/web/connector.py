"""Connections, and how many of them are kept for later."""

import resource
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from ingest.web.answer_bytes import AnswerHandler, Opened

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
        self._per_address = per_address
        self._factory: Any = partial(AnswerHandler, loop=self._loop, opened=self._opened)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = _MOST_CONNECTIONS if files == resource.RLIM_INFINITY else int(files * _SHARE_OF_FILES)
        self._most = min(_MOST_CONNECTIONS, share)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        assert isinstance(protocol, AnswerHandler)
        many = self._opened.at[protocol.peer] > self._per_address or self._opened.in_all > self._most
        super()._release(key, protocol, should_close=should_close or many)
