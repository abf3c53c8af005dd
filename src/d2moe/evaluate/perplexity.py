"""Perplexity of a text, by one protocol that the engine and the reference share.

The text is one string, tokenised as transformers would (one token at the beginning if the model wants it). A window is
`context` input tokens fed to an empty sequence; each input predicts the token after it, so a window scores up to
`context` tokens and its last input's target is the first input of the next window where `stride` = `context` (the
default: windows without overlap). Windows begin every `stride` tokens; a token already scored is not scored again,
so a smaller stride gives every token but the first window's at least context - stride tokens of history. The first
`max_tokens` scored tokens count; the last window may be short.

perplexity = exp(mean negative log-likelihood); bits per byte = its sum in bits / UTF-8 bytes of the scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import ConfigError, D2MoeError, RequestError
from d2moe.runtime.request import Chunk, EngineLike, Progress, check_prompt
from d2moe.runtime.tokenizer import Tokenizer

CONTEXT = 256
"""Default window, the context the built-in model was trained at."""
LOGITS_BYTES = 16 << 20
"""A window is fed in pieces whose logits take at most this much, to stay under the memory budget."""


@dataclass(frozen=True)
class Window:
    """Inputs tokens[start:end] score the targets tokens[first:end+1]."""

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class Perplexity:
    """A measurement with its protocol. `nll` is the summed negative log-likelihood in nats of `tokens` predictions."""

    perplexity: float
    tokens: int
    nll: float
    n_bytes: int
    bits_per_byte: float
    bits: float | None
    context: int
    stride: int
    seconds: float
    read_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The keys of the JSON line."""
        return {
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bits": self.bits,
            "bits_per_byte": self.bits_per_byte,
            "text_bytes": self.n_bytes,
            "context": self.context,
            "stride": self.stride,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": self.tokens / self.seconds if self.seconds > 0 else None,
            "read_bytes": self.read_bytes,
        }


def windows(n_tokens: int, context: int, stride: int, max_tokens: int | None) -> Iterator[Window]:
    """The windows over a text of `n_tokens`; ConfigError for numbers that make no protocol."""
    if context < 1 or not 1 <= stride <= context:
        raise ConfigError(f"context {context} with stride {stride}: expected 1 <= stride <= context")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}, expected at least 1")
    last = n_tokens - 1 if max_tokens is None else min(n_tokens - 1, max_tokens)  # index of the last target
    scored, start = 0, 0
    while scored < last:
        end = min(start + context, last)
        yield Window(start, end, scored + 1)
        scored, start = end, start + stride


def count_scored(n_tokens: int, max_tokens: int | None) -> int:
    """How many tokens the windows score in all."""
    return n_tokens - 1 if max_tokens is None else min(n_tokens - 1, max_tokens)


def perplexity(
    engine: EngineLike,
    tokens: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    context: int = CONTEXT,
    stride: int | None = None,
    max_tokens: int | None = None,
    bits: float | None = None,
    uniform: bool | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `tokens` at average width `bits`, plain if `uniform` (defaults: the engine's); the module's docstring is the
    protocol. The result's `bits` is the average that came out.

    Bits per byte need the `tokenizer`, and are NaN without. RequestError if the text has fewer than two tokens, holds a
    token the model does not have, or a window does not fit the engine's context.
    """
    stride = context if stride is None else stride
    if len(tokens) < 2:
        raise RequestError(f"the text has {len(tokens)} tokens, perplexity needs at least 2")
    if context > engine.context:
        raise RequestError(
            f"a window of {context} tokens does not fit the engine's context of {engine.context}; lower --context"
        )
    total = count_scored(len(tokens), max_tokens)
    tokens = check_prompt(tokens[: total + 1], engine.shape.vocab, total + 1)
    width = engine.config.bits if bits is None else bits
    plain = engine.config.uniform if uniform is None else uniform
    engine.dial(width, plain)
    piece = max(1, min(context, LOGITS_BYTES // (4 * engine.shape.vocab)))
    before, begun = engine.counters.snapshot(), time.perf_counter()
    nll, done = 0.0, 0
    for window in windows(len(tokens), context, stride, max_tokens):
        sequence = engine.new_sequence()
        try:
            for start in range(window.start, window.end, piece):
                end = min(start + piece, window.end)
                skip = min(max(window.first - 1 - start, 0), end - start)  # rows whose targets were scored before
                if skip:
                    engine.step([Chunk(sequence, tokens[start : start + skip], width, "none", plain)])
                if skip < end - start:
                    rows = engine.step([Chunk(sequence, tokens[start + skip : end], width, "all", plain)])
                    nll += negative_log_likelihood(rows, tokens[start + skip + 1 : end + 1])
        finally:
            sequence.free()
        done += window.end + 1 - window.first
        if progress is not None:
            progress(done, total)
    used = engine.counters.snapshot() - before
    return result(
        nll, tokens, tokenizer, bits=used.average_bits, context=context, stride=stride,
        seconds=time.perf_counter() - begun, read_bytes=used.read_bytes,
    )  # fmt: skip


def negative_log_likelihood(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> float:
    """Summed -log softmax(logits)[target] of logits float32 [rows, vocab], which are overwritten; sums in float64."""
    highest = logits.max(axis=-1)
    if not np.isfinite(highest).all():
        raise D2MoeError('the model\'s logits are not finite; damaged weights? run "d2moe verify"')
    picked = np.take_along_axis(logits, np.asarray(targets, np.int64)[:, None], axis=-1)[:, 0]
    logits -= highest[:, None]
    np.exp(logits, out=logits)
    total = np.log(logits.sum(axis=-1, dtype=np.float64))
    return float((total + highest.astype(np.float64) - picked.astype(np.float64)).sum())


def result(
    nll: float,
    tokens: Sequence[int],
    tokenizer: Tokenizer | None,
    *,
    bits: float | None,
    context: int,
    stride: int,
    seconds: float,
    read_bytes: int = 0,
) -> Perplexity:
    """The measurement of all `tokens` but the first, which nothing predicts."""
    scored = len(tokens) - 1
    n_bytes = tokenizer.n_bytes(tokens[1:]) if tokenizer is not None else 0
    per_byte = nll / math.log(2) / n_bytes if n_bytes else math.nan
    mean = nll / scored
    # exp overflows above 709 nats; a model that bad has infinite perplexity for every purpose.
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, scored, nll, n_bytes, per_byte, bits, context, stride, seconds, read_bytes)
