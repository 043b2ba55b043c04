"""The fence: what an intruder in a decoder may do, and that a decoder notices nothing of it."""

import errno
import json
import os
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from ingest.fence import doctor
from ingest.fence.fence import MACHINES, PARTS, environment, filter_program
from ingest.image.check import Treatment, check
from ingest.image.check_pool import Checker

INTRUDER = """
import ctypes, io, json, os, signal, socket, subprocess, sys, threading
from pathlib import Path
from ingest.fence.fence import fence
secret, parent, held = Path(sys.argv[1]), os.getppid(), os.open(sys.argv[1], os.O_RDONLY)
up = fence(256 << 20)
libc = ctypes.CDLL(None, use_errno=True)

def call(*numbers):
    if libc.syscall(*numbers) < 0:
        raise OSError(ctypes.get_errno(), "")

tricks = {
    "a socket": lambda: socket.socket(),
    "a pair of sockets": lambda: socket.socketpair(),
    "a program": lambda: subprocess.run(["/bin/true"]),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "a process": lambda: os.fork(),
    "write": lambda: open(secret, "ab"),
    "create": lambda: open(secret.with_name("new"), "xb"),
    "a nameless file": lambda: os.open(secret.parent, os.O_TMPFILE | os.O_RDWR),
    "memory as a file": lambda: os.memfd_create("x"),
    "unlink": lambda: secret.unlink(),
    "rename": lambda: secret.rename(secret.with_name("other")),
    "chmod": lambda: os.fchmod(held, 0o777),
    "truncate": lambda: os.truncate(secret, 0),
    "kill": lambda: os.kill(parent, signal.SIGTERM),
    "kill all": lambda: os.killpg(0, signal.SIGTERM),
    "limits of others": lambda: __import__("resource").prlimit(parent, 7, (1, 1)),
    "ptrace": lambda: call(101 if os.uname().machine == "x86_64" else 117, 16, parent, 0, 0),
    "io_uring": lambda: call(425, 1, 0),
    "a call of tomorrow": lambda: call(4_000, 0),
    "memory": lambda: bytearray(1 << 30),
}
reads = {
    "read": lambda: secret.read_bytes(),
    "list": lambda: os.listdir(secret.parent),
    "environment of the parent": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
    "memory of the parent": lambda: open(f"/proc/{parent}/mem", "rb"),
}
went = []
for name, trick in [*tricks.items(), *(reads.items() if "Landlock" in up else ())]:
    try:
        trick()
        went.append(name)
    except (OSError, MemoryError):
        pass
thread = threading.Thread(target=lambda: went.append("a thread"))
thread.start()
thread.join()
import wave, zipfile  # of the library, not read before
sys.stdout.write(json.dumps([up, went, sorted(os.environ)]))
"""


@pytest.fixture
def intruder(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    run = subprocess.run(
        [sys.executable, "-P", "-c", INTRUDER, str(secret)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert secret.read_text() == "secret"
    assert list(tmp_path.iterdir()) == [secret]
    return json.loads(run.stdout)


def test_D4_an_intruder_in_a_decoder_can_compute_and_nothing_else(intruder):
    up, went, names = intruder
    if "seccomp" not in up:
        pytest.skip("this kernel has no filters of calls")
    assert went == ["a thread"]
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & set(names)


def answer(program, arch, number, *arguments):
    """What the kernel would make of a call: the filter, run by hand."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    at, value = 0, 0
    while True:
        code, yes, no, k = program[at]
        if code == 0x06:
            return k
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
            at += 1
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: value & k != 0}[code]
            at += 1 + (yes if holds else no)


# read, write, mmap, brk, futex, exit_group, getrandom
NEEDED = {"x86_64": (0, 1, 9, 12, 202, 231, 318), "aarch64": (63, 64, 222, 214, 98, 94, 278)}
# socket, connect, execve, unlinkat, kill, ptrace, process_vm_writev, bpf
DENIED = {"x86_64": (41, 42, 59, 263, 62, 101, 311, 321), "aarch64": (198, 203, 221, 35, 129, 117, 271, 280)}


@pytest.mark.parametrize("name", MACHINES)
def test_the_filter_of_each_processor(name):
    machine = MACHINES[name]
    program = filter_program(machine, process=77)

    def called(number, *arguments):
        return answer(program, machine.arch, number, *arguments)

    allow, denied, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    assert [called(number) for number in NEEDED[name]] == [allow] * len(NEEDED[name])
    assert [called(number) for number in DENIED[name]] == [denied] * len(DENIED[name])
    # clone3, openat2, io_uring_setup, what comes after them, and x32's calls
    assert {called(number) for number in (435, 437, 425, 480, 0x40000000)} == {unknown}
    assert called(machine.clone, 0x10000) == allow
    assert called(machine.clone, 17) == denied
    assert called(machine.openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
    assert called(machine.openat, 0, 0, os.O_RDWR) == called(machine.openat, 0, 0, os.O_CREAT) == denied
    assert called(machine.tgkill, 77) == called(machine.prlimit64, 0) == allow
    assert called(machine.tgkill, 78) == called(machine.prlimit64, 78) == denied
    other = next(each for each in MACHINES.values() if each is not machine)
    assert answer(program, other.arch, NEEDED[name][0]) == 0x80000000


@pytest.mark.parametrize("treatment", [Treatment(), Treatment(resize=64, encoding="webp")])
def test_verdicts_are_those_without_a_fence(treatment, scene, encode):
    images = [b"none", b"\x89PNG\r\n\x1a\n", encode(scene(), "JPEG")[:-300]]
    for number, kind in enumerate(("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP")):
        with suppress(OSError, KeyError):  # of AVIF, where there is no encoder
            images.append(encode(scene(number), kind))
    with Checker(treatment, workers=1, seconds=20, memory_mb=768) as checker:
        verdicts = [verdict for _, _, verdict in checker.run(enumerate(images))]
    assert verdicts == [check(data, treatment) for data in images]


def test_the_doctor_says_what_is_up(monkeypatch, tmp_path):
    row = doctor.fence_check()
    assert [part for part in PARTS if part not in row.detail] == [] or row.status == "warning"
    monkeypatch.setattr(doctor, "PARTS", (*PARTS, "moat"))
    assert doctor.fence_check().status == "warning"
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no room')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = doctor.fence_check()
    assert (row.status, row.required, "no room" in row.detail) == ("missing", True, True)


def test_what_is_fenced_has_one_thread():
    """Landlock holds for the thread that asks for it, and for those that it starts."""
    code = "import os, ingest.image.check_worker, ingest.fence.reader\n"
    code += "print(len(os.listdir('/proc/self/task')))"
    found = subprocess.check_output([sys.executable, "-P", "-c", code], env=environment(), text=True)
    assert found.strip() == "1"
