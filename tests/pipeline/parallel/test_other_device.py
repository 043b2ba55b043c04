"""Methods compute where their inputs are: no tensor that they make themselves stays behind on the CPU.

A build for CPUs has no GPU, not even for tensors without values. PyTorch's place for devices of others stands
in for one; what it registers stays, hence a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from cluster.rank.torch_dist import World
from cluster.typed_yaml import load_recipe
from pipeline.data.modality import modality_of
from pipeline.methods.build import assemble_method
from pipeline.parallel.batchnorm import convert_batchnorm
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.precision import arithmetic
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.guard import Guard
from pipeline.train.optim import build_optimizer, set_learning_rate

_setup_privateuseone_for_python_backend("elsewhere")
torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
library = torch.library.Library("_", "IMPL")
library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
DEVICE, ROWS = torch.device("elsewhere:0"), 8


def move(method):
    for module in method.modules():
        for name, value in module._parameters.items():
            if value is not None:
                there = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(there, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=DEVICE)


for name in sys.argv[1:]:
    recipe = load_recipe(
        PretrainRecipe,
        name,
        [f"data.batch_size={ROWS}", *(["method.classes=10"] if "finetune" in name else [])],
        kind="pretrain",
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            method = assemble_method(recipe, total_steps=10, group=None)
        move(method)
        convert_batchnorm(method, rank_rows=ROWS, sync_samples=None, group=None)
        alone = World(rank=0, size=1, local_rank=0, device=DEVICE, group=None, control=None)
        engine = ReplicatedEngine(method, world=alone)
        optimizer = build_optimizer(engine, recipe.optim)
        guard = Guard(method, world=alone, max_skipped=3, spike_deviations=20.0)
        inputs = modality_of(recipe.data).placeholders(ROWS, dtype=torch.float32)
        views = {name: view.to(DEVICE) for name, view in inputs.views.items()}
        inputs = replace(inputs, views=views, targets=inputs.targets and inputs.targets.to(DEVICE))
        for step in range(2):
            set_learning_rate(optimizer, 0.1)
            guard.remember()
            with arithmetic(recipe.train, DEVICE):
                terms = engine(inputs, step)
            terms["loss"].backward()
            optimizer.step()
            engine.after_step(step)
            guard.restore()
            optimizer.zero_grad(set_to_none=True)
        held = [*terms.values(), *method.parameters(), *method.buffers()]
        held += [each for state in optimizer.state.values() for each in state.values() if each.ndim]
        assert {each.device for each in held} == {DEVICE}, {each.device for each in held}
    print(name)
"""
RECIPES = [
    "cifar10_swav",
    "cifar10_byol",
    "cifar10_simsiam",
    "cifar10_barlow_twins",
    "transfer/finetune_cifar10",
]


@pytest.mark.slow
def test_methods_and_optimizers_stay_on_the_device_of_their_inputs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *RECIPES], capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.returncode) == (RECIPES, 0), done.stderr[-3000:]
