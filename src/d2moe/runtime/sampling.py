"""From one row of logits to one token: what a request asks for, and the NumPy that does it.

Order and meaning are those of transformers' `generate` with the same numbers:

1. repetition_penalty: the logit of every token of the prompt or the answer so far is divided by it if positive, else
   multiplied (CTRL, arXiv 1909.05858; llama.cpp's "repeat penalty" with an unlimited window)
2. frequency_penalty times the number of times a token is in the answer so far, and presence_penalty if it is there at all,
   are subtracted from its logit, and logit_bias is added (as in OpenAI's interface; transformers has none of them)
3. tokens that a grammar does not allow are out
4. temperature: logits are divided by it; 0 is greedy, the first token of the highest logit, and skips the rest
   (llama.cpp divides last instead, after the cuts)
5. top_k: only the k highest logits stay (with any that equal the k-th)
6. top_p: of what is left, the smallest set of the likeliest tokens with probability of at least p together
7. min_p: of what is left, tokens at least min_p times as likely as the likeliest
8. one token is drawn from what is left, in proportion

Log-probabilities are those of the model's own distribution: log-softmax of the logits before step 1.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import ConfigError, D2MoeError, RequestError
from d2moe.types import check_dial, quality_bits

try:
    from d2moe.kernels.native import draw
except ImportError:  # without the compiled core

    def draw(logits: F32, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
        return draw_reference(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), uniform)


F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for; ConfigError for a value out of range.

    `max_tokens` None: until the model ends or the context is full. `seed` None: a fresh one each time. `stop`: text
    that ends the answer and is not part of it. `logprobs` n: log-probability of each token and of the n likeliest.
    `logit_bias`: (token, number added to its logit) pairs, or a mapping. `prompt_logprobs` n: the same as `logprobs` for the
    tokens of the prompt. `ignore_eos`: the model's end tokens do not end the answer. `bits`: average width of the experts,
    any number from 2 to 8 with a width router, else a whole one; or `quality`, a name for one: fast, balanced, best. Neither:
    the engine's. `uniform`: one plain width for all experts. The default is greedy.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    seed: int | None = 0
    stop: tuple[str, ...] = field(default=())
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bits: float | None = None
    quality: str | None = None
    uniform: bool | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _stops(self.stop))
        _whole("max_tokens", self.max_tokens, 1, None, optional=True)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, None)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ConfigError(
                "top_p is 0, expected a number above 0 and at most 1; for the likeliest token use temperature=0"
            )
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        _whole("seed", self.seed, 0, 2**64 - 1, optional=True)
        _whole("logprobs", self.logprobs, 0, 100, optional=True)
        _whole("prompt_logprobs", self.prompt_logprobs, 0, 100, optional=True)
        if self.bits is not None:
            check_dial(self.bits)
        if self.quality is not None:
            quality_bits(self.quality, self.bits)
        for name in ("uniform", "ignore_eos"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "uniform" and value is None):
                raise ConfigError(f"{name} is {value!r}, expected True or False")

    @property
    def average_bits(self) -> float | None:
        """The width asked for, by number or by name; None for the engine's."""
        return self.bits if self.quality is None else quality_bits(self.quality, None)

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from names and values; an unknown name is a ConfigError, never ignored."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise ConfigError(f"unknown sampling parameter {name!r}{hint}")
        return cls(**values)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token, and of the likeliest `top` (token, logprob) at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SplitMix64:
    """Steele, Lea and Flood's generator (OOPSLA 2014): enough for one draw per token; numpy.random takes 6 MB."""

    def __init__(self, seed: int):
        self._state = seed

    def uniform(self) -> float:
        """The next number of [0, 1), with 53 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return ((z ^ z >> 31) >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one request with a generator of its own, so that no other request changes the result."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab: int):
        self.params = params
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        self._counts: dict[int, int] | None = {} if params.presence_penalty or params.frequency_penalty else None
        self._bias: tuple[I64, F32] | None = None
        if params.logit_bias:
            ids = np.array([token for token, _ in params.logit_bias], np.int64)
            if ids.max() >= vocab:
                raise RequestError(f"logit_bias names token {ids.max()}, the vocabulary has 0 to {vocab - 1}")
            self._bias = ids, np.array([bias for _, bias in params.logit_bias], np.float32)
        self._random = SplitMix64(int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed)

    def sample(self, logits: F32, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """One token id from logits float32 [vocab], of those `allowed` bool [vocab] if given; D2MoeError if they hold NaN or no
        finite value."""
        logits = self._penalised(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        if self.params.temperature == 0:
            token = int(np.argmax(logits))
            _check_finite(float(logits[token]))
        else:
            p = self.params
            token = draw(logits, p.temperature, p.top_k, p.top_p, p.min_p, self._random.uniform())
            if token < 0:
                _check_finite(float(np.max(logits)))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _penalised(self, logits: F32) -> F32:
        if self._seen is None and not self._counts and self._bias is None:
            return logits
        changed: F32 = logits.copy()
        if self._seen is not None:
            penalty = np.float32(self.params.repetition_penalty)
            ids = np.flatnonzero(self._seen)
            some = changed[ids]
            changed[ids] = np.where(some < 0, some * penalty, some / penalty)
        if self._counts:
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            changed[ids] -= np.float32(self.params.presence_penalty) + np.float32(self.params.frequency_penalty) * times
        if self._bias is not None:
            changed[self._bias[0]] += self._bias[1]
        return changed


def exponential(x: F32) -> F32:
    """exp of x float32, at most 0, bit for bit that of the kernels (`exponential` in csrc/kernels_scalar.cpp): off by 2e-6 at most,
    so that a seed draws the same token on every machine."""
    x = np.maximum(x, np.float32(-150))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.full_like(x, 1 / 720)
    for c in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + np.float32(c)
    weights: F32 = np.ldexp(p, n.astype(np.int32))
    return weights


def candidates(logits: F32, params: SamplingParams) -> tuple[I64 | None, F32]:
    """Token ids, ascending, that survive steps 4 to 7 and their relative weights (1 for the likeliest); ids None means all."""
    top = np.max(logits)
    _check_finite(float(top))
    ids: I64 | None = None
    scores = logits
    if 0 < params.top_k < logits.size:
        kth = np.partition(logits, logits.size - params.top_k)[logits.size - params.top_k]
        ids = np.flatnonzero(logits >= kth)
        scores = logits[ids]
    weights = exponential((scores - top) * np.float32(1 / params.temperature))
    keep = None
    if params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order], dtype=np.float64)
        inside = sums - weights[order] < params.top_p * sums[-1]  # what is heavier does not make up top_p
        keep = np.sort(order[inside & (weights[order] >= params.min_p)])
    elif params.min_p > 0.0:
        keep = np.flatnonzero(weights >= params.min_p)
    if keep is not None:
        ids = keep if ids is None else ids[keep]
        weights = weights[keep]
    return ids, weights


def draw_reference(logits: F32, params: SamplingParams, uniform: float) -> int:
    """The token that `uniform` of [0, 1) draws from logits float32 [vocab]: the definition of the compiled `draw`."""
    ids, weights = candidates(logits, params)
    total = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(total, uniform * total[-1], side="right"))
    # Rounding can put the draw on the very end; the last token with any weight is the answer then.
    place = min(place, int(np.searchsorted(total, total[-1], side="left")))
    return place if ids is None else int(ids[place])


def logprob(logits: F32, token: int, top: int) -> TokenLogprob:
    """Log-probabilities under the model's own distribution: of `token`, and of the `top` likeliest tokens."""
    highest = float(np.max(logits))
    _check_finite(highest)
    shifted = logits.astype(np.float64) - highest
    total = math.log(float(np.exp(shifted).sum()))
    best: list[tuple[int, float]] = []
    if top > 0:
        count = min(top, logits.size)
        ids = np.argpartition(-logits, count - 1)[:count]
        ids = ids[np.lexsort((ids, -logits[ids]))]
        best = [(int(i), float(shifted[i] - total)) for i in ids]
    return TokenLogprob(token, float(shifted[token] - total), tuple(best))


def _check_finite(highest: float) -> None:
    if not math.isfinite(highest):
        raise D2MoeError(
            f'the model\'s logits are not finite (highest is {highest}); damaged weights? run "d2moe verify"'
        )


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value or ())
    for token, bias in pairs:
        _whole("logit_bias, token,", token, 0, None)
        _number(f"logit_bias of token {token}", bias, -100.0, 100.0)
    if len({token for token, _ in pairs}) < len(pairs):
        raise ConfigError("logit_bias names a token twice; give one number for each")
    return tuple((int(token), float(bias)) for token, bias in pairs)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ConfigError(f"stop holds {stop!r}, expected text of at least one character, or a list of such")
    return stops


def _number(name: str, value: Any, low: float, high: float) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not ok:  # also NaN
        raise ConfigError(f"{name} is {value!r}, expected a number from {low:g} to {high:g}")


def _whole(name: str, value: Any, low: int, high: int | None, optional: bool = False) -> None:
    if value is None and optional:
        return
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name} is {value!r}, expected a whole number {limits}{' or None' if optional else ''}")
