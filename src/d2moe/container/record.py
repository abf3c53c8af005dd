"""A nested matrix as arrays, and one expert's record as bytes; the order is that of `layout.RecordLayout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.layout import ARRAYS, PROJECTIONS, SEGMENTS, Part, RecordLayout
from d2moe.container.safetensors_header import DTYPES
from d2moe.errors import ContainerError
from d2moe.types import BASE_BITS, MAX_BITS, check_width

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NestedMatrix:
    """A nested matrix as `d2moe.planes` packs it: base and as many planes (bit 3 first) as were read."""

    row_scale: F32
    """float32 [tiles, 16]: R."""
    affine: U8
    """uint8 [tiles, groups, 2, 16]: step S, then zero Z."""
    base: U8
    """uint8 [tiles, groups, group/16, 64]: the first two bits."""
    planes: list[U8]
    """uint8 [tiles, groups, group/32, 64] each: one further bit."""

    @property
    def bits(self) -> int:
        return BASE_BITS + len(self.planes)

    def cut(self, bits: int) -> NestedMatrix:
        """The first `bits` bits, or what there is."""
        return replace(self, planes=self.planes[: bits - BASE_BITS])

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays by the names of `layout.ARRAYS`."""
        return dict(zip(ARRAYS, (self.row_scale, self.affine, self.base, *self.planes), strict=False))

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> NestedMatrix:
        """Inverse of `arrays`; planes from bit 3 on, without gaps."""
        planes = [arrays[kind] for kind in SEGMENTS[1:] if kind in arrays]
        return cls(arrays["rows"], arrays["affine"], arrays["base"], planes)


def pack_record(layout: RecordLayout, matrices: Mapping[str, NestedMatrix], bits: int = MAX_BITS) -> U8:
    """The first `prefix_bytes(bits)` bytes of an expert's record, uint8; `matrices` has gate, up and down at `bits`."""
    if set(matrices) != set(PROJECTIONS):
        raise ContainerError(f"an expert has the matrices {sorted(matrices)}, expected {', '.join(PROJECTIONS)}")
    for projection, matrix in matrices.items():
        if matrix.bits != bits:
            raise ContainerError(f"{projection} has {matrix.bits} bits, the record is written with {bits}")
    record, start = np.zeros(layout.prefix_bytes(bits), np.uint8), 0
    for segment in SEGMENTS[: bits - BASE_BITS + 1]:
        for part in layout.parts(segment):
            at = start + part.offset
            record[at : at + part.n_bytes] = _array(layout, matrices, segment, part).reshape(-1).view(np.uint8)
        start += layout.segment_bytes(segment)
    return record


def _array(layout: RecordLayout, matrices: Mapping[str, NestedMatrix], segment: str, part: Part) -> npt.NDArray[Any]:
    kind = segment if part.kind == "codes" else part.kind
    found = matrices[part.projection].arrays[kind]
    name, shape = layout.matrix(part.projection).array(kind)
    if found.shape != shape or found.dtype != DTYPES[name]:
        item = f"{part.projection} {part.kind} of {segment}"
        raise ContainerError(
            f"{item} is {found.dtype} {list(found.shape)}, the layout expects {DTYPES[name]} {list(shape)}"
        )
    return np.ascontiguousarray(found)


def split_record(layout: RecordLayout, data: U8, bits: int) -> dict[str, NestedMatrix]:
    """Views of gate, up and down in `data` uint8 [prefix_bytes(bits)], the first bytes of a record; no copies."""
    if data.shape != (layout.prefix_bytes(check_width(bits)),) or data.dtype != np.uint8:
        raise ContainerError(f"a record at {bits} bits has {layout.prefix_bytes(bits):,} bytes, found {data.nbytes:,}")
    arrays: dict[str, dict[str, npt.NDArray[Any]]] = {projection: {} for projection in PROJECTIONS}
    start = 0
    for segment in SEGMENTS[: bits - BASE_BITS + 1]:
        for part in layout.parts(segment):
            kind = segment if part.kind == "codes" else part.kind
            dtype, shape = layout.matrix(part.projection).array(kind)
            piece = data[start + part.offset : start + part.offset + part.n_bytes]
            arrays[part.projection][kind] = piece.view(DTYPES[dtype]).reshape(shape)
        start += layout.segment_bytes(segment)
    return {projection: NestedMatrix.of(found) for projection, found in arrays.items()}
