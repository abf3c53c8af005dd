"""The nested code on one page: the definition that the file format and every kernel must agree with.

A weight matrix W [rows, cols] is cut into groups of `group` columns. Each (row, group) has a range S and a low end L,
both float16. A weight's code is one unsigned byte c, and its value at width b (2 to 8 bits) is the middle of the cell
that the first b bits of c name:

    c   = clip(floor((w - L) * 256 / S), 0, 255)
    w_b = L + S/256 * ((c with its low 8-b bits cleared) + 2**(7-b))

So the b-bit weight *is* the first b bits of the 8-bit one, one (S, L) serves all widths, and rounding to the nearest
b-bit value is the same as truncating. This is the paper's Matryoshka weight quantisation (arXiv 2504.15299, section on
MWQ) with s_{k+1} = s_k / 2: a plane of signs with half the scale of the plane before it.

The (S, L) of a group is chosen jointly for all widths: among `CLIPS` shrunken versions of [min, max], the one with the
least sum over SEARCH_WIDTHS of 4**b * sum_i importance_i * (w_i - w_b,i)**2, importance_i = w_i**2 + mean(w**2).
With 4**b the 8-bit width decides: clipping costs it more than the low widths gain, and on real weights the search has not
been seen to shrink a group. Plain range then is the measured best of what was tried (docs/log.md).

Products with int8 activations: x is cut into the same groups, x_i ≈ a * q_i with a = max|x| / 127 per group,
q_i = round_half_even(x_i * (127 / max|x|)); a group whose max|x| is at most TINY is all zero. All arithmetic below is
float32, one operation at a time, groups in order:

    y = 0;  per group:  y += a * (s * (dot + half * sum) + L * sum),   dot = Σ prefix_i * q_i,  sum = Σ q_i,
                        s = S / 256,  half = 2**(7-b)

dot and sum are exact integers, so every kernel can give the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.types import MAX_BITS, TILE_ROWS, padded

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]

CLIPS = tuple(float(np.float32(1.0 - 0.04 * i)) for i in range(12))
SEARCH_WIDTHS = (2, 3, 4, 8)
TINY = np.float32(2.0**-100)


def encode(w: F32, range_: F16, low: F16) -> U8:
    """Codes uint8 [..., group] of weights float32 [..., group] under ranges and lows float16 [...]."""
    s = range_.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(s > 0, np.float32(256.0) / s, np.float32(0.0))
    cell = np.floor((w - low.astype(np.float32)[..., None]) * inverse)
    codes: U8 = np.clip(cell, 0, 255).astype(np.uint8)
    return codes


def prefix(codes: U8, bits: int) -> U8:
    """Codes with all but the first `bits` bits cleared."""
    kept: U8 = codes & np.uint8((0xFF00 >> bits) & 0xFF)
    return kept


def half_cell(bits: int) -> np.float32:
    """Half a cell of the `bits`-bit code, in units of the 8-bit cell."""
    half: np.float32 = np.float32(2.0 ** (MAX_BITS - 1 - bits))
    return half


def decode(codes: U8, range_: F16, low: F16, bits: int) -> F32:
    """Weights float32 [..., group] at width `bits` from codes uint8 [..., group]."""
    s = range_.astype(np.float32)[..., None] * np.float32(1 / 256)
    w: F32 = low.astype(np.float32)[..., None] + s * (prefix(codes, bits).astype(np.float32) + half_cell(bits))
    return w


def fit(w: F32) -> tuple[F16, F16]:
    """Range and low end, float16 [...], of groups w float32 [..., group] by the joint clip search described above.

    Float64 sums, so the compiled version (which adds in another order) can differ in near ties only.
    """
    top, bottom = w.max(axis=-1), w.min(axis=-1)
    importance = np.square(w, dtype=np.float64)
    importance += importance.mean(axis=-1, keepdims=True)
    best_range, best_low = np.zeros(top.shape, np.float16), np.zeros(top.shape, np.float16)
    best = np.full(top.shape, np.inf)
    for clip in CLIPS:
        range_ = ((top - bottom) * np.float32(clip)).astype(np.float16)
        low = (bottom * np.float32(clip)).astype(np.float16)
        codes = encode(w, range_, low)
        loss = np.zeros(top.shape)
        for bits in SEARCH_WIDTHS:
            error = np.square(w - decode(codes, range_, low, bits), dtype=np.float64)
            loss += 4.0**bits * (importance * error).sum(axis=-1)
        better = loss < best
        best = np.where(better, loss, best)
        best_range, best_low = np.where(better, range_, best_range), np.where(better, low, best_low)
    return best_range, best_low


def quantize(w: F32, group: int) -> tuple[U8, F16]:
    """Codes uint8 [rows', cols'] and affine float16 [rows', groups, 2] (range, low) of W float32 [rows, cols].

    rows' is rows padded to a multiple of 16, cols' is cols padded to a multiple of `group`. Padding columns take part
    in no fit and meet activations that are zero; padding rows have range and low 0.
    """
    rows, cols = w.shape
    rows_p, cols_p = padded(rows, TILE_ROWS), padded(cols, group)
    codes = np.zeros((rows_p, cols_p), np.uint8)
    affine = np.zeros((rows_p, cols_p // group, 2), np.float16)
    for g in range(cols_p // group):
        part = np.ascontiguousarray(w[:, g * group : (g + 1) * group], np.float32)
        range_, low = fit(part)
        affine[:rows, g, 0], affine[:rows, g, 1] = range_, low
        codes[:rows, g * group : g * group + part.shape[1]] = encode(part, range_, low)
    return codes, affine


def dequantize(codes: U8, affine: F16, bits: int, rows: int, cols: int) -> F32:
    """W float32 [rows, cols] at width `bits` from what `quantize` returned."""
    rows_p, cols_p = codes.shape
    groups = affine.shape[1]
    w = decode(codes.reshape(rows_p, groups, cols_p // groups), affine[..., 0], affine[..., 1], bits)
    return np.ascontiguousarray(w.reshape(rows_p, cols_p)[:rows, :cols])


def quantize_activations(x: F32, group: int) -> tuple[I8, F32, I32]:
    """int8 [m, cols'], scale float32 [m, groups] and sum int32 [m, groups] of activations float32 [m, cols]."""
    m, cols = x.shape
    cols_p = padded(cols, group)
    full = np.zeros((m, cols_p), np.float32)
    full[:, :cols] = x
    cut = full.reshape(m, cols_p // group, group)
    largest = np.abs(cut).max(axis=-1)
    largest = np.where(largest > TINY, largest, np.float32(0.0))
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127.0) / largest, np.float32(0.0))
    q = np.rint(cut * inverse[..., None]).astype(np.int8)
    return q.reshape(m, cols_p), largest / np.float32(127.0), q.sum(axis=-1, dtype=np.int32)


def matmul(codes: U8, affine: F16, bits: int, q: I8, scale: F32, total: I32) -> F32:
    """y float32 [m, rows'] of int8 activations [m, cols'] with scale and sum [m, groups]: the exact definition."""
    rows_p, cols_p = codes.shape
    groups = affine.shape[1]
    group = cols_p // groups
    u = prefix(codes, bits).reshape(rows_p, groups, group).astype(np.int32)
    y = np.zeros((q.shape[0], rows_p), np.float32)
    for g in range(groups):
        dot = (q[:, g * group : (g + 1) * group].astype(np.int32) @ u[:, g].T).astype(np.float32)
        t = total[:, g, None].astype(np.float32)
        s = affine[:, g, 0].astype(np.float32) * np.float32(1 / 256)
        inner = s * (dot + half_cell(bits) * t) + affine[:, g, 1].astype(np.float32) * t
        y = y + scale[:, g, None] * inner
    return y


# Storage order. A block is 16 rows × one group; register j of a block holds columns 4j..4j+3 of all 16 rows, byte 4r+c is
# row r, column 4j+c. The base stores 2 bits of registers 4i..4i+3 in each byte of word i, a plane 1 bit of 8i..8i+7.


def tile(codes: U8, group: int) -> U8:
    """Codes uint8 [rows', cols'] in register order [tiles, groups, group/4, 64]."""
    rows_p, cols_p = codes.shape
    shape = (rows_p // TILE_ROWS, TILE_ROWS, cols_p // group, group // 4, 4)
    return np.ascontiguousarray(codes.reshape(shape).transpose(0, 2, 3, 1, 4)).reshape(shape[0], shape[2], shape[3], 64)


def untile(tiles: U8) -> U8:
    """Inverse of `tile`: uint8 [rows', cols'] from [tiles, groups, group/4, 64]."""
    t, g, j, _ = tiles.shape
    return np.ascontiguousarray(tiles.reshape(t, g, j, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)).reshape(t * 16, g * j * 4)


def pack_base(tiles: U8) -> U8:
    """Base plane uint8 [tiles, groups, group/16, 64] of register-ordered codes."""
    t, g, j, _ = tiles.shape
    v = (tiles >> 6).reshape(t, g, j // 4, 4, 64)
    base: U8 = v[..., 0, :] | v[..., 1, :] << np.uint8(2) | v[..., 2, :] << np.uint8(4) | v[..., 3, :] << np.uint8(6)
    return base


def pack_plane(tiles: U8, bit: int) -> U8:
    """Plane of bit `bit` (3 to 8, 8 the least significant) uint8 [tiles, groups, group/32, 64]."""
    t, g, j, _ = tiles.shape
    v = ((tiles >> (MAX_BITS - bit)) & 1).reshape(t, g, j // 8, 8, 64)
    out = np.zeros((t, g, j // 8, 64), np.uint8)
    for f in range(8):
        out |= v[..., f, :] << np.uint8(f)
    return out


def unpack(base: U8, planes: list[U8]) -> U8:
    """Register-ordered codes [tiles, groups, group/4, 64]; bits of planes that are not given are zero."""
    t, g, words, _ = base.shape
    tiles = np.stack([(base >> np.uint8(2 * f) & 3) << 6 for f in range(4)], axis=3).reshape(t, g, words * 4, 64)
    for i, plane in enumerate(planes):
        bits = np.stack([(plane >> np.uint8(f) & 1) << np.uint8(5 - i) for f in range(8)], axis=3)
        tiles |= bits.reshape(tiles.shape)
    return tiles


def tile_affine(affine: F16) -> F16:
    """Affine float16 [rows', groups, 2] in storage order [tiles, groups, 2, 16]."""
    rows_p, groups, _ = affine.shape
    return np.ascontiguousarray(affine.reshape(rows_p // TILE_ROWS, TILE_ROWS, groups, 2).transpose(0, 2, 3, 1))


def untile_affine(tiled: F16) -> F16:
    """Inverse of `tile_affine`: [rows', groups, 2] from [tiles, groups, 2, 16]."""
    t, groups = tiled.shape[:2]
    return np.ascontiguousarray(tiled.transpose(0, 3, 1, 2)).reshape(t * TILE_ROWS, groups, 2)
