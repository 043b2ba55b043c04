"""Of Parquet files that Python has opened, nothing is read ahead by threads that could outlive Python."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.dataset.parquet import read_parquet

ROOT = Path(__file__).parents[3]


def test_nothing_is_read_ahead(monkeypatch):
    file = io.BytesIO()
    pq.write_table(pa.table({"a": range(1000), "b": ["x"] * 1000}), file, row_group_size=100)
    asked = {}
    read_table = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda file, **how: asked.update(how) or read_table(file, **how))
    assert read_parquet(io.BytesIO(file.getvalue()), columns=["a"])["a"].to_pylist() == list(range(1000))
    assert (asked["use_threads"], asked["pre_buffer"]) == (False, False)


def test_who_reads_parquet_otherwise_has_arrow_open_the_file():
    rooms = ("cluster", "ingest", "pipeline")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    others = {str(path.relative_to(ROOT)) for path in files if "pq.read_table(" in path.read_text()}
    assert others == {
        "ingest/dataset/parquet.py",
        "pipeline/hashtags/make_tags.py",
        "pipeline/transfer/predict.py",
    }
