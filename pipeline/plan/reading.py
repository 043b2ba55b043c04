"""What a run asks of the object store that its images are in."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.wording import in_bytes
from ingest.dataset.open import Dataset, sealed_head
from pipeline.data.order import largest_window, plan_order
from pipeline.data.read_ahead.demand import whole_lanes
from pipeline.data.read_ahead.room import CHUNK_BYTES, FEW_STEPS, share_out
from pipeline.recipe.pretrain import PretrainRecipe

# Of a tar, beside each image's bytes: a header of 512, and half a block of padding.
_TAR_BYTES = 768


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Requests and bytes of a run's images, on nodes that read ahead; metadata, read once, is not in it.

    Attributes:
        coalesced: whether windows are read whole, in ranges of some MB; else each sample is a request.
        reason: why not; empty if so.
        window_bytes: of the windows that are open at a time on a node; what the cache must hold.
        requests, bytes: of an epoch and node.
        requests_per_second, bytes_per_second: that the store must give all nodes together.
    """

    coalesced: bool
    reason: str
    window_bytes: float
    requests: float
    bytes: float
    requests_per_second: float
    bytes_per_second: float


def reading(recipe: PretrainRecipe, dataset: Dataset, *, nodes: int, images_per_second: float) -> Reading:
    """What reading the recipe's dataset takes at this speed of all nodes."""
    head = sealed_head(dataset.path, dataset.root)
    mean = head.bytes / max(head.kept, 1)
    data = recipe.data
    order = plan_order(samples=len(dataset), batch_size=data.batch_size, window=data.window, seed=recipe.seed)
    rows = data.batch_size // nodes
    lanes = len(whole_lanes(order, [slice(0, rows)]))
    # Of a view, the images that are left out lie between those that are read.
    stretch = (mean + _TAR_BYTES) * head.kept / len(dataset)
    window_bytes = max(lanes, 1) * largest_window(order) * stretch
    step_bytes, cache = int(rows * mean), int(recipe.run.cache_gib * 2**30)
    room = share_out(cache, step_bytes=step_bytes, window_bytes=lanes and window_bytes)
    samples = order.steps_per_epoch * rows
    if room.windows:
        in_unit = len(dataset) / len(dataset.units)
        pieces = lanes * (order.lane_length / in_unit + order.windows)
        requests, size = pieces + lanes * order.lane_length * stretch / CHUNK_BYTES, samples * stretch
    else:
        requests, size = float(samples), samples * mean
    per_second = images_per_second / (nodes * samples)
    return Reading(
        coalesced=room.windows > 0,
        reason="" if room.windows else _reason(lanes, window_bytes, nodes, cache - FEW_STEPS * step_bytes),
        window_bytes=window_bytes,
        requests=requests,
        bytes=size,
        requests_per_second=nodes * requests * per_second,
        bytes_per_second=nodes * size * per_second,
    )


def _reason(lanes: int, window_bytes: float, nodes: int, left: int) -> str:
    if left < 0:
        return f"run.cache_gib does not hold {FEW_STEPS} steps, and the run will be refused: raise it"
    if not lanes:
        return f"{nodes} nodes share lanes of the shuffle, and no window is read whole"
    return f"windows of {in_bytes(window_bytes)} a node do not fit run.cache_gib"
