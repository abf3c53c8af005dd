"""Made-up traces with the statistics of real models, for models that are not at hand.

Popularity within a layer is Zipf over a permutation of its own, part of which each sequence draws anew. The next token keeps
some of this token's experts, so many that the share of experts that come again is `again` altogether; independent draws are
no valid trace. A forecast keeps each expert with probability `recall` per layer looked ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import ConfigError
from d2moe.policy.trace import NO_FORECAST, Meta, Trace

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

AHEAD = 3


@dataclass(frozen=True)
class Statistics:
    """`zipf`: exponent of popularity; `again`: share of a token's experts that the token before had chosen; `redrawn`: share of the
    popularity order that is a sequence's own; `recall`: of a forecast one layer ahead. The defaults are those of models
    with 64 to 512 experts; Mixtral-like: zipf 0.2, again 0.25."""

    zipf: float = 1.0
    again: float = 0.48
    redrawn: float = 0.3
    recall: float = 0.72


def synthetic_trace(
    meta: Meta,
    *,
    tokens: int,
    prompt_tokens: int = 0,
    sequences: int = 1,
    bits: int = 4,
    seed: int = 0,
    statistics: Statistics | None = None,
) -> Trace:
    """`prompt_tokens` of each sequence in a step of its own, then `tokens` steps with a token of each of `sequences`."""
    s = statistics or Statistics()
    if not 0 <= s.again < 1 or not 0 <= s.redrawn <= 1 or not 0 <= s.recall <= 1:
        raise ConfigError("again, redrawn and recall of a synthetic trace are shares from 0 to 1")
    rng = np.random.default_rng(seed)
    routes = _routes(rng, meta, s, sequences, prompt_tokens + tokens)  # [sequences, tokens, layers, top_k]
    kept: dict[str, list[npt.NDArray[Any]]] = {n: [] for n in ("tokens", "wanted", "rows", "position", "sequence", "ids")}

    def step(part: I64, positions: range, row: int) -> None:  # part [tokens, layers, top_k]
        n = len(part)
        own = positions if len(positions) == n else [positions[0]] * n
        kept["tokens"].append(np.array([n]))
        rows = np.arange(n) if row < 0 else np.array([n - 1])
        kept["wanted"].append(np.array([len(rows)]))
        kept["rows"].append(rows)
        kept["position"].append(np.array(own))
        kept["sequence"].append(np.arange(n) if row < 0 else np.zeros(n, int))
        for layer in range(meta.layers):
            last = meta.ends_with_moe and layer == meta.layers - 1
            seen = rows if last else slice(None)
            kept["ids"].append(part[seen, layer])
            forecasts.append(_forecast(rng, meta, s.recall, part, layer, seen))

    forecasts: list[I64] = []
    if prompt_tokens:
        for sequence in range(sequences):
            step(routes[sequence, :prompt_tokens], range(prompt_tokens), sequence)
    for t in range(prompt_tokens, prompt_tokens + tokens):
        step(routes[:, t], range(t, t + 1), -1)
    calls = sum(len(a) for a in kept["ids"])
    gates = -np.sort(-rng.dirichlet(np.full(meta.top_k, 2.0), calls), axis=1)
    arrays: dict[str, npt.NDArray[Any]] = {name: np.concatenate(a).astype(np.int32) for name, a in kept.items()}
    arrays["ids"] = arrays["ids"].astype(np.uint16)
    arrays["bits"] = np.full((calls, meta.top_k), bits, np.uint8)
    arrays["gates"] = gates.astype(np.float32)
    arrays["forecast"] = np.concatenate(forecasts).astype(np.int16)
    return Trace(meta, arrays)


def _popularity(rng: np.random.Generator, experts: int, zipf: float) -> F64:
    return np.asarray(rng.permutation(np.arange(1, experts + 1) ** -zipf), np.float64)


def _draw(rng: np.random.Generator, weight: F64, count: int) -> I64:
    """`count` different experts, by weight: the greatest of log-weights with Gumbel noise, along the last axis."""
    with np.errstate(divide="ignore"):
        noisy = np.log(weight) + rng.gumbel(size=weight.shape)
    return np.asarray(np.argsort(-noisy, axis=-1)[..., :count], np.int64)


def _routes(rng: np.random.Generator, meta: Meta, s: Statistics, sequences: int, tokens: int) -> I64:
    out = np.empty((sequences, tokens, meta.layers, meta.top_k), np.int64)
    common = np.stack([_popularity(rng, meta.experts, s.zipf) for _ in range(meta.layers)])
    sample = _draw(rng, np.broadcast_to(common[0], (256, meta.experts)), meta.top_k)
    chance = np.mean([len(np.intersect1d(a, b)) for a, b in pairwise(sample)]) / meta.top_k
    keep = max(0.0, (s.again - chance) / (1 - chance)) if chance < 1 else 0.0
    for sequence in range(sequences):
        weight = common.copy()
        for layer in range(meta.layers):
            own = rng.choice(meta.experts, int(s.redrawn * meta.experts), replace=False)
            weight[layer, own] = weight[layer, rng.permutation(own)]
        for t in range(tokens):
            now = weight.copy()
            if t:
                before = out[sequence, t - 1]
                # Kept experts get a weight that no other reaches; the others compete as ever.
                kept = rng.random(before.shape) < keep
                boosted = np.take_along_axis(now, before, 1) * np.where(kept, 1e30, 1.0)
                np.put_along_axis(now, before, boosted, 1)
            out[sequence, t] = _draw(rng, now, meta.top_k)
    return out


def _forecast(rng: np.random.Generator, meta: Meta, recall: float, part: I64, layer: int, seen: Any) -> I64:
    """[tokens, AHEAD, top_k]: the later layers' true experts, some replaced by others."""
    tokens = len(part[seen, layer])
    out = np.full((tokens, AHEAD, meta.top_k), NO_FORECAST, np.int64)
    for ahead in range(1, min(AHEAD, meta.layers - 1 - layer) + 1):
        if meta.ends_with_moe and layer + ahead == meta.layers - 1 and tokens > 1 and len(part) == tokens:
            continue  # its last layer may see fewer tokens
        true = part[seen, layer + ahead]
        weight = np.ones((tokens, meta.experts))
        hit = rng.random(true.shape) < recall**ahead
        np.put_along_axis(weight, true, np.where(hit, 1e30, 1e-30), 1)
        out[:, ahead - 1] = _draw(rng, weight, meta.top_k)
    return out
