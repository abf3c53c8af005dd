"""Rounding with error feedback, for all widths of the nested code at once.

The outputs' squared error is that of the weights in the metric of the inputs' Hessian, so an error of one column can be made up for
by others, as far as their inputs are correlated. Column after column, those of the largest inputs first, gets the code that is best as
all others stand; the first sweep begins with nothing rounded, later ones go over the codes again (coordinate descent). Our deviation from
its kin (GPTQ, arXiv 2210.17323, which it beats; QuantEase, 2309.01885): several widths count. Each of them (`Target`) has an error of its
own, and of all 256 codes that one is taken whose squared errors, each in cells of its width and times the target's share, are least
together. Where 8 bits count as much as 2 the first bits follow from all eight and there is nothing to choose; where they count little the
code need not be the nearest at 8 bits, whose errors are small anyway, and the low widths can choose. Figures are in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.kernels import native
from d2moe.types import MAX_BITS, TILE_ROWS, padded

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

DAMPING = 0.05
"""Share of the mean diagonal that is added to a Hessian's diagonal: what calibration did not show may come, too."""
BLOCK = 64
"""Columns between two products with the whole Hessian."""
SWEEPS = (1.0, 0.5)
"""Shares of the columns that are gone through, one turn after the other. Those that come first know least of the others' errors."""
PASSES = 2
"""Turns through a block's columns each time it comes, which cost no product."""
PANEL = 256
"""Rows at a time, so that their errors stay in the cache."""


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


def descend(
    w: F32,
    e: F32,
    r: F32,
    gram: F32,
    step: F32,
    zero: F32,
    codes: U8,
    losses: F32,
    targets: Sequence[Target],
    fresh: bool,
    passes: int,
) -> None:
    """Choose the codes of some columns in turn, `passes` times, each with all others as they are then. Defines `native.descend`.

    w, step, zero float32 [cols, rows]; e float32 [targets, cols, rows]: what each target is short of w; r, same shape: e of all
    columns times the Hessian; gram float32 [cols, cols]: the Hessian between these columns. codes uint8 [cols, rows], e and losses
    float32 [targets, rows], Σ e H eᵀ, are brought up to date. `fresh`: there are no codes yet, and e is zero.
    """
    weights = np.array(shares(targets), np.float32)
    r, gained = r.copy(), np.zeros_like(losses)
    for turn, j in np.ndindex(passes, len(w)):
        s, z, live = step[j], zero[j], step[j] > 0
        with np.errstate(divide="ignore"):
            inverse = np.where(live, np.float32(1) / s, np.float32(0))
        missing = r[:, j] * (np.float32(1) / gram[j, j])
        wanted = ((w[j] - e[:, j]) + missing) * inverse + z
        code, values = choose(wanted, targets)
        held, cost = np.zeros_like(s), np.zeros_like(s)
        for k, weight in enumerate(weights):
            d = missing[k] * inverse
            held = held + weight * (d * d)
            d = wanted[k] - values[k]
            cost = cost + weight * (d * d)
        better = np.ones_like(live) if fresh and turn == 0 else cost < held
        codes[j] = np.where(better, np.where(live, code, 0), codes[j])
        now = np.where(better, w[j] - s * (values - z), e[:, j])
        moved = e[:, j] - now
        e[:, j] = now
        gained = gained + moved * (moved * gram[j, j] - np.float32(2) * r[:, j])
        r -= moved[:, None] * gram[j, :, None]
    losses += gained


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
        mean = max(float(diagonal.mean(dtype=np.float64)), 0.0)
        self._scale = mean
        if mean > 0:
            self._hessian = hessian[np.ix_(self._order, self._order)] / np.float32(mean)
            self._hessian[np.diag_indices(len(hessian))] += np.float32(DAMPING)
        else:  # inputs that are always zero: all errors are alike
            self._hessian = np.eye(len(hessian), dtype=np.float32)

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
        out, losses = np.zeros((rows_p, cols_p), np.uint8), np.zeros(len(self._targets))
        for row in range(0, rows_p, PANEL):
            panel = slice(row, row + PANEL)
            codes, lost = self._panel(*(np.ascontiguousarray(a[:, panel]) for a in (in_order, step, zero)))
            out[panel, order] = codes.T
            losses += lost
        return Rounded(out, affine, row_scale, losses * self._scale)

    def _panel(self, w: F32, step: F32, zero: F32) -> tuple[U8, F64]:
        """Codes uint8 [cols, rows] and losses float64 [targets] of w, step and zero float32 [cols, rows], in the order of columns."""
        cols, rows = w.shape
        bits, weights = [t.bits for t in self._targets], shares(self._targets)
        e, codes = np.zeros((len(bits), cols, rows), np.float32), np.zeros((cols, rows), np.uint8)
        losses = np.zeros((len(bits), rows), np.float32)
        for sweep, share in enumerate(SWEEPS):
            stop = ceil(share * cols)
            for at in range(0, stop, BLOCK):
                here = slice(at, min(at + BLOCK, stop))
                known = at if sweep == 0 else cols  # columns that have an error
                across = self._hessian[here, :known]
                r = np.stack([across @ errors[:known] for errors in e])
                gram, own = np.ascontiguousarray(self._hessian[here, here]), np.ascontiguousarray(e[:, here])
                native.descend(
                    w[here],
                    own,
                    r,
                    gram,
                    step[here],
                    zero[here],
                    codes[here],
                    losses,
                    bits,
                    weights,
                    fresh=sweep == 0,
                    passes=PASSES,
                    threads=self._threads,
                )
                e[:, here] = own
        return codes, losses.sum(1, dtype=np.float64)
