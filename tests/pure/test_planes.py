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

ALL_CODES = np.arange(256, dtype=np.uint8)
F32 = npt.NDArray[np.float32]


def gaussian(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def decibel(w: F32, approximation: F32) -> float:
    return float(10 * np.log10(np.mean((w - approximation) ** 2) / np.mean(w**2)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_a_prefix_of_every_wider_one(bits: int) -> None:
    first = planes.prefix(ALL_CODES, bits)
    assert np.array_equal(first, ALL_CODES >> (8 - bits) << (8 - bits))
    for wider in range(bits, 9):
        assert np.array_equal(planes.prefix(planes.prefix(ALL_CODES, wider), bits), first)
    range_, low = np.array([3.0], np.float16), np.array([-1.25], np.float16)
    value = planes.decode(ALL_CODES[None], range_, low, bits)[0]
    assert len(np.unique(value)) == 2**bits
    # The value is the middle of the cell that the prefix names.
    cell = 3.0 / 2**bits
    assert np.allclose(value, -1.25 + cell * ((ALL_CODES >> (8 - bits)) + 0.5), atol=1e-6)
    # Cells nest: the middle of a narrower cell lies inside the wider one.
    if bits < 8:
        finer = planes.decode(ALL_CODES[None], range_, low, bits + 1)[0]
        assert np.allclose(np.abs(finer - value), cell / 4, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_is_at_most_half_a_cell_and_reaches_it(bits: int) -> None:
    range_, low = np.array([2.0], np.float16), np.array([-1.0], np.float16)
    w = np.linspace(-1, 1, 100_001, dtype=np.float32)[None, :-1]
    error = w - planes.decode(planes.encode(w, range_, low), range_, low, bits)
    half = 1.0 / 2**bits
    assert np.abs(error).max() <= half * (1 + 1e-5)
    assert error.max() > 0.99 * half
    assert error.min() < -0.99 * half
    assert abs(error.mean()) < 0.01 * half
    # Truncating is rounding: no other prefix of that width is nearer.
    levels = planes.decode(ALL_CODES[None], range_, low, bits)[0]
    nearest = np.abs(w[0, :, None][::37] - np.unique(levels)).min(axis=1)
    assert np.allclose(nearest, np.abs(error[0, ::37]), atol=1e-6)


@pytest.mark.parametrize("group", [64, 128])
def test_reconstruction_of_gaussian_weights(group: int) -> None:
    """Within a few tenths of a decibel of independent quantisers (design: -8.8, -14.6, -20.2 at 2, 3, 4 bits)."""
    w = gaussian(256, 512)
    codes, affine = planes.quantize(w, group)
    found = [decibel(w, planes.dequantize(codes, affine, bits, *w.shape)) for bits in WIDTHS]
    assert all(a - b > 4 for a, b in pairwise(found)), found
    for value, limit in zip(found, (-7.8, -13.8, -19.4, -24.8, -30.0, -34.5, -38.0), strict=True):
        assert value < limit, found


@pytest.mark.parametrize("power", [1, 3])
def test_fit_is_the_best_of_its_candidates(power: int) -> None:
    w = gaussian(64, 64, 1).reshape(64, 1, 64) ** power
    top, bottom = w.max(-1), w.min(-1)

    def loss(range_: planes.F16, low: planes.F16) -> npt.NDArray[np.float64]:
        importance = w.astype(np.float64) ** 2
        importance += importance.mean(-1, keepdims=True)
        codes = planes.encode(w, range_, low)
        total = np.zeros(top.shape)
        for b in planes.SEARCH_WIDTHS:
            error = (w - planes.decode(codes, range_, low, b)).astype(np.float64)
            total += 4.0**b * (importance * error**2).sum(-1)
        return total

    found = loss(*planes.fit(w))
    for clip in planes.CLIPS:
        low = (bottom * np.float32(clip)).astype(np.float16)
        assert np.all(found <= loss(((top - bottom) * np.float32(clip)).astype(np.float16), low) * (1 + 1e-9))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 1e-7])
def test_constant_groups_are_exact_up_to_float16(value: float) -> None:
    w = np.full((3, 40), value, np.float32)
    codes, affine = planes.quantize(w, 32)
    for bits in WIDTHS:
        w_b = planes.dequantize(codes, affine, bits, 3, 40)
        # Padding columns are no part of the fit; a constant's range is zero.
        assert np.array_equal(w_b, np.full((3, 40), np.float16(value), np.float32))


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (5, 70), elements=st.floats(-100, 100, width=32)), st.sampled_from([32, 64]))
def test_any_weights_give_finite_values_within_a_cell(w: F32, group: int) -> None:
    codes, affine = planes.quantize(w, group)
    assert codes.shape == (16, 96 if group == 32 else 128)
    assert affine.shape == (16, codes.shape[1] // group, 2)
    for bits in (2, 8):
        w_b = planes.dequantize(codes, affine, bits, 5, 70)
        assert np.all(np.isfinite(w_b))
        low, high = float(w.min()), float(w.max())
        # Clipping draws inwards, towards zero at most; never beyond the weights but for float16's rounding.
        assert w_b.min() >= min(low, 0) - 0.1 and w_b.max() <= max(high, 0) + 0.1


def test_padding_is_no_part_of_the_matrix() -> None:
    w = gaussian(17, 33, 2)
    codes, affine = planes.quantize(w, 32)
    assert codes.shape == (32, 64) and affine.shape == (32, 2, 2)
    assert not codes[17:].any() and not affine[17:].any() and not codes[:, 33:].any()
    # The fit of the first group does not see the second, and one column alone is exact.
    alone, alone_affine = planes.quantize(w[:, :32], 32)
    assert np.array_equal(codes[:, :32], alone) and np.array_equal(affine[:, :1], alone_affine)
    last = planes.dequantize(codes, affine, 8, 17, 33)[:, 32]
    assert np.array_equal(last, w[:, 32].astype(np.float16).astype(np.float32))


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
    affine = gaussian(48, 10, 3).reshape(48, 5, 2).astype(np.float16)
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
    assert found == [0x04, 0x04, 0x00, 0x04, 0x04, 0x00]
    range_, low = np.full((16, 1), 1.0, np.float16), np.full((16, 1), -0.5, np.float16)
    values = [float(planes.decode(codes[:, None], range_, low, bits)[3, 0, 9]) for bits in WIDTHS]
    assert values == [0.125, 0.1875, 0.21875, 0.203125, 0.2109375, 0.21484375, 0.212890625]


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
    codes, affine = planes.quantize(w, 32)
    q, scale, total = planes.quantize_activations(x, 32)
    y = planes.matmul(codes, affine, bits, q, scale, total)
    assert y.shape == (3, 48) and not y[:, 40:].any()
    w_b = planes.dequantize(codes, affine, bits, 48, 128).astype(np.float64)
    x_q = (q.reshape(3, 4, 32) * scale[..., None].astype(np.float64)).reshape(3, 128)
    expected = x_q @ w_b.T
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
