"""What `submit plan` says, beside what is counted in a real step, and by hand."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_recipe
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.parallel.initialize import initialize
from pipeline.plan.cost import GPUS, Estimate, estimate
from pipeline.plan.step_count import StepCount, count_step, measure_peak, prepare, step_counter
from pipeline.recipe.pretrain import PretrainRecipe

TRUNK = {"name": "regnety_400mf"}
CROPS = [{"count": 2, "size": 96, "scale": [0.3, 1.0]}, {"count": 2, "size": 64, "scale": [0.1, 0.3]}]


def recipe_with(**train: Any) -> Any:
    return make_recipe(Path("nowhere"), data__crops=CROPS, train={"steps": 100} | train)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("fp32", "none"), ("fp32", "full"), ("bf16", "full")]
)
def test_the_bytes_of_a_step_are_those_of_a_real_one(precision: str, checkpointing: str) -> None:
    recipe = recipe_with(precision=precision, activation_checkpointing=checkpointing)
    counted = count_step(recipe, rank_rows=6)
    method = prepare(recipe, rank_rows=6)
    initialize(method, seed=0)
    real = measure_peak(method, recipe, rank_rows=6)
    together = counted.weights + counted.gradients + counted.optimizer + counted.buffers + counted.activations
    assert together == pytest.approx(real["Total"], rel=0.02)
    assert (counted.weights, counted.gradients) == (real["PARAM"], real["GRAD"])
    assert (counted.optimizer, counted.buffers) == (real["OPT"], real["BUFFER"])


@pytest.mark.slow
def test_flops_are_three_times_forward_and_four_with_recomputation() -> None:
    # 400MF is the name: multiply-adds of one 224 px image without its classifier, which has 0.44 million.
    crops = [{"count": 2, "size": 224, "scale": [0.3, 1.0]}]
    recipe = make_recipe(Path("nowhere"), trunk=TRUNK, data__crops=crops)
    plain = count_step(recipe, rank_rows=2)
    assert plain.forward_flops / 2 == pytest.approx(2 * 0.404e9, rel=0.02)
    assert plain.flops / plain.forward_flops == pytest.approx(3, abs=0.05)
    checkpointed = {"steps": 1, "activation_checkpointing": "full"}
    again = make_recipe(Path("nowhere"), trunk=TRUNK, data__crops=crops, train=checkpointed)
    again = count_step(again, rank_rows=2)
    assert again.flops / again.forward_flops == pytest.approx(4, abs=0.1)


@pytest.mark.slow
def test_activations_lie_on_a_line() -> None:
    recipe = make_recipe(Path("nowhere"), data__crops=CROPS)
    count = step_counter(recipe, near=4)
    assert count(12).activations == pytest.approx(count_step(recipe, rank_rows=12).activations, rel=0.02)


COUNTED = StepCount(
    matrices=1_000_000_000,
    vectors=1_000_000,
    frozen_matrices=0,
    frozen_vectors=0,
    trunk=900_000_000,
    largest_blocks=(300_000_000, 200_000_000),
    forward_flops=1e12,
    flops=3e12,
    weights=4_004_000_000,
    gradients=4_004_000_000,
    optimizer=4_004_000_000,
    buffers=1_000_000,
    activations=10_000_000_000,
    passes=2,
    batch_norms=200,
)


def planned(gpus: int, counted: StepCount = COUNTED, **train: Any) -> Estimate:
    recipe = make_recipe(
        Path("nowhere"), data__batch_size=8192, train={"steps": 1000, "precision": "bf16"} | train
    )
    return estimate(
        recipe,
        gpus=gpus,
        gpus_per_node=8,
        gpu=GPUS["h100"],
        mfu=0.4,
        steps=1000,
        failures_per_node_day=0.01,
        count=lambda rows: counted,
    )


def test_one_gpu_moves_nothing_and_computes_all() -> None:
    plan = planned(1)
    assert plan.moved == {} and plan.bottleneck == "compute"
    assert plan.step_seconds == pytest.approx(8192 * 3e12 / (0.4 * 989e12))
    assert plan.days == pytest.approx(1000 * plan.step_seconds / 86_400)
    assert sum(plan.memory.values()) == pytest.approx(22.013e9) and plan.fits


def test_replicas_average_their_gradients_in_a_ring() -> None:
    plan = planned(16)
    assert plan.moved["NVLink: gradients"] == pytest.approx(2 * 4.004e9 * 15 / 16)
    assert plan.moved["network: gradients"] == pytest.approx(plan.moved["NVLink: gradients"] / 8)
    assert planned(8).moved.keys() == {"NVLink: gradients"}


def test_shards_hold_a_share_and_gather_every_block_for_each_crop_size_forward_and_backward() -> None:
    plan = planned(8, strategy="fsdp2")
    assert plan.memory["weights"] == pytest.approx(4 * (1e9 / 8 + 1e6), rel=1e-3)
    assert plan.memory["gathered"] == pytest.approx(2 * 3e8 + 6 * 2e8)
    assert plan.memory["whole gradients"] == 0
    assert plan.moved["NVLink: weights"] == pytest.approx(4 * 2 * 1e9 * 7 / 8)
    assert plan.moved["NVLink: gradients"] == pytest.approx(2 * 4 * 1e9 * 7 / 8)  # once for each crop size
    thrice = planned(8, strategy="fsdp2", accumulate=2).moved["NVLink: gradients"]
    assert thrice == pytest.approx(3 * 4 * 1e9 * 7 / 8)  # what the first micro-batch left, too
    hybrid = planned(64, strategy="fsdp2", shard_ranks=8)
    assert "network: weights" not in hybrid.moved
    assert hybrid.moved["network: gradients of copies"] == pytest.approx(2 * 2 * 7 / 8 * 4e9 / 8)
    fairscale = planned(8, strategy="fairscale")
    assert fairscale.memory["whole gradients"] == 4e9  # they wait for the other crop size's pass
    assert fairscale.moved["NVLink: gradients"] == pytest.approx(4 * 1e9 * 7 / 8)
    assert planned(8, strategy="fairscale", activation_checkpointing="full").memory["whole gradients"] == 0


def test_a_teacher_is_gathered_for_its_forward_pass_and_has_no_gradient_or_momentum() -> None:
    counted = replace(COUNTED, frozen_matrices=400_000_000, frozen_vectors=400_000)
    assert planned(16, counted).moved["NVLink: gradients"] == pytest.approx(2 * 4 * 0.6006e9 * 15 / 16)
    sharded = planned(8, counted, strategy="fsdp2")
    assert sharded.moved["NVLink: weights"] == pytest.approx(2 * 2 * 1.6e9 * 7 / 8)
    assert sharded.moved["NVLink: gradients"] == pytest.approx(2 * 4 * 0.6e9 * 7 / 8)
    assert sharded.checkpoint_bytes == pytest.approx(2 * 4 * 1.001e9 - 4 * 0.4004e9)
    method = {"name": "byol", "projector": [16, 8], "predictor": 16}
    byol = make_recipe(Path("nowhere"), method=method, data__crops=CROPS[:1])
    teacher = count_step(byol, rank_rows=4)
    assert 0 < teacher.frozen_matrices < teacher.matrices / 2


@pytest.mark.slow
def test_the_command_prints_a_table_json_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[int, StepCount] = {}

    def count_once(recipe: PretrainRecipe, *, rank_rows: int) -> StepCount:
        """The table and the JSON are of the same recipe."""
        if rank_rows not in counted:
            counted[rank_rows] = count_step(recipe, rank_rows=rank_rows)
        return counted[rank_rows]

    monkeypatch.setattr("pipeline.plan.step_count.count_step", count_once)
    plot = tmp_path / "plan.svg"
    words = [
        "plan",
        "--recipe",
        "demo",
        "--nodes",
        "1",
        "--gpu",
        "h200",
        "--plot",
        str(plot),
        "train.steps=10",
    ]
    words += ["data.batch_size=64", "train.epochs=null", "trunk.regnet.depth=2"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert sorted(counted) == [8]  # the rows of a rank: counted once
    assert "parameters" in shown.output and "bound by" in shown.output
    assert "</svg>" in plot.read_text()
    values = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [each["gpus"] for each in values] == [1, 2, 4, 8, 16, 32, 64]
    monkeypatch.setattr("pipeline.plan.step_count.count_step", None)  # who is refused need not wait for it
    refused = CliRunner().invoke(app, [*words, "data.batch_size=60"])
    assert refused.exit_code == 2 and "does not divide over 8 GPUs" in refused.output
    words[words.index("h200")] = "v100-32"
    refused = CliRunner().invoke(app, [*words, "train.precision=bf16"])
    assert refused.exit_code == 2 and "a V100 has no bf16: give train.precision=fp16" in refused.output


AVID = {
    "data": {"root": "nowhere", "batch_size": 2048, "clip": {"size": 32}, "audio": {}},
    "trunk": {"name": "r2plus1d_10", "width": 4},
    "audio_trunk": {"name": "conv2d_10", "width": 4},
    "method": {"name": "avid", "head": {"hidden": [8]}, "bank_dtype": "fp16", "cma": {"positives": 32}},
    "optim": {"name": "adam", "lr": 1e-3},
    "train": {"steps": 10, "precision": "bf16", "activation_checkpointing": "full"},
}


def test_a_bank_of_a_billion_on_64_nodes_is_what_can_be_computed_by_hand() -> None:
    recipe = PretrainRecipe.model_validate(AVID)
    numbers = {field.name: 1 for field in fields(StepCount)} | {"largest_blocks": (1, 1)}
    counted = StepCount(**numbers)  # type: ignore[arg-type]

    def on(gpus: int) -> Estimate:
        return estimate(
            recipe,
            gpus=gpus,
            gpus_per_node=1,
            gpu=GPUS["h200"],
            mfu=0.4,
            steps=10,
            failures_per_node_day=0.0,
            count=lambda rows: counted,
            samples=1_000_000_000,
        )

    here = on(64)
    assert here.memory["bank"] == 512e9 / 64
    assert here.memory["positives"] == 1e9 * 32 * 4 / 64
    row = 2 * 128 * 2 + 8
    seen = 2048 * (2 * 128 * 4 + 8)
    assert here.moved["network: bank"] == (32 * (1 + 32 + 1024) * row + seen) * 63 / 64
    assert here.checkpoint_bytes == pytest.approx(512e9, rel=1e-3)
    assert on(1).moved.get("network: bank", 0) == 0


@pytest.mark.slow
def test_a_bank_asks_for_the_number_of_samples(tmp_path: Path) -> None:
    file = tmp_path / "avid.yaml"
    file.write_text(json.dumps(AVID))
    asked = CliRunner().invoke(app, ["plan", "--recipe", str(file)])
    assert asked.exit_code == 2 and "with --samples" in asked.output
    told = CliRunner().invoke(app, ["plan", "--recipe", str(file), "--samples", "1000000", "--nodes", "8"])
    assert (
        "The bank has 1,000,000 rows of 512 B: 512 MB, of which a GPU holds 8.0 MB and 2.0 MB" in told.output
    )
