"""What every test stands on."""

import gc
import importlib.util
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# A machine that is busy is no failure.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell that starts the tests in the background has them ignore Ctrl-C, and all processes below inherit it:
# the tests that press Ctrl-C need it heard, as at a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: what comes last then fills both cores to the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection looks through it any more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes with one core each, for all tests: who loses its second one adds another,
    `add_node(num_cpus=1)`.

    Each node starts processes that take seconds of a core, and some more every minute: there are no others,
    and none of what nobody looks at.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'seer-pipeline[ray]'")
    patch = pytest.MonkeyPatch()
    # A token that an earlier `ray.init` has left in the home folder must not decide who may join.
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("RAY_enable_metrics_collection", "0")
    patch.setenv("RAY_prestart_worker_first_driver", "0")
    import ray
    from ray.cluster_utils import Cluster

    class SmallCluster(Cluster):  # type: ignore[misc]
        def add_node(self, **options: Any) -> Any:
            small = {
                "object_store_memory": 80 << 20,
                "include_dashboard": False,
                "include_log_monitor": False,
            }
            return super().add_node(**small, **options)

    cluster = SmallCluster(initialize_head=True, head_node_args={"num_cpus": 1, "no_monitor": True})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()
