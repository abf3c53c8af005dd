"""Where every byte of an expert record lies: arithmetic only, no I/O. `docs/format.md` is the normative text.

A record is one expert's segments one after the other: `base` (the two-bit base of gate, up, down, then their row
scales, then their steps and zeros), then one segment per further bit, `plane3` to `plane8`, each with gate, up and down.
Every segment is padded to 4096 bytes, so an expert at b bits is one aligned read of the first `prefix_bytes(b)` bytes,
and more bits are the next ones. Dense matrices are stored array by array under the names of `ARRAYS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from d2moe.types import ALIGN_BYTES, BASE_BITS, MAX_BITS, TILE_ROWS, check_width, padded

PROJECTIONS = ("gate", "up", "down")
SEGMENTS = ("base", *(f"plane{bit}" for bit in range(BASE_BITS + 1, MAX_BITS + 1)))
ARRAYS = ("rows", "affine", *SEGMENTS)
"""The arrays of a nested matrix in the order of the dense file: what every width needs comes first."""
MEMORY_ALIGN = 64
"""Alignment in memory, in bytes: kernels load whole registers of codes from aligned addresses."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name, in file order."""


def arrays_at(bits: int) -> tuple[str, ...]:
    """Those of `ARRAYS` that a matrix at width `bits` consists of."""
    return ARRAYS[: len(ARRAYS) - MAX_BITS + check_width(bits)]


@dataclass(frozen=True)
class MatrixLayout:
    """One nested matrix of `rows` × `cols` weights in groups of `group` columns; sizes in bytes."""

    rows: int
    cols: int
    group: int
    bits: int = MAX_BITS
    """The widest that is stored."""

    @property
    def tiles(self) -> int:
        return padded(self.rows, TILE_ROWS) // TILE_ROWS

    @property
    def groups(self) -> int:
        return padded(self.cols, self.group) // self.group

    def array(self, kind: str) -> tuple[str, tuple[int, ...]]:
        """Safetensors type and shape of one of `ARRAYS`."""
        if kind == "rows":
            return "F32", (self.tiles, TILE_ROWS)
        if kind == "affine":
            return "U8", (self.tiles, self.groups, 2, TILE_ROWS)
        return "U8", (self.tiles, self.groups, self.group // (16 if kind == "base" else 32), 4 * TILE_ROWS)

    def tensors(self, name: str) -> Tensors:
        """The tensors of this matrix in the dense file under the canonical name `name`, nine if all bits are stored."""
        return {f"{name}.{kind}": self.array(kind) for kind in arrays_at(self.bits)}

    @property
    def row_scale_bytes(self) -> int:
        """Float32 [tiles, 16]."""
        return self.tiles * TILE_ROWS * 4

    @property
    def affine_bytes(self) -> int:
        """Uint8 [tiles, groups, 2, 16]: step and zero."""
        return self.tiles * self.groups * 2 * TILE_ROWS

    @property
    def base_bytes(self) -> int:
        """Uint8 [tiles, groups, group/16, 64]: two bits a weight."""
        return self.tiles * self.groups * TILE_ROWS * self.group // 4

    @property
    def plane_bytes(self) -> int:
        """Uint8 [tiles, groups, group/32, 64]: one bit a weight."""
        return self.base_bytes // 2

    def array_bytes(self, kind: str) -> int:
        """Size of one of `ARRAYS`."""
        sizes = {"rows": self.row_scale_bytes, "affine": self.affine_bytes, "base": self.base_bytes}
        return sizes.get(kind, self.plane_bytes)

    def memory_bytes(self, bits: int) -> int:
        """What the matrix takes in memory at width `bits`, or the widest stored, rounded up to a multiple of 64."""
        return padded(sum(map(self.array_bytes, arrays_at(min(bits, self.bits)))), MEMORY_ALIGN)


@dataclass(frozen=True)
class Part:
    """A piece of a segment: `kind` is "codes", "rows" or "affine"; `offset` counts from the start of the segment."""

    kind: str
    projection: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class RecordLayout:
    """The record of one gated expert: gate and up [inner, hidden], down [hidden, inner]."""

    hidden: int
    inner: int
    group: int
    base_spare_bytes: int = 0
    """What `base` is larger than this version needs: optional parts that it skips; a multiple of 4096."""
    plane_spare_bytes: int = 0
    """The same for every plane segment."""
    rotation: int = 0
    """Span in which the inputs of down are rotated (`planes.rotate`), in experts and dense blocks alike; 0: they are not."""

    def matrix(self, projection: str) -> MatrixLayout:
        """Layout of "gate", "up" or "down"."""
        rows, cols = (self.hidden, self.inner) if projection == "down" else (self.inner, self.hidden)
        return MatrixLayout(rows, cols, self.group)

    def rotation_of(self, name: str) -> int:
        """Span in which the inputs of the matrix of this name are rotated: "down" of a record, "layers.0.mlp.down" of the dense file."""
        return self.rotation if name.rpartition(".")[2] == "down" else 0

    def parts(self, segment: str) -> tuple[Part, ...]:
        """The pieces of `segment` in storage order."""
        kinds = ("codes", "rows", "affine") if segment == "base" else ("codes",)
        parts, offset = [], 0
        for kind in kinds:
            for projection in PROJECTIONS:
                n_bytes = self.matrix(projection).array_bytes(segment if kind == "codes" else kind)
                parts.append(Part(kind, projection, offset, n_bytes))
                offset += n_bytes
        return tuple(parts)

    @cached_property
    def base_bytes(self) -> int:
        """Size of the `base` segment, padded."""
        last = self.parts("base")[-1]
        return padded(last.offset + last.n_bytes, ALIGN_BYTES) + self.base_spare_bytes

    @cached_property
    def plane_bytes(self) -> int:
        """Size of one `plane` segment, padded; the same for every bit."""
        last = self.parts("plane3")[-1]
        return padded(last.offset + last.n_bytes, ALIGN_BYTES) + self.plane_spare_bytes

    def segment_bytes(self, segment: str) -> int:
        return self.base_bytes if segment == "base" else self.plane_bytes

    def prefix_bytes(self, bits: int) -> int:
        """Bytes to read for the whole expert at width `bits`; 0 bits is 0 bytes."""
        return self.base_bytes + (check_width(bits) - BASE_BITS) * self.plane_bytes if bits else 0

    @property
    def record_bytes(self) -> int:
        """Size of a record with all eight bits."""
        return self.prefix_bytes(MAX_BITS)

    def records_bytes(self, kept: Iterable[int], bits: int = MAX_BITS) -> int:
        """Size of records that have the bits `kept`, as far as they go to `bits`."""
        return sum(n * self.prefix_bytes(min(b, bits)) for b, n in Counter(kept).items())

    @staticmethod
    def segments(bits: int) -> tuple[str, ...]:
        """Those of `SEGMENTS` that a record of so many bits consists of."""
        return SEGMENTS[: check_width(bits) - BASE_BITS + 1]

    def tensors(self, layer: int, kept: Sequence[int]) -> Tensors:
        """What a layer's file holds whose experts have the bits `kept`."""
        of = {s: ("U8", (self.segment_bytes(s),)) for s in SEGMENTS}
        return {expert_tensor(layer, e, s): of[s] for e, bits in enumerate(kept) for s in self.segments(bits)}

    def bits_per_weight(self, bits: int) -> float:
        """Bits on disk per weight of the model at width `bits`, scales and padding included."""
        return 8 * self.prefix_bytes(bits) / (3 * self.hidden * self.inner)


def expert_file(layer: int) -> str:
    """File of a layer's experts, relative to the container."""
    return f"experts/layer-{layer:03d}.safetensors"


def expert_tensor(layer: int, expert: int, segment: str) -> str:
    """Name of one segment of one record in that file."""
    return f"layers.{layer}.experts.{expert}.{segment}"
