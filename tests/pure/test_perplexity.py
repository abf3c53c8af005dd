"""The perplexity protocol: which tokens each window scores, and the sums against a direct computation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_generate import ToyEngine, bytes_backend

from d2moe.errors import ConfigError, D2MoeError, RequestError
from d2moe.evaluate import perplexity as module
from d2moe.evaluate.perplexity import Window, negative_log_likelihood, perplexity, windows
from d2moe.runtime.tokenizer import Tokenizer

TOKENS = np.random.default_rng(0).integers(0, 256, 300).tolist()


def direct(engine: Any, tokens: list[int], context: int, stride: int, bits: int) -> float:
    """Summed negative log-likelihood, one target at a time: in the first window that reaches it."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = 0
        while start + context < target:
            start += stride
        row = engine.row(tokens[start:target], 0, bits).astype(np.float64)
        total -= row[tokens[target]] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


def test_windows_without_overlap_score_every_token_but_the_first_once() -> None:
    assert list(windows(10, 4, 4, None)) == [Window(0, 4, 1), Window(4, 8, 5), Window(8, 9, 9)]
    # 119,808 predictions of the shared model's table are 468 windows of 256 inputs each.
    table = list(windows(200_000, 256, 256, 119_808))
    assert len(table) == 468 and table[-1] == Window(119_552, 119_808, 119_553)


@pytest.mark.parametrize(
    ("n", "context", "stride", "limit"),
    [(10, 4, 2, None), (50, 16, 1, None), (50, 7, 3, 20), (2, 8, 8, None), (9, 8, 8, 99)],
)
def test_every_token_is_scored_once_and_in_a_window(n: int, context: int, stride: int, limit: int | None) -> None:
    cut = list(windows(n, context, stride, limit))
    scored = [t for w in cut for t in range(w.first, w.end + 1)]
    assert scored == list(range(1, min(n - 1, limit or n) + 1))
    for w in cut:
        assert w.start % stride == 0 and w.end - w.start <= context and w.first > w.start
        assert w.start == 0 or w.first - w.start > context - stride  # history


@pytest.mark.parametrize(("context", "stride", "limit"), [(0, 1, None), (4, 0, None), (4, 5, None), (4, 4, 0)])
def test_numbers_that_make_no_protocol(context: int, stride: int, limit: int | None) -> None:
    with pytest.raises(ConfigError, match="expected"):
        list(windows(10, context, stride, limit))


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 16), (10, 10), (50, 7)])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_sum_equals_a_direct_one_however_it_is_fed(
    context: int, stride: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", rows * 4 * 257)
    engine = ToyEngine()
    tokenizer = Tokenizer(bytes_backend())
    seen: list[tuple[int, int]] = []
    got = perplexity(
        engine, TOKENS, tokenizer=tokenizer, context=context, stride=stride, bits=3, progress=lambda *a: seen.append(a)
    )
    expected = direct(engine, TOKENS, context, stride, 3)
    assert got.nll == pytest.approx(expected, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(expected / 299), rel=1e-6)
    n_bytes = len(tokenizer.decode(TOKENS[1:]).encode())
    assert (got.tokens, got.bits, got.n_bytes) == (299, 3.0, n_bytes)
    assert got.bits_per_byte == pytest.approx(expected / math.log(2) / n_bytes)
    assert seen[-1] == (299, 299) and seen == sorted(seen)
    assert engine.live == 0


def test_max_tokens_counts_scored_tokens_and_the_default_width_is_the_engines() -> None:
    engine = ToyEngine()
    got = perplexity(engine, TOKENS, context=64, max_tokens=100)
    assert got.tokens == 100 and got.bits == 4.0 and math.isnan(got.bits_per_byte)
    assert got.nll == pytest.approx(direct(engine, TOKENS[:101], 64, 64, 4), rel=1e-6)
    assert got.as_dict()["tokens"] == 100


def test_texts_that_cannot_be_measured() -> None:
    engine = ToyEngine(context=64)
    with pytest.raises(RequestError, match="needs at least 2"):
        perplexity(engine, [1])
    with pytest.raises(RequestError, match=r"window of 256 tokens .* context of 64"):
        perplexity(engine, TOKENS)
    with pytest.raises(RequestError, match="token 999"):
        perplexity(engine, [1, 999], context=8)
    with pytest.raises(D2MoeError, match="not finite"):
        negative_log_likelihood(np.array([[0, np.nan]], np.float32), [0])
    assert perplexity(ToyEngine(b"\x00" * 99), [5, 1, 1, 1], context=8).perplexity > 1e10
