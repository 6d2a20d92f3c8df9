"""JSONL files of records: written whole (temporary name, then rename), read with a torn last line tolerated."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pivotrl.types import Record


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole, for people: indented, keys in the given order."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSONL, whole, and return their number."""
    lines = [msgspec.json.encode(record) for record in records]
    write_bytes(path, b"".join(line + b"\n" for line in lines))
    return len(lines)


def read_jsonl[R: Record](path: Path, kind: type[R]) -> list[R]:
    """Read a file that `write_jsonl` or a `Journal` wrote.

    Raises:
        ValueError: a line (other than a torn last one) is no valid record; names file, line and fault.
        FileNotFoundError: with the path.
    """
    return list(_decode(path, kind))


def _decode[R: Record](path: Path, kind: type[R]) -> Iterator[R]:
    decoder = msgspec.json.Decoder(kind)
    data = path.read_bytes()
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            if number == len(lines):  # no newline at the end: the writer was killed inside this line
                return
            raise ValueError(f"{path}:{number} is no valid {kind.__name__}: {error}") from error


class Journal[R: Record]:
    """An append-only JSONL file that survives kill -9: a torn last line is cut off when it is opened again.

    A stage appends each finished record, and on resume skips what is already there.
    """

    def __init__(self, path: Path, kind: type[R]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[R] = []
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                with open(path, "r+b") as file:
                    file.truncate(len(whole))
            self.records = read_jsonl(path, kind)
        self._file = open(path, "ab")

    def append(self, record: Record) -> None:
        """Add one record; it is on its way to the disk when this returns."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        self.records.append(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal[R]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def completed[R: Record, K: Hashable](
    path: Path, kind: type[R], keys: Sequence[K], *, key: Callable[[R], K], make: Callable[[set[K]], Iterable[R]]
) -> list[R]:
    """The records of `keys`, in their order: read from `path` where it is there, else made, and written to it when all are.

    `make(done)` yields the records of the other keys, in any order. A journal beside `path` keeps every one of them, so that the next
    call goes on behind them, however this one ends. Fewer than `keys` are returned where `make` stopped early.
    """
    journal_path = path.with_suffix(".journal.jsonl")
    if path.exists():
        journal_path.unlink(missing_ok=True)
        return read_jsonl(path, kind)
    with Journal(journal_path, kind) as journal:
        for record in make({key(record) for record in journal.records}):
            journal.append(record)
        found = {key(record): record for record in journal.records}
    records = [found[wanted] for wanted in keys if wanted in found]
    if len(records) == len(keys):
        write_jsonl(path, records)
        journal_path.unlink()
    return records


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files below a folder, as hex.

    Raises:
        FileNotFoundError: the path does not exist.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0".encode())
            digest.update(file_digest(file).encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
