"""The compiled encoder against planes.py, bit for bit. Seeds as in conftest.py."""

from __future__ import annotations

import numpy as np
import pytest

from d2moe import planes
from d2moe.kernels import native
from d2moe.types import WIDTHS, padded


def encode(w: np.ndarray, group: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, affine and row scale in row order, as planes.quantize gives them."""
    tiles, affine, row_scale = native.encode(w, group, threads)
    return planes.untile(tiles), planes.untile_affine(affine), row_scale.reshape(-1)


def check(w: np.ndarray, group: int) -> None:
    rows, cols = w.shape
    found = encode(w, group)
    for got, wanted in zip(found, planes.quantize(w, group), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        kind = np.uint32 if got.dtype == np.float32 else np.uint8
        np.testing.assert_array_equal(got.view(kind), wanted.view(kind))
    codes, affine, row_scale = found
    assert not codes[rows:].any() and not codes[:, cols:].any() and not affine[rows:].any() and not row_scale[rows:].any()


@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (16, 64), (33, 500), (64, 256)])
def test_encode_is_exact(rng: np.random.Generator, shape: tuple[int, int], group: int) -> None:
    check(rng.standard_normal(shape).astype(np.float32), group)
    check((rng.standard_t(3, shape) * 0.02).astype(np.float32), group)
    check(rng.standard_cauchy(shape).astype(np.float32), group)  # rows where most groups have a step of one


def test_many_groups(rng: np.random.Generator) -> None:
    check((rng.standard_normal((256, 1024)) * np.exp(rng.uniform(-4, 1, (256, 1)))).astype(np.float32), 64)


def test_bfloat16_weights(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 512)).astype(np.float32) * np.float32(0.03)
    check((w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), 64)


def test_few_values(rng: np.random.Generator) -> None:
    """Many weights on the borders of cells, where a last bit decides."""
    for levels in (2, 3, 17, 256, 257):
        check((rng.integers(0, levels, (64, 256)) - levels // 3).astype(np.float32), 64)


def test_odd_rows(rng: np.random.Generator) -> None:
    w = rng.standard_normal((48, 192)).astype(np.float32)
    w[0] = 0
    w[1] = -0.75  # constant
    w[2] = 3.0
    w[3, 1:] = 0  # one weight
    w[4] = np.where(w[4] > 0, 1, -1)  # two values
    w[5] *= np.float32(2.0**-22)
    w[6] *= np.float32(1e-20)
    w[7] *= 8000
    w[8] = np.abs(w[8]) + 10  # one-sided, far from zero
    w[9] = -w[8]
    w[10] = np.abs(w[10])
    w[11] = -w[10]
    w[12] = 1e-30
    w[13, 0] = 1e6  # one group beside which the others vanish
    w[14] *= np.float32(1e34)
    w[15, 64:128] = 0  # a group of zeros in a row that has others
    w[16, :64], w[16, 64:] = -1, 1
    w[17] = -0.0
    check(w, 64)
    codes, affine, row_scale = encode(w, 64)
    for bits in WIDTHS:
        decoded = planes.dequantize(codes, affine, row_scale, bits, 48, 192)
        assert np.isfinite(decoded).all()
        assert not decoded[0].any() and not decoded[17].any() and not decoded[15, 64:128].any()


def test_tiny_rows(rng: np.random.Generator) -> None:
    """Rows whose scale is below 2^-100, weights of some 1e-26, are zero; subnormal ones would have no finite inverse."""
    sizes = 10.0 ** np.arange(-45, -13).repeat(4)
    w = (rng.standard_normal((128, 128)) * sizes[:, None]).astype(np.float32)
    check(w, 64)
    codes, affine, row_scale = encode(w, 64)
    assert not codes[: 4 * 16].any() and not affine[: 4 * 16].any() and not row_scale[: 4 * 16].any()
    assert row_scale[4 * 24 :].all() and affine[4 * 24 :, :, 0].all()


def test_threads_do_not_show(rng: np.random.Generator) -> None:
    w = rng.standard_normal((100, 300)).astype(np.float32)
    one = native.encode(w, 64)
    for threads in (2, 5, 64):
        for a, b in zip(one, native.encode(w, 64, threads), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("group", [32, 64, 96, 256])
def test_pack_is_exact(rng: np.random.Generator, group: int) -> None:
    tiles = rng.integers(0, 256, (3, 5, group // 4, 64), np.uint8)
    base, further = native.pack(tiles)
    np.testing.assert_array_equal(base, planes.pack_base(tiles))
    assert len(further) == 6
    for bit, plane in enumerate(further, 3):
        np.testing.assert_array_equal(plane, planes.pack_plane(tiles, bit))
    np.testing.assert_array_equal(planes.unpack(base, further), tiles)


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 64)).astype(np.float32)
    for bad in ({"w": w[0]}, {"w": w[:0]}, {"group": 40}, {"group": 0}, {"group": 512}, {"threads": 0}):
        with pytest.raises(ValueError, match=r"expected"):
            native.encode(**{"w": w, "group": 64, **bad})
    with pytest.raises(ValueError, match=r"tiles has shape"):
        native.pack(np.zeros((1, 1, 4, 64), np.uint8))
    tiles, affine, row_scale = native.encode(w, 64)
    assert tiles.shape == (padded(4, 16) // 16, 1, 16, 64) and affine.shape == (1, 1, 2, 16) and row_scale.shape == (1, 16)


@pytest.mark.parametrize("span", [16, 32, 64, 128, 1024])
def test_rotate_is_exact(rng: np.random.Generator, span: int) -> None:
    for cols in (span, 3 * span + int(rng.integers(1, span))):
        x = (rng.standard_normal((5, cols)) * np.exp(rng.uniform(-8, 8, (5, 1)))).astype(np.float32)
        np.testing.assert_array_equal(native.rotate(x, span).view(np.uint32), planes.rotate(x, span).view(np.uint32))
    x[0, 0] = np.inf
    np.testing.assert_array_equal(np.isfinite(native.rotate(x, span)), np.isfinite(planes.rotate(x, span)))
    for bad in (0, 8, 48):
        with pytest.raises(ValueError, match=f"span is {bad}, expected a power of two from 16 on"):
            native.rotate(x, bad)
