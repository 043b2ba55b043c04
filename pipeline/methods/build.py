"""From a recipe to the method that is trained: the one table of methods."""

from __future__ import annotations

from typing import Any

from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.data.modality import modality_of
from pipeline.distributed.collectives import world_size
from pipeline.methods.avid import AVIDMethod
from pipeline.methods.barlow_twins import BarlowTwinsMethod
from pipeline.methods.byol import BYOLMethod
from pipeline.methods.classification import ClassificationMethod
from pipeline.methods.method import Method
from pipeline.methods.simsiam import SimSiamMethod
from pipeline.methods.swav import SwAVMethod
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.method import AVID, BYOL, BarlowTwins, Classification, SimSiam, SwAV
from pipeline.recipe.pretrain import PretrainRecipe


def assemble_method(
    recipe: PretrainRecipe, *, total_steps: int, group: ProcessGroup | None, samples: int | None = None
) -> Method:
    """The recipe's method on its trunk, without meaningful weights; on `meta` it takes no memory.

    Args:
        samples: of the dataset, for a method that remembers each; None where nothing is trained.

    Raises:
        UserError: if the batch does not divide over the ranks, or the views are not what the method compares.
    """
    ranks = world_size(group)
    batch_size = recipe.data.batch_size
    if batch_size % ranks:
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {ranks} ranks: use a multiple of {ranks}, or "
            "another number of ranks"
        )
    trunk = build_trunk(recipe.trunk)
    common: dict[str, Any] = {
        "feature_dim": declared(trunk).feature_dim,
        "views": modality_of(recipe.data).counts,
        "batch_size": batch_size,
        "group": group,
    }
    match recipe.method:
        case SwAV() as section:
            return SwAVMethod(trunk, section, **common)
        case BarlowTwins() as section:
            return BarlowTwinsMethod(trunk, section, **common)
        case BYOL() as section:
            teacher = None if section.shared_weights else build_trunk(recipe.trunk)
            return BYOLMethod(trunk, section, teacher_trunk=teacher, total_steps=total_steps, **common)
        case SimSiam() as section:
            return SimSiamMethod(trunk, section, **common)
        case AVID() as section:
            audio_trunk = build_trunk(recipe.trunk_section("audio"))
            return AVIDMethod(
                trunk,
                audio_trunk,
                section,
                feature_dim=common["feature_dim"],
                audio_feature_dim=declared(audio_trunk).feature_dim,
                batch_size=batch_size,
                samples=samples,
                seed=recipe.seed,
                group=group,
            )
        case Classification() as section:
            average = None if section.ema is None else build_trunk(recipe.trunk)
            return ClassificationMethod(
                trunk, section, average_trunk=average, total_steps=total_steps, seed=recipe.seed, **common
            )
