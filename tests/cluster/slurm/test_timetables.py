"""Timetables: what is written into scrontab, and what is refused. SLURM's commands are small scripts."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.site import CpuJobs, Site
from cluster.slurm.schedule import Schedule, fire, install, installed, remove

SCRONTAB = """#!/bin/sh
case "$1" in
  -l) if [ -s "$TABLE" ]; then cat "$TABLE"; else echo "no crontab for me"; exit 1; fi ;;
  -) cat > "$TABLE" ;;
esac
"""
SBATCH = '#!/bin/sh\necho "$@" >> "$TABLE.sbatch"\necho 7\n'
OTHERS = "# mine\n0 1 * * * backup\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scrontab", SCRONTAB), ("sbatch", SBATCH), ("squeue", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("TABLE", str(tmp_path / "table"))
    return tmp_path / "table"


def test_an_entry_comes_and_goes_and_leaves_the_others_alone(table: Path, tmp_path: Path) -> None:
    table.write_text(OTHERS)
    command = ["echo", "a b; rm -rf /"]
    made = install(tmp_path / "s", "nightly", "0  2 * * *", command, Site(partition="gpu"))
    assert (made.fired_by, made.every) == ("scrontab", "0 2 * * *")
    install(tmp_path / "s", "other", "0 3 * * *", command, Site())
    lines = table.read_text().splitlines()
    assert lines[:2] == OTHERS.splitlines()
    assert "#SCRON --partition=gpu" in lines
    (entry,) = [line for line in lines if line.startswith("0 2 * * * ")]
    script = tmp_path / "s" / "nightly.sbatch"
    assert entry.endswith(f"bash {script}")
    assert script.read_text().endswith(f"-m cluster.slurm.schedule {tmp_path / 's' / 'nightly.json'}\n")
    assert [schedule.name for schedule in installed(tmp_path / "s")] == ["nightly", "other"]

    # Again, at another time, and where jobs without GPUs go.
    cpu = CpuJobs(partition="cpu", memory_gb=4)
    install(tmp_path / "s", "nightly", "0 4 * * *", command, Site(partition="gpu", cpu=cpu))
    assert {"#SCRON --partition=cpu", "#SCRON --mem=4G", "#SCRON --time=60"} <= {
        *table.read_text().split("\n")
    }
    assert "0 2 * * * " not in table.read_text()
    remove(tmp_path / "s", "nightly")
    assert "nightly" not in table.read_text()
    assert "other" in table.read_text()
    remove(tmp_path / "s", "other")
    assert table.read_text() == OTHERS


def test_a_first_entry_needs_no_table(table: Path, tmp_path: Path) -> None:
    assert install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], Site()).fired_by == "scrontab"


def test_a_firing_has_the_site_s_modules_environment_and_options(table: Path, tmp_path: Path) -> None:
    site = Site(
        modules=("cuda",), environment={"A": "b c"}, sbatch={"nice": 0, "exclusive": True, "x": False}
    )
    install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], site)
    lines = (tmp_path / "s" / "nightly.sbatch").read_text().splitlines()
    assert {"module load cuda || setup_failed 'module load cuda'", "export A='b c'", "#SBATCH --nice=0"} <= {
        *lines
    }
    assert {"#SBATCH --requeue", "#SBATCH --exclusive"} <= {*lines}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "s").glob("nightly.s*")} == {0o600}
    assert not [line for line in lines if "--x" in line]


@pytest.mark.parametrize("tool", ["scrontab", "sbatch"])
def test_what_is_refused_leaves_no_schedule(table: Path, tmp_path: Path, tool: str) -> None:
    if tool == "sbatch":
        (tmp_path / "bin" / "scrontab").unlink()
    refuses = "#!/bin/sh\n[ \"$1\" = -l ] && echo 'no crontab for me'\nexit 1\n"
    (tmp_path / "bin" / tool).write_text(refuses)
    with pytest.raises(UserError, match="refused"):
        install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], Site())
    assert installed(tmp_path / "s") == []
    assert list((tmp_path / "s").iterdir()) == []


def test_a_replacement_with_a_mistake_leaves_the_old_schedule(table: Path, tmp_path: Path) -> None:
    install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], Site())
    with pytest.raises(UserError, match="line break"):
        install(tmp_path / "s", "nightly", "0 3 * * *", ["a\nb"], Site())
    assert [schedule.every for schedule in installed(tmp_path / "s")] == ["0 2 * * *"]


def test_a_table_that_cannot_be_read_is_not_written_over(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], Site())
    before = table.read_text()
    (tmp_path / "bin" / "scrontab").write_text("#!/bin/sh\necho 'scrontab is disabled' >&2; exit 1\n")
    with pytest.raises(UserError, match="does not show its entries"):
        remove(tmp_path / "s", "nightly")
    assert table.read_text() == before
    assert [schedule.name for schedule in installed(tmp_path / "s")] == ["nightly"]


def test_without_scrontab_the_next_firing_is_queued_before_the_command_runs(
    table: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "scrontab").unlink()
    queued = Path(f"{table}.sbatch")
    command = [sys.executable, "-c", f"import sys; sys.exit(len(open({str(queued)!r}).readlines()))"]
    assert install(tmp_path / "s", "nightly", "0 2 * * *", command, Site()).fired_by == "sbatch"
    assert "T02:00:00" in queued.read_text()
    assert fire(tmp_path / "s" / "nightly.json") == 2  # its own firing, and the next one
    remove(tmp_path / "s", "nightly")
    assert fire(tmp_path / "s" / "nightly.json") == 0


@pytest.mark.parametrize("every", ["never", "0 2 * *", "* * * * * *", "61 2 * * *", "0 2 *\n* * * *"])
def test_a_time_that_is_none_is_refused(table: Path, tmp_path: Path, every: str) -> None:
    with pytest.raises(UserError, match="is no time of cron"):
        install(tmp_path / "s", "nightly", every, ["true"], Site())
    assert not (tmp_path / "s").exists()


def test_S1_no_line_break_gets_into_a_script_or_a_table(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line break"):
        hostile = Site.model_construct(partition="a\u2028touch pwned")
        install(tmp_path / "s", "nightly", "0 2 * * *", ["true"], hostile)
    with pytest.raises(UserError, match="line break"):
        install(tmp_path / "s", "nightly", "0 2 * * *", ["echo", "a\x85b"], Site())
    assert not table.exists()
    with pytest.raises(UserError, match="cannot name a schedule"):
        install(tmp_path / "s", "a/../b", "0 2 * * *", ["true"], Site())


def test_the_next_firing_is_strictly_later() -> None:
    schedule = Schedule(name="n", every="0 2 * * *", command=(), directory="", fired_by="sbatch")
    assert schedule.next(datetime(2026, 1, 31, 2, 0)) == datetime(2026, 2, 1, 2, 0)
    assert schedule.next(datetime(2026, 1, 31, 1, 59)) == datetime(2026, 1, 31, 2, 0)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "nightly"}'])
def test_a_damaged_schedule_hides_no_other_and_can_be_removed(
    table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for name in ("nightly", "other"):
        install(tmp_path / "s", name, "0 2 * * *", ["true"], Site())
    (tmp_path / "s" / "nightly.json").write_text(damage)
    assert [schedule.name for schedule in installed(tmp_path / "s")] == ["other"]
    assert "nightly.json is damaged" in caplog.text
    assert "`submit schedule remove nightly`" in caplog.text
    remove(tmp_path / "s", "nightly")
    assert "nightly" not in table.read_text()
    assert "other" in table.read_text()


def test_a_firing_whose_site_is_damaged_runs_and_says_how_to_mend_it(table: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "scrontab").unlink()
    install(tmp_path / "s", "nightly", "0 2 * * *", ["touch", str(tmp_path / "ran")], Site())
    (tmp_path / "s" / "nightly.site.json").write_text("{")
    with pytest.raises(UserError, match=r"nightly\.site\.json is damaged: .*schedule remove nightly"):
        fire(tmp_path / "s" / "nightly.json")
    assert (tmp_path / "ran").exists()
