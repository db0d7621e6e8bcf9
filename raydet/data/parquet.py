"""Reading Parquet: the one place that does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(source: bytes | memoryview | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file in this thread.

    pyarrow.parquet.read_table would read in Arrow's own threads. These may still hold Python's bytes while the
    interpreter ends, and the process then aborts (exit code 134) although its work is done.

    Args:
        source: content of the file, or its path.
        columns: names of the columns to read; None: all.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no Parquet file (pyarrow.ArrowInvalid).
    """
    opened = source if isinstance(source, Path) else pa.BufferReader(source)
    with pq.ParquetFile(opened) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
