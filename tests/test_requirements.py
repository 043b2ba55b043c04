"""What is installed by its hash was resolved together, and comes from wherever pip is told to look."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version.removesuffix("+cpu") for package, version in found}


def test_the_lock_agrees_with_the_constraints_and_the_ranges() -> None:
    locked, constraints = pins("requirements.lock"), pins("constraints.txt")
    assert {name: locked.get(name) for name in constraints} == constraints
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    builds = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for text in builds + project["dependencies"] + extras["demo"] + extras["test"]:
        wanted = Requirement(text)
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_everything_locked_has_a_hash_and_nothing_says_where_it_lies() -> None:
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    for block in blocks:
        if not block.startswith("#"):
            assert re.fullmatch(r"[a-z0-9._-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", block), block[
                :200
            ]


def test_pillow_simd_is_the_build_of_the_pillow_that_is_locked() -> None:
    pillow = re.search(r"^PILLOW := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pillow is not None and pillow[1] == pins("requirements.lock")["pillow"]
