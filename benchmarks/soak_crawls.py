"""The crawls that a soak kills: as processes of this machine, on a Ray cluster, as jobs of a SLURM cluster.

The clusters are those of the tests: real ones, on this machine.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import yaml

sys.path += [str(Path(__file__).parents[1] / "tests" / name) for name in ("ingest", "slurm")]
from lab import SITES, SlurmLab
from replay_server import ADDRESSES

COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()", "crawl-shards"]
NODES = 2  # of Ray, besides the head
CLUSTER_PARTS = 3  # of a crawl by SLURM
# A part may have failed of the kills before, and the next command hear of it.
MAX_BAD_ENDS = 3


class Crawl(Protocol):
    """A crawl that can be started, killed, and started again."""

    @property
    def starts(self) -> int:
        """How often the command was given."""

    def start(self) -> None: ...

    def running(self) -> bool:
        """Whether the command is; one that ended by itself must have ended well, or because of the kills."""

    def kill(self, chance: random.Random) -> str:
        """SIGKILL to something of it; returns to what, or "" if it had ended."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where crawls run.

    Attributes:
        addresses: of this machine, that crawlers reach; each is a site.
        crawl: makes one, from the command's arguments and a file for its output.
    """

    addresses: Sequence[str]
    crawl: Callable[[list[str], Path], Crawl]


class LocalCrawl:
    """The crawl as processes of this machine.

    Args:
        arguments: of the command.
        log: gets its output.
        environment: that it has besides this process's.
    """

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._command = [*COMMAND, *arguments]
        self._log = log
        self._environment = os.environ | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def running(self) -> bool:
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        if self._process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the crawl ended with {self._process.returncode}:\n{self._log.read_text()}")
        return False

    def start(self) -> None:
        self.starts += 1
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def kill(self, chance: random.Random) -> str:
        """To all processes, or to one."""
        if self._process is None or not self.running():
            return ""
        checkers = psutil.Process(self._process.pid).children(recursive=True)
        checkers = [each for each in checkers if each.status() != psutil.STATUS_ZOMBIE]
        if chance.random() < 0.5:
            return self.kill_command()
        if (number := chance.randint(0, len(checkers))) < len(checkers):
            checkers[number].kill()
            return "checker"
        self._process.kill()
        self._process.wait()
        return "crawler"

    def kill_command(self) -> str:
        """To the whole process group."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return "group"


@dataclass(kw_only=True)
class ClusterCrawl:
    """The crawl on a cluster: the command waits here, and the crawlers are elsewhere.

    Args:
        command: that waits.
        strike: kills something of the cluster's; returns what, or "" if the crawl has nothing there now.
    """

    command: LocalCrawl
    strike: Callable[[random.Random], str]
    bad_ends: int = field(default=0, init=False)

    @property
    def starts(self) -> int:
        return self.command.starts

    def start(self) -> None:
        self.command.start()

    def running(self) -> bool:
        try:
            return self.command.running()
        except RuntimeError:
            self.bad_ends += 1
            if self.bad_ends > MAX_BAD_ENDS:
                raise
            self.command.start()
            return True

    def kill(self, chance: random.Random) -> str:
        """To something of the cluster; now and then, or if there is nothing, to the command."""
        if not self.running():
            return ""
        killed = self.strike(chance) if chance.random() < 0.85 else ""
        if not killed:
            self.command.kill_command()
        self.bad_ends = 0
        return killed or "command"


@contextmanager
def here(folder: Path) -> Iterator[Ground]:
    """This machine."""
    arguments = ["--workers", "2"]
    yield Ground(
        addresses=ADDRESSES[:2],
        crawl=lambda words, log: LocalCrawl([*words, *arguments], log),
    )


@contextmanager
def on_ray(folder: Path) -> Iterator[Ground]:
    """A Ray cluster with a head that does not crawl and nodes of one core, in this machine's processes."""
    # A token that an earlier `ray.init` has left in the home folder must not decide who may join.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.pop("RAY_ADDRESS", None)
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(NODES)]

    def strike(chance: random.Random) -> str:
        if chance.random() < 0.2:
            cluster.remove_node(nodes.pop(chance.randrange(NODES)), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, **small))
            return "node"
        crawlers = [
            process
            for process in psutil.Process().children(recursive=True)
            if "ray::ingest.crawl.part:crawl_call" in _words(process)
        ]
        return _kill_crawler_or_checker(crawlers, chance)

    arguments = _on("ray", folder, {"ray_address": cluster.address}, parts=NODES)
    try:
        yield Ground(
            addresses=ADDRESSES[:6],
            crawl=lambda words, log: ClusterCrawl(
                command=LocalCrawl([*words, *arguments], log), strike=strike
            ),
        )
    finally:
        cluster.shutdown()


@contextmanager
def on_slurm(folder: Path) -> Iterator[Ground]:
    """The SLURM of the tests: four nodes, each a network namespace."""
    with SlurmLab(folder / "lab") as lab:

        def strike(chance: random.Random) -> str:
            if chance.random() < 0.3:
                running = lab.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").stdout.split()
                return _requeue(lab, chance.choice(running)) if running else ""
            of_nodes = [
                process
                for node in range(lab.nodes)
                for pid in lab.node_pids(node)
                if (process := _process(pid)) is not None
            ]
            if chance.random() < 0.3:
                scripts = [process for process in of_nodes if "slurm_script" in _words(process)]
                return _kill_one(scripts, "batch script", chance)
            ranks = [process for process in of_nodes if "-m cluster.rank " in _words(process)]
            # srun names the rank's command among its own words.
            return _kill_crawler_or_checker([rank for rank in ranks if "srun" not in _words(rank)], chance)

        arguments = _on("slurm", folder, {"cpus_per_rank": 1, "signal_seconds": 30}, parts=CLUSTER_PARTS)
        arguments += ["--runs", str(folder / "runs"), "--wait"]
        yield Ground(
            addresses=SITES,
            crawl=lambda words, log: ClusterCrawl(
                command=LocalCrawl([*words, *arguments], log, lab.environment), strike=strike
            ),
        )


GROUNDS = {"local": here, "ray": on_ray, "slurm": on_slurm}


def _on(executor: str, folder: Path, site: dict[str, Any], *, parts: int) -> list[str]:
    """The options that spread a crawl over a cluster."""
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    options = ["--executor", executor, "--cluster", str(folder / "site.yaml")]
    return [*options, "--parts", str(parts), "--workers", "1"]


def _requeue(lab: SlurmLab, job: str) -> str:
    done = lab.run("scontrol", "requeue", job, check=False)  # it may have ended meanwhile
    return "requeued job" if done.returncode == 0 else ""


def _kill_crawler_or_checker(crawlers: Sequence[psutil.Process], chance: random.Random) -> str:
    if chance.random() < 0.5:
        return _kill_one(crawlers, "crawler", chance)
    checkers = []
    for crawler in crawlers:
        with suppress(psutil.NoSuchProcess):
            checkers += crawler.children(recursive=True)
    return _kill_one(checkers, "checker", chance) or _kill_one(crawlers, "crawler", chance)


def _kill_one(processes: Sequence[psutil.Process], what: str, chance: random.Random) -> str:
    if not processes:
        return ""
    try:
        chance.choice(processes).kill()
    except psutil.NoSuchProcess:
        return ""
    return what


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _words(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
