"""Numbers about a run, and the files they go to."""

from __future__ import annotations

import json
import math
import tracemalloc
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.train.metrics import Metrics, Stopwatch, embedding_std, rankme
from pipeline.train.row_file import RowFile
from pipeline.train.tensorboard import TensorBoard
from tests.full_disk import files_end_at


def gaussian(rows: int, columns: int, *, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if rank is None:
        return values
    return values[:, :rank] @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)


def test_embedding_std_is_1_on_the_whole_sphere_and_0_at_a_point() -> None:
    assert embedding_std(gaussian(4096, 64)) == pytest.approx(1.0, abs=0.01)
    assert embedding_std(torch.ones(100, 64)) == pytest.approx(0.0, abs=1e-12)
    assert embedding_std(gaussian(4096, 64, rank=1)) <= 1.0
    half = torch.cat([torch.eye(64)[:1].repeat(50, 1), torch.eye(64)[1:2].repeat(50, 1)])
    assert embedding_std(half) == pytest.approx(2 * 0.5 / 64 * math.sqrt(64))


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_rankme_counts_the_dimensions_that_are_used(rank: int) -> None:
    values = gaussian(200, 16, rank=rank)
    orthogonal, _ = np.linalg.qr(values.numpy() if rank == 16 else np.eye(200, rank))
    assert rankme(torch.from_numpy(orthogonal)) == pytest.approx(rank, rel=1e-4)
    assert 1.0 <= rankme(values) <= rank + 0.01


def test_rankme_is_the_papers_formula() -> None:
    values = gaussian(50, 8).numpy()
    singular = np.linalg.svd(values, compute_uv=False)
    shares = singular / np.abs(singular).sum() + 1e-7
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert rankme(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-12)
    assert rankme(torch.zeros(4, 4)) == 1.0


def test_a_resumed_run_forgets_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, step=0, total_steps=10, log_every=1)
    for step in (2, 4, 6):
        metrics.log(step, {"loss": 1 / step})
        metrics.time(step, {"seconds": 0.1})
    metrics.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the process died while it wrote

    metrics = Metrics(tmp_path, step=4, total_steps=10, log_every=1)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:2])
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 2
    metrics.log(6, {"loss": 1 / 6})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole

    Metrics(tmp_path, step=0, total_steps=10, log_every=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_torn_line_alone_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    Metrics(tmp_path, step=5, total_steps=10, log_every=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_resumed_run_holds_the_end_of_its_rows_alone(tmp_path: Path) -> None:
    Metrics(tmp_path, step=0, total_steps=10, log_every=1).close()  # whatever is imported once
    for name in ("metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}}}\n' for step in range(200_000)))
    tracemalloc.start()
    Metrics(tmp_path, step=199_990, total_steps=10, log_every=1).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_text().endswith('8}\n{"step": 199989}\n{"step": 199990}\n')
    assert (tmp_path / "metrics.jsonl").stat().st_size > 3_000_000
    assert peak < 1_000_000


def test_rows_wait_for_room_on_the_disk_and_are_all_there_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, step=0, total_steps=9, log_every=1)
    metrics.log(1, {"loss": 1.0})
    with files_end_at(40):
        for step in range(2, 6):
            metrics.log(step, {"loss": float(step)})
            metrics.progress(step, loss=1.0, lr=0.1, images_per_second=3.0, seconds=2.0)
        with pytest.raises(OSError, match="File too large"):
            metrics.sync()  # no checkpoint may be published
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    metrics.log(6, {"loss": 6.0})
    metrics.sync()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count("its rows are held until it can") == 1 and "and has all rows" in caplog.text
    metrics.close()


def test_more_rows_than_can_be_held_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.train.row_file.HELD", 2)
    rows = RowFile(tmp_path / "rows", step=0)
    with files_end_at(0):
        for step in range(5):
            rows.write({"step": step})
    rows.close()
    assert (tmp_path / "rows").read_text() == '{"step": 3}\n{"step": 4}\n'
    assert "has all rows but 3" in caplog.text


def test_rows_that_are_missing_before_the_checkpoint_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    Metrics(tmp_path, step=29, total_steps=90, log_every=10).close()
    assert not caplog.text
    Metrics(tmp_path, step=45, total_steps=90, log_every=10).close()
    assert f"{tmp_path}/metrics.jsonl ends at step 20, and the training is at step 45" in caplog.text


def test_rows_that_a_power_cut_has_spoilt_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 2}\n\0\0\0 3}\n{"los": 4}\n{"step": 5}\n'
    )
    Metrics(tmp_path, step=3, total_steps=10, log_every=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_process_that_was_given_up_does_not_write_among_the_rows_of_its_successor(tmp_path: Path) -> None:
    before = Metrics(tmp_path, step=0, total_steps=10, log_every=1)
    before.log(1, {"loss": 1.0})
    after = Metrics(tmp_path, step=1, total_steps=10, log_every=1)
    before.log(2, {"loss": 2.0})
    after.log(2, {"loss": 3.0})
    before.close()
    after.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [1.0, 3.0]


def test_every_row_is_json_even_when_the_loss_is_not_a_number(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, step=0, total_steps=10, log_every=1)
    metrics.log(1, {"loss": math.nan, "grad_norm": math.inf, "skipped": [{"rank": 0}]})
    metrics.progress(1, loss=math.nan, lr=0.1, images_per_second=3.0, seconds=2.0)
    metrics.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "skipped": [{"rank": 0}]}
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["seconds_left"] == 18.0


def test_tensorboard_has_the_numbers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.writer import FileWriter

    metrics = Metrics(tmp_path, step=0, total_steps=10, log_every=1)
    for step in (1, 2, 3):
        metrics.log(step, {"loss": float(step)})
    metrics.close()
    metrics = Metrics(tmp_path, step=1, total_steps=10, log_every=1)
    opened: list[str] = []
    add = FileWriter.add_summary

    def tell(writer: FileWriter, summary: Any, step: int) -> None:
        opened.append(", ".join(value.tag for value in summary.value))
        add(writer, summary, step)

    monkeypatch.setattr(FileWriter, "add_summary", tell)
    metrics.log(2, {"loss": 20.0, "lr": 0.1})
    metrics.close()
    assert opened == ["loss, lr"]  # one event, for which the file is opened once
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_the_stopwatch_starts_anew_with_every_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(0.0, 0.5)
    monkeypatch.setattr("pipeline.train.metrics.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    watch.step()
    watch.step()
    watch.waited(0.0)
    first = watch.lap(images_per_step=10, device=torch.device("cpu"))
    assert first["images_per_second"] == pytest.approx(10 / first["seconds"])
    assert first["data_wait_share"] == 0.0
    assert first["memory_mb"] > 1
    watch.step()
    assert watch.lap(images_per_step=10, device=torch.device("cpu"))["seconds"] == 1.0


def test_each_sign_of_collapse_is_told_once_and_stays_in_the_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, step=0, total_steps=10, log_every=1)
    for step, std in enumerate([0.5, 0.09, 0.08], start=1):
        metrics.warn_of_collapse(step, {"embedding_std": std, "rankme": 40.0})
        metrics.progress(step, loss=1.0, lr=0.1, images_per_second=1.0, seconds=1.0)
    metrics.close()
    told = "collapse: embedding_std was 0.09 at step 2, below 0.1"
    assert caplog.messages == [told]
    assert json.loads((tmp_path / "progress.json").read_text())["warnings"] == [told]


# TensorBoard's own thread dies of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_has_what_was_shown_while_its_disk_was_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = TensorBoard(tmp_path, step=0)
    shown.add({"loss": 1.0}, 1)
    shown.flush()
    shown.add({"loss": 2.0}, 2)
    with files_end_at(0):
        for step in (3, 4):
            shown.add({"loss": float(step)}, step)
            shown.flush()
    shown.add({"loss": 5.0}, 5)
    shown.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert caplog.text.count("cannot be written, until they can") == 1
    assert "can be written again" in caplog.text
