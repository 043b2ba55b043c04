"""T3 of a fine-tuning: mixed images, averaged weights and statistics, and what is tested at the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from test_loop import rows, same_tensors, wait_for_step
from tiny_classification import MIXED, recipe_of
from tiny_training import make_dataset

from pipeline.checkpoint.files import latest, read_tensors
from pipeline.recipe import transfer
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loop import pretrain

STEPS = 15


def finetune(recipe: PretrainRecipe, folder: Path) -> None:
    """In a child of its own, whose threads are then as few as those of the other runs."""
    torch.set_num_threads(1)
    pretrain(recipe, folder)


@pytest.mark.slow
def test_T3_a_fine_tuning_that_is_killed_again_and_again_equals_one_that_was_not(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    recipe = recipe_of(
        data, MIXED, optim__head_first=0.3, train={"steps": STEPS}, run__checkpoint_every_steps=3
    )
    recipe = recipe.model_copy(update={"test": transfer.Test(root=str(data))})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes = multiprocessing.get_context(
        "fork"
    )  # torch is imported: an attempt costs no more than its steps

    def start(folder: Path) -> multiprocessing.process.BaseProcess:
        attempt = processes.Process(target=finetune, args=(recipe, folder))
        attempt.start()
        return attempt

    quiet = start(whole)
    quiet.join(120)
    assert quiet.exitcode == 0

    random.seed(seed := int(os.environ.get("T3_SEED", time.time_ns() % 10_000)))
    print(f"T3_SEED={seed}")
    step = (
        1  # the first blow before any checkpoint, one while the average follows, one when all steps are done
    )
    for after in (6, STEPS, None):
        attempt = start(broken)
        wait_for_step(broken, step)
        time.sleep(random.uniform(0, 0.05))
        attempt.kill()
        attempt.join(30)
        if after is not None:
            (broken / "progress.json").unlink()
            step = after
    last = start(broken)
    last.join(120)
    assert last.exitcode == 0

    assert len(rows(whole)) == STEPS
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert same_tensors(whole, broken)
    checkpoint = latest(broken)
    assert checkpoint is not None
    averages = read_tensors(checkpoint, prefix="average.")
    assert any("running_var" in name for name in averages)
    for name in ("classifier/classifier.safetensors", "predictions.parquet", "test.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
