"""Reads every byte of a container and compares it with its checksums; names the exact piece that is wrong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from d2moe.container.files import PIECE_BYTES, aligned_empty, crc_of_range, open_regular, read_into, read_small
from d2moe.container.layout import expert_file
from d2moe.container.manifest import CHECKSUMS, DENSE, MANIFEST, MAX_SMALL_BYTES, seal_of
from d2moe.container.reader import ADVICE, Container, checksums_of
from d2moe.errors import ContainerError, D2MoeError, StorageError

Progress = Callable[[int, int], None]
REPAIR = "copy it again, or convert the model again"


@dataclass(frozen=True)
class Report:
    """What `verify` found. `unlisted` are files the manifest does not know, `unchecked` what it has no checksum for."""

    files: int
    n_bytes: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class _Range:
    """A run of bytes with a known CRC-32; `item` is its name for people."""

    item: str
    offset: int
    n_bytes: int
    crc: int


def verify(container: Container | str | Path, progress: Progress | None = None) -> Report:
    """Check every byte of a container; `progress(done_bytes, total_bytes)` is called as it goes.

    Damage that leaves the container openable is collected in the report, in one sentence per damaged piece. Raises
    ContainerError if it cannot even be opened. Reads each byte once, a few megabytes at a time.
    """
    if not isinstance(container, Container):
        container = Container.open(container)
    return _Check(container, progress).run()


class _Check:
    def __init__(self, container: Container, progress: Progress | None):
        self.container, self.progress = container, progress
        self.problems: list[str] = []
        self.unchecked: list[str] = []
        self.done_bytes = 0
        present = {n: f for n, f in container.manifest.files.items() if (container.path / n).exists()}
        self.files = present
        self.total_bytes = sum(f.n_bytes for f in present.values())

    def run(self) -> Report:
        container, manifest = self.container, self.container.manifest
        text = read_small(container.path / MANIFEST, MAX_SMALL_BYTES, ContainerError, ADVICE)
        found, right = seal_of(text)
        if found != right:
            self.problems.append(
                f"{container.path}: {MANIFEST} was changed: its seal is not that of its text; {REPAIR}"
            )
        for name, facts in self.files.items():
            if facts.sha256:
                self.whole_file(name, facts.n_bytes, facts.sha256)
            elif name not in manifest.weight_files:
                self.unchecked.append(name)
                self.advance(facts.n_bytes)
        if any(f"{CHECKSUMS} " in problem for problem in self.problems):
            self.unchecked += sorted(manifest.weight_files)  # nothing trustworthy to compare them with
        else:
            self.weights()
        listed = set(manifest.files) | {MANIFEST}
        there = (p for p in container.path.rglob("*") if not p.is_dir())
        unlisted = sorted(p.relative_to(container.path).as_posix() for p in there)
        unlisted = [name for name in unlisted if name not in listed]
        return Report(
            len(self.files) + 1,
            self.done_bytes + len(text),
            tuple(self.problems),
            tuple(unlisted),
            tuple(self.unchecked),
        )

    def advance(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        if self.progress:
            self.progress(self.done_bytes, self.total_bytes)

    def whole_file(self, name: str, n_bytes: int, sha256: str) -> None:
        path, digest = self.container.path / name, hashlib.sha256()
        try:
            fd, _ = open_regular(path, ContainerError, ADVICE)
            try:
                buffer = aligned_empty(min(n_bytes, PIECE_BYTES))
                for at in range(0, n_bytes, PIECE_BYTES):
                    piece = buffer[: min(PIECE_BYTES, n_bytes - at)]
                    read_into(fd, piece, at, path)
                    digest.update(piece.data)
            finally:
                os.close(fd)
        except D2MoeError as e:
            self.problems.append(str(e))
        else:
            if digest.hexdigest() != sha256:
                self.problems.append(
                    f"{self.container.path}: {name} is damaged: SHA-256 is {digest.hexdigest()[:16]}…,"
                    f" expected {sha256[:16]}…; {REPAIR}"
                )
        self.advance(n_bytes)

    def weights(self) -> None:
        container = self.container
        tables = checksums_of(container)
        start = min(entry.offset for entry in container.dense.values())
        ranges = [_Range("header", 0, start, int(tables["dense.header"][0]))]
        for (name, entry), crc in zip(container.dense.items(), tables["dense"].tolist(), strict=True):
            ranges.append(_Range(f"tensor {name}", entry.offset, entry.n_bytes, crc))
        self.ranges(DENSE, iter(ranges))
        for layer, crc in zip(container.moe_layers, tables["experts.header"].tolist(), strict=True):
            self.ranges(expert_file(layer), self.expert_ranges(layer, crc, tables[f"experts.{layer}"].tolist()))

    def expert_ranges(self, layer: int, header_crc: int, crcs: list[list[int]]) -> Iterator[_Range]:
        container, record = self.container, self.container.record
        at = container.expert_offset(layer, 0)
        yield _Range(f"layer {layer} header", 0, at, header_crc)
        for expert, row in enumerate(crcs):
            for segment, crc in zip(record.segments(container.width(layer, expert)), row, strict=False):
                yield _Range(f"layer {layer} expert {expert} {segment}", at, record.segment_bytes(segment), crc)
                at += record.segment_bytes(segment)
        rest = self.files[expert_file(layer)].n_bytes - at
        if rest:
            self.unchecked.append(f"{expert_file(layer)} from byte {at:,} (optional segments of a newer version)")
            self.advance(rest)

    def ranges(self, name: str, ranges: Iterator[_Range]) -> None:
        path = self.container.path / name
        fd, _ = open_regular(path, ContainerError, ADVICE)
        try:
            for r in ranges:
                try:
                    crc = crc_of_range(fd, r.offset, r.n_bytes, path)
                except StorageError as e:
                    self.problems.append(f"{self.container.path}: {r.item} cannot be read: {e}")
                else:
                    if crc != r.crc:
                        place = f"bytes {r.offset:,} to {r.offset + r.n_bytes:,} of {name}"
                        self.problems.append(
                            f"{self.container.path}: {r.item} is damaged ({place}):"
                            f" CRC-32 is {crc:08x}, expected {r.crc:08x}; {REPAIR}"
                        )
                self.advance(r.n_bytes)
        finally:
            os.close(fd)
