"""docs/python.md, run as one script that has no main guard."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_training import make_dataset
from torch import nn

from cluster.errors import UserError
from pipeline import api
from pipeline.data.evaluation import Preprocessing
from pipeline.trunks.files import Pixels, TrunkSpec, save_trunk

ROOT = Path(__file__).parents[2]
SCRIPT = 'open("begun", "a").write(__name__ + "\\n")\n'


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What the page takes for granted: two datasets, a trunk, two pictures."""
    make_dataset(tmp_path / "out")
    make_dataset(tmp_path / "more", images=24, seed=1)
    (tmp_path / "out" / "data").rename(tmp_path / "out" / "photos")
    (tmp_path / "more" / "data").rename(tmp_path / "out" / "test")
    view = Preprocessing(image_size=4, resize=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    spec = TrunkSpec(architecture=Pixels(name="pixels"), preprocessing=view, feature_dim=48)
    save_trunk(nn.Flatten(), spec, tmp_path / "out" / "trunk")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.jpg")
    Image.fromarray(pixels[:20]).save(tmp_path / "dog.png")
    return tmp_path


@pytest.mark.parametrize("path", [str, Path])
def test_runs_are_named_by_strings_and_paths(tmp_path: Path, path: type[str | Path]) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "status.json").touch()
    assert [run.path.name for run in api.list_runs(path(tmp_path / "runs"))] == ["one"]
    with pytest.raises(UserError, match=r"one/metrics.jsonl cannot be read: No such file"):
        api.read_metrics(path(tmp_path / "runs" / "one"))


@pytest.mark.slow
def test_the_page_runs_as_one_script_once_whatever_processes_it_starts(here: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 9
    script = here / "script.py"
    script.write_text(SCRIPT + "".join(blocks))
    finished = subprocess.run(
        [sys.executable, script],
        cwd=here,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert (here / "begun").read_text() == "__main__\n"
    assert re.search(r"^top-1 \d+\.\d%, between", finished.stdout, re.MULTILINE)
    assert (here / "out" / "features.parquet").is_file()
