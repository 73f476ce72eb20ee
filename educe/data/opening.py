"""A data file as a stream of bytes: decompressed by what it is, not by its name; what poses as data is refused by name."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from educe.errors import DataError

HEAD_BYTES = 1 << 16
# A compressed file that grows beyond both is a bomb, not data.
MOST_RATIO, BOMB_BYTES = 200, 10**9
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def compression_of(path: Path) -> str:
    """gzip, zstd, or "" where the file is not compressed."""
    with path.open("rb") as f:
        head = f.read(4)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises `DataError` for what cannot be read, is damaged, or changes meanwhile."""
    before = _checked(path)
    kind = compression_of(path)
    with path.open("rb", buffering=0 if kind else 1 << 20) as file:
        if not kind:
            yield file
        else:
            yield cast(BinaryIO, io.BufferedReader(_Unpacked(file, kind, path), 1 << 20))
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(8, str(path), "changed while it was read.", "Wait until it is whole, and start again.")


def head_of(path: Path) -> bytes:
    """The first bytes of what the file holds, decompressed; impostors are refused."""
    with open_data(path) as f:
        head = f.read(HEAD_BYTES)
    _refuse_impostor(head, str(path))
    return head


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file, with its errors told and its size watched."""

    def __init__(self, file: IO[bytes], kind: str, path: Path) -> None:
        self._path, self._kind, self._num_bytes = path, kind, 0
        self._packed_bytes = max(1, path.stat().st_size)
        self._reader = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if kind == "gzip" else _zstd(file, path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._reader.read(len(buffer))
        except (OSError, EOFError, zlib.error, ValueError) as e:
            raise self._damaged(str(e)) from e
        except Exception as e:
            if type(e).__name__ != "ZstdError":
                raise
            raise self._damaged(str(e)) from e
        self._num_bytes += len(data)
        if self._num_bytes > BOMB_BYTES and self._num_bytes > MOST_RATIO * self._packed_bytes:
            found = f"unpacks to more than {MOST_RATIO} times its size."
            raise DataError(9, str(self._path), found, "Unpack it and look at it first.")
        buffer[: len(data)] = data
        return len(data)

    def _damaged(self, said: str) -> DataError:
        found = f"is damaged or cut short: {self._kind} stops after {self._num_bytes:,} bytes ({said})."
        return DataError(4, str(self._path), found, "Download or write it again.")


def _zstd(file: IO[bytes], path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as e:
        fix = "pip install 'educe[zstd]', or unpack it: unzstd."
        raise DataError(7, str(path), "is compressed with zstd, and zstandard is not installed.", fix) from e
    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return cast(BinaryIO, _Whole(reader, path))


class _Whole:
    """A zstd stream that notices when its last frame is cut short: the reader itself takes the end of the file for the end."""

    def __init__(self, reader: BinaryIO, path: Path) -> None:
        self._reader, self._path = reader, path

    def read(self, size: int) -> bytes:
        data = self._reader.read(size)
        if not data and not _ends_whole(self._path):
            raise EOFError("the last frame has no end")
        return data


def _ends_whole(path: Path) -> bool:
    """Whether the frames of a zstd file are complete."""
    import zstandard

    with path.open("rb") as f:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        rest = b""
        while block := rest or f.read(1 << 20):
            if decompressor.eof:
                decompressor = zstandard.ZstdDecompressor().decompressobj()
            decompressor.decompress(block)
            rest = decompressor.unused_data
        return bool(decompressor.eof)


def _checked(path: Path) -> Any:
    shown = str(path)
    try:
        found = path.stat()
    except FileNotFoundError as e:
        why = "points to nothing." if path.is_symlink() else "does not exist."
        raise DataError(1, shown, why, "Check the path; it is relative to the recipe.") from e
    except OSError as e:
        raise DataError(2, shown, f"cannot be read: {e.strerror}.", "Check the path and its permissions.") from e
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise DataError(2, shown, f"is {kind}.", "Give a file of rows.")
    try:
        with path.open("rb"):
            return found
    except OSError as e:
        raise DataError(2, shown, f"cannot be read: {e.strerror}.", "Check its permissions.") from e


def _refuse_impostor(head: bytes, shown: str) -> None:
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DataError(3, shown, "is empty.", "Give a file with at least one row.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(6, shown, "is a Git LFS pointer, not the data.", "Fetch it: git lfs pull.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(4, shown, "is UTF-16.", "Convert it: iconv -f utf-16 -t utf-8.")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise DataError(6, shown, "is an HTML page, not the data.", "Download the raw file.")
    if head.startswith((b"PK\x03\x04", b"BZh", b"\xfd7zXZ")):
        raise DataError(4, shown, "is packed in a way that is not read.", "Unpack it, or pack it with gzip or zstd.")
