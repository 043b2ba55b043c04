"""People are told when a run stops."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.notify import is_untold, notify, tell_the_untold
from cluster.run.status import Failure, Status
from cluster.site import Notify, Site, read_site, write_site

FAILED = Status(
    state=State.FAILED,
    name="train",
    executor="slurm",
    id="7",
    ranks=4,
    attempt=3,
    submitted=0.0,
    failure=Failure(rank=2, type="ValueError", message="boom; $(rm -rf /)", node="node1"),
)


def make_run(folder: Path, settings: Notify) -> RunFolder:
    run = RunFolder.create(folder / "train")
    write_site(Site(notify=settings), run.path / "site.yaml")
    return run


def test_a_command_gets_the_cause_as_its_last_word_and_as_json(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2] + '\\n' + sys.stdin.read())"
    )
    out = tmp_path / "told"
    notify(make_run(tmp_path, Notify(command=(sys.executable, "-c", script, str(out)))), FAILED)
    words, values = out.read_text().splitlines()
    assert words == ("train is failed: rank 2 of 4 on node1 failed first: ValueError: boom; $(rm -rf /)")
    assert json.loads(values) == {
        "run": "train",
        "folder": str(tmp_path / "train"),
        "state": "failed",
        "cause": words.removeprefix("train is failed: "),
        "rank": 2,
        "node": "node1",
        "attempt": 3,
        "set_aside": [],
    }


def test_a_webhook_gets_the_same(tmp_path: Path) -> None:
    got: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        notify(make_run(tmp_path, Notify(webhook=url)), FAILED)
    assert json.loads(got[0])["node"] == "node1"


def test_who_could_not_be_told_is_told_by_who_looks_next(tmp_path: Path) -> None:
    way_out, told = tmp_path / "way-out", tmp_path / "told"
    script = 'test -e "$0" && echo "$2" >> "$1"'
    run = make_run(tmp_path, Notify(command=("sh", "-c", script, str(way_out), str(told))))
    run.write_status(FAILED)
    notify(run, FAILED)
    assert is_untold(run)
    way_out.touch()
    tell_the_untold(run)
    tell_the_untold(run)  # once is enough
    assert not is_untold(run)
    assert len(told.read_text().splitlines()) == 1


def test_who_ends_while_it_tells_has_left_word_that_nobody_may_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> list[str]:
        raise SystemExit

    run = make_run(tmp_path, Notify(command=("true",)))
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr("cluster.run.notify._tell", killed)
        notify(run, FAILED)
    assert is_untold(run)
    notify(run, FAILED)
    assert not is_untold(run)


def test_a_hook_that_fails_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notify(make_run(tmp_path, Notify(command=("/does/not/exist",), webhook="http://127.0.0.1:9/")), FAILED)
    assert "/does/not/exist" in caplog.text
    notify(make_run(tmp_path, Notify(webhook="http://127.0.0.1:notaport/")), FAILED)
    assert "nonnumeric port" in caplog.text
    notify(RunFolder.create(tmp_path / "nobody"), FAILED)  # a run without a site


def test_a_run_s_site_is_read_as_written_whatever_a_later_version_adds(tmp_path: Path) -> None:
    site = Site(
        modules=("cuda",),
        environment={"A": "b"},
        notify=Notify(command=("true",)),
        sbatch={"reservation": "r"},
    )
    path = tmp_path / "site.yaml"
    write_site(site, path)
    values = yaml.safe_load(path.read_text())
    values |= {"later": [1], "notify": values["notify"] | {"later": {}}}
    path.write_text(yaml.safe_dump(values))
    assert read_site(path) == site
    path.write_text("minutes: soon\n")
    with pytest.raises(UserError, match=r"site\.yaml: .*minutes"):
        read_site(path)
