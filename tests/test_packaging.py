"""What is installed works outside of the clone, and installing leaves nothing in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("cluster", "configs", "ingest", "pipeline")


def files_of(folder: Path) -> set[str]:
    """All that is there but what Python and tests leave behind."""
    found = (path for floor in FLOORS for path in (folder / floor).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found if path.suffix not in {".pyc", ".nbi", ".nbc"}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("wheel")
    beside = set(ROOT.iterdir())
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in set(ROOT.iterdir()) - beside} == set()
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_has_every_recipe_page_and_module(installed: Path) -> None:
    assert files_of(installed) == files_of(ROOT)
    assert list(installed.glob("*.dist-info/licenses/pipeline/hashtags/WORDNET-LICENSE.txt"))


def test_commands_find_their_recipes_where_they_are_installed(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = "import pipeline; print(pipeline.__file__)"
    run = [sys.executable, "-P", "-c", where]
    told = subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.startswith(str(installed))
    words = [sys.executable, "-P", "-m", "pipeline.cli", "dag", "demo", "--plan"]
    plan = subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "pretrain" in plan.stdout
