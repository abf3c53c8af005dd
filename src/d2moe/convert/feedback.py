"""Rounding with error feedback, for all widths of the nested code at once.

Columns are rounded one after the other, and the error of each is made up for by those that are still to come, as far as
the inputs are correlated: GPTQ (arXiv 2210.17323), with the columns of the largest inputs first. Our deviation: several
widths count. Each of them (`Target`) has weights and an error of its own, and of all 256 codes that one is taken whose
squared errors, each in cells of its width and times the target's share, are least together. Where 8 bits count as much as 2
the first bits follow from all eight and there is nothing to choose; where they count little the code need not be the
nearest at 8 bits, whose errors are small anyway, and the low widths can choose. What it brings is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.kernels import native
from d2moe.types import MAX_BITS, TILE_ROWS, padded

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

DAMPING = 0.05
"""Share of the mean diagonal that is added to a Hessian's diagonal; ten times more while it cannot be factored."""
BLOCK = 128
"""Columns between two updates of all later ones."""


@dataclass(frozen=True)
class Target:
    """A width whose error counts, and how much: times the squared error in cells of that width."""

    bits: int
    share: float


def half_values(bits: int) -> tuple[F32, F32]:
    """Values float32 [16] of the first and of the last four bits of a code at width `bits`; their sum is the code's.

    The half cell is in the half that has the last bit that counts.
    """
    nibbles = np.arange(16, dtype=np.uint8)
    high = planes.prefix(nibbles << np.uint8(4), bits).astype(np.float32)
    low = planes.prefix(nibbles, bits).astype(np.float32)
    half = planes.half_cell(bits)
    return (high, low + half) if bits > 4 else (high + half, low)


def shares(targets: Sequence[Target]) -> list[float]:
    """What a squared error in units of the step counts for each target."""
    return [float(np.float32(t.share / 4 ** (MAX_BITS - t.bits))) for t in targets]


def choose(wanted: F32, targets: Sequence[Target]) -> tuple[U8, F32]:
    """Codes uint8 [n] for the values float32 [targets, n] wanted at each target, and the values they give.

    The first four bits are chosen as if the last four could be chosen freely within their reach, then those.
    """
    halves = [half_values(t.bits) for t in targets]
    weights = np.array(shares(targets), np.float32)
    cost = np.zeros((16, wanted.shape[1]), np.float32)
    for k, (high, low) in enumerate(halves):
        d = wanted[k] - high[:, None]
        below, above = d - low[0], d - low[15]
        d = np.minimum(below, np.float32(0)) + np.maximum(above, np.float32(0))
        cost = cost + weights[k] * (d * d)
    first = cost.argmin(0)
    cost = np.zeros_like(cost)
    for k, (high, low) in enumerate(halves):
        if targets[k].bits > 4:
            d = (wanted[k] - high[first]) - low[:, None]
            cost = cost + weights[k] * (d * d)
    last = cost.argmin(0)
    values = np.stack([high[first] + low[last] if t.bits > 4 else high[first] for t, (high, low) in zip(targets, halves, strict=True)])
    return (first << 4 | last).astype(np.uint8), values


def round_columns(t: F32, u: F32, step: F32, zero: F32, targets: Sequence[Target]) -> U8:
    """Codes uint8 [cols, rows] of t float32 [targets, cols, rows], the weights that each target still has to make up for.

    Afterwards t holds each target's errors, divided by the diagonal of u float32 [cols, cols], the upper factor of the
    inverse Hessian; step and zero float32 [cols, rows]. The definition of `native.feedback`.
    """
    codes = np.zeros(t.shape[1:], np.uint8)
    for j in range(t.shape[1]):
        s, live = step[j], step[j] > 0
        with np.errstate(divide="ignore"):
            inverse = np.where(live, np.float32(1) / s, np.float32(0))
        code, values = choose(t[:, j] * inverse + zero[j], targets)
        codes[j] = np.where(live, code, 0)
        t[:, j] = (t[:, j] - s * (values - zero[j])) * (np.float32(1) / u[j, j])
        t[:, j + 1 :] = t[:, j + 1 :] - t[:, j, None] * u[j, j + 1 :, None]
    return codes


def _inverse(lower: F32) -> F32:
    """Inverse of a lower triangular matrix, by halves: a third of the work of a general one."""
    n = len(lower)
    if n <= 128:
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float32)
    half, out = n // 2, np.zeros_like(lower)
    out[:half, :half], out[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    out[half:, :half] = -(out[half:, half:] @ lower[half:, :half]) @ out[:half, :half]
    return out


def inverse_factor(hessian: F32) -> F32:
    """Upper triangular U float32 [cols, cols] with UᵀU the inverse of a Hessian, damped until it can be factored."""
    n = len(hessian)
    mean = float(np.trace(hessian, dtype=np.float64)) / n
    if not mean > 0:  # inputs that are always zero: all errors are alike
        return np.eye(n, dtype=np.float32)
    damping = DAMPING
    while True:
        damped = hessian / np.float32(mean) + np.float32(damping) * np.eye(n, dtype=np.float32)
        try:
            # Of the reversed matrix, so that the factor's inverse is upper triangular in the right order.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            return np.ascontiguousarray(_inverse(lower)[::-1, ::-1])
        except np.linalg.LinAlgError:
            damping *= 10


@dataclass(frozen=True)
class Rounded:
    """A matrix in nested codes: `codes` uint8 [rows', cols'], affine and row_scale as `planes.quantize` gives them.

    `losses` float64 [targets]: squared error of the outputs over the calibration's inputs, Σ (W - W_b) H (W - W_b)ᵀ with the
    damped Hessian that was used.
    """

    codes: U8
    affine: U8
    row_scale: F32
    losses: F64


class Feedback:
    """Rounds matrices that share their inputs, of which `hessian` float32 [cols, cols] is the weighted sum of squares x xᵀ.

    Raises ValueError if the Hessian is not square or not finite.
    """

    def __init__(
        self,
        hessian: F32,
        group: int,
        *,
        targets: Sequence[Target],
        threads: int = 1,
    ):
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not np.isfinite(hessian).all():
            raise ValueError(f"a Hessian is square and finite, this one has shape {list(hessian.shape)}")
        self._group, self._targets, self._threads = group, tuple(targets), threads
        diagonal = np.diagonal(hessian)
        self._order = np.argsort(-diagonal, kind="stable")
        self._factor = inverse_factor(hessian[np.ix_(self._order, self._order)])
        self._scale = max(float(diagonal.mean(dtype=np.float64)), 0.0)

    def round(self, w: F32) -> Rounded:
        """Round w float32 [rows, cols]."""
        rows, cols = w.shape
        rows_p, cols_p = padded(rows, TILE_ROWS), padded(cols, self._group)
        full = np.zeros((rows_p, cols_p), np.float32)
        full[:rows, :cols] = w
        affine, row_scale = planes.fit(full.reshape(rows_p, -1, self._group))
        order = self._order
        in_order = np.ascontiguousarray(full[:, order].T)
        group_of = order // self._group
        step = (row_scale[:, None] * affine[..., 0].astype(np.float32)).T[group_of]
        zero = affine[..., 1].astype(np.float32).T[group_of]
        t = np.repeat(in_order[None], len(self._targets), axis=0)
        codes = np.zeros((cols, rows_p), np.uint8)
        losses = np.zeros(len(self._targets))
        settings = self._settings()
        for at in range(0, cols, BLOCK):
            end = min(at + BLOCK, cols)
            block = np.ascontiguousarray(t[:, at:end])
            u = np.ascontiguousarray(self._factor[at:end, at:end])
            codes[at:end] = native.feedback(block, u, step[at:end], zero[at:end], **settings)
            losses += np.square(block[:, :, :rows], dtype=np.float64).sum((1, 2))
            if end < cols:
                later = self._factor[at:end, end:].T
                for k in range(len(t)):
                    t[k, end:] -= later @ block[k]
        out = np.zeros((rows_p, cols_p), np.uint8)
        out[:, order] = codes.T
        return Rounded(out, affine, row_scale, losses * self._scale)

    def _settings(self) -> dict[str, Any]:
        return {
            "bits": [t.bits for t in self._targets],
            "weights": shares(self._targets),
            "threads": self._threads,
        }


