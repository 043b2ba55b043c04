"""A run that keeps its images on the device trains as one that reads them."""

import shutil
from pathlib import Path

import pytest
from test_loop import rows, same_tensors
from tiny_training import make_dataset, make_recipe

from pipeline.checkpoint.files import newest_first
from pipeline.train.loop import pretrain

CROPS = [{"count": 2, "size": 24, "scale": [0.3, 1.0]}, {"count": 1, "size": 8, "scale": [0.1, 0.3]}]


def test_T3_a_run_may_go_on_with_resident_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, streamed, changed = make_dataset(tmp_path), tmp_path / "streamed", tmp_path / "changed"
    changes = {"train__steps": 10, "run__keep_last": 5, "data__crops": CROPS}
    pretrain(make_recipe(data, **changes), streamed)
    shutil.copytree(streamed, changed)
    shutil.rmtree(newest_first(changed / "checkpoints")[0])
    with caplog.at_level("INFO", "pipeline.data.resident"):
        pretrain(make_recipe(data, **changes, run__resident=True), changed)
    assert "96 images of 32 x 32 are decoded on cpu" in caplog.text
    assert rows(changed) == rows(streamed)
    assert len(rows(changed)) == 10
    assert same_tensors(changed, streamed)
