"""Checkpoints: exact, whole or absent, for any number of ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from cluster.run.folder import RunFolder
from cluster.run.restarts import set_aside
from pipeline.checkpoint import checkpoints as checkpoints_module
from pipeline.checkpoint import writer
from pipeline.checkpoint.checkpoints import Checkpoints, collect
from pipeline.checkpoint.files import broken_file, latest, newest_first, read_tensors, step_of
from pipeline.checkpoint.metadata import TensorReader
from pipeline.checkpoint.period import young_daly
from tests.full_disk import files_end_at

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not there now will not be there later either."""
    monkeypatch.setattr("pipeline.checkpoint.files.WAITS", (0.0, 0.0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the ranks of the other processes have: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """A convolution (channels_last), a norm with buffers, a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.unused = nn.Parameter(torch.zeros(2))


def make(seed: int, optimizer: str = "sgd") -> tuple[Small, Optimizer]:
    torch.manual_seed(seed)
    method = Small().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = method.parameters()
    if optimizer == "adamw":
        return method, torch.optim.AdamW(parameters, lr=0.1)
    return method, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def advance(method: Small, optimizer: Optimizer, steps: int, *, seed: int = 7) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        method.trunk(images).square().sum().backward()
        optimizer.step()


def checkpoints(
    folder: Path, method: nn.Module, optimizer: Optimizer, *, world: World = ALONE, **changes: Any
) -> Checkpoints:
    settings: dict[str, Any] = {
        "minutes": 10.0,
        "failures_per_node_day": 0.0065,
        "nodes": 1,
        "every_steps": None,
        "keep_last": 2,
        "keep_every_steps": None,
        "start_over": False,
    }
    return Checkpoints(folder, world=world, method=method, optimizer=optimizer, **settings | changes)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_T3_a_loaded_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, optimizer: str) -> None:
    method, optim = make(1, optimizer)
    advance(method, optim, 3)
    checkpoints(tmp_path, method, optim).save(3, {"loader": {"step": 3}})
    advance(method, optim, 3)

    again, optim_again = make(2, optimizer)
    state = checkpoints(tmp_path, again, optim_again).load()
    assert state == {"step": 3, "loader": {"step": 3}}
    weight = again.get_parameter("trunk.0.weight")
    kept = [v for v in optim_again.state[weight].values() if v.shape == weight.shape]
    assert kept and all(value.stride() == weight.stride() for value in kept)
    advance(again, optim_again, 3)
    assert same(method, again)


@patch.object(checkpoints_module, "WORTH_A_FILE", 1)
def _save_and_load(group: dist.ProcessGroup | None, folder: Path, seed: int, save: bool) -> Any:
    """On every rank of a group, each with its file: save after some steps, or load and go on."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    world = World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )
    method, optimizer = make(seed)
    if save:
        advance(method, optimizer, 1)
        saving = checkpoints(folder, method, optimizer, world=world)
        saving.save(1, {})
        advance(method, optimizer, 2)
        saving.save(3, {})
    else:
        assert checkpoints(folder, method, optimizer, world=world).load() == {"step": 3}
    advance(method, optimizer, 2)
    return [value.numpy() for value in method.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_T3_a_run_saved_on_n_ranks_goes_on_with_m(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]], before: int, after: int
) -> None:
    expected = run_on_ranks(before, _save_and_load, tmp_path, 1, True)[0]
    assert broken_file(newest_first(tmp_path / "checkpoints")[0]) is None
    for found in run_on_ranks(after, _save_and_load, tmp_path, 2, False):
        assert all((a == b).all() for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(("worth", "files"), [(1, 3), (200, 2), (64 << 20, 1)])
def test_whole_tensors_are_dealt_out_to_as_many_ranks_as_have_a_file_that_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, worth: int, files: int
) -> None:
    monkeypatch.setattr(checkpoints_module, "WORTH_A_FILE", worth)
    method, optimizer = make(1)  # 512 bytes, the first tensor 432
    cpu = torch.device("cpu")
    worlds = [World(rank=r, size=3, local_rank=r, device=cpu, group=None, control=None) for r in range(3)]
    parts = [dict(collect(method, optimizer, world=world)) for world in worlds]
    assert sum(bool(part) for part in parts) == files
    assert sorted(name for part in parts for name in part) == sorted(
        f"method.{name}" for name in method.state_dict()
    )


def _read_whole_tensors(group: dist.ProcessGroup, saved: Path) -> Any:
    """The tensors of a checkpoint, as they come to this rank, and the names of those that it has read."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    world = World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )
    reader, read = TensorReader(saved), list[str]()
    load = reader.load

    def note(into: dict[str, torch.Tensor]) -> None:
        read.extend(into)
        load(into)

    reader.load = note  # type: ignore[assignment, method-assign]
    dealt = checkpoints(saved.parent, *make(1), world=world)._deal_out(reader, sorted(reader.tensors))
    return read, {name: tensor.numpy() for name, tensor in dealt}


@pytest.mark.slow
def test_what_no_rank_has_a_piece_of_is_read_once_for_all(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    method, optimizer = make(1)
    advance(method, optimizer, 1)
    saved = checkpoints(tmp_path, method, optimizer).save(1, {})
    names = sorted(TensorReader(saved).tensors)
    expected = read_tensors(saved, prefix="")
    answers = run_on_ranks(3, _read_whole_tensors, saved)
    assert sorted(name for read, _ in answers for name in read) == names
    for _, found in answers:
        assert sorted(found) == names
        assert all((found[f"method.{name}"] == value.numpy()).all() for name, value in expected.items())


def test_it_is_planned_once_what_lies_where_until_there_are_other_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    plan = writer._Planner._create_global_plan

    def count(planner: writer._Planner, plans: Any) -> Any:
        planned.append(plans)
        return plan(planner, plans)

    monkeypatch.setattr(writer._Planner, "_create_global_plan", count)
    method, optimizer = make(1)
    saving = checkpoints(tmp_path, method, optimizer)
    for step, plans in ((1, 1), (2, 2), (3, 2)):  # the first step makes momenta
        saving.save(step, {})
        assert len(planned) == plans
        advance(method, optimizer, 1)
    method.register_buffer("later", torch.ones(3))
    saving.save(4, {})
    assert len(planned) == 3
    again, optimizer_again = make(2)
    again.register_buffer("later", torch.zeros(3))
    assert checkpoints(tmp_path, again, optimizer_again).load() == {"step": 4}
    assert same(method, again)


def damage_flip_a_bit(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_truncate(checkpoint: Path) -> None:
    os.truncate(next(checkpoint.glob("*.distcp")), 100)


def damage_lose_a_file(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def damage_lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def damage_tear_the_manifest(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text[: len(text) // 2])


def damage_edit_the_state(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": 1}))


def damage_keep_the_pickle_from_the_manifest(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][".metadata"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_broken_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer)
    advance(method, optimizer, 1)
    kept.save(1, {})
    expected = {name: value.clone() for name, value in method.state_dict().items()}
    advance(method, optimizer, 1)
    broken = kept.save(2, {})
    damage(broken)
    with pytest.raises(UserError, match="step-00000002"):
        read_tensors(broken, prefix="")

    again, optim_again = make(2)
    with caplog.at_level(logging.WARNING):
        assert checkpoints(tmp_path, again, optim_again).load() == {"step": 1}
    assert "step-00000002 is broken" in caplog.text
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    advance(again, optim_again, 1)
    checkpoints(tmp_path, again, optim_again).save(2, {})  # the broken one is out of the way
    assert broken_file(tmp_path / "checkpoints" / "step-00000002") is None


def test_a_run_starts_over_on_the_users_word_only(tmp_path: Path) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer)
    for step in (1, 2):
        damage_flip_a_bit(kept.save(step, {}))
    for _ in range(2):  # what was set aside is remembered
        with pytest.raises(UserError, match=r"broken-step-00000002-\d+: .* run\.start_over=true"):
            checkpoints(tmp_path, method, optimizer).load()
    run = RunFolder(tmp_path)
    assert [name.rsplit("-", 1)[0] for name in set_aside(run)] == [f"broken-step-0000000{n}" for n in (1, 2)]
    assert checkpoints(tmp_path, method, optimizer, start_over=True).load() is None


def test_a_run_whose_checkpoints_are_gone_starts_over_on_the_users_word_only(tmp_path: Path) -> None:
    method, optimizer = make(1)
    shutil.rmtree(checkpoints(tmp_path, method, optimizer).save(1, {}))
    with pytest.raises(UserError, match=r"the newest is gone, which .*latest names: .* run\.start_over=true"):
        checkpoints(tmp_path, method, optimizer).load()
    assert checkpoints(tmp_path, method, optimizer, start_over=True).load() is None


def test_a_file_that_cannot_be_read_is_not_a_broken_one(tmp_path: Path) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer)
    kept.save(1, {})
    folder = kept.save(2, {})
    for name in ("state.json", "manifest.json"):
        here, away = folder / name, tmp_path / name
        here.rename(away)
        here.symlink_to("/proc/self/mem")  # which answers EIO, as a failing disk does
        with pytest.raises(UserError, match=rf"{here} cannot be read on .+ \(Input/output error\)"):
            checkpoints(tmp_path, method, optimizer).load()
        here.unlink()
        away.rename(here)
    assert checkpoints(tmp_path, method, optimizer).load() == {"step": 2}


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer)
    folder = kept.save(1, {})
    half = tmp_path / "checkpoints" / ".saving-step-00000002"
    shutil.copytree(folder, half)
    (half / "manifest.json").unlink()
    assert checkpoints(tmp_path, method, optimizer).load() == {"step": 1}
    assert not half.exists()
    assert latest(tmp_path) == folder
    assert latest(tmp_path / "nowhere") is None
    assert checkpoints(tmp_path / "nowhere", method, optimizer).load() is None


def test_the_newest_checkpoint_is_waited_for_where_another_node_saved_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS a folder's list may be a minute old."""
    method, optimizer = make(1)
    for step in (1, 2):
        checkpoints(tmp_path, method, optimizer).save(step, {})
    last, unseen = tmp_path / "checkpoints" / "step-00000002", tmp_path / "unseen"
    last.rename(unseen)
    assert checkpoints(tmp_path, method, optimizer).load() == {"step": 1}  # it does not come
    monkeypatch.setattr("cluster.shared_folder.PATIENCE", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: unseen.exists() and unseen.rename(last))
    assert checkpoints(tmp_path, method, optimizer).load() == {"step": 2}


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer, keep_last=2, keep_every_steps=4)
    for step in range(1, 8):
        kept.save(step, {})
    assert [path.name for path in newest_first(tmp_path / "checkpoints")] == [
        "step-00000007",
        "step-00000006",
        "step-00000004",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007\n"


def test_a_checkpoint_is_due_by_steps_or_by_the_first_ranks_clock(tmp_path: Path) -> None:
    method, optimizer = make(1)
    now = [0.0]
    kept = checkpoints(tmp_path, method, optimizer, minutes=1.0, every_steps=5, clock=lambda: now[0])
    assert [step for step in range(1, 11) if kept.due(step)] == [5, 10]
    now[0] = 60.0
    assert kept.due(1)
    kept.save(1, {})
    assert not kept.due(2)
    second = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"), group=None, control=None)
    now[0] = 1000.0
    assert not checkpoints(tmp_path, method, optimizer, world=second, clock=lambda: now[0]).due(2)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    method, optimizer = make(1)
    checkpoints(tmp_path, method, optimizer).save(1, {})
    other = nn.Linear(2, 2)
    with pytest.raises(UserError, match="was saved by another model"):
        checkpoints(tmp_path, other, torch.optim.SGD(other.parameters(), lr=0.1)).load()


def test_part_of_a_method_can_be_read_alone(tmp_path: Path) -> None:
    method, optimizer = make(1)
    advance(method, optimizer, 1)
    folder = checkpoints(tmp_path, method, optimizer).save(1, {})
    tensors = read_tensors(folder, prefix="trunk.")
    expected = method.trunk.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    damage_flip_a_bit(folder)
    with pytest.raises(UserError, match="is broken"):
        read_tensors(folder, prefix="trunk.")
    with pytest.raises(UserError, match="is not a checkpoint"):
        read_tensors(tmp_path, prefix="trunk.")


def test_state_that_is_no_tensor_is_not_lost_in_silence(tmp_path: Path) -> None:
    method, optimizer = make(1)
    optimizer.state[method.unused]["steps"] = 3
    with pytest.raises(TypeError, match="keeps a int as 'steps'"):
        checkpoints(tmp_path, method, optimizer).save(1, {})


def _save_behind(group: dist.ProcessGroup | None, folder: Path) -> bool:
    """On every rank: train on while a checkpoint is written; whether it holds what was saved."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    world = World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )
    method, optimizer = make(1)
    kept = checkpoints(folder, method, optimizer, world=world)
    expected = {}
    for step in (1, 2):  # the second waits for the first, and takes its place in memory
        advance(method, optimizer, 1)
        expected[step] = {name: value.clone() for name, value in method.state_dict().items()}
        kept.save(step, {}, wait=False)
        advance(method, optimizer, 1)
    kept.finish()
    world.barrier()
    return all(
        torch.equal(tensor, expected[step][f"trunk.{name}"])
        for step in (1, 2)
        for name, tensor in read_tensors(folder / "checkpoints" / f"step-{step:08d}", prefix="trunk.").items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_T3_a_checkpoint_written_in_the_background_holds_the_step_it_was_asked_at(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]], ranks: int
) -> None:
    assert all(run_on_ranks(ranks, _save_behind, tmp_path))


@patch.object(checkpoints_module, "WORTH_A_FILE", 1)
def _save_on_a_full_disk(group: dist.ProcessGroup | None, folder: Path) -> str:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    world = World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )
    method, optimizer = make(1)
    kept = checkpoints(folder, method, optimizer, world=world)
    kept.save(1, {})
    full = files_end_at(100) if rank == size - 1 else contextlib.nullcontext()
    with patch.object(checkpoints_module, "PAUSES", (0.0,)), full:
        kept.save(2, {}, wait=False)
        kept.finish()
        assert kept.news() is not None and kept.news() is None  # of the first
        try:
            kept.save(3, {})
        except UserError as error:
            told = str(error)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000001"], left
    world.barrier()
    kept.save(4, {}, wait=False)
    kept.finish()
    world.barrier()
    assert broken_file(newest_first(folder / "checkpoints")[0]) is None
    assert step_of(newest_first(folder / "checkpoints")[0]) == 4
    return told


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_costs_one_checkpoint_and_leaves_nothing_behind(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]], ranks: int
) -> None:
    for told in run_on_ranks(ranks, _save_on_a_full_disk, tmp_path):
        assert told.startswith("checkpoint of step 3 could not be saved ([Errno 27] File too large")
        assert "give the same command again" in told


def test_a_save_that_is_waited_for_is_tried_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, optimizer = make(1)
    kept = checkpoints(tmp_path, method, optimizer)
    room = contextlib.ExitStack()
    room.enter_context(files_end_at(100))
    monkeypatch.setattr("time.sleep", lambda seconds: room.close() if seconds == 15.0 else None)
    kept.save(1, {}, wait=False)
    kept.finish()
    assert latest(tmp_path) is None
    kept.save(2, {}, wait=False)  # the training waits for this one: the last is missing
    assert step_of(newest_first(tmp_path / "checkpoints")[0]) == 2


def test_a_checkpoint_that_failed_is_due_again_soon(tmp_path: Path) -> None:
    method, optimizer = make(1)
    now = [0.0]
    kept = checkpoints(tmp_path, method, optimizer, minutes=60.0, clock=lambda: now[0])
    with files_end_at(100):
        kept.save(1, {}, wait=False)
        kept.finish()
    assert not kept.due(2)
    now[0] = 60.0
    assert kept.due(2)


def test_what_has_to_be_done_before_a_checkpoint_is_published_keeps_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "PAUSES", ())

    def full() -> None:
        raise OSError(28, "No space left on device")

    method, optimizer = make(1)
    with pytest.raises(
        UserError, match=r"checkpoint of step 1 could not be saved .+ No space left on device"
    ):
        checkpoints(tmp_path, method, optimizer).save(1, {}, before=full)
    assert latest(tmp_path) is None


def test_a_try_that_published_and_failed_after_that_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(28, "No space left on device")])

    def sync(folder: Path) -> None:
        for failure in failures:
            raise failure

    monkeypatch.setattr(checkpoints_module, "PAUSES", (0.0,))
    monkeypatch.setattr(checkpoints_module, "sync_folder", sync)
    method, optimizer = make(1)
    checkpoints(tmp_path, method, optimizer).save(1, {})
    assert checkpoints(tmp_path, method, optimizer).load() == {"step": 1}


def test_the_period_follows_young_and_daly_within_ten_minutes_and_an_hour() -> None:
    # sqrt(2 * 30 s * 86,400 s / (0.0065 * 64)): by hand, 3530.1 s.
    period = young_daly(save_seconds=30, failures_per_node_day=0.0065, nodes=64)
    assert period == pytest.approx(3530.1, abs=0.1)
    assert young_daly(save_seconds=0, failures_per_node_day=0.0065, nodes=64) == 600
    assert young_daly(save_seconds=30, failures_per_node_day=0.0065, nodes=1) == 3600
    assert young_daly(save_seconds=30, failures_per_node_day=0, nodes=64) == 3600


def test_without_minutes_the_period_follows_the_cost_of_the_last_save(tmp_path: Path) -> None:
    method, optimizer = make(1)
    now = itertools.count(0.0, 20.0)  # every look at the clock takes 20 s
    kept = checkpoints(
        tmp_path, method, optimizer, minutes=None, failures_per_node_day=1.0, nodes=8, clock=lambda: next(now)
    )
    assert [kept.due(1) for _ in range(30)].index(True) == 29  # after 600 s: nothing is known yet
    kept.save(1, {})
    # The save cost 60 s or more: sqrt(2 * 60 * 86,400 / 8) = 1138 s.
    assert [kept.due(2) for _ in range(100)].index(True) > 50
