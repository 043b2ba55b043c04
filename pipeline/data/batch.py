"""What the loader hands to a method."""

import logging
from dataclasses import dataclass

from torch import Tensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's rows of a global batch.

    Attributes:
        crops: for each crop group uint8 (count·b, 3, S, S) in channels_last, view-major: view 0 of all rows,
            then view 1, …
        photometric: for each crop group float32 (count·b, K), the colour parameters that `augment` takes.
        keys: int64 (b,), the samples' keys.
    """

    crops: list[Tensor]
    photometric: list[Tensor]
    keys: Tensor

    def pin_memory(self) -> "Batch":
        """A copy, ready for asynchronous copies to a GPU; the CPU reads the parameters."""
        return Batch(
            crops=[crops.pin_memory() for crops in self.crops],
            photometric=[parameters.clone() for parameters in self.photometric],
            keys=self.keys.clone(),
        )
