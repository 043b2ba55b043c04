"""AVID and CMA: a clip is told from others by its sound, and its sound by the clip.

Morgado, Vasconcelos & Misra, 2021 (https://arxiv.org/abs/2004.12943).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cluster.errors import UserError
from pipeline.data.batch import Inputs
from pipeline.data.to_device import to_device
from pipeline.distributed.collectives import all_gather_rows, all_reduce_sum, world_size
from pipeline.distributed.rows import fetch_rows
from pipeline.methods.bank import AUDIO, VIDEO, Bank, draw_negatives
from pipeline.methods.method import Method
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.models.heads import ProjectionHead
from pipeline.recipe.method import AVID

BANK_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Recalled(NamedTuple):
    """What the bank holds for a batch, of both modalities.

    Attributes:
        own: (b, 2, dim), each sample's row.
        positives, negatives: (b, P, 2, dim) and (b, K, 2, dim).
    """

    own: Tensor
    positives: Tensor
    negatives: Tensor


class AVIDMethod(Method):
    """Two trunks, their heads and the bank, and the loss of one coupled batch.

    Args:
        trunk: clips to float features (N, feature_dim).
        audio_trunk: spectrograms to float features (N, audio_feature_dim).
        section: the recipe's `method`.
        batch_size: samples of the coupled batch, over all ranks; a multiple of the number of ranks.
        samples: of the dataset, of which each has a row in the bank; None where nothing is trained.
        seed: of the negatives.
        group: ranks that share the coupled batch; None for one process.

    Attributes:
        positives: int32 or int64 (rows of this rank's chunk of the bank, P): with CMA, who agrees most with
            each. Whoever trains the method fills it in, and anew now and then.

    Raises:
        UserError: if the dataset has too few samples to draw the negatives from.
    """

    normaliser: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        audio_trunk: nn.Module,
        section: AVID,
        *,
        feature_dim: int,
        audio_feature_dim: int,
        batch_size: int,
        samples: int | None,
        seed: int,
        group: ProcessGroup | None,
    ) -> None:
        others = section.negatives + (0 if section.cma is None else section.cma.positives)
        if samples is not None and samples <= others:
            raise UserError(
                f"method {section.name} compares each sample with {others} others, and the "
                f"dataset has {samples}: lower method.negatives"
            )
        super().__init__()
        self.trunk, self.audio_trunk = trunk, audio_trunk
        self.head = ProjectionHead(feature_dim, section.head)
        self.audio_head = ProjectionHead(audio_feature_dim, section.head)
        dtype = BANK_DTYPES[section.bank_dtype]
        self.bank = Bank(samples or 0, section.head.output, dtype=dtype, group=group)
        # Z of the first batch; 0 until its step is done.
        self.register_buffer("normaliser", torch.zeros(()))
        self.positives: Tensor | None = None
        self.section, self.cma, self.seed, self.group = section, section.cma, seed, group
        self.rank_rows = batch_size // world_size(group)
        self._normalised = False  # so that a device is asked once
        self._first: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_step = -1

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: "clip" (rank_rows, 3, T, H, W) and "audio" (rank_rows, 1, frames, bins), and the samples'
                positions; its number keys the negatives.
            step: the optimizer step, whose micro-batches enter the bank together.

        Returns:
            loss: scalar, equal on every rank.
            cross, within, agreeing: its terms that have a weight.
            pair_cosine: of a sample's two rows in the bank; random_cosine_video, _audio and _across of two
                samples' rows. Means over the coupled batch: neighbourhoods show as a distance between them.
            embedding: (rank_rows, dim), unit length, detached: the video's.
        """
        recalled = self.recall(inputs)
        video = self.head(self.trunk(inputs.views["clip"]))
        audio = self.audio_head(self.audio_trunk(inputs.views["audio"]))
        with torch.autocast(video.device.type, enabled=False):
            wide = torch.promote_types(video.dtype, torch.float32)
            v, a = F.normalize(video.to(wide), dim=1), F.normalize(audio.to(wide), dim=1)
            recalled = Recalled(*(each.to(wide) for each in recalled))
            self._remember(inputs, v, a, step)
            terms = self._terms(v, a, recalled)
            health = bank_cosines(recalled.own, recalled.negatives[:, 0], group=self.group)
        return {**terms, **health, "embedding": v.detach()}

    def recall(self, inputs: Inputs) -> Recalled:
        """What the batch is compared with; all ranks together."""
        here = inputs.positions
        if here is None:
            raise ValueError("a bank needs to know the samples' positions")
        positives = self._positives_of(here)
        drawn = draw_negatives(
            here.numpy(),
            positives.numpy(),
            samples=self.bank.samples,
            count=self.section.negatives,
            seed=self.seed,
            number=inputs.number,
        )
        wanted = torch.cat([here[:, None], positives, torch.from_numpy(drawn)], dim=1)
        rows = self.bank.fetch(to_device(wanted, self.bank.chunk.device))
        count = positives.shape[1]
        return Recalled(rows[:, 0], rows[:, 1 : 1 + count], rows[:, 1 + count :])

    def forget_values(self) -> None:
        """See `pipeline.methods.method.HasPositives`."""

        def zeros(inputs: Inputs) -> Recalled:
            b, dim = self.rank_rows, self.bank.dim
            count = 0 if self.cma is None else self.cma.positives
            like = next(self.head.parameters())
            return Recalled(
                like.new_zeros(b, 2, dim),
                like.new_zeros(b, count, 2, dim),
                like.new_zeros(b, self.section.negatives, 2, dim),
            )

        self.recall, self._normalised = zeros, True  # type: ignore[method-assign]

    def after_step(self, step: int) -> None:
        """Let the bank follow this step's embeddings, of all micro-batches. A step that the guard skipped is
        not followed by this call, so a broken batch never enters the bank.
        """
        waiting, first = (self._waiting, self._first) if self._waiting_step == step else ([], None)
        self._waiting, self._waiting_step, self._first = [], -1, None
        if first is not None:
            self.normaliser.copy_(first)
        if waiting:
            self.bank.update(waiting, momentum=self.section.bank_momentum)

    def forget_batches(self) -> None:
        """Drop what the next `after_step` would put into the bank: the training goes back."""
        self._waiting, self._waiting_step, self._first = [], -1, None
        self._normalised = False  # a checkpoint of before the first step has none

    def trunks(self) -> dict[str, nn.Module]:
        """Two, which both learn."""
        return {"student": self.trunk, "audio": self.audio_trunk}

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights, and apart from them biases and norms, which some recipes leave undecayed."""
        return weights_and_the_rest(self.parameters())

    def _positives_of(self, here: Tensor) -> Tensor:
        """Who agrees with each sample, (b, P) int64, on the host; P is 0 without CMA."""
        if self.cma is None:
            return here.new_empty((len(here), 0))
        if self.positives is None:
            raise ValueError("nobody has filled in the positives")
        asked = to_device(here, self.positives.device)
        return fetch_rows(self.positives, asked, rows=self.bank.samples, group=self.group).long().cpu()

    def _remember(self, inputs: Inputs, v: Tensor, a: Tensor, step: int) -> None:
        if not self.training:
            return
        if self._waiting_step != step:
            self._waiting, self._waiting_step, self._first = [], step, None
        assert inputs.positions is not None
        positions = to_device(inputs.positions, v.device)
        self._waiting.append((positions, torch.stack([v, a], dim=1).detach()))

    def _terms(self, v: Tensor, a: Tensor, recalled: Recalled) -> dict[str, Tensor]:
        section, cma = self.section, self.cma
        own = recalled.own[:, None]
        weighted = [
            ("cross", section.cross_weight, own, recalled.negatives, True),
            ("within", section.within_weight, own, recalled.negatives, False),
        ]
        if cma is not None:
            few = recalled.negatives[:, : cma.within_negatives]
            weighted.append(("agreeing", cma.weight, recalled.positives, few, False))
        weighted = [each for each in weighted if each[1]]
        log_z = self._log_z(v, recalled, across=weighted[0][-1])
        terms = {
            name: both_ways(
                v,
                a,
                positives,
                negatives,
                across=across,
                loss=section.loss,
                temperature=section.temperature,
                log_z=log_z,
                group=self.group,
            )
            for name, _, positives, negatives, across in weighted
        }
        total = sum(weight for _, weight, *_ in weighted)
        loss = sum((weight * terms[name] for name, weight, *_ in weighted), v.new_zeros(())) / total
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def _log_z(self, v: Tensor, recalled: Recalled, *, across: bool) -> Tensor | float:
        """ln Z: the recipe's; that of the first batch whose step was done; before it, that of this step's
        first.
        """
        if self.section.log_z != "auto":
            return self.section.log_z
        self._normalised = self._normalised or bool(self.normaliser > 0)
        if self._normalised:
            return self.normaliser.log()
        if self._first is None:
            negatives = recalled.negatives[..., AUDIO if across else VIDEO, :]
            self._first = mean_exponential(
                scores(v, negatives), temperature=self.section.temperature, group=self.group
            )
        return self._first.log()


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products of each query with its own keys: (b, dim) and (b, n, dim) to (b, n)."""
    return torch.einsum("bd,bnd->bn", queries, keys)


def both_ways(
    v: Tensor,
    a: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    across: bool,
    loss: Literal["nce", "softmax"],
    temperature: float,
    log_z: Tensor | float,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The mean of a comparison of the video's embeddings and one of the sound's.

    Morgado et al., 2021 (https://arxiv.org/abs/2004.12943): Cross-AVID's is `across` modalities, Self-AVID's
    within them, and so is CMA's, where the positives are other samples.

    Args:
        v, a: unit embeddings of this rank's rows, (b, dim).
        positives, negatives: rows of the bank, (b, P, 2, dim) and (b, K, 2, dim).
        log_z: of no meaning to "softmax".
        group: ranks that share the coupled batch, equally many rows on each; None for one process.

    Returns:
        A scalar, equal on every rank of the group.
    """
    total = v.new_zeros(())
    for queries, modality in ((v, AUDIO if across else VIDEO), (a, VIDEO if across else AUDIO)):
        alike = scores(queries, positives[..., modality, :]) / temperature
        unlike = scores(queries, negatives[..., modality, :]) / temperature
        total = (
            total + (nce(alike, unlike, log_z=log_z) if loss == "nce" else softmax(alike, unlike)).sum() / 2
        )
    return all_reduce_sum(total, group) / (len(v) * world_size(group))


def nce(alike: Tensor, unlike: Tensor, *, log_z: Tensor | float) -> Tensor:
    """Noise-contrastive estimation (Gutmann & Hyvärinen, 2010,
    https://proceedings.mlr.press/v9/gutmann10a.html), as AVID's code has it: with K negatives,

        mean_p -ln(e^p / (e^p + K Z))  +  sum_n -ln(K Z / (e^n + K Z)).

    Args:
        alike, unlike: scores over the temperature, (b, P) and (b, K).

    Returns:
        (b,).
    """
    threshold = math.log(unlike.shape[1]) + log_z
    return F.softplus(threshold - alike).mean(1) + F.softplus(unlike - threshold).sum(1)


def softmax(alike: Tensor, unlike: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018, https://arxiv.org/abs/1807.03748, equation 4) of each positive
    against all negatives: mean_p -ln(e^p / (e^p + sum_n e^n)).

    Args:
        alike, unlike: as of `nce`.

    Returns:
        (b,).
    """
    return F.softplus(unlike.logsumexp(1, keepdim=True) - alike).mean(1)


@torch.no_grad()
def mean_exponential(unlike: Tensor, *, temperature: float, group: ProcessGroup | None = None) -> Tensor:
    """Z: the mean of e^(s / temperature) over the coupled batch's scores of negatives, (b, K), added up in
    the order of the batch.
    """
    of_each = all_gather_rows((unlike.double() / temperature).logsumexp(1), group)
    return (of_each.logsumexp(0) - math.log(of_each.numel() * unlike.shape[1])).exp().to(unlike.dtype)


@torch.no_grad()
def bank_cosines(own: Tensor, other: Tensor, *, group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """Mean cosines of the coupled batch's rows in the bank with each other and with another sample's.

    Args:
        own, other: (b, 2, dim).
    """
    names = ("pair_cosine", "random_cosine_video", "random_cosine_audio", "random_cosine_across")
    pairs = (
        (own[:, VIDEO], own[:, AUDIO]),
        (own[:, VIDEO], other[:, VIDEO]),
        (own[:, AUDIO], other[:, AUDIO]),
        (own[:, VIDEO], other[:, AUDIO]),
    )
    sums = all_reduce_sum(torch.stack([(one * two).sum() for one, two in pairs]), group)
    return dict(zip(names, sums / (len(own) * world_size(group)), strict=True))
