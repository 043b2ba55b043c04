"""What failed and may succeed later is tried again, as a new generation; what is pinned stays as it was."""

import io
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from ingest.cli import app
from ingest.dataset.open import open_dataset, sealed_head, sealed_units
from ingest.report.stats import count

FLAGS = ["--contact", "a@b.org", "--allow-private", "127.0.0.0/8", "--unit-rows", "4", "--attempts", "1"]


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (number, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def server(broken):
    """Pictures by number; those in `broken` answer with the status that stands there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            number = self.path.strip("/").partition(".")[0]
            status = broken.get(number, 200) if number.isdigit() else 404
            self.send_response(status)
            self.end_headers()
            if status == 200:
                self.wfile.write(picture(int(number)))

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def run(*words, code=0):
    result = CliRunner().invoke(app(), [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def counted(output):
    found = count(output, progress=lambda done, total: None)
    return {name: getattr(found, name) for name in ("planned", "kept", "failed", "retryable")}


def rows_by_generation(output):
    units = sealed_units(output, open_dataset(output).root).to_pylist()
    rows = {}
    for unit in units:
        rows.setdefault(unit["generation"], []).extend(pq.read_table(output / unit["meta"]).to_pylist())
    return rows


@pytest.mark.slow
def test_D2_only_what_may_succeed_later_is_tried_again(tmp_path):
    broken = {"1": 503, "4": 404, "6": 503, "8": 503}
    output = tmp_path / "out"
    with server(broken) as base:
        urls = [f"{base}/{number}.png" for number in range(10)]
        captions = [f"number {number}" for number in range(10)]
        pq.write_table(
            pa.table({"url": urls, "caption": captions, "score": range(10)}), tmp_path / "l.parquet"
        )
        run("crawl-shards", tmp_path / "l.parquet", "--output", output, *FLAGS)
        first = open_dataset(output).root
        assert sealed_head(output, first).failed == {"http_404": 1, "http_503": 3}

        del broken["1"]  # one is well again, and one is gone for good
        broken["6"] = 404
        run("retry", output, "--contact", "a@b.org")
        retried = rows_by_generation(output)[1]
        assert {row["url"].rpartition("/")[2]: row["reason"] for row in retried} == {
            "1.png": None,
            "6.png": "http_404",
            "8.png": "http_503",
        }
        assert {(row["caption"], row["score"]) for row in retried} == {
            ("number 1", 1),
            ("number 6", 6),
            ("number 8", 8),
        }
        assert len(open_dataset(output)) == 7
        assert counted(output) == {"planned": 10, "kept": 7, "failed": 3, "retryable": 1}
        assert len(open_dataset(output, sealed=first)) == 6  # a run that has pinned it sees what it saw

        broken.clear()
        run("retry", output, "--contact", "a@b.org")  # of the three rows of the first retry, one may succeed
        assert [row["url"].rpartition("/")[2] for row in rows_by_generation(output)[2]] == ["8.png"]
        assert len(open_dataset(output)) == 8
        assert counted(output) == {"planned": 10, "kept": 8, "failed": 2, "retryable": 0}
        card = run("card", output)
        assert card.count("- `urls l.parquet") == 1
        assert card.count("- another try at what had failed (generation") == 2
        assert "`--encoding`" not in card  # bytes are kept
        last = open_dataset(output).root
        assert "nothing to retry" in run("retry", output, "--contact", "a@b.org")
        answer = json.loads(run("retry", output, "--json"))
        assert {name: answer[name] for name in ("root", "planned", "kept")} == {
            "root": last,
            "planned": 0,
            "kept": 0,
        }
        assert open_dataset(output).root == last


@pytest.mark.slow
def test_a_retry_that_keeps_nothing_says_so_and_ends_with_1(tmp_path):
    output = tmp_path / "out"
    with server({"0": 503}) as base:
        (tmp_path / "l.txt").write_text(f"{base}/0.png\n{base}/1.png\n")
        run("crawl-shards", tmp_path / "l.txt", "--output", output, *FLAGS)
        assert "Nothing was kept" in run("retry", output, "--contact", "a@b.org", code=1)


@pytest.mark.slow
def test_D1_a_retry_by_two_crawlers_is_that_by_one(tmp_path):
    broken = {str(number): 503 for number in range(12)}
    with server(broken) as base:
        (tmp_path / "l.txt").write_text("".join(f"{base}/{number}.png\n" for number in range(14)))
        # The host is given up before its good answers: nothing is kept.
        run("crawl-shards", tmp_path / "l.txt", "--output", tmp_path / "one", *FLAGS, code=1)
        shutil.copytree(tmp_path / "one", tmp_path / "two")  # which rows were tried is a matter of time
        broken.clear()
        run("retry", tmp_path / "one", "--contact", "a@b.org")
        run("retry", tmp_path / "two", "--contact", "a@b.org", "--parts", 2)
    assert open_dataset(tmp_path / "one").root == open_dataset(tmp_path / "two").root
    assert len(open_dataset(tmp_path / "two")) == 14


def test_an_unfinished_retry_goes_on_and_others_are_refused(tmp_path, monkeypatch):
    broken = {"1": 503, "2": 503}
    output = tmp_path / "out"
    with server(broken) as base:
        (tmp_path / "l.txt").write_text("".join(f"{base}/{number}.png\n" for number in range(4)))
        run("crawl-shards", tmp_path / "l.txt", "--output", output, *FLAGS)
        broken.clear()
        run("retry", output, "--contact", "a@b.org")
        sealed = open_dataset(output).root
        plan = (output / "plan" / "1" / "plan.json").read_bytes()
        (output / "commits" / "00000001.json").unlink()
        run("retry", output, "--contact", "a@b.org", "--deadline", 3)
        assert (output / "plan" / "1" / "plan.json").read_bytes() == plan
        assert json.loads(plan)["retries"] == [0]
        assert open_dataset(output).root == sealed
        (output / "commits" / "00000000.json").unlink()
        result = CliRunner().invoke(app(), ["retry", str(output), "--contact", "a@b.org"])
        assert result.exit_code == 2
        assert "first run the crawl of its generation 0 again" in result.output


@pytest.mark.parametrize("words", [["retry", "nowhere"], ["retry", "{out}"]])
def test_mistakes_are_a_sentence(tmp_path, words):
    with server({"0": 503}) as base:
        (tmp_path / "l.txt").write_text(f"{base}/0.png\n")
        crawl = ["crawl-shards", str(tmp_path / "l.txt"), "--output", str(tmp_path / "out"), *FLAGS]
        nothing = CliRunner().invoke(app(), crawl)
        assert (nothing.exit_code, "Nothing was kept" in nothing.output) == (1, True)
        result = CliRunner().invoke(app(), [word.format(out=tmp_path / "out") for word in words])
    assert result.exit_code == 2
    assert "is not a dataset" in result.output or "--contact" in result.output
