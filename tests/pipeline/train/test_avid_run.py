"""AVID and CMA through the real loop: killed, on other ranks, one after the other."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tiny_training import make_values

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import latest, newest_first
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train import loop
from pipeline.train.guard import Diverged, running_statistics
from pipeline.train.loop import train
from pipeline.train.setup import Training, set_up
from tests.clips import clip_bytes
from tests.pipeline.data.clip.clip_datasets import SMALL, seal_clips

Ranks = Callable[..., list[Any]]
Tensors = dict[str, NDArray[Any]]

SAMPLES, STEPS = 26, 8
CMA = {"positives": 2, "within_negatives": 4, "refresh_epochs": 1, "least_agreement": 0.0}


class Never:
    requested = False


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [clip_bytes(n, seconds=0.75, size=(32, 24), rate=8000) for n in range(SAMPLES)]
    return seal_clips(tmp_path_factory.mktemp("clips") / "data", [files[:13], files[13:]])


def recipe_of(data: Path, *, cma: dict[str, Any] | None = None, **train: Any) -> PretrainRecipe:
    """Two epochs of four batches of six; positives are sought at steps 0 and 4."""
    values = make_values(data, data__batch_size=6, run__checkpoint_every_steps=3)
    del values["data"]["crops"]
    values["data"] |= SMALL
    head = {"hidden": [8], "output": 8, "batch_norm": False}
    return PretrainRecipe.model_validate(
        values
        | {
            "trunk": {"name": "r2plus1d_10", "width": 2},
            "audio_trunk": {"name": "conv2d_10", "width": 2},
            "method": {"name": "avid", "head": head, "negatives": 8, "cma": cma},
            "optim": {"name": "adam", "lr": 1e-3, "schedule": "constant"},
            "train": {"steps": STEPS} | train,
        }
    )


def prepare(group: dist.ProcessGroup | None, recipe: PretrainRecipe, folder: Path) -> Training:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    device = torch.device("cpu")
    world = World(rank=rank, size=size, local_rank=rank, device=device, group=group, control=group)
    return set_up(recipe, folder, world)


def tensors(t: Training) -> Tensors:
    shown = {}
    for name, tensor in named_tensors(t.method):
        shown[name] = whole(tensor.detach(), tensor).numpy().copy()
        for key, value in t.optimizer.state.get(tensor, {}).items():
            shown[f"{name}/{key}"] = whole(value, tensor).numpy().copy()
    return shown


def _run(
    group: dist.ProcessGroup | None, recipe: PretrainRecipe, folder: Path, *, until: int = STEPS
) -> Tensors:
    t = prepare(group, recipe, folder)
    train(replace(t, total_steps=until), Never())  # type: ignore[arg-type]
    if t.metrics is not None:
        t.metrics.close()
    return tensors(t)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed_at(step: int, recipe: PretrainRecipe, folder: Path) -> None:
    """A process that trains and is killed, without a word, when it begins a step."""
    child = os.fork()
    if not child:
        t = prepare(None, recipe, folder)
        forward = t.method.forward

        def die(inputs: Any, number: int) -> Any:
            if number == step:
                t.checkpoints.finish()
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(inputs, number)

        t.method.forward = die  # type: ignore[method-assign]
        train(t, Never())  # type: ignore[arg-type]
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
def test_T3_avid_and_cma_go_on_bit_for_bit_after_kills(data: Path, tmp_path: Path) -> None:
    """Killed before and after positives are sought anew; what they are is read, and not sought again."""
    recipe = recipe_of(data, cma=CMA)
    at_once = _run(None, recipe, tmp_path / "whole")
    for step in (2, 4, 7):
        killed_at(step, recipe, tmp_path / "killed")
    resumed = prepare(None, recipe, tmp_path / "killed")
    assert resumed.step == 6 and resumed.positives is not None
    before = resumed.positives.state()
    assert before is not None and before.startswith("step-00000004-")
    assert resumed.method.positives is not None
    train(resumed, Never())  # type: ignore[arg-type]
    assert resumed.positives.state() == before
    found = tensors(resumed)
    assert found.keys() == at_once.keys() and "bank.rows" in found
    for name, value in at_once.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    last = rows(tmp_path / "whole")[-1]
    health = {"pair_cosine", "random_cosine_across", "bank_agreement", "positives_mutual", "positives_kept"}
    assert health | {"cross", "agreeing"} <= last.keys() and 0 < last["positives_kept"] <= 1
    # Those of step 0 are named by the checkpoint of step 3 no longer, which only the next search would see.
    assert len(list((tmp_path / "whole" / "positives").iterdir())) == 2
    assert all(each is not resumed.method.bank.rows for each in running_statistics(resumed.method))


def _cases(
    group: dist.ProcessGroup | None, cases: dict[str, tuple[PretrainRecipe, Path, int]]
) -> dict[str, Tensors]:
    return {name: _run(group, recipe, folder, until=until) for name, (recipe, folder, until) in cases.items()}


@pytest.mark.slow
def test_T3_a_bank_of_two_ranks_goes_on_on_three_and_on_one(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    """In float64, up to the order in which gradients are added up; the bank is rounded to float32."""
    recipes = {
        strategy: recipe_of(data, cma=CMA, strategy=strategy, precision="fp64")
        for strategy in ("ddp", "fsdp2")
    }
    expected = _run(None, recipes["ddp"], tmp_path / "whole")
    run_on_ranks(2, _cases, {name: (each, tmp_path / name, 5) for name, each in recipes.items()})
    found = {"replicas on one": _run(None, recipes["ddp"], tmp_path / "ddp")}
    on_three = {"shards on three": (recipes["fsdp2"], tmp_path / "fsdp2", STEPS)}
    found |= run_on_ranks(3, _cases, on_three)[0]
    for case, values in found.items():
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-7, err_msg=f"{case}: {name}")


def _rolled_back(
    group: dist.ProcessGroup | None, recipe: PretrainRecipe, folder: Path
) -> tuple[Tensors, Tensors]:
    """All that there is to see where the guard goes back, after three broken batches, and at the same step of
    a run without them.
    """
    found: list[Tensors] = []

    def shown(t: Training) -> Tensors:
        assert t.method.positives is not None
        return tensors(t) | {"positives": t.method.positives.numpy().copy()}

    go_back = loop.roll_back

    def watched(t: Training, failure: Diverged) -> Training:
        assert t.positives is not None and str(t.positives._name).startswith("step-00000004-")
        back = go_back(t, failure)
        assert back.step == 3
        found.append(shown(back))
        return back

    for name, until in (("disturbed", STEPS), ("calm", 3)):
        t = replace(prepare(group, recipe, folder / name), total_steps=until)
        forward = t.method.forward

        def broken(inputs: Any, step: int, forward: Any = forward) -> Any:
            terms = forward(inputs, step)
            return terms | {"loss": terms["loss"] * float("nan")} if inputs.number in (4, 5, 6) else terms

        t.method.forward = broken  # type: ignore[method-assign]
        with patch.object(loop, "roll_back", watched):
            train(t, Never())  # type: ignore[arg-type]
        if t.metrics is not None:
            t.metrics.close()
    return found[0], shown(t)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_T3_a_run_that_goes_back_has_the_bank_and_the_positives_of_then(
    data: Path, tmp_path: Path, run_on_ranks: Ranks, ranks: int
) -> None:
    """Though positives were sought anew behind the checkpoint, and the bank had moved on."""
    recipe = recipe_of(data, cma=CMA, strategy="ddp" if ranks == 1 else "fsdp2")
    answers = (
        [_rolled_back(None, recipe, tmp_path)]
        if ranks == 1
        else run_on_ranks(ranks, _rolled_back, recipe, tmp_path)
    )
    for back, calm in answers:
        assert back.keys() == calm.keys() and {"bank.rows", "positives"} <= back.keys()
        for name, value in calm.items():
            np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.slow
def test_cma_begins_where_avid_has_ended(data: Path, tmp_path: Path) -> None:
    ended = _run(None, recipe_of(data), tmp_path / "avid")
    told = r"CMA cannot start: .*\(pair_cosine .*\): start from a run of AVID \(train\.init_from\)"
    with pytest.raises(UserError, match=told):
        _run(None, recipe_of(data, cma=CMA | {"least_agreement": 50.0}), tmp_path / "refused")
    recipe = recipe_of(data, cma=CMA, init_from=str(tmp_path / "avid"))
    t = prepare(None, recipe, tmp_path / "cma")
    begun = tensors(t)
    for name, value in begun.items():
        np.testing.assert_array_equal(value, ended[name], err_msg=name)
    assert "normaliser" in begun and begun["normaliser"] > 0
    train(t, Never())  # type: ignore[arg-type]
    assert tensors(t)["normaliser"] == ended["normaliser"]
    noted = json.loads((tmp_path / "cma" / "init_from.json").read_text())
    assert noted["path"] == str(latest(tmp_path / "avid") / "manifest.json")  # type: ignore[operator]


@pytest.mark.slow
def test_a_bank_of_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    _run(None, recipe_of(data, steps=1), tmp_path / "avid")
    files = [clip_bytes(n, seconds=0.75, size=(32, 24), rate=8000) for n in range(12)]
    other = seal_clips(tmp_path / "other", [files])
    with pytest.raises(
        UserError, match=r"the bank of .* is of data with root .*; train AVID on this one first"
    ):
        prepare(None, recipe_of(other, cma=CMA, init_from=str(tmp_path / "avid")), tmp_path / "run")
    wider = recipe_of(data, init_from=str(tmp_path / "avid"))
    wider = wider.model_copy(update={"trunk": wider.trunk.model_copy(update={"width": 4})})
    with pytest.raises(
        UserError, match=r"was saved by another model: trunk\.conv1\.weight is \(2, 3, 3, 7, 7\)"
    ):
        prepare(None, wider, tmp_path / "wider")


def test_positives_that_are_gone_are_told(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, cma=CMA)
    _run(None, recipe, tmp_path / "run", until=3)
    assert newest_first(tmp_path / "run" / "checkpoints")
    file = next((tmp_path / "run" / "positives").glob("*/rows-*.npy"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"the positives in .* cannot be read .*not as it was written"):
        prepare(None, recipe, tmp_path / "run")
