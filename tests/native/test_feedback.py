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
def test_compiled_sweeps_are_the_definition(rng, targets):
    cols, rows = int(rng.integers(1, 70)), 16 * int(rng.integers(1, 4))
    w = rng.normal(size=(cols, rows)).astype(np.float32)
    gram = hessian(rng, cols, 200)
    gram /= gram.diagonal().mean()
    step = np.where(rng.random((cols, rows)) < 0.1, 0, rng.random((cols, rows)) * 0.02).astype(np.float32)
    zero = rng.integers(0, 256, (cols, rows)).astype(np.float32)
    e, codes = np.zeros((len(targets), cols, rows), np.float32), np.zeros((cols, rows), np.uint8)
    losses = np.zeros((len(targets), rows), np.float32)
    mine = [a.copy() for a in (e, codes, losses)]
    bits, weights = [x.bits for x in targets], feedback.shares(targets)
    for fresh, passes in ((True, 2), (False, 1), (False, 3)):
        r = gram @ e
        feedback.descend(w, mine[0], r, gram, step, zero, mine[1], mine[2], targets, fresh, passes)
        native.descend(w, e, r, gram, step, zero, codes, losses, bits, weights, fresh, passes, threads=2)
        for found, expected in zip((e, codes, losses), mine, strict=True):
            assert np.array_equal(found, expected)


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


def test_every_sweep_lowers_what_is_lost(rng, monkeypatch):
    """The sum over the targets, in cells of each and times its share: what the codes are chosen for."""
    w, h = rng.normal(size=(32, 192)).astype(np.float32), hessian(rng, 192, 600)
    lost = []
    for sweeps, passes in (((1.0,), 1), ((1.0,), 2), ((1.0, 0.5), 2), ((1.0, 1.0, 1.0), 2)):
        monkeypatch.setattr(feedback, "SWEEPS", sweeps)
        monkeypatch.setattr(feedback, "PASSES", passes)
        lost.append(np.dot(feedback.shares(TARGETS), Feedback(h, 64, targets=TARGETS).round(w).losses))
    assert (np.diff(lost) < 0).all()


def test_blocks_and_panels_do_not_show(rng, monkeypatch):
    """But for the last bits of sums: with one pass the codes are those of one block of all columns and rows, nearly everywhere."""
    w, h = rng.normal(size=(40, 192)).astype(np.float32), hessian(rng, 192, 600)
    monkeypatch.setattr(feedback, "PASSES", 1)
    found = []
    for block, panel in ((48, 16), (192, 64)):
        monkeypatch.setattr(feedback, "BLOCK", block)
        monkeypatch.setattr(feedback, "PANEL", panel)
        found.append(Feedback(h, 64, targets=TARGETS).round(w))
    # Where the last bits turn one choice, later ones follow; most at 8 bits, which count little.
    assert np.allclose(found[0].losses[:3], found[1].losses[:3], rtol=0.05)
    assert (found[0].codes == found[1].codes).mean() > 0.9
