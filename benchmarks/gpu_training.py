"""Claim: SwAV on RegNetY-256GF trains at 75 images/s on one H200, 40 % of its measured matrix peak or more.

    python benchmarks/gpu_training.py [--only PART…] [--seconds 570] [--output gpu_training.json] [--dry-run]

On one GPU, the product's own path (bf16, channels_last, compiled blocks) beside (a) eager float32, (b) fp16
autocast in NCHW without compile, as in 2021, and (c) ours with groups padded to a multiple of 8. The arms of
one trunk take turns in one process; crops are random and on the device, so data takes no time. FLOPs are
counted (`pipeline.plan.step_count`), recomputation left out of MFU; the matrix peak is that of a bf16 product
in the same run. Float32 is as torch has it by default: TF32 in convolutions, not in matrix products.

Further parts: `exact`, losses of eager, compiled, checkpointed and channels_last training in float64 (T4, and
one rank of T2); `10b`, steps of RegNet-10B. A part not begun after --seconds is named as left out.
The results are written as JSON after every part; `--dry-run` runs everything on the CPU, tiny.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from padded_groups import pad_groups
from training_arm import Arm, between, mark

from cluster.rank.torch_dist import World
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.data.batch import Inputs
from pipeline.data.image.views import crops_by_name
from pipeline.methods.build import assemble_method
from pipeline.parallel.parallelize import parallelize
from pipeline.parallel.precision import DTYPES
from pipeline.plan.step_count import count_step
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loss_scale import LossScale
from pipeline.train.optim import build_optimizer

RECIPES = Path(__file__).parents[1] / "configs" / "pretrain"
ROWS = {"16gf": 64, "32gf": 64, "128gf": 32, "256gf": 32}
PARTS = ["exact", "256gf", "16gf", "32gf", "128gf", "10b"]
ARMS: dict[str, dict[str, Any]] = {
    "ours": {"precision": "bf16", "compile": True},
    "ours, padded groups": {"precision": "bf16", "compile": True},
    "eager fp32": {"precision": "fp32", "compile": False},
    "fp16 NCHW": {"precision": "fp16", "compile": False},
}
TOLERANCE = 1e-9  # float64, over 5 steps
ROOM = 0.85  # of the device's memory: what may be planned with
TINY_GROUPS = {"depth": 2, "w_0": 16, "w_a": 12.0, "w_m": 1.5, "group_width": 5}  # compiles in time


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("gpu_training.json"))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    arguments = parser.parse_args()
    bench = Bench(dry=arguments.dry_run, rounds=arguments.rounds)
    started = time.monotonic()
    for part in arguments.only:
        try:
            in_time = time.monotonic() - started <= arguments.seconds
            bench.results[part] = bench.run(part) if in_time else {"left out": "no time"}
        except Exception as error:  # the other parts are worth their minutes
            traceback.print_exc()
            bench.results[part] = {"failed": f"{type(error).__name__}: {error}"}
        bench.release()
        print(
            part, json.dumps(bench.results[part], indent=1), f"{time.monotonic() - started:.0f} s", flush=True
        )
        arguments.output.write_text(json.dumps(bench.results, indent=1) + "\n")
    failed = any(isinstance(result, dict) and "failed" in result for result in bench.results.values())
    return int(failed or not bench.results.get("exact", {}).get("within", True))


class Bench:
    """The device, what is measured on it, and the results by part."""

    def __init__(self, *, dry: bool, rounds: int) -> None:
        self.dry, self.rounds = dry, 1 if dry else rounds
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.world = World(rank=0, size=1, local_rank=0, device=self.device, group=None, control=None)
        self.memory = 2**40 if dry else torch.cuda.get_device_properties(0).total_memory
        self.peak_flops = self.matrix_peak()
        name = "CPU, tiny: no figure here says anything" if dry else torch.cuda.get_device_name(0)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True
        ).stdout
        self.results: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "commit": commit.strip(),
            "matrix_peak_tflops": self.peak_flops / 1e12,
        }

    def run(self, part: str) -> dict[str, Any]:
        if part == "exact":
            return self.exact()
        return self.steps_of_10b() if part == "10b" else self.compare(part)

    def release(self) -> None:
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def matrix_peak(self) -> float:
        """FLOP/s of the best of 20 bf16 products."""
        size = 256 if self.dry else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = []
        for _ in range(20):
            before = mark(self.device)
            a @ b
            seconds.append(between(before, mark(self.device)))
        return 2 * size**3 / min(seconds)

    def recipe(self, part: str, *, rows: int, train: dict[str, Any]) -> PretrainRecipe:
        name = "seer_regnet_10b" if part == "10b" else f"seer_regnety_{part}"
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        values["data"]["batch_size"] = rows
        values["train"] = {"steps": 1000, "strategy": "ddp"} | train
        if self.dry:
            values["trunk"] = {"name": "regnet_y", "regnet": TINY_GROUPS}
            values["method"] |= {"head": {"hidden": [16], "output": 8, "batch_norm": False}, "prototypes": 16}
            for crops, size in zip(values["data"]["crops"], (64, 32), strict=True):
                crops["size"] = size
        return PretrainRecipe.model_validate(values)

    def arm(self, recipe: PretrainRecipe, *, padded: bool = False, nchw: bool = False) -> Arm:
        """The product's path; `nchw` undoes its layout."""
        with torch.device("meta"):
            method = assemble_method(recipe, group=None, total_steps=1000)
        if padded:
            pad_groups(method.trunk)
        rows = recipe.data.batch_size
        layout = torch.contiguous_format if nchw else torch.channels_last
        for trunk in method.trunks().values():
            trunk.memory_format = layout
        engine = parallelize(method, train=recipe.train, seed=0, rank_rows=rows, world=self.world)
        generator = torch.Generator(self.device).manual_seed(1)
        dtype = DTYPES[recipe.train.precision]
        crops = {
            name: torch.randn(
                (group.count * rows, 3, group.size, group.size),
                device=self.device,
                dtype=dtype,
                generator=generator,
            ).contiguous(memory_format=layout)
            for name, group in crops_by_name(recipe.data).items()
        }
        optimizer = build_optimizer(engine, recipe.optim)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.warmup_lr
        return Arm(
            recipe=recipe,
            world=self.world,
            method=method,
            engine=engine,
            optimizer=optimizer,
            scale=LossScale(enabled=recipe.train.precision == "fp16"),
            inputs=Inputs(views=crops),
        )

    def exact(self) -> dict[str, Any]:
        """Relative differences of 5 losses in float64 from eager NCHW training on one rank."""
        ways: dict[str, tuple[dict[str, Any], bool]] = {
            "eager NCHW": ({}, True),
            "channels_last": ({}, False),
            "compiled": ({"compile": True}, False),
            "checkpointed": ({"activation_checkpointing": "full"}, False),
            "compiled, checkpointed": ({"compile": True, "activation_checkpointing": "full"}, False),
        }
        losses = {}
        for name, (train, nchw) in ways.items():
            recipe = self.recipe("16gf", rows=8, train=train | {"precision": "fp64"})
            if not self.dry:
                trunk = recipe.trunk.model_copy(update={"name": "regnety_200mf"})
                recipe = recipe.model_copy(update={"trunk": trunk})
            arm = self.arm(recipe, nchw=nchw)
            losses[name] = [arm.step() for _ in range(5)]
            self.release()
        first = losses["eager NCHW"]
        worst = {
            name: max(abs(a / b - 1) for a, b in zip(own, first, strict=True)) for name, own in losses.items()
        }
        return {
            "differences": worst,
            "losses": first,
            "tolerance": TOLERANCE,
            "within": all(value <= TOLERANCE for value in worst.values()),
        }

    def compare(self, part: str) -> dict[str, Any]:
        """Arms of one trunk in turns; then checkpoints of ours."""
        rows = 4 if self.dry else ROWS[part]
        arms, flops = {}, 0.0
        for name, train in ARMS.items():
            padded = name == "ours, padded groups"
            recipe = self.recipe(part, rows=rows, train=train)
            if padded and not needs_padding(recipe):
                continue
            count = count_step(recipe, rank_rows=rows)
            flops = count.flops
            kept = count.weights + count.optimizer
            needed = len(ARMS) * kept + count.gradients + count.activations
            if needed > ROOM * self.memory or self.dry:
                recipe = self.recipe(part, rows=rows, train=train | {"activation_checkpointing": "full"})
            arms[name] = self.arm(recipe, padded=padded, nchw=name == "fp16 NCHW")
            arms[name].warm_up()
        for _ in range(self.rounds):
            for arm in arms.values():
                self.turn(arm, steps=2 if self.dry else 5)
        result = {name: self.figures(arm, rows=rows, flops=flops) for name, arm in arms.items()}
        ours = arms.pop("ours")
        arms.clear()
        return {"rows": rows, "flops_per_image": flops} | result | {"checkpoint": self.stall(ours)}

    def turn(self, arm: Arm, *, steps: int) -> None:
        cuda = self.device.type == "cuda"
        others = torch.cuda.memory_allocated() - arm.own_bytes() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            arm.step()
        if cuda:
            arm.peak = max(arm.peak, torch.cuda.max_memory_allocated() - others)

    def figures(self, arm: Arm, *, rows: int, flops: float) -> dict[str, Any]:
        rates = [rows / sum(times) for times in arm.times]
        rate = statistics.median(rates)
        names = ("forward", "backward", "optimizer")
        split = zip(names, zip(*arm.times, strict=True), strict=True)
        return {
            "images_per_second": rate,
            "range": [min(rates), max(rates)],
            "mfu": rate * flops / self.peak_flops,
            "peak_gib": arm.peak / 2**30,
            "seconds": {name: statistics.median(values) for name, values in split} | {"data": 0.0},
            "activation_checkpointing": arm.recipe.train.activation_checkpointing,
        }

    def stall(self, arm: Arm) -> dict[str, Any]:
        """How long asynchronous saves hold the training up, the first of which makes room."""
        with tempfile.TemporaryDirectory(dir=".") as folder:
            checkpoints = Checkpoints(
                Path(folder), world=self.world, method=arm.method, optimizer=arm.optimizer, minutes=60.0,
                failures_per_node_day=0.01, nodes=1, every_steps=None, keep_last=1, keep_every_steps=None,
                start_over=False,
            )  # fmt: skip
            stalls = [self.seconds(lambda: checkpoints.save(arm.done, {}, wait=False))]
            arm.step()
            checkpoints.finish()
            stalls.append(self.seconds(lambda: checkpoints.save(arm.done, {}, wait=False)))
            beside = self.seconds(arm.step)
            checkpoints.finish()
            whole = self.seconds(lambda: checkpoints.save(arm.done + 1, {}, wait=True))
            alone = self.seconds(arm.step)
        return {"stalls": stalls, "step_beside": beside, "step_alone": alone, "synchronous": whole}

    def seconds(self, act: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        act()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - before

    def steps_of_10b(self) -> dict[str, Any]:
        """Every block recomputed: weights, gradients and momentum alone are 12 bytes a weight."""
        rows = 2 if self.dry else 4
        results: dict[str, Any] = {"rows": rows}
        plain = self.recipe("10b", rows=rows, train={"precision": "bf16"})
        flops = count_step(plain, rank_rows=rows).flops
        train = {"precision": "bf16", "compile": True, "activation_checkpointing": "full"}
        arm = self.arm(self.recipe("10b", rows=rows, train=train))
        for name in ("plain", "padded groups"):
            if name == "padded groups":  # the same weights: there is no room for others
                pad_groups(arm.method.trunk)
                torch._dynamo.reset()
            arm.warm_up() if name == "plain" else arm.step()
            arm.times.clear()
            self.turn(arm, steps=2)
            results[name] = self.figures(arm, rows=rows, flops=flops)
        return results


def needs_padding(recipe: PretrainRecipe) -> bool:
    """Whether a trunk has group widths that are no multiple of 8."""
    with torch.device("meta"):
        return pad_groups(assemble_method(recipe, group=None, total_steps=1000).trunk) > 0


if __name__ == "__main__":
    sys.exit(main())
