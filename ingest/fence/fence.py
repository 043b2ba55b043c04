"""A fence around processes that decode what strangers made: they compute, and do nothing else.

`fence` takes from the process that calls it, for good, what a decoder does not need and an intruder in one
would: memory beyond a bound, other programs and processes, the network, files to write, and files to read
outside Python's own. `environment` is what such a process starts with: no credentials. Threads, locks,
clocks, and the descriptors that are open already (its pipes) stay.

What the kernel cannot do is left out, and `fence` says what is up; `ingest doctor` shows it. The numbers and
structures are those of Linux's user interface, which never change: linux/seccomp.h, linux/filter.h,
linux/landlock.h, asm/unistd.h.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ingest

# What there is to put up.
PARTS = ("no_new_privs", "seccomp", "Landlock")
# How Python and its libraries are found and behave; all else may be a secret.
_KEPT = (
    *("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TZ"),
    *("PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONUTF8"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
)
# Landlock is for the thread that asks for it: there should be one.
_ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# Of files that are open: what is said on standard error.
_LARGEST_FILE = 1 << 20

# Calls that fail, and their numbers on x86-64 and aarch64; - where there is no such call.
_DENIED = """
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
sendto 44 206, sendmsg 46 211, sendmmsg 307 269,
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, setsid 112 157, setpgid 109 154,
kill 62 129, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434,
pidfd_send_signal 424 424, pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, kcmp 312 272,
setpriority 141 140, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239,
creat 85 -, truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, unlink 87 -, unlinkat 263 35,
rmdir 84 -, mkdir 83 -, mkdirat 258 34, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -,
fchown 93 55, lchown 94 -, fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
setxattrat 463 463, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466,
utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -, file_setattr 469 469, flock 73 32,
shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187,
semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, mq_open 240 180, mq_unlink 241 181,
memfd_create 319 279, memfd_secret 447 447, ioctl 16 29, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, fanotify_init 300 262, open_by_handle_at 304 265, add_key 248 217, request_key 249 218,
keyctl 250 219, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268,
open_tree 428 428, open_tree_attr 467 467, move_mount 429 429, fsopen 430 430, fsconfig 431 431,
fsmount 432 432, fspick 433 433, mount_setattr 442 442,
setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149,
setfsuid 122 151, setfsgid 123 152, setgroups 116 159, capset 126 91,
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89, syslog 103 116, quotactl 179 60,
quotactl_fd 443 443, sethostname 170 161, setdomainname 171 162, settimeofday 164 170, clock_settime 227 112,
adjtimex 159 171, clock_adjtime 305 266, iopl 172 -, ioperm 173 -, modify_ldt 154 -, personality 135 92,
uselib 134 -, vhangup 153 58
"""
# Calls that fail as if the kernel had none: whoever makes them goes on with older ones. Their arguments lie
# in memory, where a filter cannot look.
_UNKNOWN = "clone3 435 435, openat2 437 437, io_uring_setup 425 425, io_uring_enter 426 426, \
io_uring_register 427 427"
# What is newer is not known here, so it fails likewise. On x86-64 this holds of the x32 calls, too.
_FIRST_UNHEARD_OF = 470


@dataclass(frozen=True)
class _Machine:
    """A processor: its place in the tables, its AUDIT_ARCH, and calls of which some are denied."""

    place: int
    arch: int
    clone: int
    openat: int
    open: int | None
    prlimit64: int
    tgkill: int


MACHINES = {
    "x86_64": _Machine(0, 0xC000003E, clone=56, openat=257, open=2, prlimit64=302, tgkill=234),
    "aarch64": _Machine(1, 0xC00000B7, clone=220, openat=56, open=None, prlimit64=261, tgkill=131),
}
_CLONE_THREAD = 0x10000
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Instructions of a filter, and its answers.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16


def environment() -> dict[str, str]:
    """What a fenced process gets of this one's environment: where Python is, and the `ingest` of here."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    here = str(Path(ingest.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return kept | _ONE_THREAD | {"PYTHONPATH": path}


def fence(memory: int) -> list[str]:
    """Fence this process in, for good. Call it while there is one thread, with all that it needs open.

    Args:
        memory: bytes of address space that it may add to what it has now.

    Returns:
        Which of PARTS are up; the bounds always are.
    """
    _bound(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    up = [libc.prctl(38, 1, 0, 0, 0) == 0, _deny_calls(libc), _deny_files(libc)]
    return [part for part, is_up in zip(PARTS, up, strict=True) if is_up]


def _bound(memory: int) -> None:
    """Bounds of memory and of files; no core dumps of hostile bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    for which, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _LARGEST_FILE),
        (resource.RLIMIT_AS, limit),
    ):
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)  # noqa: PLW2901
        resource.setrlimit(which, (most, most))


def _numbers(table: str, machine: _Machine) -> list[int]:
    rows = (row.split() for row in table.replace("\n", " ").split(","))
    return [int(number) for row in rows if (number := row[1 + machine.place]) != "-"]


def filter_program(machine: _Machine, process: int) -> list[tuple[int, int, int, int]]:
    """The filter of calls: instructions of (code, steps if true, steps if false, value).

    Args:
        machine: the processor.
        process: may be sent signals; it is the one that is fenced.
    """
    fail = (_ANSWER, 0, 0, _FAIL | errno.EPERM)
    unknown = (_ANSWER, 0, 0, _FAIL | errno.ENOSYS)
    allow = (_ANSWER, 0, 0, _ALLOW)
    program = [
        (_LOAD, 0, 0, _ARCH),
        # The numbers of another processor's calls, which this one may know too, are others.
        (_EQUAL, 1, 0, machine.arch),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _FIRST_UNHEARD_OF),
        unknown,
    ]

    def where(call: int | None, argument: int, test: int, value: int, *, is_so: bool) -> None:
        """Allow the call if its argument passes the test, or if it does not."""
        if call is not None:
            answers = [allow, fail] if is_so else [fail, allow]
            load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
            program.extend([(_EQUAL, 0, 4, call), load, (test, 0, 1, value), *answers])

    where(machine.openat, 2, _ANY_BIT, _TO_WRITE, is_so=False)
    where(machine.open, 1, _ANY_BIT, _TO_WRITE, is_so=False)
    where(machine.clone, 0, _ANY_BIT, _CLONE_THREAD, is_so=True)
    where(machine.prlimit64, 0, _EQUAL, 0, is_so=True)
    # abort() does it.
    where(machine.tgkill, 0, _EQUAL, process, is_so=True)
    for numbers, answer in ((_numbers(_DENIED, machine), fail), (_numbers(_UNKNOWN, machine), unknown)):
        for number in numbers:
            program += [(_EQUAL, 0, 1, number), answer]
    return [*program, allow]


def _deny_calls(libc: ctypes.CDLL) -> bool:
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return False
    program = filter_program(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    seccomp = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    # For all threads, and without slowing branches for fear of Spectre, as older kernels do of themselves:
    # there is nobody else's memory in this process. Kernels that know no such wish get the first alone.
    return any(libc.syscall(seccomp, 1, flags, head) == 0 for flags in (1 | 4, 1))


def _deny_files(libc: ctypes.CDLL) -> bool:
    """Landlock: read below Python's own folders, and nothing else; no TCP, no signals beyond this process."""
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1 or len(list(Path("/proc/self/task").iterdir())) > 1:
        return False
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    sizes = 8 if version < 4 else 16 if version < 6 else 24
    wishes = ctypes.create_string_buffer(struct.pack("=QQQ", files, 0b11, 0b11)[:sizes])
    rules = libc.syscall(create, wishes, ctypes.c_size_t(sizes), 0)
    if rules < 0:
        return False
    read_file, read_folder = 1 << 2, 1 << 3
    for path in _readable():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = read_file | (read_folder if path.is_dir() else 0)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place))
        libc.syscall(add, rules, 1, rule, 0)
        os.close(place)
    done: bool = libc.syscall(restrict, rules, 0) == 0
    os.close(rules)
    return done


def _readable() -> Iterator[Path]:
    """What Python and its libraries may yet want to read."""
    for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"):
        yield Path(name)
    yield from map(Path, ("/etc/ld.so.cache", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom"))
    yield from (Path(place) for place in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if place)
    yield from (Path(place) for place in {sys.prefix, sys.base_prefix, sys.exec_prefix})
    yield from (Path(place) for place in sys.path if place.endswith(("site-packages", "dist-packages")))
    # Of other folders of modules, such as a checkout or a home, only those that were imported.
    for name, module in list(sys.modules.items()):
        if "." not in name:
            yield from map(Path, getattr(module, "__path__", ()))
            if file := getattr(module, "__file__", None):
                yield Path(file)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fence(1 << 30)))
