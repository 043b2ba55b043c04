"""A Ray cluster on the nodes of the SLURM allocation that this process is in."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import UserError
from cluster.ray.connect import load_ray, own_folder

PATIENCE = 120.0  # seconds for all nodes to join
SECONDS_TO_END = 20.0
FIRST_PORT, PORTS_EACH, BLOCKS = 20_000, 8, 1_536  # up to 32,287: below what Linux gives out by itself


class AllocationRay:
    """Ray on the nodes of an allocation: the head on this one, a worker on each of the others.

    Raises:
        UserError: if this is no node of an allocation, or the head does not start.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        tools = all(shutil.which(name) for name in ("srun", "scontrol"))
        self._nodes = cpus_of_nodes(environment) if tools else {}
        here = environment.get("SLURMD_NODENAME")
        if here not in self._nodes:
            raise UserError(
                "Ray starts on the nodes of a SLURM allocation from one of them only: give the command in a "
                "batch script, or through `srun --pty`; or give the address of a Ray cluster"
            )
        job = int(environment["SLURM_JOB_ID"])
        ports = ports_of(job)
        self.address = f"{address_of(here)}:{ports['port']}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the steps
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        try:
            # Nobody is told where a dashboard is, and it takes eight processes.
            self._start(here, [*head_options(job, ports), "--include-dashboard=false"])
            self._wait_for_head()
            for node in self._nodes.keys() - {here}:
                options = [f"--address={self.address}", f"--dashboard-agent-listen-port={ports['agent']}"]
                self._start(node, options)
        except BaseException:
            self.stop()
            raise

    def wait_for_nodes(self) -> None:
        """Wait until all nodes have joined; this process has joined already.

        Raises:
            UserError: if one does not; names it.
        """
        ray, deadline = load_ray(), time.monotonic() + PATIENCE
        while sum(node["Alive"] for node in ray.nodes()) < len(self._nodes):
            gone = [node for node, process in self._steps.items() if process.poll() is not None]
            if gone or time.monotonic() > deadline:
                which = f"node {gone[0]}" if gone else "a node"
                raise UserError(f"{which} did not join the Ray of this allocation: {self._last_words()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Leave the cluster and end it on every node."""
        load_ray().shutdown()
        for process in self._steps.values():
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in self._steps.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        self._log.close()

    def _start(self, node: str, words: list[str]) -> None:
        # A session of its own: Ctrl-C is a request to the ranks to save, and must not end their cluster.
        self._steps[node] = subprocess.Popen(
            step(node, self._nodes[node], [f"--node-ip-address={address_of(node)}", *words]),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _wait_for_head(self) -> None:
        host, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1.0).close()
            except OSError:
                if any(process.poll() is not None for process in self._steps.values()) or (
                    time.monotonic() > deadline
                ):
                    words = self._last_words()
                    raise UserError(f"Ray's head did not start at {self.address}: {words}") from None
                time.sleep(0.2)
            else:
                return

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return "; ".join([line for line in lines if line][-3:]) or "not a word"


def demand_a_token() -> None:
    """Whoever reaches a Ray that asks for none runs code as this user, and it listens on the whole network.

    The head, the other nodes and this process inherit it; other processes cannot join. Called before the
    first import of Ray, which reads it then.
    """
    kept = Path.home() / ".ray" / "auth_token"  # what Ray itself takes, if the user has made one
    if "RAY_AUTH_MODE" not in os.environ and not kept.is_file():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def step(node: str, cpus: int, words: list[str]) -> list[str]:
    """The command that runs Ray on one node, beside whatever else the job runs there."""
    ray = str(Path(sys.executable).with_name("ray"))
    start = [sys.executable, "-m", "cluster.ray.start_node", str(own_folder()), ray, "start"]
    # --mem=0: what the job has; --cpu-bind=none: a step of one task would be bound to one core.
    where = [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--mem=0",
        "--cpu-bind=none",
    ]
    unused = ["--include-log-monitor=false", "--disable-usage-stats"]
    return [*where, *start, *words, f"--num-cpus={cpus}", "--block", *unused]


def head_options(job: int, ports: Mapping[str, int]) -> list[str]:
    """Ports and a folder of the job's own: two jobs may share a node. The others take the folder over."""
    return [
        "--head",
        f"--port={ports['port']}",
        f"--dashboard-port={ports['dashboard']}",
        f"--dashboard-agent-listen-port={ports['agent']}",
        f"--ray-client-server-port={ports['client']}",
        f"--temp-dir={own_folder() / str(job)}",
    ]


def ports_of(job: int) -> dict[str, int]:
    """Four ports that depend on the job's id; all others Ray takes from the kernel."""
    first = FIRST_PORT + job % BLOCKS * PORTS_EACH
    return {name: first + place for place, name in enumerate(("port", "dashboard", "agent", "client"))}


def cpus_of_nodes(environment: Mapping[str, str]) -> dict[str, int]:
    """The allocation's nodes and the cores that it has on each, from "node[1-3]" and "16(x2),8"."""
    names = subprocess.run(
        ["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")],
        check=False,
        capture_output=True,
        text=True,
    )
    cpus: list[int] = []
    for part in environment.get("SLURM_JOB_CPUS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is not None:
            cpus += [int(found[1])] * int(found[2] or 1)
    return dict(zip(names.stdout.split(), cpus, strict=False))


def address_of(node: str) -> str:
    """The address by which SLURM knows a node; its own guess may be of another network."""
    answer = subprocess.run(
        ["scontrol", "show", "node", node, "--oneliner"], check=False, capture_output=True, text=True
    )
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return socket.gethostbyname(found[1] if found else node)
