"""SwAV, and with it SEER: swapped prediction of online cluster assignments.

Caron et al., 2020 (https://arxiv.org/abs/2006.09882); Goyal et al., 2021 (https://arxiv.org/abs/2103.01988).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    rank_in,
    world_size,
)
from pipeline.methods.method import Method
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.models.heads import ProjectionHead, Prototypes
from pipeline.recipe.method import SwAV


class SwAVMethod(Method):
    """A trunk, its projection head and prototypes, and the loss of one coupled batch.

    Crops of one size pass the trunk together; the head then sees the features of all crops at once, as in the
    authors' code, so a head with BatchNorm takes its statistics over all sizes.

    Args:
        trunk: images to float features (N, feature_dim).
        section: the recipe's `method`.
        views: how many of a sample `Inputs` has, by name; those under the first name get the assignments.
        batch_size: samples of the coupled batch, over all ranks; a multiple of the number of ranks.
        group: ranks that share the coupled batch; None for one process.

    Raises:
        UserError: if there is one view only.
    """

    queue: Tensor
    queue_filled: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        section: SwAV,
        *,
        feature_dim: int,
        views: Mapping[str, int],
        batch_size: int,
        group: ProcessGroup | None,
    ) -> None:
        if sum(views.values()) < 2:
            raise UserError(
                f"method {section.name} compares crops of an image, and data.crops gives one: set count: 2"
            )
        super().__init__()
        self.trunk = trunk
        self.head = ProjectionHead(feature_dim, section.head)
        self.prototypes = Prototypes(section.head.output, section.prototypes)
        self.section = section
        self.group = group
        self.rank_rows = batch_size // world_size(group)
        self.assignment_views = next(iter(views.values()))
        if section.queue_length:
            # Replicated, in the order of the global batches, so that a checkpoint serves any number of ranks.
            shape = (self.assignment_views, section.queue_length, section.head.output)
            self.register_buffer("queue", torch.zeros(shape))
            self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self._full = False  # so that a device is asked no more once the queue is
        self._waiting: list[Tensor] = []
        self._waiting_step = -1

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: under each name (views * rank_rows, 3, size, size), view-major. The views of the first
                name get the assignments; every other view of a sample predicts them.
            step: the optimizer step, which decides on the prototypes' freeze and on the queue.

        Returns:
            loss: scalar, equal on every rank.
            prototype_entropy: nats; of the mean prediction over the coupled batch. At most ln(prototypes); a
                collapse onto few prototypes shows as a fall.
            assignment_entropy: nats; mean over samples. At ln(prototypes) the embeddings are all alike.
            assignment_information: nats; what that is below ln(prototypes). At 0 the assignments say nothing,
                the loss stays at ln(prototypes), and nothing is learned.
            embedding: (rank_rows, dim), unit length, detached: the first view's.
        """
        features = _features_by_size(self.trunk, list(inputs.views.values()))
        projected = self.head(features)
        with torch.autocast(projected.device.type, enabled=False):
            wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
            embeddings = F.normalize(wide, dim=1)
            scores = self.prototypes(embeddings, frozen=step < self.section.freeze_prototypes_steps)
            scores = scores.view(-1, self.rank_rows, scores.shape[1])
            views = embeddings.detach().view(-1, self.rank_rows, embeddings.shape[1])[: self.assignment_views]
            assignments = self._assign(scores.detach()[: self.assignment_views], step)
            self._remember(views, step)
            loss = swav_loss(scores, assignments, temperature=self.section.temperature, group=self.group)
            diagnostics = _entropies(
                scores.detach()[: self.assignment_views],
                assignments,
                temperature=self.section.temperature,
                group=self.group,
            )
        return {"loss": loss, **diagnostics, "embedding": views[0]}

    def after_step(self, step: int) -> None:
        """Put the prototypes back on the sphere, and this step's embeddings into the queue.

        A step that the guard skipped is not followed by this call, so a broken batch never enters the queue.
        """
        self.prototypes.normalise()
        waiting = self._waiting if self._waiting_step == step else []
        self._waiting = []
        for views in waiting:
            rows = all_gather_rows(views.transpose(0, 1), self.group).transpose(0, 1)
            length = self.queue.shape[1]
            self.queue.copy_(torch.cat([rows, self.queue], dim=1)[:, :length])
            self.queue_filled.add_(rows.shape[1]).clamp_(max=length)

    def trunks(self) -> dict[str, nn.Module]:
        """One, which learns."""
        return {"student": self.trunk}

    def forget_batches(self) -> None:
        """Drop what the next `after_step` would put into the queue: the training goes back."""
        self._waiting, self._waiting_step, self._full = [], -1, False

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights, and apart from them biases and norms, which some recipes leave undecayed."""
        return weights_and_the_rest(self.parameters())

    def prototype_scores(self, images: Tensor) -> Tensor:
        """Cosines of each image with each prototype, (N, prototypes)."""
        scores: Tensor = self.prototypes(F.normalize(self.head(self.trunk(images)), dim=1))
        return scores

    @torch.no_grad()
    def _assign(self, scores: Tensor, step: int) -> Tensor:
        """Assignments (views, rank_rows, prototypes), with the queue's help when it is on and full."""
        section = self.section
        if section.queue_length and step >= section.queue_start_step and self._queue_is_full():
            # Each rank scores its slice; which rank scores a row changes nothing in the result.
            ranks = world_size(self.group)
            past = self.queue.tensor_split(ranks, dim=1)[rank_in(self.group)].to(scores.dtype)
            scores = torch.cat([scores, self.prototypes(past)], dim=1)
        assignments = sinkhorn(
            scores, epsilon=section.epsilon, iterations=section.sinkhorn_iterations, group=self.group
        )
        return assignments[:, : self.rank_rows]

    def _queue_is_full(self) -> bool:
        self._full = self._full or int(self.queue_filled) == self.queue.shape[1]
        return self._full

    def _remember(self, views: Tensor, step: int) -> None:
        if not (self.section.queue_length and self.training):
            return
        if self._waiting_step != step:
            self._waiting, self._waiting_step = [], step
        self._waiting.append(views)


def _features_by_size(trunk: nn.Module, crops: list[Tensor]) -> Tensor:
    """Trunk features of all crops, in the order of `crops`, with one pass per image size."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, group in enumerate(crops):
        by_size.setdefault(group.shape[1:], []).append(index)
    features: dict[int, Tensor] = {}
    for indices in by_size.values():
        images = [crops[index] for index in indices]
        result = trunk(images[0] if len(images) == 1 else torch.cat(images))
        features.update(zip(indices, result.split([len(group) for group in images]), strict=True))
    return torch.cat([features[index] for index in range(len(crops))])


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int, group: ProcessGroup | None = None) -> Tensor:
    """Assignments that spread the samples of the coupled batch equally over the prototypes.

    Equations 3 to 5 of Caron et al., 2020 (https://arxiv.org/abs/2006.09882): the matrix Diag(u) exp(scores /
    epsilon) Diag(v) with equal mass per prototype and per sample, by iterations of Sinkhorn and Knopp, of
    which the last scales the samples.

    The first iteration is done on logarithms. After it every sample's row sums to 1 and every prototype holds
    at least 1 / (samples * prototypes) of a sample, so the others are done on the matrix itself: any epsilon,
    any number of prototypes and any batch stay within float32.

    Args:
        scores: cosines of this rank's samples, (..., samples, prototypes), float32 or wider; ranks may hold
            different numbers of samples. Leading dimensions are independent problems.
        epsilon: entropic regularisation; 0.05 in SwAV, 0.03 in SEER.
        iterations: at least 1; 3 in SwAV, 10 in SEER.
        group: ranks that share the batch; None for one process.

    Returns:
        Like `scores`; each row sums to 1.
    """
    log = scores / epsilon
    highest = all_reduce_max(log.amax(-2, keepdim=True), group)
    log -= highest + all_reduce_sum((log - highest).exp_().sum(-2, keepdim=True), group).log()
    matrix = log.softmax(-1)
    prototype_scale = torch.ones_like(highest)
    sample_scale = matrix.new_ones(matrix.shape[:-1]).unsqueeze(-2)
    for _ in range(iterations - 1):
        prototype_scale = 1 / all_reduce_sum(sample_scale @ matrix, group)
        # The scales drift apart by samples / prototypes each time: a power of two brings them back exactly.
        prototype_scale = torch.ldexp(
            prototype_scale, -torch.frexp(prototype_scale.amax(-1, keepdim=True)).exponent
        )
        sample_scale = 1 / (prototype_scale @ matrix.mT)
    return matrix * prototype_scale * sample_scale.mT


def swav_loss(
    scores: Tensor, assignments: Tensor, *, temperature: float, group: ProcessGroup | None = None
) -> Tensor:
    """Swapped prediction, with multi-crop.

    Equations 1, 2 and 6 of Caron et al., 2020 (https://arxiv.org/abs/2006.09882): the mean over samples, over
    assignment views i and over views v other than i of -sum_k q_i^(k) log softmax_k(score_v / temperature).

    Args:
        scores: of all views on this rank, (views, samples, prototypes).
        assignments: of the first views, (assignment_views, samples, prototypes), without gradient.
        temperature: of the softmax; 0.1 in the paper.
        group: ranks that share the coupled batch, equally many samples on each; None for one process.

    Returns:
        A scalar, equal on every rank of the group.

    Raises:
        ValueError: if there are fewer than two views, or more assignments than views.
    """
    views, samples, _ = scores.shape
    assigned = len(assignments)
    if views < 2 or assigned > views:
        raise ValueError(
            f"{assigned} assignment views of {views}: swapped prediction needs two views or more"
        )
    # A view's targets are summed first: one product per view instead of one per pair.
    everyone = assignments.sum(0)
    log_probabilities = F.log_softmax(scores / temperature, dim=-1)
    own = torch.stack([(everyone - assignments[view]) for view in range(assigned)])
    total = (own * log_probabilities[:assigned]).sum()
    total = total + (everyone * log_probabilities[assigned:]).sum()
    pairs = assigned * (views - 1)
    return -all_reduce_sum(total, group) / (pairs * samples * world_size(group))


@torch.no_grad()
def _entropies(
    scores: Tensor, assignments: Tensor, *, temperature: float, group: ProcessGroup | None
) -> dict[str, Tensor]:
    """Entropy of the mean prediction, and mean entropy of the assignments, over the coupled batch."""
    mean_prediction = (scores / temperature).softmax(-1).mean((0, 1))
    assignment_entropy = torch.special.entr(assignments).sum(-1).mean()
    shared = all_reduce_sum(torch.cat([mean_prediction, assignment_entropy[None]]), group) / world_size(group)
    return {
        "prototype_entropy": torch.special.entr(shared[:-1]).sum(),
        "assignment_entropy": shared[-1],
        "assignment_information": math.log(scores.shape[-1]) - shared[-1],
    }
