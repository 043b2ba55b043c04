"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipeline.recipe.pretrain import Optim


def learning_rate(optim: Optim, *, step: int, total_steps: int) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to `final_lr` (Loshchilov & Hutter, 2017,
    https://arxiv.org/abs/1608.03983, equation 5, without restarts), a constant, or steps down at the
    `milestones`.

    Args:
        optim: the recipe's section, which says where the warm-up ends and where the cosine begins.
        step: the optimizer step, from 0.
        total_steps: steps of the whole run; a cosine reaches `final_lr` there, one after the last step.

    Returns:
        The rate of this step.
    """
    if step < optim.warmup_steps:
        rises = max(1, optim.warmup_steps - optim.warmup_includes_peak)
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / rises
    if optim.schedule == "multistep":
        # A milestone of 30/90 in a run of 900 steps is step 300, whatever the division rounds to.
        passed = sum(step >= round(milestone * total_steps) for milestone in optim.milestones)
        return optim.lr * optim.gamma**passed
    if optim.schedule == "constant" or total_steps <= optim.warmup_steps:
        return optim.lr
    start = 0 if optim.schedule == "cosine_of_run" else optim.warmup_steps
    progress = min(1.0, (step - start) / (total_steps - start))
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def steps_of_head_alone(optim: Optim, *, total_steps: int) -> int:
    """How many steps at the beginning of a run only the classifier's head learns."""
    return round((optim.head_first or 0) * total_steps)
