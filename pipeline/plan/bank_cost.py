"""What a bank of all samples takes: memory on every GPU, rows that travel, room in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.recipe.method import AVID
from pipeline.recipe.pretrain import PretrainRecipe

_BYTES = {"fp32": 4, "fp16": 2}
_EMBEDDING_BYTES, _NUMBER_BYTES = 4, 8


@dataclass(frozen=True, kw_only=True)
class BankCost:
    """Bytes.

    Attributes:
        whole: of the bank, in a checkpoint, too.
        positives: of all ranks.
        fetched: rows that a rank reads in a step, with the numbers it asks for them by.
        gathered: what a rank is told in a step of what all ranks have seen.
    """

    whole: int = 0
    positives: int = 0
    fetched: int = 0
    gathered: int = 0


def bank_cost(recipe: PretrainRecipe, *, samples: int | None, rank_rows: int) -> BankCost:
    """The bank of a recipe's method; nothing if it has none.

    Raises:
        ValueError: if it has one, and the number of samples is not known.
    """
    method = recipe.method
    if not isinstance(method, AVID):
        return BankCost()
    if samples is None:
        raise ValueError("a bank has a row for each sample")
    both = 2 * method.head.output
    row = both * _BYTES[method.bank_dtype]
    count = 0 if method.cma is None else method.cma.positives
    accumulate = recipe.train.accumulate
    of_each = 1 + count + method.negatives
    return BankCost(
        whole=samples * row,
        positives=samples * count * (4 if samples < 1 << 31 else 8),
        fetched=accumulate * rank_rows * of_each * (row + _NUMBER_BYTES),
        gathered=accumulate * recipe.data.batch_size * (both * _EMBEDDING_BYTES + _NUMBER_BYTES),
    )
