"""Crawling beside img2dataset: one local nginx, the same corpus, in interleaved rounds of one run.

    python benchmarks/crawl.py PHOTOS --img2dataset PATH [--work FOLDER] [--images 10000] [--rounds 5] \\
        [--before CHECKOUT]

PHOTOS is a folder of photographs, from which come the JPEGs of about 100 KB that nginx serves on 64 addresses
(made once per FOLDER). PATH is `img2dataset` in an environment of its own. Both crawl the same list with as
many checking or worker processes, img2dataset with 64 threads each:

- `256`: shorter side 256, JPEG quality 95.
- `bytes`: as they are; img2dataset with --resize_mode=no --skip_reencode=True. Ours also without perceptual
  hashes, which img2dataset does not make.

CHECKOUT is another version of this repository, which crawls in turns with this one.

CPU is that of the crawler and all its processes, from their exit (wait4). Start-up is excluded from "per CPU
second" and from "net": each round also crawls 64 URLs in the same way, and what that took is subtracted, with
its images. Memory is the proportional set size of the whole tree, sampled. Ours heeds robots.txt and
X-Robots-Tag, hashes, and verifies what it wrote, as it always does. Last, a profile of ours, if py-spy is
here: which share of the processes' CPU time goes where.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from crawl_profile import profile
from local_web import LocalWeb, make_corpus, serving
from peak_memory import PeakMemory

OURS = [sys.executable, "-P", "-c", "from ingest.cli import main; main()", "crawl-shards"]
FEW = 64
KEEP_RATIO = ["--resize_mode=keep_ratio", "--image_size=256", "--encode_quality=95"]
KEEP_BYTES = ["--resize_mode=no", "--skip_reencode=True"]


@dataclass(frozen=True)
class Case:
    """One comparison: the same work by each crawler.

    Attributes:
        ours: options of our command, by the name of the variant.
        theirs: options of img2dataset.
    """

    mode: str
    scheme: str
    processes: int
    ours: dict[str, list[str]]
    theirs: list[str]

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.scheme}, {self.processes} processes"


@dataclass(frozen=True)
class Run:
    """One crawl: seconds of wall time and of CPU, bytes at the peak, images stored."""

    wall: float
    cpu: float
    peak: int
    images: int


@dataclass(frozen=True)
class Round:
    """A crawl of all URLs and one of few."""

    whole: Run
    few: Run

    @property
    def rate(self) -> float:
        return self.whole.images / self.whole.wall

    @property
    def net_rate(self) -> float:
        return (self.whole.images - self.few.images) / (self.whole.wall - self.few.wall)

    @property
    def per_cpu(self) -> float:
        return (self.whole.images - self.few.images) / (self.whole.cpu - self.few.cpu)


def cases() -> Iterator[Case]:
    resized = {"ours": ["--resize", "256", "--quality", "95"]}
    kept: dict[str, list[str]] = {"ours": []}
    if "--no-phash" in subprocess.run([*OURS, "--help"], check=True, capture_output=True, text=True).stdout:
        kept["ours, no phash"] = ["--no-phash"]
    for scheme, processes in (("http", 2), ("https", 2), ("http", 1)):
        yield Case("256", scheme, processes, resized, KEEP_RATIO)
        yield Case("bytes", scheme, processes, kept, KEEP_BYTES)


def our_command(urls: Path, output: Path, processes: int, options: list[str]) -> list[str]:
    manners = ["--contact", "benchmark@example.org", "--allow-private", "127.0.0.0/8"]
    work = ["--unit-rows", "1000", "--workers", str(processes), *options]
    return [*OURS, str(urls), "--output", str(output), *manners, *work]


def their_command(peer: str, urls: Path, output: Path, processes: int, options: list[str]) -> list[str]:
    columns = ["--input_format=parquet", "--url_col=url", "--caption_col=caption"]
    form = ["--output_format=webdataset", "--number_sample_per_shard=1000", "--enable_wandb=False"]
    work = [f"--processes_count={processes}", "--thread_count=64", *options]
    return [peer, f"--url_list={urls}", f"--output_folder={output}", *columns, *form, *work]


def measure(command: list[str], environment: dict[str, str], output: Path) -> Run:
    """Run a crawl, count what it stored, and delete it.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        with PeakMemory(process.pid, every=0.25) as memory:
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    images = stored(output)
    shutil.rmtree(output)
    return Run(wall, usage.ru_utime + usage.ru_stime, memory.peak, images)


def stored(output: Path) -> int:
    """Images in a dataset of ours or of img2dataset."""
    if (output / "DATASET.json").exists():
        root = json.loads((output / "DATASET.json").read_bytes())["sealed"]
        return int(json.loads((output / "sealed" / f"{root}.json").read_bytes())["kept"])
    return sum(json.loads(path.read_bytes())["successes"] for path in output.glob("*_stats.json"))


def run_case(
    case: Case, lists: dict[int, Path], work: Path, peer: str, versions: dict[str, dict[str, str]]
) -> dict[str, Round]:
    """One round: every crawler once, few URLs and then all.

    Args:
        versions: the environment variables of each of ours, by what to add to its name.
    """
    output = work / "output"
    commands = {
        f"{name}{version}": (
            [our_command(urls, output, case.processes, options) for urls in lists.values()],
            environment,
        )
        for name, options in case.ours.items()
        for version, environment in versions.items()
    }
    commands["img2dataset"] = (
        [their_command(peer, urls, output, case.processes, case.theirs) for urls in lists.values()],
        versions[""],
    )
    rounds = {}
    for name, (pair, environment) in commands.items():
        few, whole = (measure(command, environment, output) for command in pair)
        if (few.images, whole.images) != tuple(lists):
            raise RuntimeError(f"{name}, {case.name}: stored {few.images} and {whole.images} images")
        rounds[name] = Round(whole, few)
    return rounds


def tell(case: Case, rounds: list[dict[str, Round]]) -> None:
    print(f"\n{case.name}: median (range) of {len(rounds)}")
    for name in rounds[0]:
        mine = [each[name] for each in rounds]
        peers = [each["img2dataset"] for each in rounds]
        line = (
            f"  {name:23} {spread([r.rate for r in mine])} images/s,"
            f" net {spread([r.net_rate for r in mine])};"
            f" {spread([r.per_cpu for r in mine])} per CPU second;"
            f" start-up {statistics.median(r.few.cpu for r in mine):.1f} s CPU;"
            f" peak {spread([r.whole.peak / 2**20 for r in mine])} MiB"
        )
        if name != "img2dataset":
            pairs = list(zip(mine, peers, strict=True))
            line += (
                f"; x{statistics.median(a.net_rate / b.net_rate for a, b in pairs):.2f} images/s,"
                f" x{statistics.median(a.per_cpu / b.per_cpu for a, b in pairs):.2f} per CPU second,"
                f" x{statistics.median(a.whole.peak / b.whole.peak for a, b in pairs):.2f} memory"
            )
        print(line, flush=True)


def tell_growth(results: list[tuple[Case, list[dict[str, Round]]]]) -> None:
    """From 1 to 2 processes."""
    medians = {
        (case.mode, case.scheme, name, case.processes): statistics.median(
            each[name].net_rate for each in rounds
        )
        for case, rounds in results
        for name in rounds[0]
    }
    print("\nnet rate with 2 processes, in multiples of that with 1:")
    for (mode, scheme, name, processes), rate in medians.items():
        if processes == 2 and (one := medians.get((mode, scheme, name, 1))):
            print(f"  {mode}, {scheme}, {name}: x{rate / one:.2f}")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def write_lists(web: LocalWeb, scheme: str, paths: list[Path], folder: Path) -> dict[int, Path]:
    """Lists of few and of all URLs, by their number of URLs."""
    lists = {}
    for count in (FEW, len(paths)):
        lists[count] = folder / f"{scheme}-{count}.parquet"
        urls = web.urls(scheme, paths[:count])
        captions = [f"photograph {number}" for number in range(count)]
        pq.write_table(pa.table({"url": urls, "caption": captions}), lists[count])
    return lists


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--img2dataset", required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/crawl-benchmark"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="beginnings of names of comparisons: '256, http,'")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--nginx", default="/usr/sbin/nginx")
    options = parser.parse_args()
    work = options.work.absolute()
    paths = make_corpus(options.photos, work / "corpus", options.images)
    size = statistics.mean(path.stat().st_size for path in paths)
    print(f"{len(paths)} JPEGs of {size / 1e3:.0f} KB on average", flush=True)
    chosen = [case for case in cases() if not options.only or case.name.startswith(tuple(options.only))]
    results: list[tuple[Case, list[dict[str, Round]]]] = [(case, []) for case in chosen]
    with (
        tempfile.TemporaryDirectory(dir=work) as name,
        serving(work / "corpus", Path(name), options.nginx) as web,
    ):
        folder = Path(name)
        environment = os.environ | {"SSL_CERT_FILE": str(web.ca_file), "NO_ALBUMENTATIONS_UPDATE": "1"}
        versions = {"": environment}
        if options.before:
            versions[", before"] = environment | {"PYTHONPATH": str(options.before.absolute())}
        lists = {scheme: write_lists(web, scheme, paths, folder) for scheme in web.ports}
        for _ in range(options.rounds):
            for case, rounds in results:
                rounds.append(run_case(case, lists[case.scheme], folder, options.img2dataset, versions))
        for case, rounds in results:
            tell(case, rounds)
        tell_growth(results)
        if py_spy := shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            for case in chosen:
                if case.processes == 2:
                    tell_profile(case, lists[case.scheme][len(paths)], folder, environment, py_spy)


def tell_profile(case: Case, urls: Path, folder: Path, environment: dict[str, str], py_spy: str) -> None:
    output = folder / "output"
    command = our_command(urls, output, case.processes, case.ours["ours"])
    shares = profile(command, environment, folder, py_spy)
    shutil.rmtree(output)
    print(f"\n{case.name}: where the CPU time of our processes goes")
    for part, share in shares.items():
        print(f"  {share:6.1%} {part}")


if __name__ == "__main__":
    main()
