"""A smaller copy of a container: the planes that are worth most for their bytes, the same records cut shorter.

Planes of all experts have one size, so the best choice of so many is those of most worth; by nesting an expert's are a prefix as long as
no plane is worth more than the one before it, which `BitRouter.worth` sees to. It holds what each plane saved in KL divergence on
average over a text: the width router's measure (docs/routing.md), summed over tokens. The first two bits of every expert stay.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2moe.container.bit_router import NAME as ROUTER
from d2moe.container.bit_router import read_router, write_router
from d2moe.container.files import parse_json, read_small
from d2moe.container.layout import ARRAYS, arrays_at
from d2moe.container.manifest import CHECKSUMS, MANIFEST, MAX_SMALL_BYTES
from d2moe.container.reader import ADVICE, Container, checksums_of
from d2moe.container.safetensors_header import build_header
from d2moe.container.writer import ContainerWriter
from d2moe.errors import ConfigError, ContainerError
from d2moe.types import BASE_BITS, MAX_BITS, SPARED_BY_EXPERT, DenseWidths, check_width

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

@dataclass(frozen=True)
class Cut:
    """What stays: `kept` int64 [layers with experts, experts], the bits of each expert, and those of dense matrices."""

    kept: I64
    dense: DenseWidths

    @property
    def bits(self) -> float:
        """Of an expert, on average."""
        return float(self.kept.mean())


def allot(worth: F32, most: I64, planes: int) -> I64:
    """The bits of each expert, int64 [layers, experts], if `planes` planes beyond the first two bits stay of all experts together, those of
    most worth.

    worth float32 [layers, experts, 7], of the first two bits and of planes 3 to 8, which must not ascend; `most` the bits there are.
    """
    each = np.where(np.arange(BASE_BITS + 1, MAX_BITS + 1) <= most[..., None], worth[..., 1:], -np.inf)
    best = np.argsort(-each, axis=None, kind="stable")[:planes]  # of equal ones of an expert the lower plane comes first
    taken = np.zeros(each.size, bool)
    taken[best] = True
    return np.asarray(np.minimum(BASE_BITS + taken.reshape(each.shape).sum(-1), most), np.int64)


class Trimmer:
    """Cuts of the container at `path`.

    Raises ContainerError if it is none, ConfigError for what it cannot be cut to.
    """

    def __init__(self, path: str | Path, *, uniform: bool = False, dense_bits: int | None = None):
        """All experts alike if `uniform`; else by the worth that its width router knows. `dense_bits`: of all dense matrices; by
        default what the engine takes beside experts of the average width, or half a bit more."""
        self.container = Container.open(path)
        self._dense = None if dense_bits is None else DenseWidths(check_width(dense_bits, "dense_bits"))
        self.router = read_router(self.container)
        self._uniform = uniform
        if not uniform and (self.router is None or self.router.worth is None):
            lacks = "no width router" if self.router is None else "a width router that does not say what planes are worth"
            raise ConfigError(
                f"{path} has {lacks}, so which bits are worth keeping is not known; make one with "
                f'"d2moe route train {path} --text FILE", or give all experts one width with --uniform'
            )

    def to_bits(self, bits: float) -> Cut:
        """Experts have `bits` bits on average, no more; a whole number if all are alike."""
        kept = self.container.kept
        if self._uniform:
            if bits != int(bits):
                raise ConfigError(f"bits is {bits:g}, expected a whole number where all experts have one width")
            return self._cut(np.minimum(kept, check_width(int(bits))))
        if not BASE_BITS <= bits <= MAX_BITS:
            raise ConfigError(f"bits is {bits:g}, expected a number from {BASE_BITS} to {MAX_BITS}")
        return self._planes(int((min(bits, kept.mean()) - BASE_BITS) * kept.size + 1e-6))

    def to_size(self, n_bytes: int) -> Cut:
        """The whole folder takes `n_bytes` at most."""
        whole = self.container.most_bits - BASE_BITS if self._uniform else int((self.container.kept - BASE_BITS).sum())
        take = (lambda n: self.to_bits(BASE_BITS + n)) if self._uniform else self._planes
        low, high = 0, whole
        if self.size(take(0)) > n_bytes:
            raise ConfigError(
                f"{self.container.path} cannot be cut to {n_bytes:,} bytes: with 2 bits of every expert it has {self.size(take(0)):,}"
            )
        while low < high:  # the size grows with the planes
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(take(middle)) <= n_bytes else (low, middle - 1)
        return take(low)

    def _planes(self, planes: int) -> Cut:
        assert self.router is not None and self.router.worth is not None
        return self._cut(allot(self.router.worth, self.container.kept, planes))

    def _cut(self, kept: I64) -> Cut:
        spared = 0.0 if self._uniform else SPARED_BY_EXPERT
        wanted = self._dense or DenseWidths.beside(float(kept.mean()), self.container.has("head"), spared)
        return Cut(kept, self.container.stored_widths(wanted))

    def _tensors(self, cut: Cut) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dense file's, in its order."""
        found = {}
        for name, entry in self.container.dense.items():
            stem, _, kind = name.rpartition(".")
            if kind not in ARRAYS or stem not in self.container.nested or kind in arrays_at(cut.dense.of(stem)):
                found[name] = (entry.dtype, entry.shape)
        return found

    def size(self, cut: Cut) -> int:
        """Bytes of the folder, a few too many."""
        c = self.container
        others = sum(f.n_bytes for name, f in c.manifest.files.items() if name not in c.manifest.weight_files)
        widths_of = {str(layer): widths for layer, widths in zip(c.moe_layers, cut.kept.tolist(), strict=True)}
        manifest = (c.path / MANIFEST).stat().st_size + len(json.dumps({"kept": widths_of}, indent=1))  # as it is written there
        header, entries = build_header(self._tensors(cut))
        total = others + manifest + len(header) + sum(entry.n_bytes for entry in entries.values())
        for layer, widths in zip(c.moe_layers, cut.kept.tolist(), strict=True):
            total += len(build_header(c.record.tensors(layer, widths))[0]) + c.record.records_bytes(widths)
        return total

    def write(self, cut: Cut, dst: str | Path, progress: Progress = lambda done, total: None) -> Path:
        """Copy what stays to the new container `dst`, checking every byte that is read; its width router comes along.

        Interrupted, it leaves DST.partial, where the same call goes on, and raises KeyboardInterrupt that says so. Raises
        ContainerError (a damaged piece, a `dst` that exists) and StorageError.
        """
        c, tables = self.container, checksums_of(self.container)
        facts = c.manifest.files
        carried = {n: c.path / n for n, f in facts.items() if n not in c.manifest.weight_files and n != CHECKSUMS and not f.optional}
        writer = ContainerWriter(
            dst,
            record=c.record,
            layers=c.moe_layers,
            experts=c.experts,
            dense=self._tensors(cut),
            files=carried,
            source=c.manifest.source,
            quantizer=c.manifest.quantizer,
            kept=dict(zip(c.moe_layers, cut.kept.tolist(), strict=True)),
        )
        try:
            with writer:
                self._copy(writer, cut, tables, progress)
                made = writer.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{writer.partial} has what was copied; the same command goes on there") from None
        if self.router is not None:
            text = read_small(c.path / MANIFEST, MAX_SMALL_BYTES, ContainerError, ADVICE)
            about = parse_json(text, str(c.path / MANIFEST), ContainerError, ADVICE)["files"][ROUTER].get("about", {})
            write_router(made, self.router, about)
        return made

    def _copy(self, writer: ContainerWriter, cut: Cut, tables: dict[str, npt.NDArray[np.uint32]], progress: Progress) -> None:
        """What is not there yet; `tables` are the checksums of what is read."""
        c, total, done = self.container, writer.total_bytes, 0
        crcs = dict(zip(c.dense, tables["dense"].tolist(), strict=True))
        for name in self._tensors(cut):
            if not writer.is_dense_done(name):
                array = c.read_dense(name)
                if zlib.crc32(array.reshape(-1).view(np.uint8).data) != crcs[name]:
                    raise ContainerError(f"{c.path}: tensor {name} is damaged, its CRC-32 is not what it was written with; {ADVICE}")
                writer.add_dense(name, array)
            done += c.dense[name].n_bytes
            progress(done, total)
        for layer, widths in zip(c.moe_layers, cut.kept.tolist(), strict=True):
            ready = writer.done_experts(layer)
            for expert, bits in enumerate(widths):
                if expert not in ready:
                    record = c.read_record(layer, expert, bits)
                    self._check(record, bits, tables[f"experts.{layer}"][expert].tolist(), f"layer {layer} expert {expert}")
                    writer.add_record(layer, expert, record)
                done += c.record.prefix_bytes(bits)
                progress(done, total)

    def _check(self, record: npt.NDArray[np.uint8], bits: int, crcs: list[int], item: str) -> None:
        at = 0
        for segment, crc in zip(self.container.record.segments(bits), crcs, strict=False):
            n_bytes = self.container.record.segment_bytes(segment)
            if zlib.crc32(record[at : at + n_bytes].data) != crc:
                raise ContainerError(
                    f"{self.container.path}: {item} {segment} is damaged, its CRC-32 is not what it was written with; {ADVICE}"
                )
            at += n_bytes
