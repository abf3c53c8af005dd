"""The record layout: arithmetic that the C++ side repeats in csrc/layout.h."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2moe import planes
from d2moe.container.layout import (
    ARRAYS,
    PROJECTIONS,
    SEGMENTS,
    MatrixLayout,
    RecordLayout,
    arrays_at,
    expert_file,
    expert_tensor,
)
from d2moe.errors import ConfigError
from d2moe.types import ALIGN_BYTES, WIDTHS

SIZES = st.integers(1, 5000)
GROUPS = st.sampled_from([32, 64, 128, 256])


@given(SIZES, SIZES, GROUPS)
def test_matrix_sizes_are_whole_tiles_and_groups(rows: int, cols: int, group: int) -> None:
    m = MatrixLayout(rows, cols, group)
    assert (m.tiles - 1) * 16 < rows <= m.tiles * 16
    assert (m.groups - 1) * group < cols <= m.groups * group
    assert m.base_bytes + 6 * m.plane_bytes == m.tiles * 16 * m.groups * group  # two bits and six more make eight
    assert m.affine_bytes == m.tiles * 16 * m.groups * 2
    assert m.row_scale_bytes == m.tiles * 16 * 4
    for kind in ARRAYS:
        dtype, shape = m.array(kind)
        assert m.array_bytes(kind) == math.prod(shape) * (4 if dtype == "F32" else 1)
    for bits in WIDTHS:
        exact = m.row_scale_bytes + m.affine_bytes + m.base_bytes + (bits - 2) * m.plane_bytes
        assert exact <= m.memory_bytes(bits) < exact + 64 and m.memory_bytes(bits) % 64 == 0


def test_the_tensors_of_a_matrix_are_in_the_order_that_low_widths_need_them() -> None:
    assert list(MatrixLayout(33, 100, 64).tensors("head").items()) == [
        ("head.rows", ("F32", (3, 16))),
        ("head.affine", ("U8", (3, 2, 2, 16))),
        ("head.base", ("U8", (3, 2, 4, 64))),
        *((f"head.plane{bit}", ("U8", (3, 2, 2, 64))) for bit in range(3, 9)),
    ]
    assert arrays_at(2) == ("rows", "affine", "base") and arrays_at(8) == ARRAYS


@given(SIZES, SIZES, GROUPS)
def test_parts_follow_each_other_and_segments_are_aligned(hidden: int, inner: int, group: int) -> None:
    layout = RecordLayout(hidden, inner, group)
    total = 0
    for segment in SEGMENTS:
        end = 0
        for part in layout.parts(segment):
            assert part.offset == end
            # Kernels load whole registers of codes, and half registers of steps and zeros, from aligned addresses.
            assert part.offset % (32 if part.kind == "affine" else 64) == 0
            end += part.n_bytes
        assert end <= layout.segment_bytes(segment) < end + ALIGN_BYTES
        assert layout.segment_bytes(segment) % ALIGN_BYTES == 0
        total += layout.segment_bytes(segment)
    assert layout.record_bytes == total
    assert [p.projection for p in layout.parts("plane5")] == list(PROJECTIONS)


def test_widths_are_prefixes() -> None:
    layout = RecordLayout(2048, 1024, 64)
    sizes = [layout.prefix_bytes(bits) for bits in WIDTHS]
    assert sizes[0] == layout.base_bytes
    assert all(b - a == layout.plane_bytes for a, b in pairwise(sizes))
    assert layout.prefix_bytes(0) == 0
    for bits in (1, 9, True, 2.0):
        with pytest.raises(ConfigError, match="from 2 to 8"):
            layout.prefix_bytes(bits)  # type: ignore[arg-type]


def test_olmoe_sizes() -> None:
    """OLMoE-1B-7B: 2048 x 1024, 64 experts, 16 layers; step and zero of a group of 64 are a quarter of a bit per weight."""
    layout = RecordLayout(2048, 1024, 64)
    weights, rows = 3 * 2048 * 1024, 1024 + 1024 + 2048
    assert layout.base_bytes == weights * 2 // 8 + rows * 4 + weights // 64 * 2
    assert layout.plane_bytes == weights // 8
    assert [round(layout.bits_per_weight(bits), 2) for bits in WIDTHS] == [2.27, 3.27, 4.27, 5.27, 6.27, 7.27, 8.27]


def test_room_for_optional_parts_moves_what_follows() -> None:
    plain, roomy = RecordLayout(64, 32, 32), RecordLayout(64, 32, 32, 4096, 8192)
    assert roomy.parts("base") == plain.parts("base")
    assert roomy.prefix_bytes(4) == plain.prefix_bytes(4) + 4096 + 2 * 8192


def test_names() -> None:
    assert expert_file(3) == "experts/layer-003.safetensors"
    assert expert_tensor(3, 17, "plane5") == "layers.3.experts.17.plane5"


def test_the_example_of_the_format_document() -> None:
    """docs/format.md, "A worked example": row 3, column 9 (and 25), code 182 = 0b10110110."""
    for column, word, plane_bit in ((9, 0, 0x10), (25, 1, 0x20)):
        codes = np.zeros((16, 32), np.uint8)
        codes[3, column] = 182
        order = planes.tile(codes, 32)
        assert np.argwhere(order).tolist() == [[0, 0, column // 4, 13]]
        base = planes.pack_base(order)
        assert np.argwhere(base).tolist() == [[0, 0, word, 13]] and base[0, 0, word, 13] == 0x20
        found = [int(planes.pack_plane(order, bit)[0, 0, 0, 13]) for bit in range(3, 9)]
        assert found == [plane_bit, plane_bit, 0, plane_bit, plane_bit, 0]
        affine, scale = np.zeros((16, 1, 2), np.uint8), np.zeros(16, np.float32)
        affine[3, 0], scale[3] = (4, 128), 2.0**-10
        stored = planes.tile_affine(affine).reshape(-1)
        assert (stored[3], stored[19]) == (4, 128) and np.count_nonzero(stored) == 2
        values = [float(planes.dequantize(codes, affine, scale, bits, 16, 32)[3, column]) for bits in WIDTHS]
        assert values == [0.125, 0.1875, 0.21875, 0.203125, 0.2109375, 0.21484375, 0.212890625]


def test_the_record_of_the_format_document() -> None:
    """docs/format.md, end of section 4."""
    layout = RecordLayout(2048, 1024, 64)
    sizes = [(p.kind, p.projection, p.n_bytes) for p in layout.parts("base")]
    assert sizes == [
        *(("codes", p, 524_288) for p in PROJECTIONS),
        ("rows", "gate", 4096),
        ("rows", "up", 4096),
        ("rows", "down", 8192),
        *(("affine", p, 65_536) for p in PROJECTIONS),
    ]
    assert layout.base_bytes == sum(n for _, _, n in sizes) == 1_785_856 and layout.plane_bytes == 3 * 262_144
    assert round(layout.bits_per_weight(4), 2) == 4.27
