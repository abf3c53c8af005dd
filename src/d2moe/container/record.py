"""One expert's record as bytes and as arrays; the order is that of `layout.RecordLayout`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.layout import PROJECTIONS, SEGMENTS, MatrixLayout, Part, RecordLayout
from d2moe.errors import ContainerError
from d2moe.types import BASE_BITS, MAX_BITS, TILE_ROWS, check_width

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class NestedMatrix:
    """A nested matrix as `d2moe.planes` packs it: base and as many planes (bit 3 first) as were read."""

    affine: F16
    """float16 [tiles, groups, 2, 16]: range, low."""
    base: U8
    """uint8 [tiles, groups, group/16, 64]: the first two bits."""
    planes: list[U8]
    """uint8 [tiles, groups, group/32, 64] each: one further bit."""

    @property
    def bits(self) -> int:
        return BASE_BITS + len(self.planes)


def array_shape(matrix: MatrixLayout, kind: str, segment: str) -> tuple[int, ...]:
    """Shape of a part's array: affine, base or plane of `matrix`."""
    if kind == "affine":
        return matrix.tiles, matrix.groups, 2, TILE_ROWS
    return matrix.tiles, matrix.groups, matrix.group // (16 if segment == "base" else 32), 64


def pack_record(layout: RecordLayout, matrices: Mapping[str, NestedMatrix]) -> U8:
    """The record uint8 [record_bytes] of an expert with all eight bits; `matrices` has gate, up and down."""
    if set(matrices) != set(PROJECTIONS):
        raise ContainerError(f"an expert has the matrices {sorted(matrices)}, expected {', '.join(PROJECTIONS)}")
    record, start = np.zeros(layout.record_bytes, np.uint8), 0
    for segment in SEGMENTS:
        for part in layout.parts(segment):
            at = start + part.offset
            record[at : at + part.n_bytes] = _array(layout, matrices, segment, part).reshape(-1).view(np.uint8)
        start += layout.segment_bytes(segment)
    return record


def _array(layout: RecordLayout, matrices: Mapping[str, NestedMatrix], segment: str, part: Part) -> npt.NDArray[Any]:
    matrix = matrices[part.projection]
    if matrix.bits != MAX_BITS:
        raise ContainerError(f"{part.projection} has {matrix.bits} bits, a record is written with all {MAX_BITS}")
    found: npt.NDArray[Any] = matrix.affine if part.kind == "affine" else matrix.base
    if segment != "base":
        found = matrix.planes[SEGMENTS.index(segment) - 1]
    shape = array_shape(layout.matrix(part.projection), part.kind, segment)
    dtype = np.dtype(np.float16 if part.kind == "affine" else np.uint8)
    if found.shape != shape or found.dtype != dtype:
        item = f"{part.projection} {part.kind} of {segment}"
        raise ContainerError(f"{item} is {found.dtype} {list(found.shape)}, the layout expects {dtype} {list(shape)}")
    return np.ascontiguousarray(found)


def split_record(layout: RecordLayout, data: U8, bits: int) -> dict[str, NestedMatrix]:
    """Views of gate, up and down in `data` uint8 [prefix_bytes(bits)], the first bytes of a record; no copies."""
    if data.shape != (layout.prefix_bytes(check_width(bits)),) or data.dtype != np.uint8:
        raise ContainerError(f"a record at {bits} bits has {layout.prefix_bytes(bits):,} bytes, found {data.nbytes:,}")
    parts: dict[tuple[str, str, str], npt.NDArray[Any]] = {}
    segments, start = SEGMENTS[: bits - BASE_BITS + 1], 0
    for segment in segments:
        for part in layout.parts(segment):
            shape = array_shape(layout.matrix(part.projection), part.kind, segment)
            piece: npt.NDArray[Any] = data[start + part.offset : start + part.offset + part.n_bytes]
            if part.kind == "affine":
                piece = piece.view(np.float16)
            parts[segment, part.kind, part.projection] = piece.reshape(shape)
        start += layout.segment_bytes(segment)
    return {
        p: NestedMatrix(
            parts["base", "affine", p], parts["base", "codes", p], [parts[s, "codes", p] for s in segments[1:]]
        )
        for p in PROJECTIONS
    }
