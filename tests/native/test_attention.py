"""Attention scores and mixes of every kernel table against their definition in kernels.h, written here in NumPy: float32,
one fused multiplication and addition at a time, in the same order. Bit for bit. Seeds as in conftest.py."""

from __future__ import annotations

import numpy as np
import pytest

from d2moe.kernels import native

QUERIES = range(1, 9)
HEAD_DIMS = (2, 6, 32, 34, 64, 80, 96, 128, 130, 142, 256)
FOURS = (4, 12, 32, 36, 64, 80, 96, 100, 128, 256)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bits; a NaN equals any other."""
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    wrong = np.argwhere((a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b)))
    assert not len(wrong), f"{len(wrong)} of {a.size} differ, first at {wrong[0]}: {a[tuple(wrong[0])]} {b[tuple(wrong[0])]}"


def halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal and subnormal numbers of all sizes, as float16."""
    return (rng.standard_normal(shape) * np.exp(rng.uniform(-20, 3, shape))).astype(np.float16)


def floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape) * np.exp(rng.uniform(-8, 2, shape))).astype(np.float32)


def tiled(keys: np.ndarray) -> np.ndarray:
    """[tiles, head_dim, 16] of keys [16 * tiles, head_dim]."""
    return np.ascontiguousarray(keys.reshape(-1, 16, keys.shape[1]).transpose(0, 2, 1))


def tiled_codes(codes: np.ndarray) -> np.ndarray:
    """uint8 [tiles, head_dim/4, 16, 4] of codes int8 [16 * tiles, head_dim]."""
    shape = codes.reshape(-1, 16, codes.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(shape.astype(np.int16) + 128).astype(np.uint8)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once to float32: products are exact in 64 bits, and a second rounding of 64 shows once in 2^39."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def wanted_scores(keys: np.ndarray, q: np.ndarray) -> np.ndarray:
    acc = np.zeros((len(q), len(keys)), np.float32)
    for d in range(keys.shape[1]):
        acc = fused(q[:, d, None], keys[None, :, d], acc)
    return acc


def wanted_mix(values: np.ndarray, p: np.ndarray, out: np.ndarray) -> np.ndarray:
    for j in range(len(values)):
        out = fused(p[:, j, None], values[j], out)
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_of_halves(table: str, rng: np.random.Generator, head_dim: int) -> None:
    for n in QUERIES:
        for tiles in (1, 2, 3, 5):
            keys, q = halves(rng, (16 * tiles, head_dim)), floats(rng, (n, head_dim))
            stored = tiled(keys).view(np.uint16)
            got = native.scores(table, stored, q)
            same_bits(got, wanted_scores(keys, q))
            same_bits(got, native.scores("scalar", stored, q))


@pytest.mark.parametrize("head_dim", FOURS)
def test_scores_of_codes(table: str, rng: np.random.Generator, head_dim: int) -> None:
    for n in QUERIES:
        for tiles in (1, 3):
            codes = rng.integers(-128, 128, (16 * tiles, head_dim)).astype(np.int8)
            q = rng.integers(-128, 128, (n, head_dim)).astype(np.int8)
            scale = np.exp(rng.uniform(-9, 9, (tiles, 16))).astype(np.float32)
            stored = tiled_codes(codes)
            got = native.scores(table, stored, q, scale)
            dot = q.astype(np.int32) @ codes.astype(np.int32).T
            same_bits(got, dot.astype(np.float32) * scale.reshape(1, -1))
            same_bits(got, native.scores("scalar", stored, q, scale))


@pytest.mark.parametrize("head_dim", [4, 36, 128, 512])
def test_scores_of_extreme_codes_do_not_overflow(table: str, rng: np.random.Generator, head_dim: int) -> None:
    codes = rng.choice(np.array([-128, -127, 127], np.int8), (48, head_dim))
    codes[:16], codes[16:32] = 127, -128
    q = rng.choice(np.array([-128, -127, 127], np.int8), (8, head_dim))
    q[0], q[1] = 127, -128
    scale = np.ones((3, 16), np.float32)
    dot = q.astype(np.int32) @ codes.astype(np.int32).T
    same_bits(native.scores(table, tiled_codes(codes), q, scale), dot.astype(np.float32))


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 7, 65])
def test_mix_of_halves(table: str, rng: np.random.Generator, head_dim: int) -> None:
    for n in QUERIES:
        for count in (1, 3, 64, 65, 150):
            values, p, out = halves(rng, (count, head_dim)), floats(rng, (n, count)), floats(rng, (n, head_dim))
            got = native.mix(table, values.view(np.uint16), p, out)
            same_bits(got, wanted_mix(values, p, out))
            same_bits(got, native.mix("scalar", values.view(np.uint16), p, out))


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 7, 65])
def test_mix_of_codes(table: str, rng: np.random.Generator, head_dim: int) -> None:
    for n in QUERIES:
        for count in (1, 3, 64, 65, 150):
            codes = rng.integers(-128, 128, (count, head_dim)).astype(np.int8)
            scale = np.exp(rng.uniform(-9, 9, count)).astype(np.float32)
            p, out = floats(rng, (n, count)), floats(rng, (n, head_dim))
            got = native.mix(table, codes, p, out, scale)
            wanted = out
            for j in range(count):
                wanted = fused(p[:, j, None] * scale[j], codes[j], wanted)
            same_bits(got, wanted)
            same_bits(got, native.mix("scalar", codes, p, out, scale))


def test_queries_do_not_show(table: str, rng: np.random.Generator) -> None:
    keys, q = tiled(halves(rng, (64, 96))).view(np.uint16), floats(rng, (8, 96))
    whole = native.scores(table, keys, q)
    same_bits(native.scores(table, keys[:1], q), whole[:, :16].copy())
    values, p, out = halves(rng, (70, 96)).view(np.uint16), floats(rng, (8, 70)), floats(rng, (8, 96))
    mixed = native.mix(table, values, p, out)
    for n in QUERIES:
        same_bits(native.scores(table, keys, q[:n]), whole[:n])
        same_bits(native.mix(table, values, p[:n], out[:n]), mixed[:n])
    # A mix in two calls is the mix in one: the accumulators are those in memory.
    half = native.mix(table, values[:33], p[:, :33].copy(), out)
    same_bits(native.mix(table, values[33:], p[:, 33:].copy(), half), mixed)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_stays_where_it_belongs(table: str, rng: np.random.Generator) -> None:
    keys, q = halves(rng, (32, 64)), floats(rng, (5, 64))
    keys[3, 5], keys[20, 0], q[2, 7] = np.nan, np.inf, np.nan
    got = native.scores(table, tiled(keys).view(np.uint16), q)
    same_bits(got, wanted_scores(keys, q))
    assert np.isnan(got[2]).all() and np.isnan(got[:, 3]).all() and np.isinf(got[[0, 1, 3, 4], 20]).all()
    assert np.isfinite(np.delete(np.delete(got, 2, 0), [3, 20], 1)).all()
    values, p, out = halves(rng, (20, 70)), floats(rng, (5, 20)), floats(rng, (5, 70))
    values[4, 66], values[5, 1], p[3, 2] = np.nan, np.inf, np.nan
    got = native.mix(table, values.view(np.uint16), p, out)
    same_bits(got, wanted_mix(values, p, out))
    assert np.isnan(got[3]).all() and np.isnan(got[:, 66]).all() and np.isinf(got[[0, 1, 2, 4], 1]).all()
    assert np.isfinite(np.delete(np.delete(got, 3, 0), [1, 66], 1)).all()


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    keys, q = tiled(halves(rng, (32, 64))).view(np.uint16), floats(rng, (3, 64))
    codes, scale, integers = np.zeros((2, 16, 16, 4), np.uint8), np.ones((2, 16), np.float32), np.zeros((3, 64), np.int8)
    native.scores("scalar", keys, q)
    native.scores("scalar", codes, integers, scale)
    for bad in [
        ("mmx", keys, q),
        ("scalar", keys, q[:0]),
        ("scalar", keys, floats(rng, (9, 64))),
        ("scalar", keys, q[:, :60].copy()),
        ("scalar", codes, integers, scale[:1]),
        ("scalar", codes, integers[:, :60].copy(), scale),
        ("scalar", np.zeros((2, 1, 16, 4), np.uint8), np.zeros((3, 6), np.int8), scale),  # 6 is no multiple of 4
    ]:
        with pytest.raises(ValueError, match=r"\w{4}"):
            native.scores(*bad)
    values, p, out = halves(rng, (20, 70)).view(np.uint16), floats(rng, (5, 20)), floats(rng, (5, 70))
    native.mix("scalar", values, p, out)
    for bad in [
        ("mmx", values, p, out),
        ("scalar", values, p[:0], out[:0]),
        ("scalar", values, p, out[:4]),
        ("scalar", values, p[:, :19].copy(), out),
        ("scalar", values, p, out[:, :69].copy()),
        ("scalar", values.view(np.int8).reshape(20, 140), p, out, np.ones(20, np.float32)),
        ("scalar", np.zeros((20, 70), np.int8), p, out, np.ones(19, np.float32)),
    ]:
        with pytest.raises(ValueError, match=r"\w{4}"):
            native.mix(*bad)
