"""The file for Prometheus: read by its own parser, never seen half written, and never in a crawl's way."""

import json
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.progress.counts import Counts
from ingest.progress.metrics_file import WRITE_EVERY_S, MetricsFile
from ingest.progress.pace import Pace
from ingest.web.host_queues import SlowHost


def read(path):
    """Value by name and labels."""
    families = text_string_to_metric_families(path.read_text())
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "output")): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def counts():
    return Counts(
        planned=1000, kept=180, rejected=Counter(empty=15), failed=Counter(http_404=3, reset=2),
        bytes_read=5_000_000, bytes_stored=4_000_000, units=4, units_done=1,
        slowest_hosts=[SlowHost('evil"\n.example', 40, 3.0)],
    )  # fmt: skip


def test_file_has_every_number_of_a_crawl(tmp_path):
    path = tmp_path / "crawl.prom"
    metrics, pace = MetricsFile(path, output="s3://bucket/crawl"), Pace(0.0)
    pace.note(counts(), 10.0)
    metrics.tell(counts(), pace, 10.0)
    assert 'output="s3://bucket/crawl"' in path.read_text()
    assert read(path) == {
        ("ingest_attempts_total", "", "kept"): 180,
        ("ingest_attempts_total", "empty", "rejected"): 15,
        ("ingest_attempts_total", "http_404", "failed"): 3,
        ("ingest_attempts_total", "reset", "failed"): 2,
        ("ingest_read_bytes_total",): 5_000_000,
        ("ingest_stored_bytes_total",): 4_000_000,
        ("ingest_planned_attempts",): 1000,
        ("ingest_planned_units",): 4,
        ("ingest_committed_units",): 1,
        ("ingest_attempts_per_second",): 20,
        ("ingest_read_bytes_per_second",): 500_000,
        ("ingest_left_seconds",): 120,
        ("ingest_slow_host_left_seconds", 'evil"\\n.example'): 120,
        ("ingest_finished",): 0,
    }
    metrics.end(counts(), pace)
    assert read(path)["ingest_finished",] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["crawl.prom"]


def test_file_is_written_every_ten_seconds(tmp_path):
    path = tmp_path / "crawl.prom"
    metrics, pace, told = MetricsFile(path, output="out"), Pace(0.0), counts()
    metrics.tell(told, pace, 100.0)
    told.kept = 500
    metrics.tell(told, pace, 99.9 + WRITE_EVERY_S)
    assert read(path)["ingest_attempts_total", "", "kept"] == 180
    metrics.tell(told, pace, 100.0 + WRITE_EVERY_S)
    assert read(path)["ingest_attempts_total", "", "kept"] == 500


def test_file_that_cannot_be_written_is_one_sentence_at_the_start_and_a_warning_later(tmp_path, caplog):
    with pytest.raises(UserError, match=r"--metrics-file .* cannot be written .*: name a file in a folder"):
        MetricsFile(tmp_path / "nowhere" / "crawl.prom", output="out")
    folder = tmp_path / "textfile"
    folder.mkdir()
    metrics = MetricsFile(folder / "crawl.prom", output="out")
    (folder / "crawl.prom").unlink()
    folder.rmdir()
    metrics.tell(counts(), Pace(0.0), 10.0)
    metrics.end(counts(), Pace(0.0))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "cannot write the metrics file"
    ] * 2


def test_crawl_leaves_its_result_in_the_file(folder, tmp_path):
    path = tmp_path / "crawl.prom"
    arguments = ["crawl-shards", str(folder()), "--output", str(tmp_path / "out"), "--workers", "1", "--json"]
    done = CliRunner().invoke(cli.app(), [*arguments, "--metrics-file", str(path)])
    assert done.exit_code == 0, done.output
    numbers = read(path)
    assert numbers["ingest_attempts_total", "", "kept"] == json.loads(done.stdout)["kept"] == 10
    assert numbers["ingest_attempts_total", "not_an_image", "rejected"] == 1
    assert numbers["ingest_committed_units",] == numbers["ingest_planned_units",] == 1
    assert numbers["ingest_finished",] == 1
