"""Safetensors files without the safetensors library: headers checked rule by rule, tensors read with pread.

We read them ourselves because weights must land in aligned buffers of our own (a memory map would count as resident
memory that nobody budgeted), one expert of a fused tensor must be readable alone, and NumPy has no bfloat16. A file is
untrusted input; `parse_header` names the rule that was broken. The caller says which error class fits.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import aligned_empty, open_regular, parse_json, read_into, shown
from d2moe.errors import CheckpointError, D2MoeError
from d2moe.types import ALIGN_BYTES, padded

F32 = npt.NDArray[np.float32]

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 48
"""Largest dimension; keeps products small long before a file of that size exists."""

# BF16 and the two 8-bit floats have no NumPy type: they stay raw bits of the same width.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
        "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
        "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `offset` is absolute in the file, sizes in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """What a file's header says; entries in file order of the JSON."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_offset: int
    file_bytes: int


def parse_header(text: bytes, file_bytes: int, where: str, error: type[D2MoeError]) -> Header:
    """Check the JSON `text` of a header (without its 8 length bytes) against the size of its file."""
    advice = "the file is damaged or not safetensors"
    if not text.startswith(b"{"):
        raise error(f"{where}: header begins with {shown(text[:1])}, expected '{{'; {advice}")
    table = parse_json(text, f"{where}: header", error, advice)
    data_offset = 8 + len(text)
    data_bytes = file_bytes - data_offset
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error(f"{where}: __metadata__ must map strings to strings; {advice}")
    entries = {name: _entry(name, facts, data_offset, data_bytes, where, error) for name, facts in table.items()}
    end, before = data_offset, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != end:
            what = f"overlaps {shown(before)}" if entry.offset < end else "leaves a hole before it"
            at, free = entry.offset - data_offset, end - data_offset
            raise error(f"{where}: tensor {shown(name)} at byte {at:,} {what}, expected {free:,}; {advice}")
        end, before = entry.offset + entry.n_bytes, name
    if end != file_bytes:
        raise error(
            f"{where}: has {data_bytes:,} bytes of data, the header says {end - data_offset:,};"
            " was the file cut or changed? copy or download it again"
        )
    return Header(entries, metadata, data_offset, file_bytes)


def _entry(name: str, facts: Any, data_offset: int, data_bytes: int, where: str, error: type[D2MoeError]) -> Entry:
    item = f"{where}: tensor {shown(name)}"
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        found = shown(list(facts) if isinstance(facts, dict) else facts)
        raise error(f"{item} has {found}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"{item} has dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise error(f"{item} has shape {shown(shape)}, expected at most {MAX_DIMENSIONS} sizes from 0 to {MAX_SIZE:,}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"{item} has data_offsets {shown(offsets)}, expected [begin, end]")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise error(f"{item} {dtype} {shape} has {offsets[1] - offsets[0]:,} bytes, its shape needs {n_bytes:,}")
    if offsets[1] > data_bytes:
        raise error(
            f"{item} ends at byte {offsets[1]:,} of the data, the file has {data_bytes:,};"
            " was the file cut? copy or download it again"
        )
    return Entry(dtype, tuple(shape), data_offset + offsets[0], n_bytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_SIZE for v in value)


def read_header(path: Path, error: type[D2MoeError], limit_bytes: int = MAX_HEADER_BYTES, advice: str = "") -> Header:
    """Header of the file at `path`; reads the header's bytes only, at most `limit_bytes`."""
    fd, file_bytes = open_regular(path, error, advice or "is the checkpoint complete? download it again")
    try:
        return _read_header(fd, file_bytes, path, error, limit_bytes)
    finally:
        os.close(fd)


def _read_header(fd: int, file_bytes: int, path: Path, error: type[D2MoeError], limit_bytes: int) -> Header:
    if file_bytes < 8:
        raise error(f"{path}: has {file_bytes} bytes, a safetensors file has at least 8; copy or download it again")
    size = np.empty(8, np.uint8)
    read_into(fd, size, 0, path)
    (n,) = struct.unpack("<Q", size.tobytes())
    if n > min(limit_bytes, file_bytes - 8):
        raise error(
            f"{path}: the header claims {n:,} bytes, expected at most {min(limit_bytes, file_bytes - 8):,};"
            " the file is cut, damaged or not safetensors"
        )
    text = np.empty(n, np.uint8)
    read_into(fd, text, 8, path)
    return parse_header(text.tobytes(), file_bytes, str(path), error)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """Header bytes (length, JSON, spaces) for tensors stored in the given order, and where each will lie.

    The data begins at a multiple of 4096 bytes. The same tensors give the same bytes.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "d2moe"}}
    places, at = [], 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        places.append((name, dtype, tuple(shape), at, n_bytes))
        at += n_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    start = padded(8 + len(text), ALIGN_BYTES)
    head = struct.pack("<Q", start - 8) + text.ljust(start - 8)
    return head, {name: Entry(dtype, shape, start + at, n) for name, dtype, shape, at, n in places}


class SafetensorsFile:
    """A checkpoint file opened for reading tensors or parts of tensors; use `with`, or close it.

    Arrays are fresh and 64-byte aligned. BF16 comes as its raw bits in uint16; `as_float32` widens it.
    """

    def __init__(self, path: str | Path, error: type[D2MoeError] = CheckpointError):
        self.path, self.error = Path(path), error
        fd, file_bytes = open_regular(self.path, error, "is the checkpoint complete? download it again")
        try:
            header = _read_header(fd, file_bytes, self.path, error, MAX_HEADER_BYTES)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.entries, self.metadata = header.entries, header.metadata

    def entry(self, name: str) -> Entry:
        """Where a tensor lies; raises the file's error class if there is none of that name."""
        if name not in self.entries:
            raise self.error(f"{self.path}: has no tensor {shown(name)}; is the checkpoint complete?")
        return self.entries[name]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor in its own type."""
        entry = self.entry(name)
        return self._read(entry, entry.offset, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of the first dimension; reads only these bytes."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise self.error(f"{self.path}: tensor {shown(name)} {list(entry.shape)} has no rows {start} to {stop}")
        row_bytes = entry.n_bytes // max(entry.shape[0], 1)
        return self._read(entry, entry.offset + start * row_bytes, (stop - start, *entry.shape[1:]))

    def read_index(self, name: str, index: int) -> npt.NDArray[Any]:
        """Element `index` of the first dimension, without that dimension: one expert of a fused tensor."""
        rows = self.read_rows(name, index, index + 1)
        return rows.reshape(rows.shape[1:])

    def read_float32(self, name: str) -> F32:
        """The whole tensor widened to float32."""
        return as_float32(self.read(name), self.entry(name).dtype)

    def _read(self, entry: Entry, offset: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        dtype = DTYPES[entry.dtype]
        data = aligned_empty(math.prod(shape) * dtype.itemsize)
        read_into(self._fd, data, offset, self.path)
        return data.view(dtype).reshape(shape)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def as_float32(array: npt.NDArray[Any], dtype: str) -> F32:
    """Float32 of BF16 (raw uint16 bits), F16, F32 or F64 data of safetensors type `dtype`; exact but for F64."""
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    if dtype not in ("F16", "F32", "F64"):
        raise CheckpointError(f"a weight has dtype {dtype}, expected BF16, F16 or F32; is the checkpoint quantised?")
    return np.ascontiguousarray(array, dtype=np.float32)
