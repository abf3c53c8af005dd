"""A container opened for reading: checked early, held cheaply, read by exact byte ranges into arrays of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import aligned_empty, open_regular, parse_json, read_into, read_small, shown
from d2moe.container.layout import SEGMENTS, RecordLayout, expert_file, expert_tensor
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
from d2moe.types import ALIGN_BYTES, TILE_ROWS, check_width

F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]

ADVICE = 'copy it again, or convert the model again; "d2moe verify" checks every byte'


class Container:
    """A d2moe container; make one with `Container.open`. It holds no file open, so there is nothing to close.

    `config` and `generation_config` are the source's own JSON; `dense` maps canonical names to where they lie.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        dense: dict[str, Entry],
        starts: dict[int, int],
    ):
        self.path, self.manifest = path, manifest
        self.config, self.generation_config = config, generation_config
        self.dense, self._starts = dense, starts

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
        _check_dense(header.entries, manifest, path / DENSE)
        starts = {}
        for layer in manifest.layers:
            file = path / expert_file(layer)
            # A name with its numbers takes about 100 bytes; a header far above that is an attack on our memory.
            limit = 4096 + manifest.experts * (len(SEGMENTS) + len(manifest.optional_segments)) * 256
            starts[layer] = _check_experts(read_header(file, ContainerError, limit, ADVICE), manifest, layer, file)
        return cls(path, manifest, config, generation, header.entries, starts)

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
    def dense_bytes(self) -> int:
        """Size of all dense tensors."""
        return sum(entry.n_bytes for entry in self.dense.values())

    def has(self, name: str) -> bool:
        """Whether there is a dense tensor of that canonical name."""
        return name in self.dense

    def read_dense(self, name: str) -> npt.NDArray[Any]:
        """A dense tensor in a fresh, 64-byte aligned array; reads its bytes and no more."""
        entry = self.dense.get(name)
        if entry is None:
            raise ContainerError(
                f"{self.path / DENSE}: has no tensor {shown(name)}, which {CONFIG} calls for; convert the model again"
            )
        data = self._read(self.path / DENSE, entry.offset, entry.n_bytes)
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def read_linear(self, name: str) -> tuple[U8, F16]:
        """(codes uint8 [tiles, groups, group/4, 64], affine float16 [tiles, groups, 2, 16]) of a dense matrix."""
        return self.read_dense(f"{name}.codes"), self.read_dense(f"{name}.affine")

    def expert_path(self, layer: int) -> Path:
        """File with the records of `layer`."""
        return self.path / expert_file(self._known(layer, 0))

    def expert_offset(self, layer: int, expert: int) -> int:
        """Where in that file the record begins; a multiple of 4096."""
        return self._starts[self._known(layer, expert)] + expert * self.record.record_bytes

    def read_record(self, layer: int, expert: int, bits: int) -> U8:
        """The first `prefix_bytes(bits)` bytes of a record, 4096-byte aligned."""
        n_bytes = self.record.prefix_bytes(check_width(bits))
        return self._read(self.expert_path(layer), self.expert_offset(layer, expert), n_bytes, ALIGN_BYTES)

    def read_expert(self, layer: int, expert: int, bits: int) -> dict[str, NestedMatrix]:
        """Gate, up and down of an expert at width `bits`; one read of `prefix_bytes(bits)` bytes."""
        return split_record(self.record, self.read_record(layer, expert, bits), bits)

    def _known(self, layer: int, expert: int) -> int:
        if layer not in self._starts:
            raise ConfigError(f"{self.path}: layer {layer} has no experts, expected one of {shown(self.moe_layers)}")
        if not 0 <= expert < self.experts:
            raise ConfigError(f"{self.path}: layer {layer} has no expert {expert}, expected 0 to {self.experts - 1}")
        return layer

    def _read(self, path: Path, offset: int, n_bytes: int, align: int = 64) -> U8:
        fd, _ = open_regular(path, ContainerError, ADVICE)
        try:
            data = aligned_empty(n_bytes, align)
            read_into(fd, data, offset, path)
        finally:
            os.close(fd)
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


def _check_dense(entries: dict[str, Entry], manifest: Manifest, path: Path) -> None:
    """Codes and affine come in pairs that fit each other; all else is float32, or says that it is optional."""
    group, experts, hidden = manifest.record.group, manifest.experts, manifest.record.hidden

    def expect(name: str, dtype: str, shape: list[int]) -> None:
        entry = entries.get(name)
        if entry is None or entry.dtype != dtype or list(entry.shape) != shape:
            found = f"is {entry.dtype} {list(entry.shape)}" if entry else "is missing"
            raise ContainerError(f"{path}: tensor {shown(name)} {found}, expected {dtype} {shape}; {ADVICE}")

    if not entries:
        raise ContainerError(f"{path}: has no tensors; {ADVICE}")
    for name, entry in entries.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("optional."):
            continue
        if kind == "codes":
            tiles, groups = (*entry.shape, 0, 0)[:2]
            expect(name, "U8", [tiles, groups, group // 4, 64])
            expect(f"{stem}.affine", "F16", [tiles, groups, 2, TILE_ROWS])
        elif kind == "affine":
            if f"{stem}.codes" not in entries:
                raise ContainerError(f"{path}: tensor {shown(name)} has no codes beside it; {ADVICE}")
        elif entry.dtype != "F32":
            raise ContainerError(f"{path}: tensor {shown(name)} is {entry.dtype}, expected F32; {ADVICE}")
    for layer in manifest.layers:
        if f"layers.{layer}.router" in entries:
            expect(f"layers.{layer}.router", "F32", [experts, hidden])


def _check_experts(header: Header, manifest: Manifest, layer: int, path: Path) -> int:
    """Offset of the first record, if all records are where the manifest's layout has them."""
    record, entries, start = manifest.record, header.entries, header.data_offset
    if start % ALIGN_BYTES:
        raise ContainerError(f"{path}: records begin at byte {start:,}, expected a multiple of {ALIGN_BYTES}; {ADVICE}")
    count = manifest.experts * (len(SEGMENTS) + len(manifest.optional_segments))
    if len(entries) != count:
        raise ContainerError(
            f"{path}: has {len(entries):,} tensors, expected {count:,} for {manifest.experts:,} experts; {ADVICE}"
        )
    at = start
    places = [(e, s, record.segment_bytes(s)) for e in range(manifest.experts) for s in SEGMENTS]
    places += [(e, s, n) for e in range(manifest.experts) for s, n in manifest.optional_segments.items()]
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
