"""The documentation holds: its commands, links, code and messages, and its tutorial from end to end."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from ingest.cli import app as ingest_app
from pipeline.cli import app as submit_app
from pipeline.data.batch import Inputs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks(page: Path, language: str) -> Iterator[re.Match[str]]:
    return (found for found in BLOCK.finditer(page.read_text()) if found["language"] == language)


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return {
        "submit": typer.main.get_command(submit_app),
        "ingest": typer.main.get_command(ingest_app()),
    }


def commands(text: str) -> Iterator[list[str]]:
    """Each use of `ingest` and `submit` in a block of shell, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        found = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        found.whitespace_split = True
        words: list[str] = []
        for word in [*found, ";"]:
            if set(word) <= set(";&|"):
                if words and words[0] in {"ingest", "submit"}:
                    yield words
                words = []
            else:
                words.append(word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_the_programs_take(page: Path, programs: dict[str, Any]) -> None:
    for block in blocks(page, "sh"):
        for program, name, *rest in commands(block["text"]):
            command = programs[program].commands.get(name)
            assert command is not None, f"{program} {name}"
            context = typer.Context(command, info_name=name)
            # What is not there may be named, as a list of URLs that a reader has: only words are checked.
            _, left, _ = command.make_parser(context).parse_args(args=rest)
            assert not [word for word in left if word.startswith("-")], f"{program} {name}: {left}"


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub and MyST have it."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    made = {
        "submit-command",
        "ingest-command",
        "training-recipe",
        "evaluation-recipes",
        "stages",
        "site-file",
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        if name.removeprefix("docs/").startswith("reference/"):
            assert Path(name).stem in made, target
            continue
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def test_pages_name_files_that_are_there() -> None:
    """Of those that stand in the tables of proofs."""
    for page in ROOT / "docs" / "guarantees.md", ROOT / "docs" / "architecture.md":
        for name in re.findall(
            r"`((?:tests|benchmarks|configs|pipeline|ingest|cluster)/[\w/.]+)`", page.read_text()
        ):
            assert (ROOT / name).exists() or "NAME" in name, f"{page.name}: {name}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^[\w/-]+$", (ROOT / "docs" / "index.md").read_text(), re.M))
    assert {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"} <= listed


def test_messages_that_are_explained_are_ones_of_the_product() -> None:
    sources = [path for floor in ("cluster", "ingest", "pipeline") for path in (ROOT / floor).rglob("*.py")]
    # As they are printed: strings in Python are cut into lines.
    said = (
        "".join(re.sub(r'"\n\s*f?"', "", path.read_text()) for path in sources)
        + (ROOT / "Makefile").read_text()
    )
    for message in re.findall(r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M):
        assert message in said, message


def test_reference_names_every_command_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from reference import PROGRAMS, pages  # type: ignore[import-not-found]

    found = pages()
    for program, typed in PROGRAMS.items():
        for name in typer.main.get_command(typed).commands:  # type: ignore[attr-defined]
            assert f"## `{program} {name}`" in found[f"{program}-command"]
    training = found["training-recipe"]
    assert "| `optim.lr` | number, greater than 0 | required |  |" in training
    assert "| `run.workers` | integer, at least 0 | `2` | yes |" in training
    assert "| `train.strategy` | `ddp`, `fsdp2`, `fairscale` | `ddp` | yes |" in training
    assert "`method` (swav)" in training
    assert "| `data.crops.size` |" in training
    assert "## `knn`" in found["evaluation-recipes"]
    assert "A function by its name" not in found["stages"]
    assert "gpus_per_node" in found["site-file"]


def test_the_method_that_is_added_learns() -> None:
    """The code of docs/adding-a-method.md, as it stands there."""
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "adding-a-method.md", "python"):
        exec(compile(block["text"], "adding-a-method.md", "exec", dont_inherit=True), names)
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16))
    section = names["VICReg"](name="vicreg", projector=(16, 8))
    views = {"crops.0": 2}
    method = names["VICRegMethod"](trunk, section, feature_dim=16, views=views, batch_size=32, group=None)
    inputs = Inputs(views={"crops.0": torch.randn(64, 3, 4, 4)})
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for step in range(20):
        terms = method(inputs, step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


# Lengths that a reader wants, and what a test has time for.
SHORTER = {
    "train.steps=3000": "train.steps=2 optim.warmup_steps=0 data.batch_size=16",
    "train.epochs=20": "train.epochs=1 data.batch_size=16",
}


@pytest.mark.slow
def test_the_tutorial_on_own_images_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in ("train", 16), ("test", 4):
        for label in "cat", "ship":
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    page = ROOT / "docs" / "own-images.md"
    script = "\n".join(block["text"] for block in blocks(page, "sh") if not block["why"])
    for long, short in SHORTER.items():
        assert long in script
        script = script.replace(long, short)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxc", script],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first is completed" in done.stdout or "first  completed" in done.stdout
    assert (tmp_path / "photos.html").is_file()
    assert (tmp_path / "runs" / "scratch" / "predictions.parquet").is_file()
