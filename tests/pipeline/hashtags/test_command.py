"""`submit hashtags`."""

import json
from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli import app


def test_the_command_makes_tags_and_a_page_once(dataset: Path, tmp_path: Path) -> None:
    words = ["hashtags", str(dataset), str(tmp_path / "tags"), "min_images=5", "--workers", "1"]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["tagged"] == 52
    assert (tmp_path / "tags" / "hashtags.html").is_file()
    again = CliRunner().invoke(app, words)
    assert again.exit_code != 0
    assert "already has tags, which trainings may use: name another folder" in again.output
