"""The compiled draw against its definition in runtime/sampling.py, on fresh logits and cuts."""

from __future__ import annotations

import numpy as np
import pytest

from d2moe.errors import D2MoeError
from d2moe.kernels import native
from d2moe.runtime.sampling import Sampler, SamplingParams, draw_reference


@pytest.mark.parametrize("vocab", [1, 2, 100, 127, 128, 129, 5000])
def test_draw_is_its_definition(rng: np.random.Generator, vocab: int) -> None:
    for _ in range(60):
        logits = rng.normal(0, rng.uniform(0.1, 8), vocab).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)  # many ties
        if rng.random() < 0.2:
            logits[rng.random(vocab) < 0.5] = -np.inf
            logits[rng.integers(vocab)] = 1.0
        params = SamplingParams(
            temperature=float(rng.uniform(0.05, 3)),
            top_k=int(rng.choice([0, 1, 2, 40, vocab])),
            top_p=float(rng.choice([1.0, 0.95, 0.5, 1e-6])),
            min_p=float(rng.choice([0.0, 0.05, 1.0])),
        )
        for uniform in (0.0, float(rng.random()), 1 - 2.0**-53):
            token = native.draw(logits, params.temperature, params.top_k, params.top_p, params.min_p, uniform)
            assert token == draw_reference(logits, params, uniform), (params, uniform)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("top_k", [0, 40])
def test_what_is_not_finite_is_refused_wherever_it_is(rng: np.random.Generator, bad: float, top_k: int) -> None:
    for vocab in (1, 127, 1000):
        logits = rng.standard_normal(vocab).astype(np.float32)
        logits[rng.integers(vocab)] = bad
        assert native.draw(logits, 1.0, top_k, 1.0, 0.0, 0.5) == -1
        with pytest.raises(D2MoeError, match="not finite"):
            Sampler(SamplingParams(temperature=1.0, top_k=top_k), [0], vocab).sample(logits)
