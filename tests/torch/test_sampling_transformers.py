"""The cuts against transformers' own logits processors, in the order its generate applies them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: sampling is not compared with transformers")
process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")

from d2moe.runtime.sampling import Sampler, SamplingParams, candidates  # noqa: E402

CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
    {"repetition_penalty": 0.8, "top_k": 7},
]


def theirs(logits: np.ndarray, prompt: list[int], values: dict[str, float]) -> np.ndarray:
    steps = []
    if "repetition_penalty" in values:
        steps.append(process.RepetitionPenaltyLogitsProcessor(values["repetition_penalty"]))
    if "temperature" in values:
        steps.append(process.TemperatureLogitsWarper(values["temperature"]))
    if "top_k" in values:
        steps.append(process.TopKLogitsWarper(int(values["top_k"])))
    if "top_p" in values:
        steps.append(process.TopPLogitsWarper(values["top_p"]))
    if "min_p" in values:
        steps.append(process.MinPLogitsWarper(values["min_p"]))
    scores = torch.from_numpy(logits.copy())[None]
    for step in steps:
        scores = step(torch.tensor([prompt]), scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize("values", CASES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_the_same_distribution_as_transformers(values: dict[str, float], spread: float) -> None:
    rng = np.random.default_rng(3)
    prompt = [3, 3, 17, 400]
    for _ in range(5):
        logits = (rng.standard_normal(1000) * spread).astype(np.float32)
        params = SamplingParams.make({"temperature": 1.0, **values})
        ids, weights = candidates(Sampler(params, prompt, logits.size)._penalised(logits), params)
        ours = np.zeros(logits.size)
        ours[ids if ids is not None else slice(None)] = weights / weights.sum()
        expected = theirs(logits, prompt, values)
        assert np.abs(ours - expected).max() < 1e-5
        # A token on the very edge may fall either way by rounding, no more than that.
        assert np.count_nonzero((ours > 0) != (expected > 0)) <= 1
