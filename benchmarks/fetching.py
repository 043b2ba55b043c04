"""Claim: politeness costs next to no time. CPU of the fetcher per URL, of this tree and of another one.

    python benchmarks/fetching.py PHOTOS --other TREE [--urls 3000] [--rounds 7]

nginx serves JPEGs of about 100 KB, on 64 hosts and on a host for every two URLs. In interleaved rounds each
tree's `Fetcher` fetches all of them in a process of its own, and takes the bodies for nothing; robots.txt, of
which there is none, is asked for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from local_web import LocalWeb, make_corpus, serving

FETCH = """
import json, sys, time
from ingest.web.fetcher import Fetcher
from ingest.web.settings import FetchSettings

urls = open(sys.argv[1]).read().split()
settings = FetchSettings(contact="benchmark@example.org", allow_private=("127.0.0.0/8",))
with Fetcher(settings) as fetcher:
    begun = time.process_time()
    got = sum(hasattr(outcome, "data") for _, outcome in fetcher.run(enumerate(urls)))
    print(json.dumps([got, time.process_time() - begun]))
"""


def cpu_per_url(tree: Path, urls: Path, ca_file: Path) -> float:
    """Seconds of a process that fetches all of the list.

    Raises:
        RuntimeError: something was not fetched.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "SSL_CERT_FILE": str(ca_file)}
    command = [sys.executable, "-c", FETCH, str(urls)]
    done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    got, seconds = json.loads(done.stdout)
    count = len(urls.read_text().split())
    if got != count:
        raise RuntimeError(f"{tree}: {got} of {count} URLs")
    return float(seconds) / count


def lists(web: LocalWeb, paths: list[Path], count: int) -> dict[str, list[str]]:
    some = [paths[number % len(paths)] for number in range(count)]
    half = count // 2
    crowd = [
        f"http://127.1.{number % half // 250}.{number % half % 250 + 1}:{web.ports['http']}"
        f"/{path.relative_to(web.root)}"
        for number, path in enumerate(some)
    ]
    return {
        "64 hosts, http": web.urls("http", some),
        "64 hosts, https": web.urls("https", some),
        "2 URLs per host": crowd,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--urls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("/tmp/crawl-benchmark"))
    options = parser.parse_args()
    trees = [Path(__file__).parents[1], options.other.absolute()]
    corpus = options.work.absolute() / "corpus"
    paths = make_corpus(options.photos, corpus, 300)
    with (
        tempfile.TemporaryDirectory() as name,
        serving(corpus, Path(name), "/usr/sbin/nginx") as web,
    ):
        for kind, urls in lists(web, paths, options.urls).items():
            file = Path(name) / "urls.txt"
            file.write_text("\n".join(urls))
            rounds = []
            for number in range(options.rounds):
                order = trees[:: 1 if number % 2 else -1]
                rounds.append({tree: 1e6 * cpu_per_url(tree, file, web.ca_file) for tree in order})
            for tree in trees:
                print(f"{kind}, {tree}: {spread([each[tree] for each in rounds])} us")
            ratios = [each[trees[0]] / each[trees[1]] for each in rounds]
            print(f"{kind}: x{spread(ratios, digits=2)}", flush=True)


def spread(values: list[float], *, digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
