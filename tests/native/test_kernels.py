"""Every kernel table against planes.py, bit for bit where kernels.h promises it. Inputs are fresh in each run; the seed
is printed with a failure (run again with D2MOE_SEED=...)."""

from __future__ import annotations

import platform

import numpy as np
import pytest

from d2moe import planes
from d2moe.kernels import native
from d2moe.types import WIDTHS, padded

GROUPS = (32, 64, 128)


class Case:
    """A matrix with random codes, steps, zeros and row scales, and activations for it."""

    def __init__(self, rng: np.random.Generator, rows: int, cols: int, group: int, m: int):
        self.rows, self.cols, self.group = rows, cols, group
        shape = (padded(rows, 16), padded(cols, group))
        self.affine = rng.integers(0, 256, (shape[0], shape[1] // group, 2), np.uint8)
        self.row_scale = np.exp(rng.uniform(-9, 3, shape[0])).astype(np.float32)
        self.x = rng.standard_normal((m, cols), np.float32) * np.exp(rng.uniform(-3, 3, (m, cols)).astype(np.float32))
        self.set_activations(*planes.quantize_activations(self.x, group))
        self.set_codes(rng.integers(0, 256, shape, np.uint8))

    def set_codes(self, codes: np.ndarray) -> None:
        self.codes, self.tiles = codes, planes.tile(codes, self.group)
        self.base = planes.pack_base(self.tiles)
        self.planes = [planes.pack_plane(self.tiles, bit) for bit in range(3, 9)]

    def set_activations(self, q: np.ndarray, scale: np.ndarray, total: np.ndarray) -> None:
        self.q, self.scale, self.total = q, scale, total

    def expected(self, bits: int) -> np.ndarray:
        y = planes.matmul(self.codes, self.affine, self.row_scale, bits, self.q, self.scale, self.total)
        return np.ascontiguousarray(y[:, : self.rows])

    def arguments(self, table: str, bits: int, tokens: slice = slice(None)) -> tuple[object, ...]:
        stored = self.row_scale.reshape(-1, 16), planes.tile_affine(self.affine), self.base, self.planes[: bits - 2]
        activations = self.q[tokens], self.scale[tokens], self.total[tokens]
        return table, self.rows, self.cols, self.group, bits, *stored, *activations

    def run(self, table: str, bits: int, threads: int = 1, tokens: slice = slice(None)) -> np.ndarray:
        return native.matmul(*self.arguments(table, bits, tokens), threads)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    kind = {2: np.uint16, 4: np.uint32, 1: np.uint8}[a.dtype.itemsize]
    wrong = np.argwhere(a.view(kind) != b.view(kind))
    assert not len(wrong), (
        f"{len(wrong)} of {a.size} differ, first at {wrong[0]}: {a[tuple(wrong[0])]} {b[tuple(wrong[0])]}"
    )


def test_some_table_is_there() -> None:
    assert native.tables()[0] == "scalar"
    assert set(native.tables()) <= {"scalar", "avx2", "avx512", "neon"}
    assert len(native.tables()) > 1 or platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64")


# ---- activations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [*GROUPS, 96, 256])
@pytest.mark.parametrize("cols", [1, 31, 64, 100, 515])
def test_quantize_is_exact(table: str, rng: np.random.Generator, group: int, cols: int) -> None:
    x = rng.standard_normal((7, cols), np.float32) * np.exp(rng.uniform(-40, 40, (7, 1)).astype(np.float32))
    x[1] = 0
    x[2] *= rng.random(cols) < 0.05
    x[3] = rng.integers(-254, 255, cols) * np.float32(0.5)  # many exact halves
    x[3, 0] = 127
    x[4] = np.float32(2.0**-101)
    for got, expected in zip(
        native.quantize_activations(table, x, group), planes.quantize_activations(x, group), strict=True
    ):
        same_bits(got, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quantize_of_what_is_no_number_spoils_one_group(table: str, rng: np.random.Generator, bad: float) -> None:
    x = rng.standard_normal((1, 192)).astype(np.float32)
    clean = native.quantize_activations(table, x, 64)
    x[0, 70] = bad
    q, scale, total = native.quantize_activations(table, x, 64)
    for g in (0, 2):
        same_bits(q[:, 64 * g : 64 * g + 64].copy(), clean[0][:, 64 * g : 64 * g + 64].copy())
        assert scale[0, g] == clean[1][0, g] and total[0, g] == clean[2][0, g]


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [*GROUPS, 96])
def test_matmul_is_exact(table: str, rng: np.random.Generator, group: int, bits: int) -> None:
    # One to a few tokens, odd numbers of them, more than any kernel takes at a time.
    for m in (1, 2, 3, 4, 5, 7, 8, 17, 67):
        case = Case(rng, int(rng.integers(1, 70)), int(rng.integers(1, 600)), group, m)
        same_bits(case.run(table, bits), case.expected(bits))


@pytest.mark.parametrize("group", [32, 64, 96, 160, 256])
def test_matmul_of_many_columns(table: str, rng: np.random.Generator, group: int) -> None:
    for m in (1, 3, 11):
        case = Case(rng, 19, 4000, group, m)  # more columns than any kernel unpacks at a time
        for bits in (2, 3, 5, 8):
            same_bits(case.run(table, bits), case.expected(bits))


def test_extreme_codes_do_not_overflow(table: str, rng: np.random.Generator) -> None:
    for group in (32, 64, 128, 256):
        for m in (1, 5):
            case = Case(rng, 33, 2 * group, group, 5)
            case.set_codes(np.full_like(case.codes, 255))
            case.affine[:] = rng.choice(np.array([0, 255], np.uint8), case.affine.shape)
            q = np.full_like(case.q, 127)
            q[1], q[2, ::2], q[3, ::2] = -127, -127, rng.choice([-127, 127], q.shape[1] // 2)
            total = q.reshape(5, 2, group).sum(-1, dtype=np.int32)
            case.set_activations(q, case.scale, total)
            for bits in WIDTHS:
                wanted = case.expected(bits)
                for i in range(0, 5, m):
                    same_bits(case.run(table, bits, tokens=slice(i, i + m)), wanted[i : i + m])


def test_splits_do_not_show(table: str, rng: np.random.Generator) -> None:
    case = Case(rng, 16 * 9 + 5, 1000, 64, 23)
    for bits in WIDTHS:
        whole = case.run(table, bits)
        for threads in (2, 3, 7, 64):
            same_bits(case.run(table, bits, threads), whole)
        for size in (1, 2, 3, 4, 6, 9):
            parts = [case.run(table, bits, tokens=slice(i, i + size)) for i in range(0, 23, size)]
            same_bits(np.concatenate(parts), whole)


def test_many_tokens_are_cut_alike(table: str, rng: np.random.Generator) -> None:
    case = Case(rng, 16, 20000, 64, 130)  # more activations than stay in L2
    same_bits(case.run(table, 3), case.expected(3))


def test_padding_rows_are_not_written(table: str, rng: np.random.Generator) -> None:
    # Rows are contiguous in y, so a write past a token's last row would land in the next token's first rows; tiles are
    # computed in order, hence the last tile of token 0 after the first of token 1.
    for rows in (1, 7, 15, 17, 31):
        for m in (2, 6):
            case = Case(rng, rows, 64, 32, m)
            same_bits(case.run(table, 4), case.expected(4))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_huge_and_tiny_scales(table: str, rng: np.random.Generator) -> None:
    case = Case(rng, 32, 256, 64, 6)
    case.row_scale[:8], case.row_scale[8:16] = 1e-38, 1e-44  # also products that are subnormal
    case.row_scale[16:24], case.row_scale[24:] = 1e30, 0
    case.set_activations(case.q, np.array([2.0**-107, 1e-20, 1, 1e8, 1e-38, 0], np.float32)[:, None].repeat(4, 1), case.total)
    for bits in WIDTHS:
        for part in (slice(0, 1), slice(0, 6)):
            same_bits(case.run(table, bits, tokens=part), case.expected(bits)[part])


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    case = Case(rng, 32, 128, 64, 2)
    good = case.arguments("scalar", 4)
    native.matmul(*good)
    row_scale, affine = case.row_scale.reshape(-1, 16), planes.tile_affine(case.affine)
    for at, bad in [
        (0, "mmx"),
        (1, 33),
        (2, 129),
        (3, 48),
        (3, 512),
        (4, 1),
        (4, 9),
        (5, row_scale[:1]),
        (6, affine[:1]),
        (7, case.base[:, :1].copy()),
        (8, case.planes[:1]),
        (8, [case.base] * 6),
        (9, case.q[:, :64].copy()),
        (10, case.scale[:1]),
        (11, case.total[:1]),
    ]:
        with pytest.raises(ValueError, match=r"\w{4}"):
            native.matmul(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(ValueError, match="threads"):
        native.matmul(*good, threads=0)
    with pytest.raises(ValueError, match="group"):
        native.quantize_activations("scalar", case.x, 33)
    with pytest.raises(ValueError, match="vector op"):
        native.vector_op("scalar", "norm", case.x[0])
    with pytest.raises(ValueError, match="differ"):
        native.vector_op("scalar", "dot_f32", case.x[0], case.x[0, 1:])
    with pytest.raises(ValueError, match="uint16"):
        native.vector_op("scalar", "to_f32", case.x[0])


# ---- the small slots -----------------------------------------------------------------------------------------------

LENGTHS = (0, 1, 7, 8, 15, 16, 17, 31, 63, 64, 100, 1000)


def test_to_f32_of_every_half(table: str) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    got, _ = native.vector_op(table, "to_f32", halves)
    expected = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    same_bits(got[number], expected[number])
    assert np.isnan(got[~number]).all()


def test_to_f16_rounds_half_to_even(table: str, rng: np.random.Generator) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all that are positive and finite
    middles = (halves[1:] + halves[:-1]) / 2
    x = [halves, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    x += [np.array([65504, 65519.996, 65520, 65536, 3e38, np.inf, 2.0**-25, 2.0**-26, 1e-45, 0], np.float32)]
    x += [rng.integers(0, 0x7F800000, 100_000, np.uint32).view(np.float32)]
    both = np.concatenate([np.concatenate(x), -np.concatenate(x)])
    with np.errstate(over="ignore", under="ignore"):
        expected = both.astype(np.float16).view(np.uint16)
    same_bits(native.vector_op(table, "to_f16", both)[0], expected)
    nan, _ = native.vector_op(table, "to_f16", np.full(20, np.nan, np.float32))
    assert np.isnan(nan.view(np.float16)).all()


@pytest.mark.parametrize("n", LENGTHS)
def test_conversions_of_any_length(table: str, rng: np.random.Generator, n: int) -> None:
    x = rng.standard_normal(n).astype(np.float32)
    halves, _ = native.vector_op(table, "to_f16", x)
    same_bits(halves, x.astype(np.float16).view(np.uint16))
    same_bits(native.vector_op(table, "to_f32", halves)[0], x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("n", LENGTHS)
def test_sums(table: str, rng: np.random.Generator, n: int) -> None:
    a, b = rng.standard_normal((2, n)).astype(np.float32)
    bound = 1e-6 * float(np.abs(a.astype(np.float64) * b).sum() + 1e-30)
    assert abs(native.vector_op(table, "dot_f32", a, b)[1] - a.astype(np.float64) @ b) <= bound
    squares = float(np.square(a, dtype=np.float64).sum())
    assert native.vector_op(table, "sum_squares", a)[1] == pytest.approx(squares, rel=1e-6)


def test_exp_is_accurate(table: str, rng: np.random.Generator) -> None:
    x = np.concatenate([rng.uniform(-87.3, 88.7, 200_000), rng.uniform(-1, 1, 50_000), [0, -0.0]]).astype(np.float32)
    got, _ = native.vector_op(table, "exp_sum", x)  # the sum overflows
    expected = np.exp(x.astype(np.float64))
    assert np.abs(got / expected - 1).max() < 2e-6
    assert got[-1] == got[-2] == 1


def test_exp_far_out(table: str) -> None:
    x = np.array([-87.5, -100, -104.5, -1000, -3e38, -np.inf], np.float32)
    got, total = native.vector_op(table, "exp_sum", x)
    np.testing.assert_allclose(got[:2], np.exp(x[:2].astype(np.float64)), rtol=0, atol=1e-44)
    assert not got[2:].any() and np.isfinite(total)
    assert np.isnan(native.vector_op(table, "exp_sum", np.array([np.nan], np.float32))[0]).all()


@pytest.mark.parametrize("n", LENGTHS)
def test_exp_sum_of_any_length(table: str, rng: np.random.Generator, n: int) -> None:
    x = rng.standard_normal(n).astype(np.float32)
    got, total = native.vector_op(table, "exp_sum", x, offset=1.5)
    np.testing.assert_allclose(got, np.exp((x - np.float32(1.5)).astype(np.float64)), rtol=2e-6)
    assert total == pytest.approx(float(got.sum(dtype=np.float64)), rel=1e-5)


@pytest.mark.parametrize("n", [*LENGTHS, 33, 48, 127, 4099])
def test_small_slots_are_the_scalar_ones_bit_for_bit(table: str, rng: np.random.Generator, n: int) -> None:
    a, b = (rng.standard_normal((2, n)) * np.exp(rng.uniform(-8, 8, (2, n)))).astype(np.float32)
    for op, first, second, offset in [
        ("dot_f32", a, b, 0.0),
        ("sum_squares", a, None, 0.0),
        ("exp_sum", np.minimum(a, 80), None, 1.25),
        ("silu_mul", a, b, 0.0),
    ]:
        array, number = native.vector_op(table, op, first, second, offset)
        wanted_array, wanted = native.vector_op("scalar", op, first, second, offset)
        same_bits(np.array([number], np.float32), np.array([wanted], np.float32))
        if array is not None:
            same_bits(array, wanted_array)


@pytest.mark.parametrize("n", LENGTHS)
def test_silu_mul(table: str, rng: np.random.Generator, n: int) -> None:
    gate, up = (rng.standard_normal((2, n)) * 10).astype(np.float32)
    gate[: n // 4] *= 30  # exp(-gate) over- and underflows
    got, _ = native.vector_op(table, "silu_mul", gate, up)
    with np.errstate(over="ignore", under="ignore"):
        expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(got, expected, rtol=4e-6, atol=1e-30)


def test_read_bandwidth(table: str) -> None:
    assert native.read_bandwidth(8 << 20, 2, 0.0, table) > 1e6
    with pytest.raises(ValueError, match="MiB"):
        native.read_bandwidth(0, 1, 0.0, table)
