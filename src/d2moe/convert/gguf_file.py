"""GGUF files: the header rule by rule, tensors as float32 rows read with pread and decoded by the `gguf` package.

The header is read here and not by gguf's own reader, which maps the whole file (a mapping counts as resident memory
that nobody budgeted, and a file cut while in use ends the process) and keeps a NumPy object for every string of the
vocabulary: nine seconds and 490 MB for one of 152,000 tokens. A file is untrusted input; errors name the broken rule.
Names, types, block sizes and the decoding of every type are gguf's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize

from d2moe.container.files import open_regular, read_into, shown
from d2moe.errors import CheckpointError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARRAY, STRING, BOOL = 9, 8, 7
NUMBERS: dict[int, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"])
    if kind
}
"""Value types of the format by their number; 8 is a string, 9 an array."""
MAX_DIMENSIONS = 4
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
WINDOW_BYTES = 1 << 20
"""Bytes of the header read at a time."""
PIECE_BYTES = 4 << 20
"""Float32 bytes decoded at a time: gguf's decoders need a few times as much."""
ADVICE = "is the download complete? get the file again"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` as in NumPy, rows before columns (the file lists columns first); `offset` is absolute."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // per_block * block_bytes

    @property
    def n_rows(self) -> int:
        """Rows of all leading dimensions together."""
        return math.prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


class GgufFile:
    """An opened file; use `with`, or close it. Every tensor lies inside the file.

    `metadata` has str, int, float, bool, list[str] and one-dimensional NumPy arrays; a float32 becomes the shortest
    number that rounds to it, 1e-05 and not 9.999999747378752e-06. Raises CheckpointError, and StorageError where the
    system does not read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd, self.n_bytes = open_regular(path, CheckpointError, "give the .gguf file")
        try:
            header = _Header(path, self._fd, self.n_bytes)
            self.metadata: Mapping[str, Any] = header.metadata
            self.tensors: Mapping[str, GgufTensor] = header.tensors
        except BaseException:
            self.close()
            raise

    def where(self, tensor: GgufTensor) -> str:
        """The tensor for a message."""
        return f"{self.path}: tensor {shown(tensor.name)}"

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> F32:
        """Rows start to stop, counted over all leading dimensions: float32 [stop - start, columns]."""
        cols = tensor.shape[-1]
        out = np.empty((stop - start, cols), np.float32)
        step = max(PIECE_BYTES // (4 * cols), 1)
        raw = np.empty((min(step, stop - start), tensor.row_bytes), np.uint8)
        for row in range(start, stop, step):
            piece = raw[: min(step, stop - row)]
            read_into(self._fd, piece.reshape(-1), tensor.offset + row * tensor.row_bytes, self.path)
            # A scale that is infinite or NaN is found in the result by whoever asked.
            with np.errstate(all="ignore"):
                out[row - start : row - start + len(piece)] = dequantize(piece, tensor.kind)
        return out

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def can_decode(kind: GGMLQuantizationType) -> bool:
    """Whether the installed gguf turns this type into float32."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        with np.errstate(all="ignore"):
            values = dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return values.dtype == np.float32 and values.shape == (1, per_block)


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, fd: int, n_bytes: int):
        self._path, self._fd, self._n_bytes = path, fd, n_bytes
        self._at, self._window, self._start = 0, b"", 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._check_version()
        n_tensors, n_keys = self._u64(), self._u64()
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise self._error(f"says it has {n_tensors:,} tensors and {n_keys:,} keys; the file is damaged")
        for _ in range(n_keys):
            key = self._string("a key")
            if key in self.metadata:
                raise self._error(f"key {shown(key)} is there twice; the file is damaged")
            self.metadata[key] = self._value(key, self._u32())
        # Offsets count from the end of the header, which is known once all of it is read.
        found = [self._tensor() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, expected a power of two; the file is damaged")
        data = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in found:
            if name in self.tensors:
                raise self._error(f"tensor {shown(name)} is there twice; the file is damaged")
            tensor = GgufTensor(name, kind, shape, data + offset)
            if tensor.offset + tensor.n_bytes > n_bytes:
                raise self._error(
                    f"tensor {shown(name)} ends at byte {tensor.offset + tensor.n_bytes:,}, but the file has "
                    f"{n_bytes:,}; {ADVICE}"
                )
            self.tensors[name] = tensor

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")

    def _check_version(self) -> None:
        if self._n_bytes < 24:
            raise self._error(f"has {self._n_bytes} bytes, too few for a GGUF file; {ADVICE}")
        magic = self._take(4, "the first bytes")
        if magic != MAGIC:
            raise self._error(f"begins with {magic!r}, expected {MAGIC!r}; is this a GGUF file?")
        version = self._u32()
        if version & 0xFFFF == 0:
            raise self._error("is of a big-endian machine, which is not supported; get the little-endian file")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise self._error(f"has GGUF version {version}, supported are {known}; make it with a current llama.cpp")

    def _take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if n > self._n_bytes - self._at:
            raise self._error(f"ends inside {what} at byte {self._at:,}; {ADVICE}")
        skip = self._at - self._start
        if skip + n > len(self._window):
            buffer = np.empty(min(max(n, WINDOW_BYTES), self._n_bytes - self._at), np.uint8)
            read_into(self._fd, buffer, self._at, self._path)
            self._window, self._start, skip = buffer.tobytes(), self._at, 0
        self._at += n
        return self._window[skip : skip + n]

    def _u32(self) -> int:
        return int.from_bytes(self._take(4, "the header"), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8, "the header"), "little")

    def _string(self, what: str) -> str:
        data = self._take(self._u64(), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8: {shown(repr(data[:40]))}; the file is damaged") from None

    def _value(self, key: str, kind: int) -> Any:
        what = f"the value of {shown(key)}"
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            item, count = self._u32(), self._u64()
            if item == STRING:
                if count > (self._n_bytes - self._at) // 8:  # before a loop that an absurd number would not end
                    raise self._error(f"{what} has {count:,} strings, more than the file has room for; {ADVICE}")
                return [self._string(what) for _ in range(count)]
            return np.frombuffer(self._numbers(item, count, what), NUMBERS[item])
        number = np.frombuffer(self._numbers(kind, 1, what), NUMBERS[kind])[0]
        # str() of a NumPy float32 is the shortest decimal that rounds to it.
        return float(str(number)) if isinstance(number, np.float32) else number.item()

    def _numbers(self, kind: int, count: int, what: str) -> bytes:
        if kind not in NUMBERS:
            raise self._error(f"{what} has type {kind}, which the format does not have; the file is damaged")
        return self._take(count * NUMBERS[kind].itemsize, what)

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string("the name of a tensor")
        what = f"tensor {shown(name)}"
        n_dims = self._u32()
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._error(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMENSIONS}; the file is damaged")
        shape = tuple(self._u64() for _ in range(n_dims))[::-1]
        if not all(1 <= n < 1 << 48 for n in shape):
            raise self._error(f"{what} has shape {list(shape)}, which no tensor has; the file is damaged")
        number = self._u32()
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._error(
                f"{what} has type {number}, which this version of the gguf package does not know; update it with "
                "pip install -U gguf, or take a file of another quantisation"
            ) from None
        per_block = GGML_QUANT_SIZES[kind][0]
        if shape[-1] % per_block:
            raise self._error(
                f"{what} has rows of {shape[-1]} weights, expected a multiple of {per_block} for type {kind.name}; "
                "the file is damaged"
            )
        return name, kind, shape, self._u64()
