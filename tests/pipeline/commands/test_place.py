"""Where a training goes that is typed on a login node. SLURM's commands are scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import Result
from tiny_training import make_values
from typer.testing import CliRunner

from pipeline.cli import app

SINFO = """#!/bin/sh
if [ -f "$ANSWERS/down" ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi
echo 'gpu*|64|96|1031000|gpu:h100:8|2-00:00:00|EXCLUSIVE|REQUEUE|(null)'
"""


@pytest.fixture(autouse=True)
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"sinfo": SINFO, "sbatch": "#!/bin/sh\nexit 1\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(make_values(tmp_path / "data", data__batch_size=7936))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tools}:/bin")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    monkeypatch.setenv("SUBMIT_CLUSTER", "default")
    return tmp_path


def pretrain(*words: str) -> Result:
    command = ["pretrain", "--recipe", "recipe.yaml", "--run", "a", "run.device=auto", "--dry-run", *words]
    return CliRunner().invoke(app, command)


def test_without_a_site_file_nodes_are_as_slurm_says_and_that_is_said() -> None:
    done = pretrain("--nodes", "62")
    assert done.exit_code == 0, done.output
    asked = {"nodes=62", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=0"}
    assert {f"#SBATCH --{option}" for option in asked} <= {*done.stdout.splitlines()}
    assert "gpus_per_node 8, cpus_per_rank 12, memory_gb 0: the site file does not say" in done.stderr
    fewer = pretrain("--nodes", "64")
    assert (fewer.exit_code, "use --nodes 62 or 124, or" in fewer.stderr) == (2, True)


def test_where_slurm_is_silent_nothing_is_guessed_and_where_there_is_none_it_is_this_machine(
    login_node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (login_node / "down").touch()
    silent = pretrain("--nodes", "62")
    assert (silent.exit_code, "or run on this machine by --executor local" in silent.stderr) == (2, True)
    monkeypatch.setenv("PATH", str(login_node / "nothing"))
    assert "on this machine (there is no SLURM here): 1 rank" in pretrain().stdout
    assert "(there is no SLURM here)" not in pretrain("--executor", "local").stdout
