"""What a method is shown, and what it was before the device worked on it.

Both hold the views of their samples by name. A view is named by the key of the recipe that describes it:
"crops.0" for the first of `data.crops`, "clip" and "audio" for those of a video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.targets import Targets


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One rank's rows of a global batch as a method takes them. Who passes it on does not look inside.

    Attributes:
        views: of every sample, by name, on the device: (count·b, …), view-major: view 0 of all b rows, then
            view 1, …; images are (count·b, 3, S, S) floats in channels_last, clips (b, 3, T, S, S), and sound
            (b, 1, frames, bins).
        number: of the global batch, counted over all epochs; what a method draws for a batch is keyed by it.
        targets: the labels of the rows, on the device; None for a method that needs none.
        positions: int64 (b,), on the host, where each sample is among all of the dataset, from 0, whatever
            the epoch: what a method remembers of a sample is kept under it, and what it draws for it is keyed
            by it. None for a method that needs none.
    """

    views: Mapping[str, Tensor]
    number: int = 0
    targets: Targets | None = None
    positions: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rank's rows of a global batch as workers hand them over: bytes, and what is left for the device.

    Attributes:
        views: of every sample, by name, as they are stored: (count·b, …), view-major; images are uint8
            (count·b, S, S, 3), clips (b, T, S, S, 3), and sound float32 (b, samples).
        parameters: for each name (count·b, K), on the CPU: what was drawn for the device to do.
        keys: int64 (b,), the samples' keys.
        number, targets, positions: as in `Inputs`.
    """

    views: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    keys: Tensor
    number: int = 0
    targets: Targets | None = None
    positions: Tensor | None = None

    def pin_memory(self) -> Batch:
        """A copy, ready for asynchronous copies to a GPU; the CPU reads the parameters."""
        return Batch(
            views={name: view.pin_memory() for name, view in self.views.items()},
            parameters={name: drawn.clone() for name, drawn in self.parameters.items()},
            keys=self.keys.clone(),
            number=self.number,
            targets=self.targets and self.targets.pin_memory(),
            positions=None if self.positions is None else self.positions.pin_memory(),
        )
