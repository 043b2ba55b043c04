"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipeline.recipe.pretrain import Optim


def learning_rate(optim: Optim, *, step: int, total_steps: int) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to `final_lr` (Loshchilov & Hutter, 2017,
    https://arxiv.org/abs/1608.03983, equation 5, without restarts), a constant, or steps down at the
    `milestones`.

    Args:
        optim: the recipe's section. Step `warmup_steps` is the first at the peak, `lr`.
        step: the optimizer step, from 0.
        total_steps: steps of the whole run; the cosine reaches `final_lr` there, one after the last step.

    Returns:
        The rate of this step.
    """
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / optim.warmup_steps
    if optim.schedule == "multistep":
        # A milestone of 30/90 in a run of 900 steps is step 300, whatever the division rounds to.
        passed = sum(step >= round(milestone * total_steps) for milestone in optim.milestones)
        return optim.lr * optim.gamma**passed
    if optim.schedule == "constant" or total_steps <= optim.warmup_steps:
        return optim.lr
    progress = min(1.0, (step - optim.warmup_steps) / (total_steps - optim.warmup_steps))
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2
