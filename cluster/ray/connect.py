"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.host import private_folder
from cluster.run.folder import RunFolder
from cluster.site import users_site
from cluster.typed_json import read_record

NAMESPACE = "submit"  # of all our actors
OWN = f"{NAMESPACE}-own"  # of a driver whose Ray ends with it
CONNECT_PATIENCE = 5.0  # seconds
RECORD = "ray.json"  # in the run folder: where its supervisor is


# How Ray names the cluster's versions, and then this process's.
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


def load_ray() -> Any:
    """The library; imported where it is used, so that the product imports without it."""
    try:
        import ray
        import ray.util.scheduling_strategies  # not part of `import ray`
    except ImportError as error:
        raise UserError(f"the Ray executor needs Ray: pip install 'seer-pipeline[ray]' ({error})") from None
    return ray


def join(address: str, namespace: str) -> None:
    """Become a driver of an existing cluster.

    Raises:
        UserError: if there is none at that address.
    """
    _refuse_silence(address)
    try:
        _init(namespace=namespace, address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if len(versions := _VERSIONS.findall(str(error))) == 2:
            (there, there_python), (here, here_python) = versions
            raise UserError(
                f"the Ray at {address} is {there} on Python {there_python}, and here is {here} on Python "
                f"{here_python}: both must be the same; pip install 'ray=={there}'"
            ) from None
        raise UserError(
            f"no Ray answers at {address}: {first_line(error)}; give the address that `ray start --head` has "
            "printed, from a machine of that cluster, or a ray:// address"
        ) from None


def _refuse_silence(address: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    try:
        _knock(address)
    except OSError as error:
        raise UserError(
            f"no Ray answers at {address}: {error}; give the address that `ray start --head` has printed, "
            "from a machine of that cluster"
        ) from None


def _knock(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # not "auto", or the name of a plug-in
        socket.create_connection((host, int(port)), timeout=CONNECT_PATIENCE).close()


def find_again(run: RunFolder, site_address: str | None) -> str | None:
    """Where the Ray of a run is that goes on: its head may have come back at another address.

    Args:
        site_address: of the site file that the run was submitted with.

    Returns:
        The first address at which something answers, of those that RAY_ADDRESS, the user's site file, the
        run and this machine's Ray name; else where it was, to be told that nothing does. None: one that was
        started for the run alone is started anew.
    """
    known = [os.environ.get("RAY_ADDRESS"), users_site().ray_address, site_address]
    if (run.path / RECORD).exists() and not (submission := read_submission(run)).own:
        site_address = site_address or submission.address
        known += [submission.address, _address_of_this_machine()]
    for address in dict.fromkeys(known):
        with contextlib.suppress(OSError):
            if address is not None:
                _knock(address)
                return address
    return site_address


def _address_of_this_machine() -> str | None:
    """What `ray start` has written down here, if nobody but this user and root could have."""
    path = Path("/tmp/ray/ray_current_cluster")
    with contextlib.suppress(OSError):
        owners = {path.stat().st_uid, path.parent.stat().st_uid}
        if owners <= {0, os.geteuid()}:
            return path.read_text().strip() or None
    return None


def own_folder() -> Path:
    """Where a Ray of ours keeps its sockets and logs: it lets everybody write there, so that nobody else may
    come in. On a machine that it shares with another Ray, each has a folder in it.
    """
    return private_folder(Path(tempfile.gettempdir()) / f"submit-ray-{os.geteuid()}")


def start_here() -> None:
    """Start a Ray on this machine that ends with this process.

    Raises:
        UserError: if it does not start.
    """
    # Cores that this process may not use are not Ray's to give away.
    cores, folder = len(os.sched_getaffinity(0)), own_folder() / "here"
    try:
        _init(namespace=OWN, address="local", num_cpus=cores, include_dashboard=False, _temp_dir=str(folder))
    except Exception as error:  # Ray raises no more than that
        raise UserError(
            f"Ray did not start on this machine: {first_line(error)} Its logs are in {folder}; "
            "--executor local needs no Ray"
        ) from error


def _init(**options: Any) -> None:
    # Nobody was asked whether Ray may report from here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray puts the working directory before PYTHONPATH on every worker: a checkout there would be imported in
    # place of the run's own source.
    with contextlib.chdir("/"):
        load_ray().init(log_to_driver=False, logging_level="WARNING", **options)


def detached() -> bool:
    """Whether the cluster that this process has joined outlives it."""
    return bool(load_ray().get_runtime_context().namespace != OWN)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Where a run was submitted to.

    Attributes:
        address: by which its Ray is reached.
        cluster: which that is, as Ray names it.
        own: it ends with the process that submitted the run.
    """

    address: str
    cluster: str
    own: bool


def write_submission(run: RunFolder, address: str | None) -> None:
    """Write down which cluster runs it."""
    joined = load_ray().get_runtime_context().gcs_address
    record = Submission(address=address or joined, cluster=joined, own=not detached())
    write_atomically(run.path / RECORD, json.dumps(asdict(record)) + "\n")


def read_submission(run: RunFolder) -> Submission:
    """What `write_submission` wrote.

    Raises:
        UserError: if it is damaged.
    """
    remedy = f"remove {run.path / 'status.json'} and give the command that started the run again"
    return read_record(Submission, run.path / RECORD, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The Ray that can be asked.

    Attributes:
        cluster: that this process is on, as Ray names it; empty if on none.
        silence: why on none.
    """

    cluster: str = ""
    silence: str = ""


def reach_users_ray() -> Reached:
    """Be on the Ray that this process's user names, in RAY_ADDRESS or the site file, and on no other."""
    if is_joined():
        return Reached(cluster=load_ray().get_runtime_context().gcs_address)
    try:
        address = os.environ.get("RAY_ADDRESS") or users_site().ray_address
        if address is None:
            return Reached(silence="its Ray was not asked: name its address in RAY_ADDRESS")
        join(address, NAMESPACE)
    except UserError as error:
        return Reached(silence=str(error))
    return reach_users_ray()


def is_joined() -> bool:
    """Whether this process is on a Ray."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def rejoin(run: RunFolder) -> None:
    """Join the cluster that runs it, at the address that its folder has.

    Raises:
        UserError: if it cannot be reached from here, or this process has joined another.
    """
    submission = read_submission(run)
    if not load_ray().is_initialized():
        if submission.own:  # it asks for a token that only its processes have
            raise UserError(f"the Ray of the run in {run.path} is for the process alone that submitted it")
        join(os.environ.get("RAY_ADDRESS") or submission.address, NAMESPACE)
    if (joined := load_ray().get_runtime_context().gcs_address) != submission.cluster:
        raise UserError(
            f"the run in {run.path} is on the Ray of {submission.cluster}, and this process has joined "
            f"{joined}: ask for that run alone, without RAY_ADDRESS"
        )


def first_line(error: Exception) -> str:
    """Ray's errors are long; the first line says what happened."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
