"""Reads and writes of exact byte ranges, and strict JSON. Never a memory map: resident memory must be what we say."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import stat
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from d2moe.errors import D2MoeError, StorageError
from d2moe.types import padded

U8 = npt.NDArray[np.uint8]

READ_BYTES = 1 << 26
"""Most bytes asked of one system call; Linux stops at 2 GiB anyway."""
PIECE_BYTES = 1 << 22
"""Pieces in which checksums are computed."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shown(name: object) -> str:
    """`name` for a message: quoted, without control characters, at most 120 characters."""
    text = ascii(name) if isinstance(name, str) and not name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


def open_regular(path: Path, error: type[D2MoeError], advice: str) -> tuple[int, int]:
    """Open `path` for reading and return (file descriptor, size in bytes); anything but a plain file raises `error`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hang us
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError) as e:
        raise StorageError(f"{path}: cannot be opened: {reason(e)}; check the file and its permissions") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise error(f"{path}: not a regular file; {advice}")
    return fd, status.st_size


def reason(e: BaseException) -> str:
    """The system's words for an error, without the numbers and paths that we say ourselves."""
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def aligned_empty(n_bytes: int, align: int = 64) -> U8:
    """Uninitialised uint8 [n_bytes] whose address is a multiple of `align`."""
    raw = np.empty(n_bytes + align, np.uint8)
    skip = -raw.ctypes.data % align
    return raw[skip : skip + n_bytes]


def read_into(fd: int, buffer: U8, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of the file; a short read or an I/O error raises StorageError."""
    view, done = buffer.data, 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done : done + READ_BYTES]], offset + done)
        except OSError as e:
            raise StorageError(f"{path}: reading {len(view):,} bytes at {offset:,} failed: {reason(e)}") from None
        if n == 0:
            raise StorageError(
                f"{path}: ends at byte {offset + done:,}, expected {len(view):,} bytes at {offset:,};"
                " was the file cut while in use? copy it again"
            )
        done += n


def read_pieces(path: Path, pieces: Sequence[tuple[int, U8]], error: type[D2MoeError], advice: str) -> None:
    """Fill each buffer from its byte offset of the file at `path`, and leave nothing of it in the page cache.

    What is held in memory must not be there a second time. So the system is told exactly what will be read, nothing is
    read ahead of that, and the pages are dropped afterwards. Raises as `open_regular` and `read_into`.
    """
    fd, _ = open_regular(path, error, advice)
    try:
        _advise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, buffer in pieces:
            _advise(fd, offset, buffer.nbytes, os.POSIX_FADV_WILLNEED)
        for offset, buffer in pieces:
            read_into(fd, buffer, offset, path)
        for offset, buffer in pieces:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE  # whole pages: part of one would stay
            _advise(fd, start, padded(offset + buffer.nbytes, mmap.PAGESIZE) - start, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _advise(fd: int, offset: int, n_bytes: int, advice: int) -> None:
    with contextlib.suppress(OSError):  # a file system may decline
        os.posix_fadvise(fd, offset, n_bytes, advice)


def read_small(path: Path, limit_bytes: int, error: type[D2MoeError], advice: str) -> bytes:
    """The whole file, refused when it is larger than `limit_bytes`."""
    fd, n_bytes = open_regular(path, error, advice)
    try:
        if n_bytes > limit_bytes:
            raise error(f"{path}: has {n_bytes:,} bytes, expected at most {limit_bytes:,}; {advice}")
        data = np.empty(n_bytes, np.uint8)
        read_into(fd, data, 0, path)
    finally:
        os.close(fd)
    return data.tobytes()


def write_at(fd: int, data: bytes | U8, offset: int, path: Path, needed_bytes: Callable[[], int]) -> None:
    """Write `data` (bytes or uint8 [n]) at byte `offset`; a full disk raises StorageError asking for `needed_bytes`."""
    view, done = (memoryview(data) if isinstance(data, bytes) else data.data), 0
    while done < len(view):
        try:
            done += os.pwrite(fd, view[done : done + READ_BYTES], offset + done)
        except OSError as e:
            refuse_write(e, path, needed_bytes())


def refuse_write(e: OSError, path: Path, needed_bytes: int) -> NoReturn:
    """Raise the StorageError for a failed write, creation or preallocation."""
    if e.errno in NO_SPACE:
        raise StorageError(
            f"{path}: writing failed: {reason(e)}; {needed_bytes:,} more bytes are needed."
            " What is done is kept: make room, and the same command resumes"
        ) from None
    raise StorageError(f"{path}: writing failed: {reason(e)}; what is done is kept, the same command resumes") from None


def crc_of_range(fd: int, offset: int, n_bytes: int, path: Path) -> int:
    """CRC-32 of a byte range, read in pieces of a few megabytes."""
    crc, buffer = 0, aligned_empty(min(n_bytes, PIECE_BYTES))
    for at in range(0, n_bytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, n_bytes - at)]
        read_into(fd, piece, offset + at, path)
        crc = zlib.crc32(piece.data, crc)
    return crc


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse_json(data: bytes, where: str, error: type[D2MoeError], advice: str) -> dict[str, Any]:
    """A JSON object. Refused: bad UTF-8, repeated keys, NaN and infinities, lone surrogates, absurd nesting."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in out if names.count(name) > 1)
            raise ValueError(f"key {shown(twice)} is there twice")
        return out

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates, which no message could print
    except RecursionError:
        raise error(f"{where}: is nested too deeply to be read; {advice}") from None
    except ValueError as e:
        cause = "it is not UTF-8" if isinstance(e, UnicodeError) else str(e)
        raise error(f"{where}: is not valid JSON: {cause}; {advice}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: is a JSON {type(value).__name__}, expected an object; {advice}")
    return value
