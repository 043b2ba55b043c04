"""A SLURM for the tests that are marked `slurm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lab import SlurmLab, SlurmUnavailableError


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Four idle nodes, no accounting."""
    with _started(SlurmLab(tmp_path_factory.mktemp("slurm"))) as lab:
        yield lab


@pytest.fixture(scope="module")
def slurm_with_accounting(slurm: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Four idle nodes, and a sacct that works; `slurm` is stopped meanwhile."""
    slurm.stop()
    try:
        with _started(SlurmLab(tmp_path_factory.mktemp("accounting"), accounting=True), optional=True) as lab:
            yield lab
    finally:
        slurm.start()


@pytest.fixture(autouse=True)
def _slurm_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """The next test finds no jobs, and all nodes."""
    yield
    for name in ("slurm_with_accounting", "slurm"):
        if name in request.fixturenames:
            request.getfixturevalue(name).reset()
            return


@contextmanager
def _started(lab: SlurmLab, *, optional: bool = False) -> Iterator[SlurmLab]:
    """A running lab; where there can be none, the test is skipped, except in CI, which installs SLURM."""
    try:
        lab.start()
    except SlurmUnavailableError as error:
        if os.environ.get("CI_REQUIRES_SLURM") == "1" and not optional:
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        yield lab
    finally:
        lab.stop()
