"""A container opened for reading: checked early, held cheaply, read by exact byte ranges into arrays of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import (
    aligned_empty,
    open_regular,
    parse_json,
    read_pieces,
    read_small,
    shown,
)
from d2moe.container.layout import (
    ARRAYS,
    MEMORY_ALIGN,
    SEGMENTS,
    MatrixLayout,
    RecordLayout,
    arrays_at,
    expert_file,
    expert_tensor,
)
from d2moe.container.manifest import (
    CHECKSUMS,
    CONFIG,
    DENSE,
    GENERATION_CONFIG,
    MANIFEST,
    MAX_SMALL_BYTES,
    Manifest,
    parse_manifest,
)
from d2moe.container.record import NestedMatrix, split_record
from d2moe.container.safetensors_header import DTYPES, Entry, Header, read_header
from d2moe.errors import ConfigError, ContainerError
from d2moe.types import ALIGN_BYTES, BASE_BITS, MAX_BITS, TILE_ROWS, DenseWidths, check_width, padded

U8 = npt.NDArray[np.uint8]

ADVICE = 'copy it again, or convert the model again; "d2moe verify" checks every byte'


class Container:
    """A d2moe container; make one with `Container.open`. It holds no file open, so there is nothing to close.

    `config` and `generation_config` are the source's own JSON. `dense` maps every tensor of the dense file to where it
    lies; by canonical name, `nested` has the shapes of the quantised matrices among them, padded to whole tiles and
    groups, and `floats` the float32 tensors. `kept` and `offsets` int64 [layers with experts, experts]: the bits that
    each record has, and where in its file it begins.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        dense: dict[str, Entry],
        nested: dict[str, MatrixLayout],
        floats: dict[str, Entry],
        starts: dict[int, int],
    ):
        self.path, self.manifest = path, manifest
        self.config, self.generation_config = config, generation_config
        self.dense, self.nested, self.floats = dense, nested, floats
        self.kept = np.array([manifest.kept_of(layer) for layer in manifest.layers], np.int64)
        sizes = np.array([[manifest.record.prefix_bytes(b) for b in row] for row in self.kept.tolist()], np.int64)
        self.offsets = np.cumsum(sizes, 1) - sizes + np.array([[starts[layer]] for layer in manifest.layers], np.int64)

    @classmethod
    def open(cls, path: str | Path) -> Container:
        """Open and check the container at `path`: every header, shape and file size, but no weight.

        Reads the manifest, the configs and the headers (about 100 bytes per tensor); raises ContainerError, or
        StorageError when the system refuses a read.
        """
        path = Path(path)
        _check_folder(path)
        text = read_small(path / MANIFEST, MAX_SMALL_BYTES, ContainerError, ADVICE)
        manifest = parse_manifest(text, str(path / MANIFEST))
        for name, facts in manifest.files.items():
            _check_size(path / name, facts.n_bytes, facts.optional)
        config = _read_config(path / CONFIG)
        generation = _read_config(path / GENERATION_CONFIG) if GENERATION_CONFIG in manifest.files else {}
        header = read_header(path / DENSE, ContainerError, MAX_SMALL_BYTES, ADVICE)
        nested, floats = _check_dense(header.entries, manifest, path / DENSE)
        starts = {}
        for layer in manifest.layers:
            file = path / expert_file(layer)
            # A name with its numbers takes about 100 bytes; a header far above that is an attack on our memory.
            limit = 4096 + manifest.experts * (len(SEGMENTS) + len(manifest.optional_segments)) * 256
            starts[layer] = _check_experts(read_header(file, ContainerError, limit, ADVICE), manifest, layer, file)
        return cls(path, manifest, config, generation, header.entries, nested, floats, starts)

    @property
    def record(self) -> RecordLayout:
        return self.manifest.record

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, ascending."""
        return self.manifest.layers

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return self.manifest.experts

    @property
    def most_bits(self) -> int:
        """The widest record."""
        return int(self.kept.max())

    def width(self, layer: int, expert: int, bits: int = MAX_BITS) -> int:
        """`bits`, or the bits that the record has if they are fewer."""
        return min(bits, int(self.kept[self._index(layer, expert)]))

    def experts_bytes(self, bits: int = MAX_BITS) -> int:
        """Bytes of all records, as far as they go to `bits`."""
        return self.record.records_bytes(self.kept.reshape(-1).tolist(), check_width(bits))

    def stored_widths(self, widths: DenseWidths) -> DenseWidths:
        """These widths, or the widest that are stored where those are less."""
        found = {name.rpartition(".")[2]: min(widths.of(name), layout.bits) for name, layout in self.nested.items()}
        bits = min(widths.bits, max((bits for kind, bits in found.items() if kind not in widths.others), default=widths.bits))
        return DenseWidths(bits, {kind: b for kind, b in (dict(widths.others) | found).items() if b != bits})

    def dense_bytes(self, widths: DenseWidths) -> int:
        """Bytes in memory of all dense weights, matrices at `widths` and float32 tensors.

        Each matrix and each tensor counts as a multiple of 64 bytes, so an arena of this size holds them all, aligned.
        """
        matrices = sum(layout.memory_bytes(widths.of(name)) for name, layout in self.nested.items())
        return matrices + sum(padded(entry.n_bytes, MEMORY_ALIGN) for entry in self.floats.values())

    def has(self, name: str) -> bool:
        """Whether there is a dense weight of that canonical name, be it a matrix ("head") or a float32 tensor."""
        return name in self.nested or name in self.floats

    def read_dense(self, name: str) -> npt.NDArray[Any]:
        """A tensor of the dense file in a fresh, 64-byte aligned array; reads its bytes and no more."""
        entry = self.dense.get(name)
        if entry is None:
            raise self._missing("tensor", name)
        data = self._read(self.path / DENSE, entry.offset, entry.n_bytes)
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def read_nested(self, name: str, bits: int, allocate: Callable[[int], U8] | None = None) -> NestedMatrix:
        """A dense matrix at width `bits`, or the widest that is stored; reads the arrays that this width needs and no more.

        `allocate(n_bytes)` is called once with `nested[name].memory_bytes(bits)` and must give uint8 [n_bytes], writable
        and at a multiple of 64 bytes, such as a piece of a large arena; without it the memory is fresh. The arrays are
        views of it and begin at multiples of 64 bytes.
        """
        layout = self.nested.get(name)
        if layout is None:
            raise self._missing("matrix", name)
        bits = min(check_width(bits), layout.bits)
        n_bytes = layout.memory_bytes(bits)
        memory = (allocate or aligned_empty)(n_bytes)
        if memory.shape != (n_bytes,) or memory.dtype != np.uint8 or not memory.flags.carray:
            raise ConfigError(
                f"allocate({n_bytes}) gave {memory.dtype} {list(memory.shape)}, expected writable uint8 [{n_bytes}]"
            )
        if memory.ctypes.data % MEMORY_ALIGN:
            raise ConfigError(f"allocate({n_bytes}) gave memory that is not at a multiple of {MEMORY_ALIGN} bytes")
        pieces, arrays, at = [], {}, 0
        # Affine goes last in memory: alone of all its size may be an odd multiple of 32.
        for kind in (*(k for k in arrays_at(bits) if k != "affine"), "affine"):
            entry = self.dense[f"{name}.{kind}"]
            piece = memory[at : at + entry.n_bytes]
            pieces.append((entry.offset, piece))
            arrays[kind] = piece.view(DTYPES[entry.dtype]).reshape(entry.shape)
            at += entry.n_bytes
        read_pieces(self.path / DENSE, pieces, ContainerError, ADVICE)
        return NestedMatrix.of(arrays)

    def _missing(self, what: str, name: str) -> ContainerError:
        return ContainerError(
            f"{self.path / DENSE}: has no {what} {shown(name)}, which {CONFIG} calls for; convert the model again"
        )

    def expert_path(self, layer: int) -> Path:
        """File with the records of `layer`."""
        self._index(layer, 0)
        return self.path / expert_file(layer)

    def expert_offset(self, layer: int, expert: int) -> int:
        """Where in that file the record begins; a multiple of 4096."""
        return int(self.offsets[self._index(layer, expert)])

    def read_record(self, layer: int, expert: int, bits: int) -> U8:
        """The first `prefix_bytes(bits)` bytes of a record, 4096-byte aligned; ConfigError if it has fewer bits."""
        n_bytes = self.record.prefix_bytes(check_width(bits))
        if self.width(layer, expert, bits) < bits:
            raise ConfigError(f"{self.path}: layer {layer} expert {expert} has {self.width(layer, expert)} bits, {bits} were asked for")
        return self._read(self.expert_path(layer), self.expert_offset(layer, expert), n_bytes, ALIGN_BYTES)

    def read_expert(self, layer: int, expert: int, bits: int) -> dict[str, NestedMatrix]:
        """Gate, up and down of an expert at width `bits`; one read of `prefix_bytes(bits)` bytes."""
        return split_record(self.record, self.read_record(layer, expert, bits), bits)

    def _index(self, layer: int, expert: int) -> tuple[int, int]:
        """Row and column of `kept`."""
        if layer not in self.moe_layers:
            raise ConfigError(f"{self.path}: layer {layer} has no experts, expected one of {shown(self.moe_layers)}")
        if not 0 <= expert < self.experts:
            raise ConfigError(f"{self.path}: layer {layer} has no expert {expert}, expected 0 to {self.experts - 1}")
        return self.moe_layers.index(layer), expert

    def _read(self, path: Path, offset: int, n_bytes: int, align: int = 64) -> U8:
        data = aligned_empty(n_bytes, align)
        read_pieces(path, [(offset, data)], ContainerError, ADVICE)
        return data


def _check_folder(path: Path) -> None:
    """Say what a folder that is no container is, if we can tell."""
    if path.name.endswith(".partial"):
        raise ContainerError(f'{path}: is an unfinished conversion; run the same "d2moe convert" again, it resumes')
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # names that no file can have
        is_folder = exists = False
    if not exists:
        half = path.with_name(path.name + ".partial") if path.name else path
        hint = f'; {half.name} is unfinished, run the same "d2moe convert" again' if half.is_dir() else ""
        raise ContainerError(f"{shown(str(path))}: no such folder{hint or ', expected a d2moe container'}")
    if not is_folder:
        raise ContainerError(f"{path}: is a file, expected the folder that d2moe convert made")
    if not (path / MANIFEST).exists():
        advice = "give the folder of a d2moe container"
        if (path / CONFIG).exists():
            advice = f'convert it: "d2moe convert {path} NAME.d2moe"'
        raise ContainerError(f"{path}: has no {MANIFEST}, so it is not a whole container; {advice}")


def _check_size(path: Path, n_bytes: int, optional: bool) -> None:
    if optional and not path.exists():
        return
    fd, found = open_regular(path, ContainerError, ADVICE)
    os.close(fd)
    if found != n_bytes:
        raise ContainerError(f"{path}: has {found:,} bytes, the manifest says {n_bytes:,}; cut or changed? {ADVICE}")


def _read_config(path: Path) -> dict[str, Any]:
    return parse_json(read_small(path, MAX_SMALL_BYTES, ContainerError, ADVICE), str(path), ContainerError, ADVICE)


def _check_dense(
    entries: dict[str, Entry], manifest: Manifest, path: Path
) -> tuple[dict[str, MatrixLayout], dict[str, Entry]]:
    """The nested matrices and the float32 tensors by canonical name; what is neither must say that it is optional.

    All arrays of a matrix must be there up to its widest plane, in shapes that fit each other.
    """

    def expect(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        entry = entries[name]
        if entry.dtype != dtype or entry.shape != shape:
            found = f"is {entry.dtype} {list(entry.shape)}"
            raise ContainerError(f"{path}: tensor {shown(name)} {found}, expected {dtype} {list(shape)}; {ADVICE}")

    if not entries:
        raise ContainerError(f"{path}: has no tensors; {ADVICE}")
    matrices: dict[str, MatrixLayout] = {}
    floats: dict[str, Entry] = {}
    for name, entry in entries.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("optional."):
            continue
        if kind not in ARRAYS:
            expect(name, "F32", entry.shape)
            floats[name] = entry
        elif stem not in matrices:
            bits = max((int(k[5:]) for k in ARRAYS if k.startswith("plane") and f"{stem}.{k}" in entries), default=BASE_BITS)
            for other in (f"{stem}.{k}" for k in arrays_at(bits)):
                if other not in entries:
                    raise ContainerError(f"{path}: tensor {shown(name)} has no {shown(other)} beside it; {ADVICE}")
            tiles, groups = (max(n, 1) for n in (*entries[f"{stem}.base"].shape, 1, 1)[:2])
            group = manifest.record.group
            matrices[stem] = MatrixLayout(tiles * TILE_ROWS, groups * group, group, bits)
            for other, (dtype, shape) in matrices[stem].tensors(stem).items():
                expect(other, dtype, shape)
    for layer in manifest.layers:
        if f"layers.{layer}.router" in floats:
            expect(f"layers.{layer}.router", "F32", (manifest.experts, manifest.record.hidden))
    return matrices, floats


def _check_experts(header: Header, manifest: Manifest, layer: int, path: Path) -> int:
    """Offset of the first record, if all records are where the manifest's layout has them."""
    record, entries, start = manifest.record, header.entries, header.data_offset
    if start % ALIGN_BYTES:
        raise ContainerError(f"{path}: records begin at byte {start:,}, expected a multiple of {ALIGN_BYTES}; {ADVICE}")
    kept = manifest.kept_of(layer)
    places = [(e, s, record.segment_bytes(s)) for e in range(manifest.experts) for s in record.segments(kept[e])]
    places += [(e, s, n) for e in range(manifest.experts) for s, n in manifest.optional_segments.items()]
    count = len(places)
    if len(entries) != count:
        raise ContainerError(
            f"{path}: has {len(entries):,} tensors, expected {count:,} for {manifest.experts:,} experts; {ADVICE}"
        )
    at = start
    for expert, segment, n_bytes in places:
        entry = entries.get(expert_tensor(layer, expert, segment))
        if entry is None or (entry.dtype, entry.shape, entry.offset) != ("U8", (n_bytes,), at):
            found = f"{entry.dtype} {list(entry.shape)} at byte {entry.offset:,}" if entry else "missing"
            raise ContainerError(
                f"{path}: layer {layer} expert {expert} {segment} is {found},"
                f" expected U8 [{n_bytes}] at byte {at:,}; {ADVICE}"
            )
        at += n_bytes
    return start


def checksums_of(container: Container) -> dict[str, npt.NDArray[np.uint32]]:
    """The CRC tables of checksums.safetensors by name, shapes checked."""
    path, manifest = container.path / CHECKSUMS, container.manifest
    shapes: dict[str, tuple[int, ...]] = {
        "dense.header": (1,),
        "dense": (len(container.dense),),
        "experts.header": (len(manifest.layers),),
        **{f"experts.{layer}": (manifest.experts, len(SEGMENTS)) for layer in manifest.layers},
    }
    header = read_header(path, ContainerError, MAX_SMALL_BYTES, ADVICE)
    tables = {}
    for name, shape in shapes.items():
        entry = header.entries.get(name)
        if entry is None or entry.dtype != "U32" or entry.shape != shape:
            found = f"{entry.dtype} {list(entry.shape)}" if entry else "missing"
            raise ContainerError(f"{path}: tensor {shown(name)} is {found}, expected U32 {list(shape)}; {ADVICE}")
        data = container._read(path, entry.offset, entry.n_bytes)
        tables[name] = data.view(np.uint32).reshape(shape)
    return tables
