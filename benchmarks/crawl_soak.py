"""Claim: however often a crawl is killed, the same command finishes it, with the undisturbed crawl's bytes.

    python benchmarks/crawl_soak.py [--executor local] [--kills 200] [--images 20000] [--seed 0]

A local server replays the images: its answers are a pure function of the URL. `ingest crawl-shards` is
killed with SIGKILL at random moments, the whole process group or one process of it, and started again by the
same command until the dataset is sealed. On Ray a kill is of a crawler, a checker, the waiting command, or a
whole node; on SLURM of a crawler, a checker, a batch script or the waiting command, or a job is requeued.

A kill comes some time after a unit was committed, or, if the crawl is ahead of the kills, some time after the
one before; meanwhile the server answers slowly, or holds back. So the kills are spread over all of the crawl,
its start and its planning too. Exits with 1 if the root differs from that of an undisturbed crawl on this
machine, if a URL's row is lost, doubled or not what the server's answer must give, or if a file is damaged.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.dataset.open import open_dataset, sealed_units
from ingest.dataset.verify import Level, read_seal, verify_root, verify_units

sys.path += [str(Path(__file__).parents[1] / "tests" / "ingest"), str(Path(__file__).parent)]
from replay_server import ReplayServer, expected
from soak_crawls import GROUNDS, Crawl, LocalCrawl

OPTIONS = ["--contact", "soak@example.org", "--attempts", "1", "--per-host", "8"]
# No answer may come too late, however long it is held back.
OPTIONS += ["--deadline", "600"]
# Mean seconds before an answer. Until there is progress, no quicker than units can be committed: else many
# wait, and are all committed at once. Then slowly, and not at all while the crawl is ahead of the kills.
QUICK, SLOW = 0.04, 0.3
# Answers that may be on their way through the checkers before the first unit is committed.
RUN_AHEAD = 512


@dataclass(kw_only=True)
class Soak:
    """What came of a soak.

    Attributes:
        kills: by what was killed, such as "crawler".
        starts: of the crawl.
        crawls: that the kills are spread over; one that is sealed before it had all is followed by another.
        undisturbed: Merkle root of a crawl that was left alone.
        different: crawls with another root.
        lost, doubled, wrong: URLs without a row, with several, with one that contradicts the server.
        damages: what `verify` found.
        spread: share of the units that were committed at each kill.
    """

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    crawls: int = 0
    undisturbed: str = ""
    different: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    damages: int = 0
    spread: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.different or self.lost or self.doubled or self.wrong or self.damages)


def soak(
    folder: Path,
    *,
    images: int,
    kills: int,
    unit_rows: int,
    pauses: tuple[float, float],
    seed: int,
    executor: str = "local",
) -> Soak:
    """Crawl once undisturbed and once with kills, into `folder`, and compare.

    Args:
        executor: of the crawls that are killed: one of `GROUNDS`.
        pauses: least and most seconds from a commit to a kill.

    Raises:
        RuntimeError: a crawl failed by itself.
    """
    result = Soak()
    with GROUNDS[executor](folder) as ground, ReplayServer(ground.addresses) as server:
        urls = server.urls(images)
        pq.write_table(pa.table({"url": urls}), folder / "urls.parquet")
        common = [str(folder / "urls.parquet"), "--unit-rows", str(unit_rows), *OPTIONS]
        common += [word for address in ground.addresses for word in ("--allow-private", address)]
        whole = folder / "undisturbed"
        _finish(LocalCrawl([*common, "--workers", "2", "--output", str(whole)], folder / "log"), whole)
        result.undisturbed = open_dataset(whole).root
        started = time.monotonic()
        chance = random.Random(seed)
        while result.kills.total() < kills:
            output = folder / f"killed-{result.crawls}"
            crawl = ground.crawl([*common, "--output", str(output)], folder / "log")
            before, wanted = result.kills.total(), kills - result.kills.total()
            while result.kills.total() < kills and not _sealed(output):
                if not crawl.running():
                    crawl.start()
                # Whoever has had this many kills may have done this much.
                due = (images - RUN_AHEAD) / unit_rows * (result.kills.total() - before + 1) / (wanted + 1)
                _let_run(crawl, output, server, due, chance.uniform(*pauses))
                if killed := crawl.kill(chance):
                    result.spread.append(committed(output) * unit_rows / images)
                    result.kills[killed] += 1
            server.held, server.delay = False, 0.0
            _finish(crawl, output)
            result.starts += crawl.starts
            result.crawls += 1
            _compare(output, urls, result)
        result.seconds = time.monotonic() - started
    return result


def _sealed(output: Path) -> bool:
    return (output / "DATASET.json").exists()


def _finish(crawl: Crawl, output: Path) -> None:
    """Let it end, and start it again while there is no dataset."""
    while crawl.running() or not _sealed(output):
        if not crawl.running():
            crawl.start()
        time.sleep(0.05)


def _let_run(crawl: Crawl, output: Path, server: ReplayServer, due: float, pause: float) -> None:
    """Until it has committed a unit, if fewer than `due` are, and then, slowly, for the pause."""
    before = committed(output)
    if before < due:
        server.held, server.delay = False, QUICK
        while crawl.running() and committed(output) == before:
            time.sleep(0.02)
    server.delay = SLOW
    until = time.monotonic() + pause
    while crawl.running() and time.monotonic() < until:
        server.held = committed(output) >= due
        time.sleep(0.02)


def committed(output: Path) -> int:
    try:
        with os.scandir(output / "commits") as entries:
            return sum(not entry.name.startswith(".") for entry in entries)
    except FileNotFoundError:
        return 0


def _compare(output: Path, urls: list[str], result: Soak) -> None:
    root = open_dataset(output).root
    result.different += root != result.undisturbed
    rows = [
        row
        for meta in sealed_units(output, root)["meta"].to_pylist()
        for row in pq.read_table(
            output / meta, columns=["url", "status", "reason", "http_status"]
        ).to_pylist()
    ]
    found = Counter(row["url"] for row in rows)
    result.lost += len(set(urls) - set(found))
    result.doubled += sum(count > 1 for count in found.values())
    result.wrong += sum(
        (row["status"], row["reason"], row["http_status"]) != expected(row["url"]) for row in rows
    )
    seal, damages = read_seal(output)
    if seal is not None:
        damages = damages + verify_root(output, seal)
        reports = verify_units(output, seal, Level.SHA, workers=2)
        damages += [damage for report in reports for damage in report.damages]
    result.damages += len(damages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--unit-rows", type=int, default=40)
    parser.add_argument("--pauses", type=float, nargs=2, default=(0.5, 4.0), metavar=("LEAST", "MOST"))
    parser.add_argument("--executor", choices=sorted(GROUNDS), default="local")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(
            Path(folder),
            images=options.images,
            kills=options.kills,
            unit_rows=options.unit_rows,
            pauses=tuple(options.pauses),
            seed=options.seed,
            executor=options.executor,
        )
    of = ", ".join(f"{count} {who}" for who, count in sorted(result.kills.items()))
    print(
        f"{result.kills.total()} kills ({of}) and {result.starts} starts over {result.crawls} crawls of "
        f"{options.images} images, {options.executor}, seed {options.seed}, in {result.seconds:.0f} s: "
        f"{result.different} roots differ from {result.undisturbed[:12]}, {result.lost} rows lost, "
        f"{result.doubled} doubled, {result.wrong} wrong, {result.damages} damages; "
        f"units committed at the kills: {min(result.spread):.0%} to {max(result.spread):.0%}, "
        f"median {statistics.median(result.spread):.0%}"
    )
    raise SystemExit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
