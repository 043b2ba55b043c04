"""The most frequent of very many names, counted in bounded memory."""

from collections.abc import Mapping

CAPACITY = 100_000


class Frequent:
    """Counts names in order of frequency; a count has columns, of which the first is the whole.

    When there are twice as many names as `capacity`, the rarer half is forgotten ("lossy counting", Manku and
    Motwani, 2002). A name that comes back counts from there on; `missing` bounds what any count may lack.
    The result depends on the order of calls alone.

    Attributes:
        counts: columns of the count by name.
        missing: what the whole of any name may be too low by; 0 if no name was forgotten.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self.counts: dict[str, tuple[int, ...]] = {}
        self.missing = 0

    def add(self, name: str, *columns: int) -> None:
        """Add to a name's count, always as many columns."""
        there = self.counts.get(name)
        self.counts[name] = (
            columns if there is None else tuple(a + b for a, b in zip(there, columns, strict=True))
        )
        if len(self.counts) > 2 * self._capacity:
            self._forget()

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Add counts of one column."""
        for name, count in counts.items():
            self.add(name, count)

    def top(self, most: int | None = None, *, by: int = 0) -> list[tuple[str, tuple[int, ...]]]:
        """Names with the most in this column, and at least 1; equal ones by name."""
        there = [item for item in self.counts.items() if item[1][by]]
        return sorted(there, key=lambda item: (-item[1][by], item[0]))[:most]

    def _forget(self) -> None:
        ranked = self.top()
        self.missing += ranked[self._capacity][1][0]
        self.counts = dict(ranked[: self._capacity])
