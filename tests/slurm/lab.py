"""A real SLURM cluster on one machine, for tests: every virtual node is a network namespace.

    login    this machine: clients run here; 10.91.5.1, one virtual cable into the namespace of `control`
    control  the switch, munged, slurmctld and, with accounting, slurmdbd and MariaDB; 10.91.5.2
    node0... slurmd and its jobs, each with a host name, an address and two GPUs; 10.91.5.10 and up.
             There its own name means 127.0.1.1, as on many sites

Every process of the cluster lives in one of these namespaces. So all of them are found without pid files,
also when the tests that started them were killed, and the machine has nothing of the lab but the cable and
the namespaces: /etc/hosts and /etc/slurm stay as they are.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

PREFIX = "seerlab"  # of the namespaces; also the cable's name on this machine
NAMESPACES = Path("/run/netns")
LOCK = Path("/run/seerlab.lock")
SUBNET = "10.91.5"
LOGIN, CONTROL = f"{SUBNET}.1", f"{SUBNET}.2"
# Further addresses of the login machine: sites of a web.
SITES = [f"{SUBNET}.{number}" for number in range(3, 9)]
FIRST_NODE = 10  # last number of the address of node0
GPUS = 2

NEEDED = ("ip", "munged", "nsenter", "scontrol", "slurmctld", "slurmd", "srun", "unshare")
NEEDED_FOR_ACCOUNTING = ("mariadbd", "mariadb-install-db", "sacct", "sacctmgr", "slurmdbd")

# Below the 300 s after which pytest ends a test: the sentence about the other lab is better than a stack.
PATIENCE_FOR_ANOTHER_LAB = 240.0


class SlurmUnavailableError(Exception):
    """This machine cannot run the lab; the sentence says why."""


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 90.0, *, pause: float = 0.2
) -> None:
    """Poll until the condition is true; TimeoutError says what did not happen.

    Many conditions ask a command of SLURM's: with a shorter pause, they keep half a core busy.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(pause)


@dataclass
class SlurmLab:
    """One controller and some nodes; at most one lab runs on a machine, others wait for it.

    Args:
        folder: configuration, state and logs; nothing there outlives `stop` but them. Every start begins with
            an empty queue and job 1.
        nodes: how many: node0, node1, ..., 4 CPUs and 2 GPUs each.
        accounting: whether sacct works. Without, it answers that accounting is disabled, as on many sites.
    """

    folder: Path
    nodes: int = 4
    accounting: bool = False
    _lock: TextIO | None = field(default=None, init=False, repr=False)
    _cut: set[int] = field(default_factory=set, init=False, repr=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False, repr=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------ the whole lab

    @property
    def environment(self) -> dict[str, str]:
        """What every client needs in its environment."""
        path = os.environ.get("PATH", os.defpath)
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "PATH": f"{path}:/usr/sbin:/sbin"}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle.

        Raises:
            SlurmUnavailableError: if this machine cannot run the lab.
        """
        self._require_programs()
        self._take_lock()
        try:
            _clear_machine()
            self._make_files()
            self._build_network()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self._spawn("slurmctld", "control", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            for node in range(self.nodes):
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process of the lab and remove what it made outside its folder; harmless when stopped."""
        if self._lock is None:
            return
        try:
            for daemon in self._daemons.values():
                daemon.kill()  # one started just now may not yet be in its namespace
            _clear_machine()
            for daemon in self._daemons.values():
                daemon.wait()
            self._daemons.clear()
            self._cut.clear()
            # Device files have no place among a test run's leftovers.
            shutil.rmtree(self.folder / "dev", ignore_errors=True)
        finally:
            # Unlock, not only close: a process forked meanwhile holds the same open file.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Wait until every node answers, is idle, and has nothing left of earlier jobs."""

        def idle() -> bool:
            if self._daemons["slurmctld"].poll() is not None:
                raise RuntimeError(f"slurmctld ended:\n{self._log('slurmctld')}")
            answer = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t", check=False)
            return answer.stdout.split() == ["idle"] * self.nodes

        try:
            wait_until(idle, "all nodes idle", seconds)
        except TimeoutError as error:
            error.add_note(self.run("sinfo", "--Node", "--long", check=False).stdout)
            error.add_note(self._log("slurmctld"))
            raise

    def reset(self) -> None:
        """As after `start`, but for job numbers: no jobs, all nodes up and idle."""
        for node in range(self.nodes):
            self.heal_node(node)
            if self._daemons[node_name(node)].poll() is not None:
                self.start_node(node)
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)  # not after KillWait: now
        self.run("scancel", "--user=root", check=False)
        self.wait_idle()

    # ------------------------------------------------------------------------------------------------ clients

    def run(
        self, *command: str | Path, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a client on the login machine. With check, an exit status other than 0 is an error."""
        return self._run([str(word) for word in command], timeout=timeout, check=check)

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, ...; empty for a stranger.

        `squeue` forgets a job when it ends; the controller remembers it for five minutes.
        """
        answer = self.run("scontrol", "--oneliner", "show", "job", number, check=False).stdout
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)

    def wait_for_job(self, number: str, state: str, seconds: float = 30.0) -> dict[str, str]:
        """Wait until a job is in a state ("RUNNING"); what the controller knows of it then."""
        known: dict[str, str] = {}

        def there() -> bool:
            known.clear()
            known.update(self.job(number))
            return known.get("JobState") == state

        try:
            wait_until(there, f"job {number} {state}", seconds)
        except TimeoutError as error:
            error.add_note(f"{known}\n{self._log('slurmctld')}")
            raise
        return known

    @contextmanager
    def silent_controller(self) -> Iterator[None]:
        """slurmctld takes connections meanwhile, and does not answer."""
        self._daemons["slurmctld"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._daemons["slurmctld"].send_signal(signal.SIGCONT)

    # -------------------------------------------------------------------------------------------------- nodes

    def start_node(self, node: int) -> None:
        """Start a node's slurmd, at first or after `kill_node`; does not wait."""
        name = node_name(node)
        if name in self._daemons and self._daemons[name].poll() is None:
            raise RuntimeError(f"{name} is running")
        self._spawn(name, name, ["slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"]])

    def node_pids(self, node: int) -> list[int]:
        """Every process of a node: slurmd, the supervisors of its job steps, their tasks."""
        return _pids(_namespace(node_name(node)))

    def kill_node(self, node: int) -> None:
        """SIGKILL every process of a node.

        Its address still refuses connections, as after a crash of slurmd; after `cut_node` it is silent, as
        without power.
        """
        self._daemons[node_name(node)].kill()
        _kill_all([_namespace(node_name(node))])
        self._daemons[node_name(node)].wait()

    def cut_node(self, node: int) -> None:
        """Pull a node's network cable; its processes go on."""
        _ip(["link", "set", node_name(node), "down"], namespace=_namespace("control"))
        self._cut.add(node)

    def heal_node(self, node: int) -> None:
        """Put a node's network cable back, and have its slurmd say so; nothing if it was not cut."""
        if node not in self._cut:
            return
        _ip(["link", "set", node_name(node), "up"], namespace=_namespace("control"))
        self._cut.remove(node)
        # slurmd registers on SIGHUP. By itself it waits to be asked, which takes 7 to 20 s.
        slurmd = self._daemons[node_name(node)]
        if slurmd.poll() is None:
            slurmd.send_signal(signal.SIGHUP)

    def in_node(
        self, node: int, command: Sequence[str | Path], *, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, outside of any job; it works also when the node's slurmd is dead."""
        return self._run(self._inside(node_name(node), command), timeout=timeout, check=check)

    # ------------------------------------------------------------------------------------------------ details

    def _require_programs(self) -> None:
        if os.geteuid() != 0:
            raise SlurmUnavailableError("the SLURM of the tests needs root, for network namespaces")
        needed = NEEDED + (NEEDED_FOR_ACCOUNTING if self.accounting else ())
        missing = [name for name in needed if shutil.which(name, path=self.environment["PATH"]) is None]
        if missing:
            packages = "slurm-wlm munge iproute2 util-linux"
            packages += " slurmdbd mariadb-server" if self.accounting else ""
            raise SlurmUnavailableError(f"{', '.join(missing)} not found: apt-get install {packages}")

    def _take_lock(self) -> None:
        """Names and addresses are fixed, so two labs take turns."""
        if self._lock is not None:
            raise RuntimeError("this lab is running")
        lock = LOCK.open("a+")

        def taken() -> bool:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        try:
            wait_until(
                taken, f"the lab of another test run, which holds {LOCK}, ends", PATIENCE_FOR_ANOTHER_LAB
            )
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def _make_files(self) -> None:
        for name in ("dev", "run", "state", "spool"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        for name in ("etc", "log"):
            (self.folder / name).mkdir(exist_ok=True)
        for gpu in range(GPUS):
            # A GPU without its device file makes the node invalid. This one is a second /dev/null.
            try:
                os.mknod(self.folder / "dev" / f"nvidia{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError as error:
                raise SlurmUnavailableError(
                    f"this machine does not let us make device files: {error}"
                ) from error
        etc = self.folder / "etc"
        (etc / "munge.key").write_bytes(secrets.token_bytes(128))
        (etc / "munge.key").chmod(0o400)
        hosts = ["127.0.0.1 localhost", f"{LOGIN} {socket.gethostname()}", f"{CONTROL} control"]
        hosts += [f"{node_address(node)} {node_name(node)}" for node in range(self.nodes)]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        for own in range(self.nodes):  # as Debian installs it
            mine = f"127.0.1.1 {node_name(own)}"
            others = [line for line in hosts if not line.endswith(f" {node_name(own)}")]
            (etc / f"hosts.{node_name(own)}").write_text("\n".join([mine, *others]) + "\n")
        (etc / "slurm.conf").write_text(slurm_conf(self.folder, self.nodes, accounting=self.accounting))
        (etc / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        # Nothing here uses cgroups, but slurmd looks for systemd's if none is named.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if self.accounting:
            (etc / "slurmdbd.conf").write_text(slurmdbd_conf(self.folder))
            (etc / "slurmdbd.conf").chmod(0o600)

    def _build_network(self) -> None:
        """One switch, and no route out: with a default route, every look-up of a name waits for a timeout."""
        control = _namespace("control")
        here = [f"netns add {control}"]
        here += [f"netns add {_namespace(node_name(node))}" for node in range(self.nodes)]
        here += [
            f"link add {PREFIX} type veth peer name login netns {control}",
            f"address add {LOGIN}/24 dev {PREFIX}",
            *(f"address add {site}/24 dev {PREFIX}" for site in SITES),
            f"link set {PREFIX} up",
        ]
        # The switch is in a namespace of its own, where no firewall of this machine filters what it forwards.
        switch = [
            "link set lo up",
            "link add switch type bridge",
            f"address add {CONTROL}/24 dev switch",
            "link set switch up",
            "link set login master switch up",
        ]
        for node in range(self.nodes):
            name = node_name(node)
            switch += [
                f"link add {name} type veth peer name eth0 netns {_namespace(name)}",
                f"link set {name} master switch up",
            ]
        try:
            _ip_batch(here)
            _ip_batch(switch, namespace=control)
            for node in range(self.nodes):
                address = f"address add {node_address(node)}/24 dev eth0"
                _ip_batch(
                    ["link set lo up", address, "link set eth0 up"], namespace=_namespace(node_name(node))
                )
        except subprocess.CalledProcessError as error:
            reason = (
                error.stderr.strip().splitlines()[0] if error.stderr.strip() else f"ip: {error.returncode}"
            )
            raise SlurmUnavailableError(
                f"this machine does not let us make virtual networks: {reason}"
            ) from error

    def _start_munge(self) -> None:
        run = self.folder / "run"
        # --force: the test's folder lets in nobody but root, and munged insists on everybody.
        command = ["munged", "--foreground", "--force", f"--key-file={self.folder / 'etc' / 'munge.key'}"]
        command += [f"--socket={run / 'munge'}", f"--pid-file={run / 'munged.pid'}"]
        command += [f"--seed-file={run / 'munge.seed'}"]
        self._spawn("munged", "control", command)
        self._wait_for("munged", (run / "munge").exists)

    def _start_accounting(self) -> None:
        shutil.rmtree(self.folder / "database", ignore_errors=True)
        data = [
            "--no-defaults",
            "--user=root",
            f"--datadir={self.folder / 'database'}",
            "--innodb-log-file-size=16M",
        ]
        self._run(["mariadb-install-db", *data, "--skip-test-db", "--auth-root-authentication-method=socket"])
        # Nobody but root reaches the namespace's loopback: the database needs no accounts.
        server = ["mariadbd", *data, "--skip-grant-tables", "--bind-address=127.0.0.1"]
        server += [f"--socket={self.folder / 'run' / 'database'}", "--innodb-flush-log-at-trx-commit=0"]
        server += ["--innodb-buffer-pool-size=32M", "--innodb-lock-wait-timeout=900"]  # slurmdbd asks for 900
        self._spawn("mariadbd", "control", server)
        self._wait_for("mariadbd", (self.folder / "run" / "database").exists)
        self._spawn("slurmdbd", "control", ["slurmdbd", "-D"])
        add = ["sacctmgr", "--immediate", "add", "cluster", PREFIX]
        self._wait_for("slurmdbd", lambda: self._run(add, timeout=10, check=False).returncode == 0)

    def _wait_for(self, daemon: str, condition: Callable[[], bool]) -> None:
        def ready() -> bool:
            if self._daemons[daemon].poll() is not None:
                raise RuntimeError(f"{daemon} ended:\n{self._log(daemon)}")
            return condition()

        wait_until(ready, f"{daemon} ready")

    def _inside(self, host: str, command: Sequence[str | Path]) -> list[str]:
        """What runs a command on a host of the lab: in its network, with its host name and /etc/hosts."""
        of_node = self.folder / "etc" / f"hosts.{host}"
        hosts = of_node if of_node.exists() else self.folder / "etc" / "hosts"
        enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        return [
            "nsenter",
            f"--net={NAMESPACES / _namespace(host)}",
            *("unshare", "--uts", "--mount", "--propagation=slave"),
            *("sh", "-c", enter, "sh", host, str(hosts)),
            *(str(word) for word in command),
        ]

    def _spawn(self, daemon: str, host: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / daemon).open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(
                self._inside(host, command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,  # Ctrl-C at the tests' terminal is not for the cluster
            )

    def _log(self, daemon: str) -> str:
        return "\n".join((self.folder / "log" / daemon).read_text(errors="replace").splitlines()[-30:])

    def _run(
        self, command: Sequence[str], *, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=check,
                env=os.environ | self.environment,
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise


def node_name(node: int) -> str:
    """What the scheduler and the node itself call it."""
    return f"node{node}"


def node_address(node: int) -> str:
    """Where the others reach it."""
    return f"{SUBNET}.{FIRST_NODE + node}"


def slurm_conf(folder: Path, nodes: int, *, accounting: bool) -> str:
    """The cluster: quick to see a lost node, quick to start a requeued job again."""
    last = nodes - 1
    text = f"""
ClusterName={PREFIX}
SlurmctldHost=control({CONTROL})
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
MpiDefault=none

# cred_expire is also how long a requeued job waits; 5 is the least.
AuthInfo=socket={folder}/run/munge,cred_expire=5

# Plain processes: no cgroups, which a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none

# The nodes are what is written here, not what slurmd finds: all of them share one machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:{GPUS}
NodeName=node[0-{last}] NodeAddr={SUBNET}.[{FIRST_NODE}-{FIRST_NODE + last}]

# A job of `high` takes the place of jobs of `main`: they get the signal they asked for, else SIGTERM, and
# have 20 s. Those still there then are requeued. One that ends sooner has ended, unless it requeued itself.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=DEFAULT Nodes=ALL DefaultTime=60 MaxTime=INFINITE
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=10 PreemptMode=OFF

# A lost node is given up after two pings that fail, each after these times: 8 to 12 s.
SlurmdTimeout=4
MessageTimeout=3
TCPTimeout=1
BatchStartTimeout=5
ReturnToService=2
KillWait=5

# Jobs start as soon as they can.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0,kill_invalid_depend
ScronParameters=enable
"""
    if accounting:
        # Without the socket's name here, every call of sacct hangs.
        text += f"""
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={CONTROL}
AccountingStoragePass={folder}/run/munge
AccountingStorageTRES=gres/gpu
"""
    return text.lstrip()


def slurmdbd_conf(folder: Path) -> str:
    """The accounting daemon, in the same namespace as its database."""
    return f"""
DbdHost=control
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
""".lstrip()


def _namespace(host: str) -> str:
    return f"{PREFIX}-{host}"


def _ip(words: Sequence[str], *, namespace: str) -> None:
    subprocess.run(["ip", "-netns", namespace, *words], check=True, capture_output=True, text=True)


def _ip_batch(lines: Sequence[str], *, namespace: str | None = None) -> None:
    command = ["ip", *(["-netns", namespace] if namespace else []), "-batch", "-"]
    subprocess.run(command, input="\n".join(lines) + "\n", check=True, capture_output=True, text=True)


def _clear_machine() -> None:
    """Remove whatever a lab, this one or one that was killed, has on this machine."""
    left = sorted(path.name for path in NAMESPACES.glob(f"{PREFIX}-*"))
    _kill_all(left)
    if Path("/sys/class/net", PREFIX).exists():
        # Before its namespace, which the kernel empties only after a while.
        subprocess.run(["ip", "link", "delete", PREFIX], check=True, capture_output=True)
    for name in left:
        subprocess.run(["ip", "netns", "delete", name], check=True, capture_output=True)


def _kill_all(namespaces: Sequence[str]) -> None:
    """SIGKILL every process of some namespaces, again and again: one may have forked meanwhile."""

    def none_left() -> bool:
        pids = [pid for name in namespaces for pid in _pids(name)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(none_left, f"no processes in {', '.join(namespaces)}")


def _pids(namespace: str) -> list[int]:
    """The processes of a network namespace."""
    own = (NAMESPACES / namespace).stat()
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(OSError):  # it ended meanwhile
            if os.path.samestat(link.stat(), own):
                found.append(int(link.parts[2]))
    return found
