"""Training as a whole: on any number of ranks, stopped in any way, the numbers are the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from tiny_training import make_dataset, make_recipe, make_values
from torch import Tensor

from cluster.errors import UserError
from cluster.job import Job, Resources, State
from cluster.rank.preempt import Preempted, PreemptionFlag
from cluster.rank.torch_dist import World
from cluster.run.folder import RunFolder
from ingest.dataset.keys import key_name
from pipeline.checkpoint.files import latest, newest_first, read_tensors
from pipeline.data.batch import Batch, Inputs
from pipeline.data.loader import Loader
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train import loop as loop_module
from pipeline.train.loop import forward_backward, pretrain, train
from pipeline.train.metrics import Stopwatch
from pipeline.train.setup import Training, set_up

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)
Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as every rank has: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_tensors(checkpoint, prefix="")


def same_tensors(one: Path, other: Path) -> bool:
    a, b = final_tensors(one), final_tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def world_of(group: dist.ProcessGroup | None) -> World:
    if group is None:
        return ALONE
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )


class Recorder:
    """Notes the keys of every batch that a loader is asked to augment."""

    def __init__(self, loader: Loader) -> None:
        self.keys: list[list[int]] = []
        self._augment = loader.augment
        loader.augment = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: Batch, **options: Any) -> Inputs:
        self.keys.append(batch.keys.tolist())
        return self._augment(batch, **options)


def _train(group: dist.ProcessGroup | None, values: dict[str, Any], folder: Path) -> list[list[int]]:
    """The whole training on one rank of a group; the keys of its rows of every batch."""
    training = set_up(PretrainRecipe.model_validate(values), folder, world_of(group))
    recorder = Recorder(training.loader)
    train(training, PreemptionFlag(training.run))
    if training.metrics is not None:
        training.metrics.close()
    return recorder.keys


def whole_batches(parts: list[list[list[int]]]) -> list[list[int]]:
    return [[key for part in batch for key in part] for batch in zip(*parts, strict=True)]


@pytest.mark.slow
def test_T2_T3_ranks_and_a_change_of_their_number_change_nothing(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    values = make_values(data, train__precision="fp64", run__keep_last=10)
    values["train"]["steps"] = 10
    alone, two, changed = (tmp_path / name for name in ("alone", "two", "changed"))
    keys = whole_batches(run_on_ranks(1, _train, values, alone))
    assert whole_batches(run_on_ranks(2, _train, values, two)) == keys

    shutil.copytree(two, changed)
    for late in newest_first(changed / "checkpoints"):
        if late.name > "step-00000005":
            shutil.rmtree(late)
    assert whole_batches(run_on_ranks(3, _train, values, changed)) == keys[5:]

    for other in (two, changed):
        assert len(rows(other)) == 10
        for a, b in zip(rows(alone), rows(other), strict=True):
            assert a["step"] == b["step"] and a["lr"] == b["lr"] and a["epoch"] == b["epoch"]
            # float64 sums in another order, amplified by 10 steps of training.
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-9)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-9)
            assert b["rankme"] == pytest.approx(a["rankme"], rel=1e-9)


def launch(values: dict[str, Any], folder: Path, *, ranks: int) -> subprocess.Popen[bytes]:
    """A launcher in its own process, as on the command line; its last line is the final state."""
    job = Job(
        name="tiny",
        function="pipeline.train.loop:run_pretrain",
        arguments={"recipe": values, "folder": str(folder)},
        resources=Resources(ranks_per_node=ranks, cpus_per_rank=1),
        folder=folder,
    )
    described = folder.with_suffix(".json")
    described.write_text(job.to_json())
    code = (
        "import sys; from pathlib import Path; from cluster.job import Job;"
        "from cluster.local import LocalExecutor;"
        "from cluster.submit import submit; from cluster.typed_json import read_record;"
        "job = read_record(Job, Path(sys.argv[1]), remedy='');"
        "print(submit(job, LocalExecutor()).wait())"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(described)], stdout=subprocess.PIPE)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        path = folder / "progress.json"
        if path.is_file() and json.loads(path.read_text())["step"] >= step:
            return
        assert time.monotonic() < deadline, RunFolder(folder).tail(0)
        time.sleep(0.005)


def kill_everything(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher, its ranks and whatever they started, as a power cut would."""
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in family:
        process.kill()
    launcher.communicate()


def kill_one_rank(launcher: subprocess.Popen[bytes]) -> None:
    random.choice(psutil.Process(launcher.pid).children()).kill()
    assert launcher.communicate()[0].decode().split()[-1] == State.FAILED


def ask_to_stop(number: signal.Signals) -> Callable[[subprocess.Popen[bytes]], None]:
    def ask(launcher: subprocess.Popen[bytes]) -> None:
        launcher.send_signal(number)
        assert launcher.communicate()[0].decode().split()[-1] == State.PREEMPTED

    return ask


@pytest.mark.slow
def test_T3_a_run_stopped_in_every_way_equals_one_that_was_not(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    values = make_values(data, train__steps=32, optim__clip_norm=5.0, run__checkpoint_every_steps=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_on_ranks(2, _train, values, whole)  # forks: they need not import PyTorch
    assert len(rows(whole)) == 32

    seed = int(os.environ.get("T3_SEED", time.time_ns() % 10_000))
    print(f"T3_SEED={seed}")
    random.seed(seed)
    blows = [kill_everything, ask_to_stop(signal.SIGTERM), kill_one_rank]
    step = 1  # the first blow before any checkpoint
    for blow in blows:
        launcher = launch(values, broken, ranks=2)
        wait_for_step(broken, step)
        time.sleep(random.uniform(0, 0.1))
        blow(launcher)
        (broken / "progress.json").unlink()
        done = latest(broken)
        step = random.randint(4, 8) + (0 if done is None else int(done.name[5:]))
    assert launch(values, broken, ranks=2).communicate()[0].decode().split()[-1] == State.COMPLETED

    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert same_tensors(whole, broken)
    assert RunFolder(broken).status().attempt == 4
    assert len((broken / "attempts.jsonl").read_text().splitlines()) == 4
    assert not list((broken / "checkpoints").glob(".*"))


def _preempted(group: dist.ProcessGroup, values: dict[str, Any], folder: Path) -> int:
    """Only rank 1 hears the signal."""
    training = set_up(PretrainRecipe.model_validate(values), folder, world_of(group))
    flag = PreemptionFlag(training.run)
    if training.world.rank == 1:
        training.method.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGTERM))
    with flag, pytest.raises(Preempted, match="saved at step 1 of 20"):
        train(training, flag)
    return 0


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    run_on_ranks(2, _preempted, make_values(data), tmp_path / "run")
    assert [path.name for path in newest_first(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


@pytest.mark.slow
def test_ranks_that_know_how_long_a_save_takes_stop_in_time_for_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(data, train__steps=20, run__checkpoint_every_steps=2)
    monkeypatch.setattr(loop_module, "SECONDS_TO_PART", 0.0)
    monkeypatch.setenv("SUBMIT_ENDS", str(int(time.time()) + 10_000))
    training = set_up(recipe, tmp_path / "run", ALONE)
    monkeypatch.setattr(Stopwatch, "total", 50_000.0)  # it has gone on for long
    training.checkpoints.slowest = 6_000.0
    with pytest.raises(Preempted, match="saved at step 1 of 20"):
        train(training, PreemptionFlag(training.run))

    monkeypatch.setenv("SUBMIT_ENDS", str(int(time.time()) + 100_000))
    training = set_up(recipe, tmp_path / "run", ALONE)
    train(training, PreemptionFlag(training.run))
    assert training.checkpoints.slowest > 0.0


def run_alone(recipe: PretrainRecipe, folder: Path) -> Training:
    training = set_up(recipe, folder, ALONE)
    train(training, PreemptionFlag(training.run))
    assert training.metrics is not None
    training.metrics.close()
    return training


def gradients(training: Training) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in training.method.named_parameters() if p.grad is not None}


def _accumulated(group: dist.ProcessGroup | None, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    training = set_up(PretrainRecipe.model_validate(values), folder, world_of(group))
    batches = [batch for _, batch in itertools.islice(training.loader.from_step(0), 2)]
    forward_backward(training, batches, step=5)
    return {name: gradient.numpy() for name, gradient in gradients(training).items()}


@pytest.mark.slow
def test_accumulating_two_batches_is_the_mean_of_their_gradients(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    values = make_values(data, train__accumulate=2, train__precision="fp64", method__queue_length=0)
    training = set_up(PretrainRecipe.model_validate(values), tmp_path / "a", ALONE)
    batches = [batch for _, batch in itertools.islice(training.loader.from_step(0), 2)]
    apart = []
    for batch in batches:
        training.optimizer.zero_grad()
        forward_backward(training, [batch], step=5)
        apart.append(gradients(training))
    for answer in run_on_ranks(1, _accumulated, values, tmp_path / "b") + run_on_ranks(
        2, _accumulated, values, tmp_path / "c"
    ):
        for name, together in answer.items():
            expected = (apart[0][name] + apart[1][name]) / 2
            assert torch.allclose(torch.from_numpy(together), expected, rtol=1e-10, atol=1e-12), name


@pytest.mark.slow
def test_accumulation_takes_successive_batches_and_resumes_there(data: Path, tmp_path: Path) -> None:
    values = make_values(data, train__accumulate=3, train__steps=4, run__checkpoint_every_steps=2)
    keys = _train(None, values, tmp_path / "accumulated")
    plain = set_up(make_recipe(data), tmp_path / "plain", ALONE)
    one_by_one = itertools.islice(plain.loader.from_step(0), 12)
    assert keys == [batch.keys.tolist() for _, batch in one_by_one]
    assert plain.metrics is not None
    plain.metrics.close()
    shutil.copytree(tmp_path / "accumulated", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    assert _train(None, values, tmp_path / "again") == keys[6:]
    assert same_tensors(tmp_path / "accumulated", tmp_path / "again")


def _poisoned(
    group: dist.ProcessGroup | None, values: dict[str, Any], folder: Path, bad_steps: list[int]
) -> tuple[str, list[list[int]]]:
    """Some steps see a crop that is not a number, on the last rank; the error, and the keys seen."""
    training = set_up(PretrainRecipe.model_validate(values), folder, world_of(group))
    recorder = Recorder(training.loader)
    clean = training.loader.augment
    poisoned_keys = set()

    def augment(batch: Batch, **options: Any) -> Inputs:
        inputs = clean(batch, **options)
        key = int(batch.keys[1])
        if training.world.rank == training.world.size - 1 and (
            len(recorder.keys) in bad_steps or key in poisoned_keys
        ):
            poisoned_keys.add(key)  # the guard looks again
            inputs.views["crops.0"][1, 0, 0, 0] = float("nan")
        return inputs

    training.loader.augment = augment  # type: ignore[method-assign, assignment]
    try:
        train(training, PreemptionFlag(training.run))
    except UserError as error:
        return str(error), recorder.keys
    assert all(value.isfinite().all() for value in training.method.state_dict().values())
    return "", recorder.keys


@pytest.mark.slow
def test_a_number_that_is_not_finite_is_skipped_on_every_rank_and_named(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    folder = tmp_path / "run"
    answers = run_on_ranks(2, _poisoned, make_values(data, train__steps=5), folder, [3])
    assert [error for error, _ in answers] == ["", ""]
    bad = answers[1][1][2][1]
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, 6))
    assert found[2]["skipped"] == [{"rank": 1, "what": "the augmented crops", "keys": [bad]}]
    assert all(row["loss"] is not None for row in found if "skipped" not in row)


def test_too_many_skips_in_a_row_stop_the_run_with_a_diagnosis(data: Path, tmp_path: Path) -> None:
    values = make_values(data, train__max_skipped_steps=2)
    # A skipped step looks at its crops twice: batches 3 and 5 as the loader counts them.
    error, keys = _poisoned(None, values, tmp_path / "run", [3, 5])
    assert error.startswith("the loss or gradient was not finite in 2 steps in a row, up to step 4 (rank 0: ")
    assert key_name(keys[4][1]) in error


@pytest.mark.slow
def test_the_probe_changes_nothing_in_the_training(data: Path, tmp_path: Path) -> None:
    probe = {"train": str(data), "test": str(data), "every_steps": 2, "image_size": 16, "k": 5}
    without = run_alone(make_recipe(data, train__steps=5, method__queue_length=0), tmp_path / "without")
    run_alone(make_recipe(data, train__steps=5, method__queue_length=0, probe=probe), tmp_path / "with")
    assert same_tensors(tmp_path / "without", tmp_path / "with")
    probed = {row["step"]: row.pop("knn") for row in rows(tmp_path / "with") if "knn" in row}
    assert list(probed) == [2, 4, 5]
    assert all(25 < accuracy <= 100 for accuracy in probed.values())
    stripped = [{k: v for k, v in row.items() if k != "knn"} for row in rows(tmp_path / "with")]
    assert stripped == rows(tmp_path / "without")
    assert without.method.training


def test_a_finished_run_and_another_recipe(data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(data, train__steps=2, run__log_every=10)
    run_alone(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows(tmp_path / "run")] == [2]
    assert RunFolder(tmp_path / "run").done_mark(0).exists()  # a rank that fails now starts nothing again
    run_alone(recipe, tmp_path / "run")  # nothing is left to do
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert timing[0].keys() >= {"step", "seconds", "images_per_second", "data_wait_share", "memory_mb"}

    other = make_recipe(data, train__steps=2, optim__lr=0.1, run__log_every=5)
    with pytest.raises(
        UserError, match=r"another recipe \(optim\.lr is 0\.3 there, 0\.1 here\): give the same"
    ):
        pretrain(other, tmp_path / "run")


def test_a_dataset_that_has_changed_is_refused(
    data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path / "data"
    shutil.copytree(data, place)
    run_alone(make_recipe(place, train__steps=2), tmp_path / "run")
    shutil.rmtree(place)
    shutil.copytree(make_dataset(tmp_path_factory.mktemp("other"), seed=1), place)
    with pytest.raises(UserError, match=r"have root .* or start a new run"):
        pretrain(make_recipe(place, train__steps=2), tmp_path / "run")


def test_bf16_is_a_way_to_compute_not_another_training(data: Path, tmp_path: Path) -> None:
    # No smaller crops: oneDNN leaves holes in bfloat16 gradients of a grouped convolution over one pixel.
    crops = make_values(data)["data"]["crops"]
    crops[0]["size"], crops[1]["size"] = 32, 16
    run_alone(make_recipe(data, train__steps=3, data__crops=crops), tmp_path / "fp32")
    half = make_recipe(data, train__steps=3, data__crops=crops, train__precision="bf16")
    trained = run_alone(half, tmp_path / "bf16")
    assert all(p.dtype == torch.float32 for p in trained.method.parameters())
    for a, b in zip(rows(tmp_path / "fp32"), rows(tmp_path / "bf16"), strict=True):
        # bfloat16 has 8 bits of mantissa; the loss sees them divided by the temperature of 0.1.
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert a["loss"] != b["loss"]
