"""The `ingest` command as a user meets it: output, exit codes, and one clear sentence for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.commands import doctor, verify
from ingest.commands.stats import LISTED
from ingest.dataset.open import open_dataset
from ingest.dataset.verify import Level
from ingest.web.opt_outs import OptOut

COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()"]


def run(*arguments):
    """The command in this process; returns its result with exit_code, stdout and stderr."""
    return CliRunner().invoke(cli.app(), [str(argument) for argument in arguments], prog_name="ingest")


def mistake(*arguments):
    """Runs the command in this process; returns the one sentence it ends with."""
    done = run(*arguments)
    return the_sentence(done.exit_code, done.stdout, done.stderr)


def the_sentence(status, stdout, stderr):
    assert (status, stdout) == (2, ""), stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("ingest: ")
    return lines[0]


@pytest.fixture
def dataset(folder, tmp_path):
    assert run("crawl-shards", folder(), "--output", tmp_path / "out", "--workers", 1).exit_code == 0
    return tmp_path / "out"


def test_crawl_ends_with_what_was_made_and_what_to_type_next(folder, tmp_path):
    done = subprocess.run(
        [
            *COMMAND,
            "crawl-shards",
            folder(),
            "--output",
            tmp_path / "my out",
            "--unit-rows",
            "4",
            "--workers",
            "2",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:-1])
    assert lines["dataset"] == str(tmp_path / "my out")
    assert lines["root"] == open_dataset(tmp_path / "my out").root
    assert lines["planned"] == "11 files"
    assert lines["kept"].startswith("10 images, ")
    assert lines["rejected"] == "1: 1 not_an_image"
    assert lines["failed"] == "0"
    assert "images/s" in lines["took"]
    assert done.stdout.splitlines()[-1] == f"Look at it:  ingest show '{tmp_path / 'my out'}'"


def test_crawl_json_is_all_that_stdout_has(folder, tmp_path):
    result = run("crawl-shards", folder(), "--output", tmp_path / "out", "--resize", 8, "--json")
    answer = json.loads(result.stdout)
    assert answer["kept"] == 10
    assert answer["rejected"] == {"not_an_image": 1}
    assert answer["planned"] == 11
    assert answer["root"] == open_dataset(tmp_path / "out").root
    again = json.loads(
        run("crawl-shards", folder(), "--output", tmp_path / "out", "--resize", 8, "--json").stdout
    )
    assert again["resumed"] == 11
    assert again["root"] == answer["root"]


def test_crawl_again_says_that_it_was_done(dataset, folder, tmp_path):
    assert (
        "11 files, 11 of them by an earlier run"
        in run("crawl-shards", tmp_path / "pictures", "--output", dataset).stdout
    )


def test_options_reach_the_crawl(folder, tmp_path):
    output = tmp_path / "out"
    options = {
        "--unit-rows": 7, "--resize": 8, "--crop": "center", "--encoding": "webp", "--quality": 80,
        "--max-bytes": 100_000,
        "--max-pixels": 5_000, "--seconds": 5.0, "--memory-mb": 512, "--deadline": 9.0, "--attempts": 2,
        "--max-redirects": 4, "--allow-private": "10.0.0.0/8", "--deny-network": "10.9.0.0/16",
    }  # fmt: skip
    flags = [str(word) for option in options.items() for word in option]
    switches = ["--no-icc", "--no-phash", "--ignore-robots", *(each.option for each in OptOut)]
    options |= dict.fromkeys(switches, True) | {"--allow-private": ["10.0.0.0/8"]}
    options["--deny-network"] = ["10.9.0.0/16"]
    assert run("crawl-shards", folder(), "--output", output, *flags, *switches).exit_code == 0
    assert json.loads((output / "plan/0/plan.json").read_bytes())["settings"] == options


def test_mistakes_in_a_crawl_are_one_sentence(dataset, folder, tmp_path):
    source = tmp_path / "pictures"
    out = ("--output", tmp_path / "new")
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "bare").mkdir()
    assert "does not exist" in mistake("crawl-shards", tmp_path / "nowhere", *out)
    assert "neither a folder, nor a readable tar" in mistake("crawl-shards", tmp_path / "text.tar", *out)
    assert "nothing to ingest" in mistake("crawl-shards", tmp_path / "bare", *out)
    assert "inside the source" in mistake("crawl-shards", source, "--output", source / "out")
    sentence = mistake("crawl-shards", source, "--output", dataset, "--resize", 8)
    assert sentence.endswith("to go on with it, or another --output")
    assert "--resize" in sentence
    for option in (("--quality", 80), ("--crop", "center"), ("--encoding", "webp")):
        sentence = mistake("crawl-shards", source, *out, *option)
        assert f"{option[0]} is used with --resize only: add --resize" in sentence
    assert not (tmp_path / "new" / "DATASET.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["crawl-shards", "x"], "--output"),
        (["crawl-shards", "--output", "y"], "SOURCE"),
        (["crawl-shards", "x", "--output", "y", "--resize", "0"], "--resize"),
        (["crawl-shards", "x", "--output", "y", "--quality", "101"], "--quality"),
        (["crawl-shards", "x", "--output", "y", "--unit-rows", "100001"], "--unit-rows"),
        (["crawl-shards", "x", "--output", "y", "--workers", "0"], "--workers"),
        (["crawl-shards", "", "--output", "y"], "the name of a source is empty"),
        (["crawl-shards", "tests", "./tests/", "--output", "y"], "is given twice: leave one of them out"),
        (["stats", ""], "the name of a dataset is empty"),
        (["stat", "x"], "stat"),
    ],
)
def test_wrong_usage_names_the_option_and_exits_with_2(arguments, told):
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["verify", "stats", "show"])
def test_commands_on_what_is_no_dataset_are_one_sentence(command, tmp_path):
    assert "DATASET.json" in mistake(command, tmp_path) or "is not a dataset" in mistake(command, tmp_path)
    assert str(tmp_path / "nowhere") in mistake(command, tmp_path / "nowhere")


def test_error_cannot_write_to_the_terminal_what_a_name_says(tmp_path):
    command = [*COMMAND, "stats", tmp_path / "\x1b[31mred\nsecond line"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    sentence = the_sentence(done.returncode, done.stdout, done.stderr)
    assert "\\x1b[31mred\\nsecond line" in sentence


def test_debug_anywhere_shows_the_traceback():
    assert isinstance(run("--debug", "stats", "nowhere").exception, UserError)
    command = [*COMMAND, "stats", "nowhere", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr


def test_verify_of_a_whole_dataset(dataset):
    for level in Level:
        result = run("verify", dataset, "--level", level.name.lower())
        assert result.exit_code == 0
        assert f"{dataset} is whole, at level {level.name.lower()}" in result.stdout
    assert "(10 images read)" in result.stdout


def test_verify_names_damage_and_exits_with_1(dataset):
    shard = next((dataset / "shards").rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("verify", dataset, "--level", "names").exit_code == 0
    result = run("verify", dataset, "--level", "sizes")
    assert result.exit_code == 1
    first, last = result.stdout.splitlines()
    assert first.startswith(str(shard.relative_to(dataset)))
    assert last == f"{dataset} is damaged: 1 thing, at level sizes"
    answer = run("verify", dataset, "--json")
    assert answer.exit_code == 1
    verdict = json.loads(answer.stdout)
    assert verdict["whole"] is False
    assert verdict["level"] == "sha"
    assert [damage["what"] for damage in verdict["damages"]] == [str(shard.relative_to(dataset))]
    assert verdict["images"] == 10


def test_verify_says_what_levels_there_are(dataset):
    assert "use names, sizes, sha or decode" in mistake("verify", dataset, "--level", "deep")


def test_stats_shows_reasons_sizes_and_labels(dataset):
    text = run("stats", dataset).stdout
    for shown in ("planned", "not_an_image", "jpeg", "webp", "cat", "dog", "shorter side", "p50"):
        assert shown in text
    assert json.loads(run("stats", dataset, "--json").stdout)["labels"] == {"cat": 5, "dog": 5}


def test_stats_lists_few_labels_and_counts_the_others(tmp_path, scene, crawl):
    for number in range(LISTED + 3):
        (tmp_path / "source" / f"label{number:02}").mkdir(parents=True)
        scene(number, 8, 8).save(tmp_path / "source" / f"label{number:02}" / "x.png")
    crawl([tmp_path / "source"], tmp_path / "out")
    text = run("stats", tmp_path / "out").stdout
    assert "label19" in text
    assert "label20" not in text
    assert "3 others" in text


def test_show_writes_one_page_in_the_current_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("show", dataset, "--samples", 4)
    assert result.exit_code == 0
    assert result.stdout.startswith("out.html shows 4 images of 10 (")
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    for shard in dataset.glob("shards/*/*"):
        shard.unlink()
    told = run("show", dataset, "--samples", 4).stdout.splitlines()
    assert told[0].startswith("out.html shows 0 images of 10 (")
    assert told[1] == "4 images could not be shown: `ingest verify` says what is damaged."


def test_show_into_a_folder_that_is_not_there(dataset, tmp_path):
    assert "there is no such folder" in mistake("show", dataset, "--output", tmp_path / "no" / "page.html")
    assert "is a folder" in mistake("show", dataset, "--output", tmp_path)


def test_doctor_answers(tmp_path):
    result = run("doctor", tmp_path)
    assert result.exit_code == 0
    assert "decoder" in result.stdout
    rows = json.loads(run("doctor", "--json").stdout)
    assert {"decoder", "JPEG", "pyarrow", "webdataset", "torch", "SLURM"} <= {row["name"] for row in rows}
    assert set(rows[0]) == {"name", "status", "detail", "remedy", "required"}


def test_doctor_exits_with_1_if_something_required_is_missing(monkeypatch):
    row = {"name": "x", "detail": "gone", "remedy": "install it"}
    monkeypatch.setattr(
        doctor, "image_checks", lambda: [doctor.Finding(**row, status="missing", required=False)]
    )
    assert run("doctor").exit_code == 0
    monkeypatch.setattr(
        doctor, "image_checks", lambda: [doctor.Finding(**row, status="missing", required=True)]
    )
    assert run("doctor").exit_code == 1


def test_every_command_says_what_it_does():
    text = run("--help").stdout
    for command in ("crawl-shards", "verify", "stats", "show", "doctor"):
        assert command in text
        assert run(command, "--help").exit_code == 0
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--help"], 0, "verify"),
        (["--debug", "verify", "--help"], 0, "--level"),
        (["verfy", "nowhere"], 2, "verify"),
        (["--debug"], 2, "Missing command"),
    ],
)
def test_whatever_comes_first_the_program_finds_its_commands(words, code, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ingest", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    said = capsys.readouterr()
    assert told in said.out + said.err


def test_commands_start_without_what_most_of_them_do_not_need():
    code = "import sys; from ingest import cli; cli.app(['crawl-shards', 'stats']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {
        "aiohttp",
        "av",
        "matplotlib",
        "prometheus_client",
        "ray",
        "requests",
        "scipy",
        "tldextract",
        "torch",
    }
    assert slow & set(done.stdout.split()) == set()


@pytest.mark.slow
def test_interrupted_crawl_says_how_to_go_on_and_goes_on(tmp_path, scene):
    source = tmp_path / "source"
    source.mkdir()
    scene(0, 1000, 750).save(source / "0000.png")
    for number in range(1, 60):
        (source / f"{number:04}.png").hardlink_to(source / "0000.png")
    output = tmp_path / "out"
    crawl = [
        *COMMAND,
        "crawl-shards",
        str(source),
        "--output",
        str(output),
        "--unit-rows",
        "5",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(crawl, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(output.glob("commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    # Before it, a line for every ten seconds that a busy machine took.
    assert stderr.splitlines()[-1] == (
        "ingest: interrupted; run the same command again to go on where it stopped"
    )
    assert "not sealed yet" in mistake("stats", output)
    done = len(list(output.glob("commits/*.json")))
    assert 0 < done < 12
    answer = json.loads(
        subprocess.run([*crawl, "--json"], capture_output=True, check=True, timeout=120).stdout
    )
    assert answer["resumed"] == 5 * done
    assert answer["kept"] == 60
    assert run("verify", output).exit_code == 0


def test_interrupt_elsewhere_is_one_line(dataset, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "read_seal", interrupted)
    result = run("verify", dataset)
    assert (result.exit_code, result.output) == (130, "ingest: interrupted\n")
