"""Output that cannot be written is one sentence, whichever command writes it."""

import subprocess
import sys
import tarfile

import archives
import pytest
from typer.testing import CliRunner

from ingest import cli
from tests.full_disk import files_end_at

COMMANDS = {
    "crawl-shards": ("crawl-shards", "{pictures}", "--output", "{new}", "--workers", "1"),
    "index": ("index", "{tar}", "--output", "{new}", "--workers", "1"),
    "view": ("view", "{dataset}", "--name", "wide", "--where", "width >= 1", "--workers", "1"),
    "dedup": ("dedup", "{dataset}", "--name", "new", "--exact", "--workers", "1"),
    "card": ("card", "{dataset}", "--output", "{file}"),
    "show": ("show", "{dataset}", "--output", "{file}"),
    "urls": ("urls", "{archive}", "--output", "{file}.parquet", "--workers", "1"),
}


def run(*words):
    return CliRunner().invoke(cli.app(), words, prog_name="ingest")


@pytest.fixture(scope="module")
def places(tmp_path_factory, scene):
    """A sealed dataset, and what the commands read; the new outputs are not there yet."""
    root = tmp_path_factory.mktemp("trouble")
    (root / "pictures").mkdir()
    for number in range(3):
        scene(number).save(root / "pictures" / f"{number}.png")
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "pictures", "pictures")
    page = archives.response("http://a.test/", b'<img src="http://a.test/b.jpg">')
    archives.archive(root / "a.warc", [page])
    done = run("crawl-shards", str(root / "pictures"), "--output", str(root / "sealed"), "--workers", "1")
    assert done.exit_code == 0, done.output
    names = {"pictures": "pictures", "tar": "a.tar", "archive": "a.warc", "dataset": "sealed"}
    names |= {"new": "new", "file": "page"}
    return {name: str(root / path) for name, path in names.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence(places, command):
    with files_end_at(0):
        done = run(*(word.format(**places) for word in COMMANDS[command]))
    assert done.exit_code == 2, done.output
    (told,) = done.stderr.splitlines()
    assert told.startswith("ingest: cannot write "), told
    assert told.endswith("file too large; mend that, then run the same command again"), told


@pytest.mark.slow
@pytest.mark.parametrize("command", ["stats", "verify"])
def test_an_answer_that_nobody_can_take_is_one_sentence(places, command):
    with open("/dev/full", "w") as full:  # noqa: PTH123 -- a device
        words = [sys.executable, "-c", "from ingest.cli import main; main()", command, places["dataset"]]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.startswith("ingest: cannot write the output: no space left on device; mend that")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2


def test_the_whole_error_is_there_for_whoever_asks(places):
    with files_end_at(0):
        done = run("--debug", *(word.format(**places) for word in COMMANDS["card"]))
    assert isinstance(done.exception, OSError)
