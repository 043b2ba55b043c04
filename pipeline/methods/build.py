"""From a recipe to the method that is trained."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.collectives import world_size
from pipeline.methods.swav import SwAVMethod
from pipeline.models.initialize import initialize
from pipeline.models.trunk import build_trunk
from pipeline.recipe import PretrainRecipe

Method = SwAVMethod


def build_method(recipe: PretrainRecipe, *, group: ProcessGroup | None) -> Method:
    """The recipe's method on its trunk, in float32 on the CPU, with weights drawn from the recipe's seed.

    The weights are equal on every rank, whatever the global random state.

    Raises:
        UserError: as `assemble_method` does.
    """
    method = assemble_method(recipe, group=group)
    initialize(method, seed=recipe.seed)
    return method


def assemble_method(recipe: PretrainRecipe, *, group: ProcessGroup | None) -> Method:
    """The recipe's method on its trunk, without meaningful weights; on `meta` it takes no memory.

    Raises:
        UserError: if the batch does not divide over the ranks, or the crops are too few for the method.
    """
    ranks = world_size(group)
    batch_size = recipe.data.batch_size
    if batch_size % ranks:
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {ranks} ranks: use a multiple of {ranks}, or "
            "another number of ranks"
        )
    if sum(crops.count for crops in recipe.data.crops) < 2:
        raise UserError(
            f"method {recipe.method.name} compares crops of an image, and data.crops gives one: set count: 2"
        )
    trunk = build_trunk(recipe.trunk)
    return SwAVMethod(
        trunk,
        recipe.method,
        feature_dim=trunk.feature_dim,
        batch_size=batch_size,
        assignment_views=recipe.data.crops[0].count,
        group=group,
    )
