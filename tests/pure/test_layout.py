"""The record layout: arithmetic that the C++ side repeats in csrc/layout.h."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2moe.container.layout import PROJECTIONS, SEGMENTS, MatrixLayout, RecordLayout, expert_file, expert_tensor
from d2moe.errors import ConfigError
from d2moe.types import ALIGN_BYTES, WIDTHS

SIZES = st.integers(1, 5000)
GROUPS = st.sampled_from([32, 64, 128, 256])


@given(SIZES, SIZES, GROUPS)
def test_matrix_sizes_are_whole_tiles_and_groups(rows: int, cols: int, group: int) -> None:
    m = MatrixLayout(rows, cols, group)
    assert (m.tiles - 1) * 16 < rows <= m.tiles * 16
    assert (m.groups - 1) * group < cols <= m.groups * group
    assert m.flat_bytes == m.tiles * 16 * m.groups * group
    assert m.base_bytes + 6 * m.plane_bytes == m.flat_bytes  # two bits and six more make eight
    assert m.affine_bytes == m.tiles * 16 * m.groups * 4


@given(SIZES, SIZES, GROUPS)
def test_parts_follow_each_other_and_segments_are_aligned(hidden: int, inner: int, group: int) -> None:
    layout = RecordLayout(hidden, inner, group)
    total = 0
    for segment in SEGMENTS:
        end = 0
        for part in layout.parts(segment):
            assert part.offset == end
            assert part.offset % 64 == 0  # kernels load whole registers from aligned addresses
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
    """OLMoE-1B-7B: 2048 x 1024, 64 experts, 16 layers; 32 bits of scales per group of 64 are half a bit per weight."""
    layout = RecordLayout(2048, 1024, 64)
    assert layout.base_bytes == 3 * 2048 * 1024 * 5 // 16
    assert layout.plane_bytes == 3 * 2048 * 1024 // 8
    assert [layout.bits_per_weight(bits) for bits in WIDTHS] == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5]


def test_room_for_optional_parts_moves_what_follows() -> None:
    plain, roomy = RecordLayout(64, 32, 32), RecordLayout(64, 32, 32, 4096, 8192)
    assert roomy.parts("base") == plain.parts("base")
    assert roomy.prefix_bytes(4) == plain.prefix_bytes(4) + 4096 + 2 * 8192


def test_names() -> None:
    assert expert_file(3) == "experts/layer-003.safetensors"
    assert expert_tensor(3, 17, "plane5") == "layers.3.experts.17.plane5"
