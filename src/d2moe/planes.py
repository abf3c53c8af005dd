"""The nested code on one page: the definition that the file format and every kernel must agree with.

A weight matrix W [rows, cols] is cut into groups of `group` columns. Each row has a scale R (float32); each (row, group) a
step S and a zero Z, both one byte. A weight's code is one unsigned byte c, and its value at width b (2 to 8 bits) is the
middle of the cell that the first b bits of c name:

    s   = R * S
    c   = clip(floor(w / s + Z), 0, 255)
    w_b = s * ((c with its low 8-b bits cleared) + 2**(7-b) - Z)

So the b-bit weight *is* the first b bits of the 8-bit one, one (S, Z) serves all widths, and rounding to the nearest
b-bit value is the same as truncating. This is the paper's Matryoshka weight quantisation (arXiv 2504.15299, section on
MWQ) with s_{k+1} = s_k / 2: a plane of signs with half the scale of the plane before it.

`quantize` lets the cells of a group span its [min, max], zero included: S is the range/256 in units of R, rounded up, so
that R = the largest range/256 of the row / 255; an R of at most TINY is 0, and so is the whole row. A search of clips over
squared weight errors was tried and lost to plain range (docs/log.md).

What `down` of a gated block meets may be rotated: `rotate` takes sums and differences of its inputs, the weights are rotated to
fit, and the product is the same. The rotated weights of a row are alike in size, which a shared step wants.

Products with int8 activations: x is cut into the same groups, x_i ≈ a * q_i with a = max|x| / 127 per group,
q_i = round_half_even(x_i * (127 / max|x|)); a group whose max|x| is at most TINY is all zero. All arithmetic below is
float32, one operation at a time, groups in order:

    y = 0;  per group:  n = dot + (2**(7-b) - Z) * sum,   dot = Σ prefix_i * q_i,  sum = Σ q_i
                        y += (a * n) * S
    at the end          y *= R

n is exact (an integer, or a half at 8 bits, below 2**23 for groups up to 256), so every kernel can give the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2moe.types import MAX_BITS, TILE_ROWS, padded

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]

TINY = np.float32(2.0**-100)
LEVELS = 256
PLANE_BIT = (0, 2, 4, 6, 1, 3, 5, 7)
"""Where register f of eight sits in a byte of a plane: two planes become 2-bit fields like the base's in two shifts."""


def prefix(codes: U8, bits: int) -> U8:
    """Codes with all but the first `bits` bits cleared."""
    kept: U8 = codes & np.uint8((0xFF00 >> bits) & 0xFF)
    return kept


def half_cell(bits: int) -> np.float32:
    """Half a cell of the `bits`-bit code, in units of the 8-bit cell."""
    half: np.float32 = np.float32(2.0 ** (MAX_BITS - 1 - bits))
    return half


def rotate(x: F32, span: int) -> F32:
    """Walsh-Hadamard transforms of whole spans of the last dimension of x float32, without a factor; what is left of a span stays.

    `span` is a power of two. Its own inverse but for that factor: rotate(rotate(x)) is span * x. In exact arithmetic
    rotate(x) @ (rotate(w) / span).T is x @ w.T; dividing by a power of two is exact.
    """
    whole = x.shape[-1] // span * span
    y = x[..., :whole].reshape(-1, span)
    step = 1
    while step < span:
        a, b = np.moveaxis(y.reshape(-1, span // (2 * step), 2, step), 2, 0)
        y = np.stack([a + b, a - b], axis=2).reshape(-1, span)
        step *= 2
    return np.concatenate([y.reshape(*x.shape[:-1], whole), x[..., whole:]], axis=-1)


def fit(w: F32) -> tuple[U8, F32]:
    """Step and zero uint8 [rows, groups, 2] and row scale float32 [rows] of W float32 [rows, groups, group]."""
    low = np.minimum(w.min(axis=-1), np.float32(0))
    step = (np.maximum(w.max(axis=-1), np.float32(0)) - low) / np.float32(LEVELS)
    row_scale: F32 = step.max(axis=-1) / np.float32(255)
    row_scale = np.where(row_scale > TINY, row_scale, np.float32(0))  # else 1 / s could overflow
    with np.errstate(divide="ignore", invalid="ignore"):
        s8 = np.where(row_scale[:, None] > 0, np.minimum(np.ceil(step / row_scale[:, None]), np.float32(255)), 0)
        zero = np.where(s8 > 0, np.rint(-low / (row_scale[:, None] * s8.astype(np.float32))), 0)
    return np.stack([s8, np.clip(zero, 0, 255)], axis=-1).astype(np.uint8), row_scale


def quantize(w: F32, group: int) -> tuple[U8, U8, F32]:
    """Codes uint8 [rows', cols'], affine uint8 [rows', groups, 2] (step, zero) and row scale float32 [rows'].

    W is float32 [rows, cols]; rows' is rows padded to a multiple of 16, cols' is cols padded to a multiple of `group`.
    Padding columns count as zero in the fit, have code 0 and meet activations that are zero; padding rows are all zero.
    """
    rows, cols = w.shape
    rows_p, cols_p = padded(rows, TILE_ROWS), padded(cols, group)
    full = np.zeros((rows_p, cols_p), np.float32)
    full[:rows, :cols] = w
    cut = full.reshape(rows_p, cols_p // group, group)
    affine, row_scale = fit(cut)
    s = row_scale[:, None] * affine[..., 0].astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(s > 0, np.float32(1) / s, np.float32(0))
    cell = np.floor(cut * inverse[..., None] + affine[..., 1, None].astype(np.float32))
    codes = np.clip(cell, 0, LEVELS - 1).astype(np.uint8).reshape(rows_p, cols_p)
    codes[:, cols:] = 0
    return codes, affine, row_scale


def dequantize(codes: U8, affine: U8, row_scale: F32, bits: int, rows: int, cols: int) -> F32:
    """W float32 [rows, cols] at width `bits` from what `quantize` returned."""
    rows_p, cols_p = codes.shape
    groups = affine.shape[1]
    s = row_scale[:, None] * affine[..., 0].astype(np.float32)
    cell = prefix(codes, bits).reshape(rows_p, groups, -1).astype(np.float32) + half_cell(bits)
    w = s[..., None] * (cell - affine[..., 1, None].astype(np.float32))
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


def matmul(codes: U8, affine: U8, row_scale: F32, bits: int, q: I8, scale: F32, total: I32) -> F32:
    """y float32 [m, rows'] of int8 activations [m, cols'] with scale and sum [m, groups]: the exact definition."""
    rows_p, cols_p = codes.shape
    groups = affine.shape[1]
    group = cols_p // groups
    u = prefix(codes, bits).reshape(rows_p, groups, group).astype(np.int32)
    y = np.zeros((q.shape[0], rows_p), np.float32)
    for g in range(groups):
        dot = (q[:, g * group : (g + 1) * group].astype(np.int32) @ u[:, g].T).astype(np.float32)
        offset = half_cell(bits) - affine[:, g, 1].astype(np.float32)
        n = dot + offset * total[:, g, None].astype(np.float32)
        y = y + (scale[:, g, None] * n) * affine[:, g, 0].astype(np.float32)
    return np.asarray(y * row_scale, np.float32)


# Storage order. A block is 16 rows × one group; register j of a block holds columns 4j..4j+3 of all 16 rows, byte 4r+c is
# row r, column 4j+c. The base stores 2 bits of registers 4i..4i+3 in each byte of word i, a plane 1 bit of 8i..8i+7, in the
# order of PLANE_BIT.


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
        out |= v[..., f, :] << np.uint8(PLANE_BIT[f])
    return out


def unpack(base: U8, planes: list[U8]) -> U8:
    """Register-ordered codes [tiles, groups, group/4, 64]; bits of planes that are not given are zero."""
    t, g, words, _ = base.shape
    tiles = np.stack([(base >> np.uint8(2 * f) & 3) << 6 for f in range(4)], axis=3).reshape(t, g, words * 4, 64)
    for i, plane in enumerate(planes):
        bits = np.stack([(plane >> np.uint8(PLANE_BIT[f]) & 1) << np.uint8(5 - i) for f in range(8)], axis=3)
        tiles |= bits.reshape(tiles.shape)
    return tiles


def tile_affine(affine: U8) -> U8:
    """Affine uint8 [rows', groups, 2] in storage order [tiles, groups, 2, 16]."""
    rows_p, groups, _ = affine.shape
    return np.ascontiguousarray(affine.reshape(rows_p // TILE_ROWS, TILE_ROWS, groups, 2).transpose(0, 2, 3, 1))


def untile_affine(tiled: U8) -> U8:
    """Inverse of `tile_affine`: [rows', groups, 2] from [tiles, groups, 2, 16]."""
    t, groups = tiled.shape[:2]
    return np.ascontiguousarray(tiled.transpose(0, 3, 1, 2)).reshape(t * TILE_ROWS, groups, 2)
