"""L1 and L2 on real shards: the loader's batches, through processes, restarts and damage."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import integers, sampled_from

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.data import workers as workers_module
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.recipe.data import Data

CROPS = [
    {"count": 2, "size": 8, "scale": [0.3, 1.0]},
    {"count": 1, "size": 5, "scale": [0.1, 0.3], "interpolation": "bicubic"},
]


def make_loader(root: Path, *, rank: int = 0, world: int = 1, workers: int = 0, **changes: Any) -> Loader:
    seed, resident = changes.pop("seed", 3), changes.pop("resident", False)
    values = {"root": str(root), "batch_size": 12, "window": 8, "crops": CROPS} | changes
    data = Data.model_validate(values)
    device = torch.device("cpu")
    sizes: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world, "workers": workers}
    return Loader(data, **sizes, device=device, resident=resident)


def take(loader: Loader, step: int, count: int) -> list[tuple[int, Batch]]:
    return list(islice(loader.from_step(step), count))


def joined(parts: list[Batch]) -> Batch:
    """One batch from the ranks' parts, view-major again."""

    def join(tensors: list[torch.Tensor], views: int) -> torch.Tensor:
        return torch.cat([tensor.unflatten(0, (views, -1)) for tensor in tensors], 1).flatten(0, 1)

    counts = {f"crops.{index}": int(group["count"]) for index, group in enumerate(CROPS)}  # type: ignore[call-overload]
    return Batch(
        views={name: join([part.views[name] for part in parts], n) for name, n in counts.items()},
        parameters={name: join([part.parameters[name] for part in parts], n) for name, n in counts.items()},
        keys=torch.cat([part.keys for part in parts]),
    )


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.keys, b.keys)
    for ours, theirs in ((a.views, b.views), (a.parameters, b.parameters)):
        assert list(ours) == list(theirs) == ["crops.0", "crops.1"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def damage(root: Path, keys: list[int]) -> None:
    """Flip a bit in the middle of some samples' bytes."""
    dataset = open_dataset(root)
    for unit_index in range(len(dataset.units)):
        rows = dataset.unit_rows(unit_index)
        for row in np.flatnonzero(np.isin(dataset.unit_keys(unit_index).astype(np.int64), keys)).tolist():
            with Path(dataset.shard_path(unit_index)).open("r+b") as shard:
                place = int(rows["offset"][row] + rows["size"][row] // 2)
                shard.seek(place)
                byte = shard.read(1)[0]
                shard.seek(place)
                shard.write(bytes([byte ^ 1]))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=sampled_from([4, 6, 8, 12, 45]),
    window=sampled_from([3, 8, 100]),
    world=integers(1, 6),
    resume_at=integers(0, 25),
    seed=integers(0, 2**40),
)
def test_L1_batches_do_not_depend_on_ranks_or_resume(
    small_dataset: Path, batch_size: int, window: int, world: int, resume_at: int, seed: int
) -> None:
    world = max(size for size in range(1, world + 1) if batch_size % size == 0)
    sizes: dict[str, Any] = {"batch_size": batch_size, "window": window, "seed": seed}
    one = make_loader(small_dataset, **sizes)
    (_, before), (step, whole) = take(one, resume_at, 2)
    assert step == resume_at + 1
    assert whole.views["crops.0"].shape == (2 * batch_size, 8, 8, 3)
    parts = [
        take(make_loader(small_dataset, rank=rank, world=world, **sizes), resume_at + 1, 1)[0][1]
        for rank in range(world)
    ]
    assert_same(joined(parts), whole)
    assert before.keys.tolist() != whole.keys.tolist()


@pytest.mark.slow
def test_L1_batches_do_not_depend_on_worker_count(small_dataset: Path) -> None:
    """Over the end of two epochs, from step 2."""
    expected = take(make_loader(small_dataset, workers=0), 2, 7)
    for workers in (1, 3):
        got = take(make_loader(small_dataset, workers=workers), 2, 7)
        assert [step for step, _ in got] == list(range(2, 9))
        for (_, ours), (_, theirs) in zip(got, expected, strict=True):
            assert_same(ours, theirs)


def test_L1_every_resume_step_of_two_epochs(small_dataset: Path) -> None:
    whole = take(make_loader(small_dataset), 0, 7)
    for step in range(7):
        assert_same(take(make_loader(small_dataset), step, 1)[0][1], whole[step][1])


@pytest.mark.parametrize("batch_size", [7, 12, 16])
def test_L2_an_epoch_visits_each_sample_at_most_once(small_dataset: Path, batch_size: int) -> None:
    loader = make_loader(small_dataset, batch_size=batch_size)
    steps = loader.steps_per_epoch
    batches = [batch for _, batch in take(loader, 0, 2 * steps)]
    epochs = []
    for epoch in (batches[:steps], batches[steps:]):
        keys = torch.cat([batch.keys for batch in epoch]).tolist()
        assert len(set(keys)) == len(keys) == steps * batch_size
        epochs.append(keys)
    lanes = loader.state()["lanes"]
    assert 45 - steps * batch_size < batch_size + lanes
    assert epochs[0] != epochs[1]


def test_a_sample_has_other_crops_in_the_next_epoch(small_dataset: Path) -> None:
    loader = make_loader(small_dataset, batch_size=45)
    (_, first), (_, second) = take(loader, 0, 2)
    place = int(torch.nonzero(second.keys == first.keys[0]))
    assert not torch.equal(first.views["crops.0"][0], second.views["crops.0"][place])
    assert not torch.equal(first.parameters["crops.0"][0], second.parameters["crops.0"][place])


def test_L1_a_corrupt_sample_is_replaced_by_the_same_one_on_any_world_size(
    own_dataset: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = own_dataset(images=45, unit_rows=7)
    clean = [batch for _, batch in take(make_loader(root), 0, 3)]
    bad = [int(clean[0].keys[1]), int(clean[1].keys[5]), int(clean[2].keys[11])]
    damage(root, bad)
    whole = [batch for _, batch in take(make_loader(root), 0, 3)]
    assert len([record for record in caplog.records if "takes its place" in record.message]) == 3
    assert f"{bad[0]:013d} is bad" in caplog.text
    for world, workers in [(2, 0), (3, 0), (6, 0), (2, 2)]:
        ranks = [take(make_loader(root, rank=r, world=world, workers=workers), 0, 3) for r in range(world)]
        for number in range(3):
            assert_same(joined([batches[number][1] for batches in ranks]), whole[number])
    for number, (before, after) in enumerate(zip(clean, whole, strict=True)):
        assert len(after.keys) == 12
        changed = torch.nonzero(before.keys != after.keys).squeeze(1).tolist()
        assert changed == [(1, 5, 11)[number]]
        assert int(after.keys[changed[0]]) not in bad


def test_a_substitute_has_other_crops_than_in_its_own_place(own_dataset: Callable[..., Path]) -> None:
    root = own_dataset(images=24, unit_rows=24)
    clean = [batch for _, batch in take(make_loader(root, window=24), 0, 2)]
    damage(root, [int(clean[0].keys[0])])
    after = [batch for _, batch in take(make_loader(root, window=24), 0, 2)]
    stand_in = after[0].keys[0]
    keys = torch.cat([batch.keys for batch in after])
    twice = torch.nonzero(keys == stand_in).squeeze(1).tolist()
    assert len(twice) == 2
    first, second = (after[place // 12].views["crops.0"][place % 12] for place in twice)
    assert not torch.equal(first, second)


def test_a_window_without_a_usable_sample_is_the_users_to_mend(own_dataset: Callable[..., Path]) -> None:
    root = own_dataset(images=12, unit_rows=12)
    damage(root, list(range(12)))
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"8 samples in a row of .* `ingest verify --level decode"
        ) as caught:
            take(make_loader(root, workers=workers), 0, 1)
        assert "Traceback" not in str(caught.value)


def test_the_state_is_a_dozen_plain_values_and_names_what_differs(small_dataset: Path) -> None:
    loader = make_loader(small_dataset)
    assert loader.state()["step"] == 0
    take(loader, 4, 2)
    state = loader.state()
    assert state["step"] == 6
    assert len(state) <= 12
    assert all(isinstance(value, int | str | None) for value in state.values())
    make_loader(small_dataset, rank=1, world=3).check_state(state)
    with pytest.raises(UserError, match=r"have seed 3, these have 4: go on with the same data"):
        make_loader(small_dataset, seed=4).check_state(state)
    with pytest.raises(UserError, match="batch_size"):
        make_loader(small_dataset, batch_size=6).check_state(state)


def test_augment_gives_the_views_of_each_group_by_its_key_in_the_recipe(small_dataset: Path) -> None:
    loader = make_loader(small_dataset)
    _, batch = next(loader.from_step(0))
    views = loader.augment(batch).views
    assert list(views) == ["crops.0", "crops.1"]
    large, small = views.values()
    assert large.shape == (24, 3, 8, 8) and large.is_contiguous(memory_format=torch.channels_last)
    assert small.shape == (12, 3, 5, 5)
    assert large.dtype == torch.float32
    assert loader.augment(batch, dtype=torch.float64).views["crops.0"].dtype == torch.float64


def test_views_are_row_major_in_blocks(small_dataset: Path) -> None:
    """Rows 0 … b−1 are view 0: with the whole image and no flip, both views show the same pictures."""
    whole = [{"count": 2, "size": 8, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip_probability": 0.0}]
    _, batch = next(make_loader(small_dataset, crops=whole).from_step(0))
    one, other = batch.views["crops.0"].float().split(12)
    differences = (one - other).abs().mean((1, 2, 3))
    others = (one - other.roll(1, 0)).abs().mean((1, 2, 3))
    assert differences.mean() < others.mean() / 3


def test_little_shared_memory_is_refused_before_a_worker_dies(
    small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1_000)
    monkeypatch.setattr(workers_module, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    with pytest.raises(UserError, match="2 workers need 6 MiB of shared memory and /dev/shm has 0 MiB"):
        take(make_loader(small_dataset, workers=2), 0, 1)


@pytest.mark.slow
def test_workers_die_with_a_killed_trainer_and_ignore_its_signals(small_dataset: Path) -> None:
    script = Path(__file__).with_name("killed_trainer.py")
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(small_dataset), "wait"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        for worker in workers:
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)
        _, alive = psutil.wait_procs(workers, timeout=1)
        assert len(alive) == 2
    finally:
        trainer.kill()
        trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


@pytest.mark.slow
def test_a_trainer_exits_with_its_workers_though_they_ignore_others(small_dataset: Path) -> None:
    script = Path(__file__).with_name("killed_trainer.py")
    command = [sys.executable, str(script), str(small_dataset), "exit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert not any(psutil.pid_exists(pid) for pid in workers)


@pytest.mark.slow
def test_L1_batches_stay_as_they_were_while_they_are_kept(small_dataset: Path) -> None:
    """Some buffers are used again, some are kept, and in the end more are kept than there are."""
    expected = take(make_loader(small_dataset), 0, 30)
    kept: list[Batch] = []
    for (_, theirs), (step, ours) in zip(
        expected, make_loader(small_dataset, workers=1).from_step(0), strict=False
    ):
        if step % 3 == 1:
            kept.append(ours)
        else:
            assert_same(ours, theirs)
    for step, batch in zip(range(1, 30, 3), kept, strict=True):
        assert_same(batch, expected[step][1])


@pytest.mark.slow
def test_pinned_values_come_in_order(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(int(batch.keys[0]))
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    expected = [int(batch.keys[0]) for _, batch in take(make_loader(small_dataset), 0, 6)]
    for workers in (0, 1):
        loader = make_loader(small_dataset, workers=workers)
        loader._device = torch.device("cuda")
        got = [int(batch.keys[0]) for _, batch in take(loader, 0, 6)]
        assert got == expected
        assert pinned[:6] == expected
        pinned.clear()


@pytest.mark.slow
def test_an_abandoned_iterator_takes_its_workers_along(small_dataset: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    batches = make_loader(small_dataset, workers=2).from_step(0)
    next(batches)
    del batches
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = {
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
        }
        # The fork server and its resource tracker stay for the next loader.
        if len(now - before) <= 2:
            return
        time.sleep(0.05)
    pytest.fail("workers are left behind")


def test_L1_a_moved_dataset_gives_the_same_batches(small_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(small_dataset, tmp_path / "moved")
    (_, here), (_, there) = (
        next(make_loader(root).from_step(1)) for root in (small_dataset, tmp_path / "moved")
    )
    assert_same(here, there)
