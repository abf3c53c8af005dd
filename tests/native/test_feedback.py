"""Rounding with error feedback: the compiled loop is its NumPy definition, and the errors it answers are real."""

from __future__ import annotations

import numpy as np
import pytest

from d2moe import planes
from d2moe.convert import feedback
from d2moe.convert.feedback import Feedback, Target
from d2moe.kernels import native

TARGETS = (Target(2, 1.0), Target(3, 1.0), Target(4, 1.0), Target(8, 0.1))
WIDE = (Target(2, 1.0), Target(3, 2.0), Target(5, 0.5), Target(6, 0.7), Target(8, 0.1))


def hessian(rng: np.random.Generator, n: int, inputs: int) -> np.ndarray:
    x = rng.normal(size=(inputs, n)) @ rng.normal(size=(n, n)) * np.exp(rng.normal(size=n))
    return (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("targets", [TARGETS, WIDE, (Target(8, 1.0),)])
def test_compiled_loop_is_the_definition(rng, targets):
    cols, rows = int(rng.integers(1, 70)), 16 * int(rng.integers(1, 4))
    t = rng.normal(size=(len(targets), cols, rows)).astype(np.float32)
    u = np.triu(rng.normal(size=(cols, cols)) * 0.2 + np.eye(cols)).astype(np.float32)
    step = np.where(rng.random((cols, rows)) < 0.1, 0, rng.random((cols, rows)) * 0.02).astype(np.float32)
    zero = rng.integers(0, 256, (cols, rows)).astype(np.float32)
    mine = t.copy()
    expected = feedback.round_columns(mine, u, step, zero, targets)
    found = native.feedback(
        t, u, step, zero, [x.bits for x in targets], feedback.shares(targets), threads=2
    )
    assert np.array_equal(found, expected)
    assert np.array_equal(t, mine)


@pytest.mark.parametrize("targets", [TARGETS, WIDE])
def test_codes_have_the_values_that_were_promised(rng, targets):
    wanted = rng.uniform(-20, 230, (len(targets), 500)).astype(np.float32)
    codes, promised = feedback.choose(wanted, targets)
    for target, row in zip(targets, promised, strict=True):
        assert np.array_equal(row, planes.prefix(codes, target.bits) + planes.half_cell(target.bits))


def test_losses_are_those_of_the_codes(rng):
    """Σ d (H + damping) dᵀ of the rounded matrix, by the definition, in the original order of columns."""
    rows, cols, group = 24, 160, 64
    w = rng.normal(size=(rows, cols)).astype(np.float32)
    h = hessian(rng, cols, 400)
    found = Feedback(h, group, targets=TARGETS, threads=2).round(w)
    damped = h.astype(np.float64) + feedback.DAMPING * np.diagonal(h).mean() * np.eye(cols)
    for target, loss in zip(TARGETS, found.losses, strict=True):
        q = planes.dequantize(found.codes, found.affine, found.row_scale, target.bits, rows, cols)
        d = w - q
        assert loss == pytest.approx(np.einsum("ij,jk,ik->", d, damped, d), rel=1e-3)
    assert not found.codes[:, cols:].any() and not found.codes[rows:].any()


def test_feedback_beats_rounding_to_the_nearest(rng):
    """With correlated inputs, at every width that counts."""
    w = rng.normal(size=(64, 256)).astype(np.float32)
    h = hessian(rng, 256, 1000)
    found = Feedback(h, 64, targets=TARGETS).round(w)
    codes, affine, row_scale = planes.quantize(w, 64)
    for target, loss in zip(TARGETS[:3], found.losses[:3], strict=True):
        d = w - planes.dequantize(codes, affine, row_scale, target.bits, 64, 256)
        assert loss < np.einsum("ij,jk,ik->", d, h.astype(np.float64), d)


def test_hessians_without_inputs_or_rank(rng):
    """An expert that saw nothing is rounded as if all inputs were alike; one that saw few is damped."""
    w = rng.normal(size=(16, 64)).astype(np.float32)
    nothing = Feedback(np.zeros((64, 64), np.float32), 64, targets=TARGETS).round(w)
    alike = Feedback(np.eye(64, dtype=np.float32), 64, targets=TARGETS).round(w)
    assert np.array_equal(nothing.codes, alike.codes)
    assert np.isfinite(Feedback(hessian(rng, 64, 3), 64, targets=TARGETS).round(w).losses).all()
    with pytest.raises(ValueError, match="square and finite"):
        Feedback(np.full((64, 64), np.nan, np.float32), 64, targets=TARGETS)


@pytest.mark.parametrize("n", [1, 96, 300])
def test_the_factor_is_that_of_the_inverse(rng, n):
    h = hessian(rng, n, 4 * n + 8)
    u = feedback.inverse_factor(h).astype(np.float64)
    damped = h.astype(np.float64) / (np.trace(h, dtype=np.float64) / n) + feedback.DAMPING * np.eye(n)
    assert np.array_equal(u, np.triu(u))
    assert np.abs(u.T @ u @ damped - np.eye(n)).max() < 2e-3
