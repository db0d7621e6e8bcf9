"""Folders of files, local or in an object store: the only place that reads images and annotations.

A root is a path, or a URI that pyarrow knows: `s3://bucket/folder`, `gs://bucket/folder`, without percent-encoding.
Credentials come from where the stores' own tools find them. `AWS_ENDPOINT_URL`, or
`?endpoint_override=host:port&scheme=http&region=…` after an S3 URI, names another server.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raydet.errors import RaydetError

# An object store fails now and then: waits before the next attempts, in seconds.
RETRY_AFTER_S = (0.2, 1.0, 5.0)
# Folders in which network drives, archives and waste bins keep thumbnails and copies of what lies beside them.
SYSTEM_FOLDERS = frozenset({"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX"})
_PLAIN = re.compile(r"\w[^/\\:]*(?:/\w[^/\\:]*)*")  # a path of which nothing leads anywhere
# To open a file in an object store is a request, for its size: so many stay open for reading parts of them.
OPEN_FILES = 128


def is_uri(root: str | Path) -> bool:
    """Is this an object store's address, not a local path?"""
    return "://" in str(root)


def is_hidden(path: str) -> bool:
    """Is a file or a folder on this path one that people do not see: `.name`, or what a system keeps for itself?"""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in path.split("/"))


def check_encoding(name: str) -> None:
    """Refuse a name of bytes that are not UTF-8, which Arrow does not take.

    Raises:
        ValueError: it is such a one.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"file name {name!r} is not UTF-8") from None


def inside(name: str) -> str:
    """Return a file name of an annotation as a path below the data set's folder, with forward slashes.

    Raises:
        ValueError: it is empty, leads out of the folder, or is not UTF-8.
    """
    check_encoding(name)
    if _PLAIN.fullmatch(name):  # nearly always, and 20 times as fast
        return name
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
        raise ValueError(f"file name {name!r} leaves the folder of images" if name else "the file name is empty")
    return str(path)


def write_aside(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file under another name and rename it, so that it is never there in part.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Store:
    """A folder, and reading below it. It can be sent to other processes.

    Args:
        root: local path or URI.

    Raises:
        RaydetError: pyarrow knows no such store.
    """

    def __init__(self, root: str | Path):
        self.root = str(root) if is_uri(root) else str(Path(root).expanduser().resolve())
        self._remote: Any = None
        self._base = self.root
        if is_uri(root):
            try:
                self._remote, self._base = pafs.FileSystem.from_uri(_encoded(self.root))
            except (ValueError, OSError) as error:
                raise RaydetError(f"{root}: no store that pyarrow can open ({error})") from None
            self._opened = lru_cache(OPEN_FILES)(self._remote.open_input_file)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root,)

    @property
    def is_local(self) -> bool:
        """Is the store a folder of this machine's file system?"""
        return self._remote is None

    def path(self, name: str) -> str:
        """Return the full path or address of a file, for messages too."""
        if self._remote is None:
            return os.path.join(self._base, name)
        address, question, query = self.root.partition("?")
        return f"{address.rstrip('/')}/{name}{question}{query}"

    def below(self, folder: str) -> Store:
        """Return the store of a folder in this one; "" and "." are this one."""
        return self if folder in {"", "."} else Store(self.path(folder))

    def kind(self, name: str = "") -> str:
        """Return "file", "folder" or "" for nothing."""
        if self._remote is None:
            path = self.path(name) if name else self._base
            return "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else ""
        found = self._retry(lambda: self._remote.get_file_info(self._key(name)), name)
        return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(found.type, "")

    def files(self, folder: str = "", *, recursive: bool = False, hidden: bool = False) -> dict[str, tuple[int, int]]:
        """List the files of a folder, sorted: path below the folder → (size in bytes, time of change in ns).

        Links are followed, but for those that lead nowhere, and those that lead back to a folder that they are in.

        Args:
            folder: below the root.
            recursive: list the folders below it as well.
            hidden: list hidden files and folders as well, see `is_hidden`.

        Raises:
            RaydetError: there is no such folder.
        """
        entries = sorted(self.each_file(folder, recursive=recursive, hidden=hidden))
        return {name: (size, changed) for name, size, changed in entries}

    def each_file(
        self, folder: str = "", *, recursive: bool = False, hidden: bool = False
    ) -> Iterator[tuple[str, int, int]]:
        """Yield what `files` lists, in no order; a local folder of any size takes no memory.

        Raises:
            RaydetError: there is no such folder.
        """
        if self.kind(folder) != "folder":
            raise RaydetError(f"{self.path(folder) if folder else self.root}: no such folder")
        if self._remote is not None:
            base = self._key(folder).rstrip("/") + "/"
            selector = pafs.FileSelector(base, recursive=recursive)
            for info in self._retry(lambda: self._remote.get_file_info(selector), folder):
                name = info.path.removeprefix(base)
                if info.type == pafs.FileType.File and (hidden or not is_hidden(name)):
                    yield name, info.size, info.mtime_ns or 0
        else:
            for name, entry in self._walk(folder, recursive, hidden):
                if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                    status = entry.stat()
                    yield name, status.st_size, status.st_mtime_ns

    def dead_links(self, folder: str = "") -> list[str]:
        """List the links in a folder and in those below it that lead nowhere, sorted."""
        if self._remote is not None or self.kind(folder) != "folder":
            return []
        found = self._walk(folder, recursive=True, hidden=False)
        return sorted(name for name, entry in found if entry.is_symlink() and not os.path.exists(entry.path))

    def _walk(self, folder: str, recursive: bool, hidden: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield what is in a local folder but is no folder, by its path below the folder."""
        base = self.path(folder) if folder else self._base
        real = os.path.realpath(base)
        # For each folder to list: its path below `base`, where it really is, and the folders whose links led there.
        waiting: list[tuple[str, str, tuple[str, ...]]] = [("", real, ())]
        while waiting:
            below, real, holders = waiting.pop()
            for entry in _scan(os.path.join(base, below)):
                name = f"{below}/{entry.name}" if below else entry.name
                if not hidden and is_hidden(entry.name):
                    continue
                is_link = entry.is_symlink()
                if not (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                    yield name, entry
                elif recursive and not is_link:
                    waiting.append((name, os.path.join(real, entry.name), holders))
                elif recursive:
                    target = os.path.realpath(entry.path)
                    if not any(_is_in(each, target) for each in (real, *holders)):
                        waiting.append((name, target, (real, *holders)))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or `length` bytes of it from `offset`.

        Raises:
            RaydetError: it is missing, cannot be read, or ends before; it is named.
        """
        if self._remote is None:
            try:
                with open(self.path(name), "rb", buffering=0) as file:
                    file.seek(offset)
                    content = file.read(-1 if length is None else length)
            except OSError as error:
                raise RaydetError(f"{self.path(name)}: cannot be read ({error.strerror})") from None
        else:
            content = self._retry(lambda: self._read(name, offset, length), name)
        if length is not None and len(content) != length:
            raise RaydetError(f"{self.path(name)}: ends before byte {offset + length}")
        return content

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            RaydetError: it is missing or cannot be reached; it is named.
        """
        if self._remote is not None:
            size: int = self._retry(lambda: self._opened(self._key(name)).size(), name)
            return size
        try:
            return os.path.getsize(self.path(name))
        except OSError as error:
            raise RaydetError(f"{self.path(name)}: cannot be read ({error.strerror})") from None

    def text(self, name: str) -> str:
        """Read a text file in UTF-8, with or without a byte order mark.

        Raises:
            RaydetError: it cannot be read, or is no text.
        """
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RaydetError(f"{self.path(name)} is not text in UTF-8: {error}") from None

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file aside and rename it, folders made as needed; an object store shows it only when it is whole.

        Raises:
            RaydetError: it cannot be written.
        """
        if self._remote is not None:

            def put() -> None:
                with self._remote.open_output_stream(self._key(name)) as file:
                    file.write(content)

            self._retry(put, name)
            return
        path = Path(self.path(name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, content)
        except OSError as error:
            raise RaydetError(f"{path}: cannot be written ({error.strerror})") from None

    def delete(self, name: str) -> None:
        """Delete a file, if there is one.

        Raises:
            RaydetError: it cannot be deleted.
        """
        if self._remote is None:
            Path(self.path(name)).unlink(missing_ok=True)
        elif self.kind(name) == "file":
            self._retry(lambda: self._remote.delete_file(self._key(name)), name)

    def remove(self, folder: str = "") -> None:
        """Remove a folder with all that is in it, if there is one.

        Raises:
            RaydetError: it cannot be removed.
        """
        if self.kind(folder) != "folder":
            return
        if self._remote is not None:  # one by one: not every server can delete many at once
            for name in self.files(folder, recursive=True, hidden=True):
                self.delete(f"{folder}/{name}" if folder else name)
            return
        path = self.path(folder) if folder else self._base
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise RaydetError(f"{path}: cannot be removed ({error.strerror})") from None

    def arrow(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        """Return Arrow's file system and the path in it of a file or a folder, for libraries that take these."""
        if self._remote is None:
            return pafs.LocalFileSystem(), self.path(name) if name else self._base
        return self._remote, self._key(name)

    def _key(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}" if name else self._base

    def _read(self, name: str, offset: int, length: int | None) -> bytes:
        if length is not None:
            file = self._opened(self._key(name))
            part: bytes = file.read_at(length, offset) if offset < file.size() else b""
            return part
        with self._remote.open_input_file(self._key(name)) as file:
            content: bytes = file.read_at(file.size() - offset, offset)
            return content

    def _retry(self, call: Any, name: str) -> Any:
        for wait in (*RETRY_AFTER_S, None):
            try:
                return call()
            except FileNotFoundError:
                raise RaydetError(f"{self.path(name)}: cannot be read (No such file)") from None
            except (OSError, ValueError) as error:
                self._opened.cache_clear()
                if wait is None:
                    raise RaydetError(f"{self.path(name)}: cannot be reached ({error})") from None
                time.sleep(wait)


def join(folder: str | Path, name: str) -> str | Path:
    """Return the path or address of a file in a folder: for a path a Path, for an address a str."""
    return Store(folder).path(name) if is_uri(folder) else Path(folder) / name


def above(path: str | Path) -> tuple[str, str]:
    """Return the path or address of the folder that a file or a folder is in, and its name there."""
    if not is_uri(path):
        place = Path(path).expanduser().absolute()
        return str(place.parent), place.name
    address, question, query = str(path).partition("?")
    folder, _, name = address.rstrip("/").rpartition("/")
    return f"{folder}{question}{query}", name


def write_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file by its path or address, see `Store.write`.

    Raises:
        RaydetError: it cannot be written.
    """
    folder, name = above(path)
    Store(folder).write(name, content)


def _encoded(uri: str) -> str:
    """Percent-encode the path of a URI."""
    address, question, query = uri.partition("?")
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}{slash}{quote(path)}{question}{query}"


def _scan(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a local folder."""
    try:
        yield from os.scandir(folder)
    except OSError as error:
        raise RaydetError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


@lru_cache(maxsize=64)
def store(root: str) -> Store:
    """Return a process' one store for a root: its connections are kept."""
    return Store(root)


def parquet(source: bytes | memoryview | Path) -> pq.ParquetFile:
    """Open a Parquet file, which is to be read with `use_threads=False`.

    Arrow's own threads may still hold Python's bytes while the interpreter ends, and the process then aborts (exit code
    134) although its work is done.

    Args:
        source: content of the file, or its path.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no Parquet file (pyarrow.ArrowInvalid).
    """
    return pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source))


def read_parquet(source: bytes | memoryview | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file in this thread.

    Args:
        source: content of the file, or its path.
        columns: names of the columns to read; None: all.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no Parquet file (pyarrow.ArrowInvalid).
    """
    with parquet(source) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
