"""A sharded trunk as one whole copy."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.distributed.sharded import is_piece, named_tensors, whole
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture


def whole_trunk(trunk: nn.Module, section: Architecture, *, keep: bool) -> nn.Module | None:
    """The trunk in one piece, for a rank to call alone: itself, or a copy where it is sharded. All ranks call
    this together.

    Args:
        section: what it was built from.
        keep: whether this rank wants it; None is returned otherwise.
    """
    if not any(is_piece(parameter) for parameter in trunk.parameters()):
        return trunk
    tensors = {}
    for name, tensor in named_tensors(trunk):
        full = whole(tensor.detach(), tensor)
        if keep:
            tensors[name] = full
    if not keep:
        return None
    with torch.device("meta"):
        copy = build_trunk(section)
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)
