"""The nested code: prefixes, error bounds from both sides, storage order, activations."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from d2moe import planes
from d2moe.types import WIDTHS

LIMITS = (-7.8, -13.8, -19.4, -24.8, -30.0, -34.5, -38.0)
"""Decibels at 2 to 8 bits that the code must beat on normal weights in groups of 64 and 128."""
ALL_CODES = np.arange(256, dtype=np.uint8)
F32 = npt.NDArray[np.float32]


def gaussian(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def decibel(w: F32, approximation: F32) -> float:
    return float(10 * np.log10(np.mean((w - approximation) ** 2) / np.mean(w**2)))


def steps(affine: npt.NDArray[np.uint8], row_scale: F32) -> npt.NDArray[np.float64]:
    """Width of the 8-bit cell of each row and group."""
    return np.asarray(row_scale[:, None].astype(np.float64) * affine[..., 0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_a_prefix_of_every_wider_one(bits: int) -> None:
    first = planes.prefix(ALL_CODES, bits)
    assert np.array_equal(first, ALL_CODES >> (8 - bits) << (8 - bits))
    for wider in range(bits, 9):
        assert np.array_equal(planes.prefix(planes.prefix(ALL_CODES, wider), bits), first)
    # One row, one group of 256: a row scale of 1/64, a step of 3, a zero of 100.
    affine, row_scale = np.array([[[3, 100]]], np.uint8), np.array([1 / 64], np.float32)
    value = planes.dequantize(ALL_CODES[None], affine, row_scale, bits, 1, 256)[0]
    assert len(np.unique(value)) == 2**bits
    # The value is the middle of the cell that the prefix names.
    cell = 3 / 64 * 2 ** (8 - bits)
    assert np.array_equal(value, -100 * 3 / 64 + cell * ((ALL_CODES >> (8 - bits)) + 0.5))
    # Cells nest: the middle of a narrower cell lies a quarter of the wider one beside its middle.
    if bits < 8:
        finer = planes.dequantize(ALL_CODES[None], affine, row_scale, bits + 1, 1, 256)[0]
        assert np.array_equal(np.abs(finer - value), np.full(256, cell / 4))


@pytest.mark.parametrize("span", [32, 64, 1024])
def test_rotation_keeps_products(span: int) -> None:
    rng = np.random.default_rng()
    cols = 2 * span + 40 % span
    x, w = rng.standard_normal((3, cols)).astype(np.float32), rng.standard_normal((5, cols)).astype(np.float32)
    matrix = np.ones((1, 1))
    while len(matrix) < span:  # Sylvester's construction
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned = planes.rotate(x, span)
    np.testing.assert_allclose(turned[:, :span], x[:, :span] @ matrix, atol=1e-3)
    assert np.array_equal(turned[:, 2 * span :], x[:, 2 * span :])
    whole = slice(0, 2 * span)
    np.testing.assert_allclose(turned[:, whole] @ planes.rotate(w, span)[:, whole].T / span, x[:, whole] @ w[:, whole].T, atol=1e-3)
    np.testing.assert_allclose(planes.rotate(turned, span)[:, whole] / span, x[:, whole], atol=1e-4)


def test_rotation_evens_out_a_row_of_few_large_weights() -> None:
    """What it is for: an outlier in a group takes the step of all the others."""
    w = gaussian(32, 256, 3)
    w[:, ::32] *= 12
    errors = []
    for stored in (w, planes.rotate(w, 256) / np.float32(256)):
        codes, affine, row_scale = planes.quantize(stored, 128)
        errors.append(decibel(stored, planes.dequantize(codes, affine, row_scale, 3, *w.shape)))
    assert errors[1] < errors[0] - 3


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "positive", "negative"])
def test_error_is_at_most_half_a_cell(kind: str, bits: int) -> None:
    w = gaussian(64, 512, 7)
    w = {"normal": w, "heavy": w**3, "uniform": np.tanh(w), "positive": np.abs(w), "negative": -np.abs(w) - 1}[kind]
    codes, affine, row_scale = planes.quantize(w, 64)
    cell = np.repeat(steps(affine, row_scale), 64, axis=1)
    zero = np.repeat(affine[..., 1], 64, axis=1).astype(np.float64)
    error = np.abs(w - planes.dequantize(codes, affine, row_scale, bits, 64, 512).astype(np.float64)) / cell
    half = float(planes.half_cell(bits))
    position = w / cell + zero
    inside = (position >= 0) & (position < 256)
    assert np.all(error[inside] <= half * (1 + 1e-5) + 1e-4)
    # Clipped are ends of a group only: by the rounding of the zero, half a cell of 8 bits, or by a whole one where all
    # weights are negative, as the zero would have to be 256.
    assert np.all(error <= half + (1 if kind == "negative" else 0.5) + 1e-3)
    assert inside.mean() > 0.97
    # The bound is reached, and truncating is rounding: a step to the neighbouring prefix is never nearer.
    assert error.max() > 0.95 * half
    step = 2 ** (8 - bits)
    for beside in (-step, step):
        other = np.clip(planes.prefix(codes, bits).astype(np.float64) + beside, 0, 256 - step) + half
        assert np.all(np.abs(other - position)[inside] >= error[inside] - 1e-3)


@pytest.mark.parametrize("group", [64, 128])
def test_reconstruction_of_gaussian_weights(group: int) -> None:
    w = gaussian(256, 512)
    codes, affine, row_scale = planes.quantize(w, group)
    found = [decibel(w, planes.dequantize(codes, affine, row_scale, bits, *w.shape)) for bits in WIDTHS]
    assert all(a - b > 4 for a, b in pairwise(found)), found
    for value, limit in zip(found, LIMITS, strict=True):
        assert value < limit, found


def test_fit_takes_the_smallest_step_that_spans_the_group() -> None:
    w = gaussian(64, 512, 1).reshape(64, 8, 64) * np.exp(gaussian(64, 8, 2))[..., None]
    affine, row_scale = planes.fit(w)
    span = (np.maximum(w.max(-1), 0) - np.minimum(w.min(-1), 0)).astype(np.float64)
    wide = 256 * steps(affine, row_scale)
    assert np.all(affine[..., 0].max(axis=1) == 255)  # the row's widest group sets its scale
    assert np.all(wide >= span * (1 - 1e-6))
    assert np.all(wide - 256 * row_scale[:, None].astype(np.float64) < span)  # one step less would not do
    low = -np.minimum(w.min(-1), 0) / steps(affine, row_scale)
    assert np.all(np.abs(affine[..., 1] - low) <= 0.5 + 1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 1e-7])
def test_constant_rows(value: float) -> None:
    """Zero is exact; any other constant is an end of the range [0, value], hence off by half a cell."""
    w = np.full((3, 40), value, np.float32)
    codes, affine, row_scale = planes.quantize(w, 32)
    for bits in WIDTHS:
        w_b = planes.dequantize(codes, affine, row_scale, bits, 3, 40)
        assert len(np.unique(w_b)) == 1
        half = abs(value) / 2 ** (bits + 1)
        # A negative one has a zero of 255 where 256 would be right, and so lies within the first cell.
        assert abs(abs(float(w_b[0, 0])) - (abs(value) - half)) <= abs(value) / 256 + 1e-12


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (5, 70), elements=st.floats(-100, 100, width=32)), st.sampled_from([32, 64]))
def test_any_weights_give_finite_values_within_a_cell(w: F32, group: int) -> None:
    codes, affine, row_scale = planes.quantize(w, group)
    assert codes.shape == (16, 96 if group == 32 else 128)
    assert affine.shape == (16, codes.shape[1] // group, 2) and row_scale.shape == (16,)
    cell = np.repeat(steps(affine, row_scale), group, axis=1)[:5, :70]
    for bits in WIDTHS:
        w_b = planes.dequantize(codes, affine, row_scale, bits, 5, 70)
        assert np.all(np.isfinite(w_b))
        # One cell more for a zero that wants to be 256; rows below TINY are zero.
        assert np.all(np.abs(w_b - w) <= cell * (float(planes.half_cell(bits)) + 1.01) + 1e-25)


def test_padding_is_no_part_of_the_matrix() -> None:
    w = gaussian(17, 33, 2)
    codes, affine, row_scale = planes.quantize(w, 32)
    assert codes.shape == (32, 64) and affine.shape == (32, 2, 2) and row_scale.shape == (32,)
    assert not codes[17:].any() and not affine[17:].any() and not codes[:, 33:].any() and not row_scale[17:].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64, 128]), st.randoms(use_true_random=False))
def test_pack_and_unpack_every_width(tiles: int, groups: int, group: int, random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    codes = rng.integers(0, 256, (tiles * 16, groups * group)).astype(np.uint8)
    order = planes.tile(codes, group)
    assert order.shape == (tiles, groups, group // 4, 64)
    assert np.array_equal(planes.untile(order), codes)
    base, further = planes.pack_base(order), [planes.pack_plane(order, bit) for bit in range(3, 9)]
    assert base.shape == (tiles, groups, group // 16, 64)
    assert all(p.shape == (tiles, groups, group // 32, 64) for p in further)
    for bits in WIDTHS:
        assert np.array_equal(planes.unpack(base, further[: bits - 2]), planes.prefix(order, bits))


def test_affine_order() -> None:
    affine = np.random.default_rng(3).integers(0, 256, (48, 5, 2)).astype(np.uint8)
    tiled = planes.tile_affine(affine)
    assert tiled.shape == (3, 5, 2, 16)
    assert tiled[1, 4, 1, 7] == affine[16 + 7, 4, 1]
    assert np.array_equal(planes.untile_affine(tiled), affine)


def test_the_example_of_the_format_document() -> None:
    """docs/format.md, "A worked example": row 3, column 9, code 182 = 0b10110110."""
    codes = np.zeros((16, 32), np.uint8)
    codes[3, 9] = 182
    order = planes.tile(codes, 32)
    assert np.argwhere(order).tolist() == [[0, 0, 2, 13]]
    base = planes.pack_base(order)
    assert np.argwhere(base).tolist() == [[0, 0, 0, 13]] and base[0, 0, 0, 13] == 0x20
    found = [int(planes.pack_plane(order, bit)[0, 0, 0, 13]) for bit in range(3, 9)]
    assert found == [0x10, 0x10, 0x00, 0x10, 0x10, 0x00]
    # R = 2^-10, S = 4, Z = 128: the cell of 8 bits is 1/256 wide.
    affine, row_scale = np.full((16, 1, 2), [4, 128], np.uint8), np.full(16, 2.0**-10, np.float32)
    values = [float(planes.dequantize(codes, affine, row_scale, bits, 16, 32)[3, 9]) for bits in WIDTHS]
    assert values == [0.125, 0.1875, 0.21875, 0.203125, 0.2109375, 0.21484375, 0.212890625]
    # The product with the activation 127 alone, of scale 1: n = 182 * 127 + (0.5 - 128) * 127 = 6921.5.
    q = np.zeros((1, 32), np.int8)
    q[0, 9] = 127
    one, total = np.ones((1, 1), np.float32), np.full((1, 1), 127, np.int32)
    assert planes.matmul(codes, affine, row_scale, 8, q, one, total)[0, 3] == 6921.5 * 4 / 1024 == 0.212890625 * 127


def test_fields_come_out_in_few_steps() -> None:
    """The order of PLANE_BIT, as kernels use it: two planes become the 2-bit fields of two words."""
    order = np.random.default_rng(8).integers(0, 256, (1, 1, 8, 64)).astype(np.uint8)
    for upper in range(3, 9, 2):
        p, below = (planes.pack_plane(order, bit)[0, 0, 0] for bit in (upper, upper + 1))
        fields = ((p << 1 & 0xAA) | (below & 0x55), (p & 0xAA) | (below >> 1 & 0x55))
        for register in range(8):
            field = fields[register // 4] >> (2 * (register % 4)) & 3
            assert np.array_equal(field, order[0, 0, register] >> (8 - upper - 1) & 3)


def test_activations_are_rounded_half_to_even_per_group() -> None:
    x = np.zeros((2, 70), np.float32)
    x[0, :4] = [127, 0.5, 1.5, -2.5]
    x[0, 64:66] = [-2.0, 1.0]
    q, scale, total = planes.quantize_activations(x, 64)
    assert q.shape == (2, 128) and scale.shape == total.shape == (2, 2)
    assert q[0, :4].tolist() == [127, 0, 2, -2] and total[0, 0] == 127
    assert q[0, 64:66].tolist() == [-127, 64] and not q[0, 70:].any()
    assert scale[0].tolist() == [1.0, np.float32(2.0) / np.float32(127)]
    assert not q[1].any() and not scale[1].any() and not total[1].any()


def test_tiny_activations_are_zero_and_nothing_overflows() -> None:
    x = np.full((3, 32), np.float32(2.0**-101))
    x[1] = np.float32(2.0**-99)
    x[2] = np.finfo(np.float32).max
    q, scale, _ = planes.quantize_activations(x, 32)
    assert not q[0].any() and scale[0, 0] == 0
    assert np.all(q[1:] == 127) and np.all(np.isfinite(scale))


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (2, 50), elements=st.floats(-1000, 1000, width=32)))
def test_activation_error_is_at_most_half_a_step(x: F32) -> None:
    q, scale, total = planes.quantize_activations(x, 32)
    back = q.reshape(2, 2, 32).astype(np.float32) * scale[..., None]
    step = np.repeat(scale, 32, axis=1)[:, :50]
    assert np.all(np.abs(back.reshape(2, 64)[:, :50] - x) <= step * 0.5001 + 1e-30)
    assert np.array_equal(total, q.reshape(2, 2, 32).astype(np.int32).sum(-1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_product_equals_dequantised_weights_times_dequantised_activations(bits: int) -> None:
    w, x = gaussian(40, 100, 4), gaussian(3, 100, 5)
    codes, affine, row_scale = planes.quantize(w, 32)
    q, scale, total = planes.quantize_activations(x, 32)
    y = planes.matmul(codes, affine, row_scale, bits, q, scale, total)
    assert y.shape == (3, 48) and not y[:, 40:].any()
    w_b = planes.dequantize(codes, affine, row_scale, bits, 48, 128).astype(np.float64)
    x_q = (q.reshape(3, 4, 32) * scale[..., None].astype(np.float64)).reshape(3, 128)
    expected = x_q @ w_b.T
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
