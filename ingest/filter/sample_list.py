"""Lists of samples as people write them: takedown requests, hand-picked samples. Keys or URLs, or both.

A text file has one per line; a Parquet, csv or tsv file has a column `key` or `url`, or both. 13 digits are
the key of a sample; all else is where it came from, compared with the column `url` by canonical address, so
that two spellings of one are the same. A list of nothing but file names (SimCLR's `1percent.txt`, with
`n01440764_10043.JPEG` a line) can be compared with the last part of each URL instead.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.keys import key_name
from ingest.fence.reading import read_fenced
from ingest.filter.sample_columns import rows
from ingest.web.url import canonical

# Their lines would be taken for URLs that name no sample.
_OTHER_FORMATS = frozenset([".json", ".jsonl", ".ndjson"])
# Bytes of texts, and for each entry, besides its text.
_MOST_HELD, _HELD_PER_ENTRY = 4 << 30, 100


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleList:
    """The entries of a file, each once.

    Attributes:
        keys: ascending, (k,) uint64.
        urls: canonical where they are addresses, sorted.
        lines: how many lines of the file each entry stands for, keys before urls, (k + u,) int64.
    """

    keys: NDArray[np.uint64]
    urls: pa.Array
    lines: NDArray[np.int64]

    @property
    def has_only_file_names(self) -> bool:
        """Whether every entry is the name of a file, without a folder or a host."""
        return bool(
            len(self.urls) and not len(self.keys) and not pc.any(pc.match_substring(self.urls, "/")).as_py()
        )

    def find(
        self, keys: NDArray[np.uint64], urls: pa.Array | None, *, by_file_name: bool = False
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which samples are named, and by what: one may be by its key and by its URL.

        Args:
            keys: of the samples, (n,).
            urls: where they came from; None if the list has no URLs.
            by_file_name: whether only the last part of each URL counts.

        Returns:
            Whether an entry names the sample, (n,); and places in `lines` of the entries that name any,
            ascending.
        """
        place = np.searchsorted(self.keys, keys)
        there = place < len(self.keys)
        there[there] = self.keys[place[there]] == keys[there]
        entries = [np.unique(place[there])]
        if urls is not None:
            spelling = _file_name if by_file_name else _spelled
            spelled = pa.array([spelling(url) for url in urls.to_pylist()], pa.string())
            by_url = pc.index_in(spelled, value_set=self.urls).fill_null(-1).to_numpy()
            entries.append(len(self.keys) + np.unique(by_url[by_url >= 0]))
            there |= by_url >= 0
        return there, np.concatenate(entries)

    def save(self, path: Path) -> None:
        """Write it where other processes of this machine find it."""
        columns = {"keys": pa.array(self.keys), "urls": self.urls, "lines": pa.array(self.lines)}
        whole = {
            name: pa.LargeListArray.from_arrays(pa.array([0, len(column)], pa.int64()), column)
            for name, column in columns.items()
        }
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.table(whole).schema) as writer:
            writer.write_table(pa.table(whole))

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote, without a copy in memory."""
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        keys, urls, lines = (table[name].chunk(0).flatten() for name in ("keys", "urls", "lines"))
        return cls(keys=keys.to_numpy(), urls=urls, lines=lines.to_numpy())

    def names(self, entries: Iterable[int]) -> list[str]:
        """Entries by their places, as text."""
        count = len(self.keys)
        return [key_name(int(self.keys[e])) if e < count else self.urls[e - count].as_py() for e in entries]


def read_sample_list(path: str | Path) -> SampleList:
    """Read a list.

    Raises:
        UserError: there is no such file, it is not what its name says, or it has neither keys nor urls, or
            too many.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise UserError(f"{path} is named like no list of samples: give .txt, .csv, .tsv or .parquet")
    try:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{path} is UTF-16: save it as UTF-8")
        keys, urls = _entries(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    distinct_keys, key_lines = np.unique(np.array(keys, np.uint64), return_counts=True)
    distinct_urls, url_lines = np.unique(
        np.array([_spelled(url) for url in urls], object), return_counts=True
    )
    return SampleList(
        keys=distinct_keys,
        urls=pa.array(distinct_urls.tolist(), pa.string()),
        lines=np.concatenate([key_lines, url_lines]),
    )


def _spelled(url: str) -> str:
    return canonical(url) or url


def _file_name(url: str) -> str:
    path = re.split("[?#]", url, maxsplit=1)[0] if "://" in url else url
    return path.rpartition("/")[2]


def _entries(path: Path) -> tuple[list[int], list[str]]:
    keys: list[int] = []
    urls: list[str] = []
    left = _MOST_HELD
    with path.open("rb") as file:
        for table in read_fenced(rows, [file], {"location": str(path)}, place=str(path)):
            left -= table.nbytes + _HELD_PER_ENTRY * len(table)
            if left < 0:
                raise UserError(
                    f"{path} names more than {len(keys) + len(urls):,} samples, which take too much memory: "
                    "give it in parts, one after another"
                )
            keys += map(int, table["key"].drop_null().to_pylist())
            urls += table["url"].drop_null().to_pylist()
    return keys, urls
