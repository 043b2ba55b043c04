"""BYOL: a student predicts what a teacher makes of another view; the teacher is the student's slow average.

Grill et al., 2020 (https://arxiv.org/abs/2006.07733). The paper calls them online and target network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import all_reduce_sum, world_size
from pipeline.distributed.sharded import own
from pipeline.methods.method import Method
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.methods.two_views import check_two_views, two_views
from pipeline.models.heads import MLP
from pipeline.recipe.method import BYOL


class Teacher(nn.Module):
    """A trunk and a projector: images (N, 3, H, W) to embeddings (N, dim)."""

    def __init__(self, trunk: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.projector(self.trunk(images))
        return embeddings


class BYOLMethod(Method):
    """A student (trunk, projector, predictor), its teacher, and the loss of one coupled batch.

    As published, the teacher starts from weights of its own, its BatchNorm takes the statistics of the
    batch, and each view passes the networks alone.

    Args:
        trunk: images to float features (N, feature_dim).
        section: the recipe's `method`.
        teacher_trunk: another of the same kind; None with shared weights.
        views: how many of a sample `Inputs` has, by name: two in all.
        batch_size: samples of the coupled batch, over all ranks; a multiple of the number of ranks.
        total_steps: of the whole run: the teacher stands still at its end.
        group: ranks that share the coupled batch; None for one process.

    Raises:
        UserError: if there are more views, or fewer.

    Attributes:
        teacher: None with shared weights.
    """

    def __init__(
        self,
        trunk: nn.Module,
        section: BYOL,
        *,
        teacher_trunk: nn.Module | None,
        feature_dim: int,
        views: Mapping[str, int],
        batch_size: int,
        total_steps: int,
        group: ProcessGroup | None,
    ) -> None:
        check_two_views(section.name, views)
        super().__init__()
        dim = section.projector[-1]
        self.trunk = trunk
        self.projector = MLP((feature_dim, *section.projector), end="plain")
        self.predictor = (
            nn.Identity() if section.predictor is None else MLP((dim, section.predictor, dim), end="plain")
        )
        self.teacher: Teacher | None = None
        if teacher_trunk is not None:
            self.teacher = Teacher(teacher_trunk, MLP((feature_dim, *section.projector), end="plain"))
            self.teacher.requires_grad_(not section.stop_gradient)
        self.section = section
        self.group = group
        self.rank_rows = batch_size // world_size(group)
        self.total_steps = total_steps

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: two views, under one name or two: (rank_rows, 3, size, size) each.
            step: of no meaning here.

        Returns:
            loss: scalar, equal on every rank; between 0 and 8.
            embedding: (rank_rows, dim), detached: the student's, before the predictor, of the first view.
        """
        views = two_views(inputs, rows=self.rank_rows)
        targets: list[Tensor] = []
        if self.teacher is not None:
            # Before the student: a sharded backward pass gathers ahead what the forward pass gathered last.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.section.stop_gradient):
                targets = [self.teacher(view) for view in views]
        z_a, z_b = (self.projector(self.trunk(view)) for view in views)
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        t_a, t_b = targets or (z_a, z_b)
        if self.section.stop_gradient:
            t_a, t_b = t_a.detach(), t_b.detach()
        with torch.autocast(z_a.device.type, enabled=False):
            wide = torch.promote_types(z_a.dtype, torch.float32)
            loss = byol_loss(p_a.to(wide), p_b.to(wide), t_a.to(wide), t_b.to(wide), group=self.group)
        return {"loss": loss, "embedding": z_a.detach().to(wide)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Let the teacher follow the student as it is after the step: equation 1, target = tau target +
        (1 - tau) online. The statistics of its BatchNorm are its own.
        """
        if self.teacher is None or not self.section.stop_gradient:
            return
        tau = teacher_momentum(self.section.momentum, step=step, total_steps=self.total_steps)
        student = [*self.trunk.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(
            [own(parameter) for parameter in self.teacher.parameters()],
            [own(parameter) for parameter in student],
            1 - tau,
        )

    def forget_batches(self) -> None:
        """No batch waits for `after_step`."""

    def trunks(self) -> dict[str, nn.Module]:
        """The student's, and the teacher's unless they are one."""
        teachers = {} if self.teacher is None else {"teacher": self.teacher.trunk}
        return {"student": self.trunk, **teachers}

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights, and apart from them biases and norms, which the paper neither decays nor scales."""
        return weights_and_the_rest(self.parameters())


def teacher_momentum(base: float, *, step: int, total_steps: int) -> float:
    """How much of itself the teacher keeps at a step, from 0: section 3.2 of Grill et al., 2020,
    1 - (1 - base) (cos(pi step / total_steps) + 1) / 2.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def byol_loss(
    p_a: Tensor, p_b: Tensor, t_a: Tensor, t_b: Tensor, *, group: ProcessGroup | None = None
) -> Tensor:
    """The symmetrised normalised regression.

    Equation 2 of Grill et al., 2020 (https://arxiv.org/abs/2006.07733), and the same with the views
    exchanged: the mean over samples of |p_a / |p_a| - t_b / |t_b||^2 + |p_b / |p_b| - t_a / |t_a||^2.

    Args:
        p_a, p_b: the student's predictions of the two views on this rank, (samples, dim), float32 or wider.
        t_a, t_b: the teacher's embeddings of the two views, (samples, dim).
        group: ranks that share the coupled batch, equally many samples on each; None for one process.

    Returns:
        A scalar, equal on every rank of the group.
    """
    cosines = F.cosine_similarity(p_a, t_b) + F.cosine_similarity(p_b, t_a)
    # |u - v|^2 = 2 - 2 u . v of unit vectors.
    return 4 - 2 * all_reduce_sum(cosines.sum(), group) / (len(p_a) * world_size(group))
