"""Independent tasks on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.job import import_name
from cluster.map.tasks import MapTasks, R, T
from cluster.site import Site


def on_ray(site: Site, *, parts: int) -> MapTasks:
    """A Ray cluster: the site's, RAY_ADDRESS's, a SLURM allocation's, or one started here.

    A task whose worker or node is lost is done again.

    Args:
        parts: tasks at a time, on a core each.
    """
    from cluster.ray.executor import RayExecutor

    executor = RayExecutor(site.ray_address, site=site)

    def map_tasks(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        early: dict[int, Any] = {}
        following = 0
        for index, answer in executor.map(import_name(function), tasks, in_flight=parts, cpus=1):
            early[index] = answer
            while following in early:
                yield early.pop(following)
                following += 1

    return map_tasks
