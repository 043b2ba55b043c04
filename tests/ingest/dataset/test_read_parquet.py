"""Parquet files that Python has opened are read without threads of Arrow's, which could outlive Python."""

import subprocess
import sys

SCRIPT = """
import io, os
import pyarrow as pa, pyarrow.parquet as pq
from ingest.dataset.parquet import read_parquet
file = io.BytesIO()
pq.write_table(pa.table({"a": range(1000), "b": ["x"] * 1000}), file, row_group_size=100)
before = len(os.listdir("/proc/self/task"))
assert len(read_parquet(io.BytesIO(file.getvalue()), columns=["a"])) == 1000
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_no_thread_is_started_for_a_file_of_pythons():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout == "0\n"
