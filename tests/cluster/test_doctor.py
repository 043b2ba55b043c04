"""The doctor's rows: nothing that is broken on a machine may break the report."""

import json
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from cluster import doctor
from cluster.rank.process import MALLOC_SETTINGS


@pytest.fixture
def path_of_commands(tmp_path, monkeypatch):
    """A PATH with nothing but the shell scripts that a test writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, body: str) -> None:
        script = folder / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    return write


def test_report_covers_what_runs_depend_on(tmp_path):
    report = doctor.doctor_report(tmp_path)
    names = [check.name for check in report]
    assert {"Python", "torch", "SLURM", "ray", "submitit", "fairscale", "CPU", "memory", "disk"} <= set(names)
    assert len(names) == len(set(names))
    for check in report:
        assert check.status in ("ok", "missing", "warning")
        assert check.detail
        assert "\n" not in check.detail
        if check.status == "missing":
            assert check.remedy, f"{check.name} is missing and nothing says how to mend it"
    json.dumps([asdict(check) for check in report])


def test_report_for_a_folder_that_does_not_exist_yet(tmp_path):
    check = doctor.disk_check(tmp_path / "not" / "yet")
    assert check.status in ("ok", "warning")
    assert str(tmp_path) in check.detail


def test_table_shows_every_row_and_its_remedy(tmp_path):
    checks = [
        doctor.Finding(name="one", status="ok", detail="fine [bold]not markup[/bold]"),
        doctor.Finding(name="two", status="missing", detail="absent", remedy="pip install two"),
    ]
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(doctor.doctor_table(checks))
    text = console.export_text()
    assert "fine [bold]not markup[/bold]" in text
    assert "→ pip install two" in text


@pytest.mark.parametrize(
    "error", ["ImportError('no libcudart.so')", "OSError(2, 'gone')", "RuntimeError('')"]
)
def test_package_that_raises_on_import_becomes_its_row(tmp_path, monkeypatch, error):
    (tmp_path / "brokenpackage.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.package_check("brokenpackage", remedy="reinstall it", purpose="tests")
    assert check.status == "missing"
    assert "cannot be imported" in check.detail
    assert error.split("(")[0].replace("OSError", "FileNotFoundError") in check.detail
    assert check.remedy == "reinstall it"


def test_absent_package_is_not_called_broken():
    check = doctor.package_check("nosuchpackage", remedy="pip install it", purpose="tests")
    assert check.status == "missing"
    assert check.detail == "not installed (used for tests)"


def test_broken_torch_is_one_row(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cuda.so: cannot open shared object file')\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    checks = doctor.torch_checks()
    assert [check.status for check in checks] == ["missing"]
    assert "libtorch_cuda.so" in checks[0].detail
    assert checks[0].required


def fake_torch(version: str, *, devices: int = 0) -> types.SimpleNamespace:
    device = types.SimpleNamespace(name="NVIDIA H200", total_memory=140 << 30)
    return types.SimpleNamespace(
        __version__=version,
        version=types.SimpleNamespace(cuda=None),
        get_num_threads=lambda: 4,
        distributed=types.SimpleNamespace(is_available=lambda: False),
        cuda=types.SimpleNamespace(device_count=lambda: devices, get_device_properties=lambda index: device),
    )


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.9.1", "missing"), ("2.10.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0.0a0+git12", "ok")],
)
def test_torch_older_than_2_8_is_told(monkeypatch, version, status):
    monkeypatch.setattr(doctor, "load", lambda module: (fake_torch(version), version))
    torch = doctor.torch_checks()[0]
    assert torch.status == status
    assert ("2.10" in torch.remedy) == (status == "missing")


def test_driver_without_cuda_build_is_a_warning(tmp_path):
    driver = tmp_path / "version"
    assert doctor.device_check(fake_torch("2.9.0"), driver).status == "ok"
    driver.write_text("NVRM version")
    check = doctor.device_check(fake_torch("2.9.0"), driver)
    assert check.status == "warning"
    assert "CUDA build" in check.remedy


def test_devices_are_named():
    check = doctor.device_check(fake_torch("2.9.0", devices=2))
    assert check.detail == "2: NVIDIA H200 (140 GiB), NVIDIA H200 (140 GiB)"


def test_no_slurm(path_of_commands):
    assert doctor.slurm_check().status == "missing"


def test_slurm_that_answers(path_of_commands):
    path_of_commands("sbatch", "echo slurm 22.05.8")
    path_of_commands("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    check = doctor.slurm_check()
    assert check.status == "ok"
    assert check.detail == "slurm 22.05.8; Slurmctld(primary) at head is UP"


@pytest.mark.parametrize(
    "scontrol",
    ["echo 'Slurmctld(primary) at head is DOWN'", "exit 1", "printf '\\377\\376'", "exec sleep 60"],
)
def test_slurm_that_does_not_answer(path_of_commands, monkeypatch, scontrol):
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.2)
    path_of_commands("sbatch", "echo slurm 22.05.8")
    path_of_commands("scontrol", scontrol.replace("sleep", "/bin/sleep"))
    check = doctor.slurm_check()
    assert check.status == "warning"
    assert "scontrol ping" in check.remedy


def test_cpu_quota_of_a_container(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    check = doctor.cpu_check(quota)
    assert check.status == "warning"
    assert "limited to 0.5" in check.detail
    assert "1 workers" in check.remedy
    quota.write_text("max 100000\n")
    assert doctor.cpu_check(quota).status == "ok"


def test_memory_limit_of_a_container(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   8388608 kB\n")
    assert doctor.memory_check(meminfo, limit) == doctor.Finding(
        name="memory", status="ok", detail="8.0 GiB free of 16.0 GiB"
    )
    limit.write_text("1073741824\n")
    check = doctor.memory_check(meminfo, limit)
    assert check.status == "warning"
    assert "at most 1.0 GiB" in check.detail
    assert doctor.memory_check(tmp_path / "none", limit).status == "warning"


def test_python_versions():
    assert doctor.python_check((3, 10)).status == "missing"
    assert doctor.python_check((3, 11)).status == "ok"
    assert doctor.python_check((3, 13)).status == "ok"
    assert doctor.python_check((3, 14)).status == "warning"


def test_malloc_hint_names_every_setting(monkeypatch):
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    hint = doctor.malloc_check()
    if "glibc" not in hint.detail:
        assert all(name in hint.remedy for name in MALLOC_SETTINGS)
        for name, value in MALLOC_SETTINGS.items():
            monkeypatch.setenv(name, value)
        assert doctor.malloc_check().detail == "pinned in this shell"


def test_no_shared_memory_folder_is_a_row():
    assert doctor.shared_memory_check(Path("/no/such/folder")).status == "warning"
