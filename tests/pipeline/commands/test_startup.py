"""Commands that only look start at once: what they run with is imported when it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status

LOOKING = [
    ["--help"],
    ["dag", "--help"],
    ["status"],
    ["list"],
    ["schedule", "list"],
    ["evaluate", "one", "stages.knn.recipe.kk=1"],  # refused where its graph is read
    ["dag", "demo", "--plan", "--picture", "plan.svg", "stages.photographs.recipe.images=pictures"],
    ["dag", "evals", "stages.train.kind=nothing"],
    ["serve", "--folder", "nothing"],
]
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from pipeline.cli import app

for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, words)
    slow = [name for name in ("torch", "pyarrow", "matplotlib", "ray") if name in sys.modules]
    print(json.dumps([words, result.exit_code, slow, result.output]))
"""


RANK = """
import gc, sys
from cluster.job import import_function

import_function("pipeline.train.loop:run_pretrain")
print(*(name for name in ("scipy", "sklearn", "matplotlib", "tensorboard", "ray") if name in sys.modules))
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with pictures, and a run that has saved a checkpoint."""
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "pictures" / "black.png")
    run = RunFolder.create(tmp_path / "runs" / "one")
    run.write_status(
        Status(state=State.COMPLETED, name="one", executor="local", id="1", ranks=1, attempt=1, submitted=0.0)
    )
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run.path / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.slow
def test_looking_imports_no_torch_pyarrow_matplotlib_or_ray(here: Path) -> None:
    root = Path(__file__).parents[3]
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(root)!r})\n{SCRIPT}",
            json.dumps(LOOKING),
        ],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [words for words, *_ in told] == LOOKING
    assert {tuple(slow) for _, _, slow, _ in told} == {()}, told
    assert [code for _, code, _, _ in told] == [0, 0, 0, 0, 0, 2, 0, 2, 2]
    assert told[5][3].startswith("submit: recipe of stage knn: 'kk' is not a key of the recipe; ")
    assert "report" in told[6][3] and "missing" in told[6][3]
    picture = ElementTree.parse(here / "plan.svg")
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    stages = len(told[6][3].splitlines()) - 1
    assert {"photographs", "report"} < set(words)
    assert words.count("missing") == stages + 1  # the legend says it, too
    assert "there is no kind 'nothing'" in told[7][3]


@pytest.mark.slow
def test_a_rank_imports_what_every_training_needs_and_keeps_it_from_the_garbage_collector() -> None:
    finished = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == ["", "True True"]


@pytest.mark.parametrize(
    ("program", "begun", "known"), [("submit", "pre", "preflight"), ("ingest", "ver", "verify")]
)
def test_shells_complete_commands(program: str, begun: str, known: str) -> None:
    asked = {
        f"_{program.upper()}_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{program} {begun}",
        "COMP_CWORD": "1",
    }
    command = [str(Path(sys.executable).parent / program)]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert known in done.stdout.split()
