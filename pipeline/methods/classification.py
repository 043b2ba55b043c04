"""Classification: a linear head on a trunk, both trained on labelled images.

Fine-tuning, and pretraining on hashtags (Mahajan et al., 2018, https://arxiv.org/abs/1805.00932).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import all_reduce_sum, rank_in, world_size
from pipeline.distributed.sharded import own
from pipeline.methods.dropout import dropout
from pipeline.methods.method import Method
from pipeline.methods.mixing import draw_mix, mix
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.recipe.method import Classification


class ClassificationMethod(Method):
    """A trunk, its head, and if the recipe says so the average of both; and the loss of one coupled batch.

    Args:
        trunk: images to float features (N, feature_dim).
        section: the recipe's `method`.
        average_trunk: another of the same kind, for the average; None without one.
        views: how many of a sample `Inputs` has, by name: one.
        batch_size: samples of the coupled batch, over all ranks; a multiple of the number of ranks.
        total_steps: of the whole run.
        seed: of what is mixed and dropped.
        group: ranks that share the coupled batch; None for one process.

    Raises:
        UserError: if there is not one view, a group of mixed rows would span ranks, or nobody has counted the
            classes.
    """

    def __init__(
        self,
        trunk: nn.Module,
        section: Classification,
        *,
        average_trunk: nn.Module | None,
        feature_dim: int,
        views: Mapping[str, int],
        batch_size: int,
        total_steps: int,
        seed: int,
        group: ProcessGroup | None,
    ) -> None:
        if sum(views.values()) != 1:
            raise UserError(
                "method classification is shown one crop of an image, and data.crops gives "
                f"{sum(views.values())}: give one group with count: 1"
            )
        if section.classes is None:
            raise UserError(
                "method.classes is counted from the data when a run begins: without data, give it, such as "
                "method.classes=1000"
            )
        rank_rows = batch_size // world_size(group)
        if (section.mixup or section.cutmix) and rank_rows % section.mix_rows:
            raise UserError(
                f"method.mix_rows {section.mix_rows} does not divide the {rank_rows} images of a rank: use a "
                "divisor of that, other ranks, or another data.batch_size"
            )
        super().__init__()
        self.trunk = trunk
        self.head = LinearHead(feature_dim, section.classes, deviation=section.head_deviation)
        self.average: Classifier | None = None
        if average_trunk is not None:
            head = LinearHead(feature_dim, section.classes, deviation=section.head_deviation)
            self.average = Classifier(average_trunk, head).requires_grad_(False)
        self.section = section
        self.classes: int = section.classes
        self.group = group
        self.rank_rows = rank_rows
        self.total_steps = total_steps
        self.seed = seed
        if section.freeze == "trunk":
            trunk.requires_grad_(False)
        elif section.freeze == "batch_norm":
            for layer in _batch_norms(trunk):
                layer.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        if self.section.freeze == "trunk":
            self.trunk.eval()
        elif self.section.freeze == "batch_norm":
            for layer in _batch_norms(self.trunk):
                layer.eval()
        return self

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: one view, (rank_rows, 3, size, size), and targets.
            step: of no meaning here.

        Returns:
            loss: scalar, equal on every rank: the cross-entropy.
            train_top1: the share of images whose likeliest class has the largest share of their target.
            embedding: (rank_rows, feature_dim), detached: the trunk's features.
        """
        (images,) = inputs.views.values()
        if inputs.targets is None:
            raise ValueError("a loader without targets")
        wide = torch.promote_types(images.dtype, torch.float32)
        shares = inputs.targets.shares(self.classes, dtype=wide)
        if self.section.label_smoothing:
            shares = shares.lerp(torch.full_like(shares, 1 / self.classes), self.section.label_smoothing)
        if self.section.mixup or self.section.cutmix:
            groups = self.rank_rows // self.section.mix_rows
            drawn = draw_mix(
                self.section,
                seed=self.seed,
                number=inputs.number,
                first=rank_in(self.group) * groups,
                groups=groups,
            )
            images, shares = mix(images, shares, drawn)
        features = self.trunk(images)
        shown = features
        if self.section.dropout:
            first = rank_in(self.group) * self.rank_rows
            shown = dropout(features, self.section.dropout, seed=self.seed, number=inputs.number, first=first)
        logits = self.head(shown)
        with torch.autocast(features.device.type, enabled=False):
            loss = soft_cross_entropy(logits, shares, group=self.group)
            right = (logits.detach().argmax(1) == shares.argmax(1)).to(wide)
            share = all_reduce_sum(right.sum(), self.group) / (len(right) * world_size(self.group))
        return {"loss": loss, "train_top1": share, "embedding": features.detach().to(wide)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Let the average follow: parameters, and BatchNorm's statistics, without which the averaged weights
        do not fit their activations.
        """
        if self.average is None or self.section.ema is None:
            return
        keep = self.section.ema if step >= self.section.ema_start * self.total_steps else 0.0
        learning = [*self.trunk.parameters(), *self.head.parameters(), *self.trunk.buffers()]
        for mean, now in zip(
            [*self.average.parameters(), *self.average.trunk.buffers()], learning, strict=True
        ):
            if mean.is_floating_point():
                own(mean).lerp_(own(now), 1 - keep)
            else:  # batches seen
                mean.copy_(now)

    def forget_batches(self) -> None:
        """No batch waits for `after_step`."""

    def trunks(self) -> dict[str, nn.Module]:
        """The one that learns, and the one that follows it, if the recipe has an average."""
        return {"student": self.trunk, **({} if self.average is None else {"teacher": self.average.trunk})}

    def param_groups(self) -> list[dict[str, Any]]:
        """The trunk's weights, its biases and norms, and the head's, which may have a rate of its own."""
        return [
            *weights_and_the_rest(self.trunk.parameters()),
            *weights_and_the_rest(self.head.parameters(), head=True),
        ]


def soft_cross_entropy(logits: Tensor, shares: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """The mean over the coupled batch of - sum_c shares_c log softmax(logits)_c.

    Args:
        logits: of this rank's images, (rows, classes), float32 or wider.
        shares: targets, (rows, classes), each row with the sum 1.
        group: ranks that share the coupled batch, equally many images on each; None for one process.

    Returns:
        A scalar, equal on every rank of the group.
    """
    total = all_reduce_sum((shares * F.log_softmax(logits, dim=1)).sum(), group)
    return -total / (len(logits) * world_size(group))


def _batch_norms(trunk: nn.Module) -> list[nn.Module]:
    return [layer for layer in trunk.modules() if getattr(layer, "running_mean", None) is not None]
