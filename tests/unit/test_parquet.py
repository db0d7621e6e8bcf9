import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydet.store import read_parquet

PROCESSES = 40
READ_AND_END = """
import sys
from pathlib import Path
from raydet.store import read_parquet
read_parquet(Path(sys.argv[1]).read_bytes())
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.parquet"
    lists = [[1.0, 2.0, 3.0, 4.0]] * 5
    pq.write_table(pa.table({"a": range(20_000), "b": [lists] * 20_000}), path, compression="zstd")
    return path


@pytest.mark.parametrize("opened", [str, bytes])
@pytest.mark.parametrize("columns", [None, ["b", "a"]])
def test_reads_what_was_written(file, opened, columns):
    source = file.read_bytes() if opened is bytes else file
    assert read_parquet(source, columns).equals(pq.read_table(file, columns=columns))


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more"])
def test_no_parquet(content):
    with pytest.raises(ValueError, match=r"(?i)parquet"):
        read_parquet(content)


def test_a_process_that_has_read_ends_without_an_abort(file):
    def run(_: int) -> int:
        return subprocess.run([sys.executable, "-c", READ_AND_END, file], capture_output=True, check=False).returncode

    with ThreadPoolExecutor(3) as pool:
        assert [code for code in pool.map(run, range(PROCESSES)) if code] == []
