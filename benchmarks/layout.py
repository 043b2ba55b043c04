"""Claim: which layout trains a trunk faster, `train.channels_last` true or false, differs between trunks.

    python benchmarks/layout.py [--device cuda] [--rows 16] [--size 96] [--rounds 7] [TRUNK ...]

Forward and backward passes of each trunk, in both layouts by turns, as the training lays them out. Prints for
each trunk the images per second of both, and the median over rounds of the ratio of seconds, channels_last
false over true, with its least and greatest: above 1, true is the faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.models.trunk import arrange_inputs, arrange_weights, build_trunk, choose_layout
from pipeline.parallel.initialize import initialize
from pipeline.recipe.trunk import Architecture

TRUNKS = ["resnet18", "resnet50", "regnety_400mf", "regnety_1_6gf", "regnety_16gf"]


def arm(name: str, images: torch.Tensor, *, channels_last: bool) -> Callable[[], None]:
    """A step of a trunk in a layout."""
    trunk = build_trunk(Architecture(name=name)).to(images.device)
    choose_layout(trunk, channels_last=channels_last)
    arrange_weights(trunk)
    initialize(nn.ModuleDict({"trunk": trunk}), seed=0)
    arrange_inputs(trunk)
    bf16 = images.device.type == "cuda"

    def step() -> None:
        trunk.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = trunk(images).square().mean()
        loss.backward()

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """On a CPU, of all its threads together: another program on the machine counts for less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trunks", nargs="*", default=TRUNKS)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rows", default=16, type=int)
    parser.add_argument("--size", default=96, type=int)
    parser.add_argument("--rounds", default=7, type=int)
    options = parser.parse_args()
    for name in options.trunks:
        images = torch.randn(options.rows, 3, options.size, options.size, device=options.device)
        images = images.contiguous(memory_format=torch.channels_last)  # as the augmentation leaves them
        steps = {chosen: arm(name, images, channels_last=chosen) for chosen in (True, False)}
        for step in steps.values():
            seconds(step, options.device)  # the first chooses kernels
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(options.rounds):
            for chosen in (True, False) if turn % 2 else (False, True):
                taken[chosen].append(seconds(steps[chosen], options.device))
        ratios = [nchw / nhwc for nchw, nhwc in zip(taken[False], taken[True], strict=True)]
        rates = {
            f"channels_last={str(chosen).lower()}": round(options.rows / statistics.median(times), 1)
            for chosen, times in taken.items()
        }
        ratio = [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        print(json.dumps({"trunk": name, "images/s": rates, "ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()
