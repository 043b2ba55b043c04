"""How long a run is."""

from __future__ import annotations

from cluster.errors import UserError
from pipeline.data.order import plan_order
from pipeline.recipe.pretrain import PretrainRecipe


def epochs_in(recipe: PretrainRecipe, *, samples: int, steps: int) -> float:
    """How often so many steps show every image, but for those that fill no batch of an epoch."""
    data = recipe.data
    order = plan_order(samples=samples, batch_size=data.batch_size, window=data.window, seed=recipe.seed)
    return steps * recipe.train.accumulate / order.steps_per_epoch


def optimizer_steps(recipe: PretrainRecipe, *, samples: int) -> int:
    """Optimizer steps of a whole run: what training takes, and what `submit plan` foresees.

    An epoch ends with the last batch that is whole in every lane of the order; a step of several batches may
    reach from one epoch into the next, and what is left of the last one is dropped.

    Args:
        samples: of the dataset or the view of it that the run reads.

    Raises:
        UserError: if the dataset is smaller than a batch, or the epochs hold fewer batches than one step.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    data, epochs, accumulate = recipe.data, recipe.train.epochs or 0, recipe.train.accumulate
    order = plan_order(samples=samples, batch_size=data.batch_size, window=data.window, seed=recipe.seed)
    total = epochs * order.steps_per_epoch // accumulate
    if total == 0:
        raise UserError(
            f"{epochs} epochs of {order.steps_per_epoch} batches are fewer than the {accumulate} batches of "
            "one step: raise train.epochs, or lower train.accumulate or data.batch_size"
        )
    return total
