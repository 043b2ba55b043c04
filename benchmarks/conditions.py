"""What deciding a condition costs: seconds per million rows, parsing included.

python benchmarks/conditions.py [--rows 1000000] [--rounds 7]
"""

import argparse
import statistics
import time

import numpy as np
import pyarrow as pa

from ingest.filter.condition_text import parse
from ingest.filter.conditions import evaluate

CONDITIONS = [
    "width >= 256",
    "aspect <= 3",
    "lang = en",
    "score > 0.5",
    "labels = cat",
    "label in [cat, dog]",
    "caption like '%7%'",
    "width >= 256 and (lang = en or not labels = cat)",
]


def made_up(rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    ends = np.concatenate([[0], np.cumsum(rng.integers(0, 3, rows))])
    words = np.array(["cat", "dog", "cow", "en", "de"])
    return pa.table(
        {
            "width": rng.integers(1, 1_000, rows),
            "height": rng.integers(1, 1_000, rows),
            "lang": words[rng.integers(3, 5, rows)],
            "score": rng.random(rows).astype(str),
            "caption": rng.integers(0, 10**9, rows).astype(str),
            "labels": pa.ListArray.from_arrays(ends.astype(np.int32), words[rng.integers(0, 3, ends[-1])]),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows = made_up(args.rows)
    for text in CONDITIONS:
        spent = []
        for _ in range(args.rounds):
            start = time.process_time()
            evaluate(parse(text), rows)
            spent.append(time.process_time() - start)
        print(f"{text:50} {statistics.median(spent):7.3f} s  ({min(spent):.3f}–{max(spent):.3f})")


if __name__ == "__main__":
    main()
