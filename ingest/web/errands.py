"""What queues at hosts: URLs on their way to an outcome, and questions for robots.txt."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from yarl import URL

from ingest.problem import Problem

Token = TypeVar("Token")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body, whatever it is: its kind is not believed, and not looked at here."""

    data: bytes
    http_status: int


Outcome = Fetched | Problem
Report = Callable[[tuple[Token, Outcome] | BaseException], None]


@dataclass(slots=True, eq=False)
class Errand(Generic[Token]):
    """A URL on its way.

    Attributes:
        url: where redirects have led.
        spent: seconds of this try.
        allowed_at: when robots.txt allowed the URL.
    """

    token: Token
    start: URL
    url: URL
    report: Report[Token]
    tries: int = 1
    redirects: int = 0
    spent: float = 0.0
    allowed_at: float = 0.0

    @property
    def host(self) -> str:
        return self.url.raw_host or ""


@dataclass(slots=True, eq=False)
class Question(Generic[Token]):
    """What does this origin ask of robots? Errands wait for the answer.

    Attributes:
        url: where redirects have led.
        spent: seconds, redirects included.
    """

    origin: URL
    url: URL
    waiting: deque[Errand[Token]] = field(default_factory=deque)
    redirects: int = 0
    spent: float = 0.0

    @property
    def host(self) -> str:
        return self.origin.raw_host or ""


Job = Errand[Token] | Question[Token]
