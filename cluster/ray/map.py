"""A function over many items on Ray: few at a time, each done again when its worker or node is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.errors import UserError
from cluster.job import import_function
from cluster.ray.connect import first_line, load_ray


def map_items(
    function: str,
    items: Iterable[Any],
    *,
    in_flight: int,
    retries: int,
    cpus: float,
    runtime_env: dict[str, Any],
) -> Iterator[tuple[int, Any]]:
    """See `cluster.ray.executor.RayExecutor.map`."""
    if in_flight < 1:
        raise ValueError(f"at least one item must be out at a time, not {in_flight}")
    ray = load_ray()
    task = ray.remote(call).options(
        name=function, num_cpus=cpus, max_retries=retries, retry_exceptions=False, runtime_env=runtime_env
    )
    numbered = enumerate(items)
    flying: dict[Any, tuple[int, Any]] = {}
    try:
        while True:
            for index, item in itertools.islice(numbered, in_flight - len(flying)):
                flying[task.remote(function, item)] = index, item
            if not flying:
                return
            ended, _ = ray.wait(list(flying), num_returns=1)
            index, item = flying.pop(ended[0])
            yield index, _result(ray, ended[0], index, item, retries)
    finally:  # the consumer has stopped, or an item failed: the others are wanted no more
        for reference in flying:
            ray.cancel(reference, force=True)


def call(function: str, item: Any) -> Any:
    """What runs on a worker."""
    return import_function(function)(item)


def _result(ray: Any, reference: Any, index: int, item: Any, retries: int) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        kind = UserError if isinstance(cause, UserError) else RuntimeError
        raise kind(f"item {index}, {_short(item)}: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"item {index}, {_short(item)}: its worker was lost {retries + 1} times: {first_line(error)}"
        ) from error


def _short(item: Any) -> str:
    text = json.dumps(item, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"
