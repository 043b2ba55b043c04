"""Results of units that are not committed, under the output: whoever goes on with a unit takes them up.

Units with giants stay open for long, a day at a Crawl-delay of 10 s, and jobs end after an hour. Each process
has files of its own for each unit, so that two of them never write to one; the first result of a row counts.
Files go when their unit is committed. They name the plan that they are of: another one's are not looked at.

In a folder a unit has one file, which is written as results come. To a bucket, what has come since the last
time goes now and then, as a file by itself: `save`.
"""

import os
import re
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ingest.crawl.results import Memory, Results, whole
from ingest.dataset import layout
from ingest.dataset.records import canonical_json
from ingest.plan.plan import Plan
from ingest.store.posix import make_folder
from ingest.store.store import Entry, Store

_NAME = re.compile(rf"{layout.WAITING}/(\d{{8,}})-[0-9a-f]{{16}}\.results")
# Of a unit: more are made one, for whoever goes on with it holds them open.
_MOST_FILES = 4
_COPIED = 1 << 20  # at a time
# From a bucket: pieces of some MB.
_READ_AT_ONCE = 8
_REMOVED_AT_ONCE = 32


class Kept:
    """The files of a plan's units.

    Args:
        plan: whose results these are.
        units: that may be begun here.
    """

    def __init__(self, plan: Plan, units: Iterable[int]) -> None:
        self._plan = plan
        self._store = plan.store
        self._folder = _folder(plan.store)
        self._files: defaultdict[int, list[str]] = defaultdict(list)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._saves: dict[int, Future[None]] = {}
        ours = set(units)
        for name in _listed(plan.store) if plan.lanes else ():
            match = _NAME.fullmatch(name)
            if match is not None and int(match[1]) in ours:
                self._files[int(match[1])].append(name)

    def close(self) -> None:
        """What is not saved by now is not; what is being saved will be."""
        self._thread.shutdown(cancel_futures=True)

    def results(self, unit: int, rows: int, memory: Memory) -> Results:
        """For the results of a unit; `load` them from `files`."""
        if unit in self._plan.local_units:
            return Results(rows, memory, new_file=_without_name)
        new_file: Callable[[], int] = _without_name
        if (folder := self._folder) is not None:
            new_file = lambda: self._new_file(folder, unit)  # noqa: E731
        return Results(rows, memory, new_file=new_file, header=self._header(unit))

    def files(self, unit: int) -> Iterator[int]:
        """Descriptors of what others have kept of a unit."""
        names = self._files.get(unit, [])
        if self._folder is None and names:
            yield self._downloaded(names)
        elif self._folder is not None and len(names) > _MOST_FILES:
            yield self._merged(self._folder, unit)
        else:
            yield from (opened for name in names if (opened := self._opened(name)) is not None)

    def save(self, unit: int, results: Results) -> None:
        """See that what has come survives; does not wait until it does.

        Raises:
            OSError: what came before could not be saved.
        """
        if self._folder is not None:
            return
        if (before := self._saves.get(unit)) is not None:
            if not before.done():
                return
            before.result()
        if (pieces := results.unsaved()) is not None:
            saving = self._saves[unit] = self._thread.submit(self._upload, unit, pieces)
            saving.add_done_callback(lambda _: pieces.close())

    def remove(self, unit: int) -> None:
        """The unit is committed."""
        if (saving := self._saves.pop(unit, None)) is not None and not saving.cancel():
            saving.exception()  # it was waited for, and is not needed any more
        _delete(self._store, self._files.pop(unit, ()))

    def _header(self, unit: int) -> bytes:
        record = self._plan.record
        return canonical_json({"plan": self._plan.fingerprint, "items": record.items.sha256, "unit": unit})

    def _opened(self, name: str) -> int | None:
        """None: of what is gone, or not to be read, all is asked for again."""
        try:
            return os.open(self._path(name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None

    def _merged(self, folder: Path, unit: int) -> int:
        """One file in the place of all: each process that was killed has left one."""
        names, merged = self._files.pop(unit), self._new_file(folder, unit)
        for name in names:
            if (descriptor := self._opened(name)) is None:
                self._files[unit].append(name)  # it goes with the others, once the unit is committed
                continue
            size = whole(os.dup(descriptor), self._header(unit))
            with os.fdopen(descriptor, "rb") as file:
                while data := file.read(min(_COPIED, size - file.tell())):
                    while data:  # a disk that is nearly full takes a part
                        data = data[os.write(merged, data) :]
            os.fsync(merged)
            _delete(self._store, [name])
        return merged

    def _new_file(self, folder: Path, unit: int) -> int:
        make_folder(folder)
        name = self._new_name(unit)
        return os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _new_name(self, unit: int) -> str:
        name = f"{layout.WAITING}/{unit:08d}-{secrets.token_hex(8)}.results"
        self._files[unit].append(name)
        return name

    def _upload(self, unit: int, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self._store.replace(self._new_name(unit), piece)

    def _downloaded(self, names: Sequence[str]) -> int:
        """One file of all of them: a unit that was open for a day has a thousand, and files may lack."""
        with tempfile.TemporaryFile(prefix="ingest-") as file:
            with suppress(OSError):  # of what could not be read, all is asked for again
                for data in self._store.read_many(names, at_once=_READ_AT_ONCE):
                    file.write(data or b"")
            file.flush()
            return os.dup(file.fileno())

    def _path(self, name: str) -> Path:
        return Path(self._store.where(name))


def remove_rest(store: Store, units: Container[int]) -> None:
    """Remove what is left of units that are committed: whoever is killed between a commit and the removal
    leaves its files. Then the folder, unless others put something there.
    """
    names = _listed(store)
    _delete(store, [name for name in names if (of := _NAME.fullmatch(name)) and int(of[1]) in units])
    if (folder := _folder(store)) is not None:
        with suppress(OSError):
            folder.rmdir()


def _delete(store: Store, names: Iterable[str]) -> None:
    """Many at a time: of a unit that was open for a day, a bucket has a thousand."""
    with ThreadPoolExecutor(_REMOVED_AT_ONCE) as threads:
        list(threads.map(lambda name: store.delete(Entry(name=name, bytes=0, modified=0.0)), names))


def _folder(store: Store) -> Path | None:
    """Of datasets in folders."""
    return store.root / layout.WAITING if isinstance(store.root, Path) else None


def _listed(store: Store) -> list[str]:
    """Files only: a pipe would keep its reader waiting."""
    folder = _folder(store)
    if folder is None:
        return [entry.name for entry in store.list(layout.WAITING)]
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    return sorted(f"{layout.WAITING}/{name}" for name in files)


def _without_name() -> int:
    with tempfile.TemporaryFile(prefix="ingest-") as file:
        return os.dup(file.fileno())
