"""What reads a run's rows, as they grow: CPU seconds, peak memory and bytes written, each in its process.

    python benchmarks/curves.py FOLDER --rows 10000 100000 1000000

To measure another checkout: PYTHONPATH=CHECKOUT python benchmarks/curves.py FOLDER …

A run has logged eight numbers every ten steps and a ninth now and then; a step is skipped here and there, and
one row in the middle is a spike. It is compared with a run of 100 rows ("compare") and with one of as many
("compare_two"). The peer is TensorBoard's own loading of one of the curves, from the file that torch wrote.
CPU seconds are of the whole command, Python's start and imports included: "imports" is what these take alone.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

EVERY = 10  # steps
SPIKE = 1e3


def rows_of(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for number in range(1, count + 1):
        row: dict[str, Any] = {"step": number * EVERY, "epoch": number // 1000}
        if number % 5_000 == 77:
            yield row | {"skipped": [{"rank": 0, "what": "embeddings", "keys": [number]}]}
            continue
        row["loss"] = SPIKE if number == count // 2 else 3 + 6 * 0.9999**number + draw.gauss(0, 0.05)
        row["lr"] = 0.3 * (1 - number / count)
        row["prototype_entropy"] = 5 + draw.gauss(0, 0.1)
        row["embedding_std"] = 0.05 if number == count // 2 else 0.8 + draw.gauss(0, 0.02)
        row["rankme"] = 50 + draw.gauss(0, 2)
        row["grad_norm"] = 1 + draw.random()
        if number % 100 == 0:
            row["knn"] = 40 + draw.gauss(0, 1)
        yield row


def make_run(run: Path, count: int) -> None:
    """A run folder as a training leaves it, with its TensorBoard file of one curve."""
    from torch.utils.tensorboard.writer import SummaryWriter

    from cluster.job import State
    from cluster.run.folder import RunFolder
    from cluster.run.status import Status
    from cluster.typed_yaml import load_recipe
    from pipeline.recipe.pretrain import PretrainRecipe
    from pipeline.train.run_recipe import record_attempt, to_yaml

    status = Status(
        state=State.COMPLETED, name=run.name, executor="local", id="1", ranks=1, attempt=1, submitted=0.0
    )
    RunFolder.create(run).write_status(status)
    recipe = load_recipe(PretrainRecipe, "cifar10_swav", ["data.root=none"], kind="pretrain")
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    record_attempt(run, ranks=1, device="cpu")
    (run / "checkpoints" / "step").mkdir(parents=True)
    state = {"step": (count - 50) * EVERY, "loader": {"root": "", "samples": 1}}
    (run / "checkpoints" / "step" / "state.json").write_text(json.dumps(state))
    board = SummaryWriter(str(run / "tensorboard"))
    with (run / "metrics.jsonl").open("w") as metrics, RunFolder(run).log(0).open("w") as log:
        for row in rows_of(count):
            metrics.write(json.dumps(row) + "\n")
            if "loss" in row:
                log.write(
                    f"2026-01-01 00:00:00,000 pipeline.train.metrics INFO "
                    f"step {row['step']}/{count * EVERY}  loss {row['loss']:.4f}  "
                    f"lr {row['lr']:.4g}  1234 images/s  1:02:03 left\n"
                )
                board.add_scalar("loss", row["loss"], row["step"])
    board.close()
    draw = random.Random(1)
    with (run / "timing.jsonl").open("w") as timing:
        for number in range(1, count + 1):
            rate = 1000 + draw.gauss(0, 30)
            values = {"seconds": 256 / rate, "images_per_second": rate, "memory_mb": 900.0, "time": 1.7e9}
            timing.write(json.dumps({"step": number * EVERY, **values}) + "\n")


def submit(*words: object) -> None:
    from pipeline.cli import main

    sys.argv = ["submit", *map(str, words)]
    with contextlib.suppress(SystemExit):
        main()


def compare(run: Path, _: int) -> int:
    out = run.parent / "compare.html"
    submit("compare", run, run.parent / "short", "--out", out)
    return out.stat().st_size


def compare_two(run: Path, _: int) -> int:
    """Both runs have all the rows."""
    out = run.parent / "compare.html"
    submit("compare", run, run.parent / "again", "--out", out)
    return out.stat().st_size


def report(run: Path, _: int) -> int:
    from pipeline.report.run_report import curves

    charts = curves(run)
    assert len(charts) == 7
    return sum(len(chart["chart"]) for chart in charts)


def end_of_stage(run: Path, last: int) -> int:
    from pipeline.stages.training import trained

    result = trained(SimpleNamespace(folder=run))  # type: ignore[arg-type]
    assert result.metrics["step"] == last
    return 0


def export(run: Path, last: int) -> int:
    from pipeline.trunks.export import _provenance

    recipe = SimpleNamespace(method=SimpleNamespace(name=""), model_dump=lambda **_: {})
    found = _provenance(run, run / "checkpoints" / "step", recipe)  # type: ignore[arg-type]
    assert found["metrics"]["step"] == last - 50 * EVERY
    return 0


def resume(run: Path, last: int) -> int:
    from pipeline.train.metrics import Metrics

    Metrics(run, step=last, total_steps=2 * last).close()
    return sum((run / name).stat().st_size for name in ("metrics.jsonl", "timing.jsonl"))


def status(run: Path, _: int) -> int:
    submit("status", run)
    return 0


def logs(run: Path, _: int) -> int:
    submit("logs", run)
    return (run / "logs" / "rank-0.log").stat().st_size


def imports(_run: Path, _: int) -> int:
    for name in ("pipeline.report.run_report", "torch.utils.tensorboard"):
        importlib.import_module(name)
    return 0


def tensorboard(run: Path, _: int) -> int:
    """The peer; the number is how many points it keeps, negative if the spike is not among them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    values = [point.value for point in events.Scalars("loss")]
    return len(values) if max(values) == SPIKE else -len(values)


READERS: dict[str, Callable[[Path, int], int]] = {
    reader.__name__: reader
    for reader in (
        compare,
        compare_two,
        report,
        end_of_stage,
        export,
        resume,
        status,
        logs,
        imports,
        tensorboard,
    )
}


def measure(name: str, run: Path, count: int) -> tuple[float, float, int]:
    """CPU seconds, peak MB and what the reader says of itself, of a process of its own."""
    command = [sys.executable, __file__, str(run), "--rows", str(count), "--one", name]
    with (run.parent / "output").open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)
        assert child.stderr is not None
        said = child.stderr.read().decode()
        _, code, used = os.wait4(child.pid, 0)
    if code:
        raise SystemExit(said)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, int(said.splitlines()[-1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    arguments.add_argument("--one", choices=[*READERS, "make"], help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.one == "make":
        make_run(asked.folder, asked.rows[0])
        return
    if asked.one:
        print(READERS[asked.one](asked.folder, asked.rows[0] * EVERY), file=sys.stderr)
        return
    print(f"{'reader':12} {'rows':>9} {'CPU s, median (spread)':>26} {'peak MB':>8} {'written':>12}")
    for count in asked.rows:
        folder = asked.folder / str(count)
        if not (folder / "long").exists():
            # Not in this process: a child's peak begins at the size of its parent.
            for name, rows in (("short", 100), ("long", count)):
                words = [str(folder / name), "--rows", str(rows), "--one", "make"]
                subprocess.run([sys.executable, __file__, *words], check=True)
            (folder / "again").symlink_to("long")
        for name in asked.only:
            rounds = [measure(name, folder / "long", count) for _ in range(asked.rounds)]
            seconds = sorted(taken for taken, _, _ in rounds)
            spread = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
            peak, wrote = max(peak for _, peak, _ in rounds), rounds[0][2]
            print(f"{name:12} {count:>9,} {spread:>26} {peak:>8,.0f} {wrote:>12,}", flush=True)


if __name__ == "__main__":
    main()
