"""The compiled encoder against planes.py: equal but for near ties of the clip search. Seeds as in test_kernels.py."""

from __future__ import annotations

import os

import numpy as np
import pytest

from d2moe import planes
from d2moe.kernels import native
from d2moe.types import padded


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("D2MOE_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"D2MOE_SEED={seed}")
    return np.random.default_rng(seed)


def encode(w: np.ndarray, group: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Codes and affine in row order, as planes.quantize gives them."""
    tiles, affine = native.encode(w, group, threads)
    return planes.untile(tiles), planes.untile_affine(affine.view(np.float16))


def losses(w: np.ndarray, affine: np.ndarray, group: int) -> np.ndarray:
    """What planes.fit minimises, float64 [rows, groups]."""
    out = np.zeros((w.shape[0], affine.shape[1]))
    for g in range(affine.shape[1]):
        part = w[:, g * group : (g + 1) * group]
        importance = np.square(part, dtype=np.float64)
        importance += importance.mean(axis=-1, keepdims=True)
        range_, low = affine[: len(w), g, 0], affine[: len(w), g, 1]
        codes = planes.encode(part, range_, low)
        for bits in planes.SEARCH_WIDTHS:
            error = np.square(part - planes.decode(codes, range_, low, bits), dtype=np.float64)
            out[:, g] += 4.0**bits * (importance * error).sum(axis=-1)
    return out


def check(w: np.ndarray, group: int) -> None:
    rows, cols = w.shape
    codes, affine = encode(w, group)
    wanted_codes, wanted_affine = planes.quantize(w, group)
    assert codes.shape == wanted_codes.shape and affine.shape == wanted_affine.shape
    same = (affine.view(np.uint16) == wanted_affine.view(np.uint16)).all(axis=-1)
    got, wanted = (losses(w, a, group)[~same[:rows]] for a in (affine, wanted_affine))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert (~same).mean() < 0.01
    # Under its own scales every code is exact, and padding is zero.
    for g in range(affine.shape[1]):
        part = w[:, g * group : (g + 1) * group]
        expected = planes.encode(part, affine[:rows, g, 0], affine[:rows, g, 1])
        np.testing.assert_array_equal(codes[:rows, g * group : g * group + part.shape[1]], expected)
    assert not codes[rows:].any() and not codes[:, cols:].any() and not affine[rows:].view(np.uint16).any()


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (16, 64), (33, 500), (64, 256)])
def test_encode_agrees_with_planes(rng: np.random.Generator, shape: tuple[int, int], group: int) -> None:
    check(rng.standard_normal(shape).astype(np.float32), group)
    check((rng.standard_t(3, shape) * 0.02).astype(np.float32), group)


def test_many_groups(rng: np.random.Generator) -> None:
    check((rng.standard_normal((256, 1024)) * np.exp(rng.uniform(-4, 1, (256, 1)))).astype(np.float32), 64)


def test_bfloat16_weights(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 512)).astype(np.float32) * np.float32(0.03)
    check((w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), 64)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_odd_groups(rng: np.random.Generator) -> None:
    w = rng.standard_normal((48, 64)).astype(np.float32)
    w[0] = 0
    w[1] = -0.75  # constant
    w[2] = 3.0
    w[3, 1:] = 0  # one weight
    w[4] = np.where(w[4] > 0, 1, -1)  # two values
    w[5] *= np.float32(2.0**-22)  # subnormal scales
    w[6] *= np.float32(1e-20)  # scales that are zero
    w[7] *= 8000
    w[8] = np.abs(w[8]) + 10  # far from zero
    w[9] = -w[8]
    w[10] = 65504
    w[11, 0] = 65504
    w[12] = 1e-30
    w[13, 0] = 1e6  # the range does not fit float16: all codes zero, as in planes.py
    check(w, 64)
    codes, affine = encode(w, 64)
    for bits in (2, 8):
        decoded = planes.dequantize(codes, affine, bits, 48, 64)
        assert not decoded[0].any()
        np.testing.assert_array_equal(decoded[1], np.full(64, -0.75, np.float32))
        np.testing.assert_array_equal(decoded[2], np.full(64, 3.0, np.float32))


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
    tiles, affine = native.encode(w, 64)
    assert tiles.shape == (padded(4, 16) // 16, 1, 16, 64) and affine.shape == (1, 1, 2, 16)
