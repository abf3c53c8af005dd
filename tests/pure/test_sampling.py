"""Sampling parameters and the draw itself: bounds, cuts, distributions, log-probabilities, and that they are fast."""

from __future__ import annotations

import time

import numpy as np
import pytest

from d2moe.errors import ConfigError, D2MoeError
from d2moe.runtime.sampling import Sampler, SamplingParams, candidates, logprob

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.25], np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x.astype(np.float64) - x.max())
    return p / p.sum()


def kept(logits: np.ndarray, **values: float) -> dict[int, float]:
    """Token → probability after the cuts."""
    ids, weights = candidates(logits, SamplingParams.make({"temperature": 1.0, **values}))
    ids = np.arange(logits.size) if ids is None else ids
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


def draw(n: int, logits: np.ndarray = LOGITS, **values: float) -> np.ndarray:
    """Relative frequency of each token over n draws."""
    sampler = Sampler(SamplingParams.make({"temperature": 1.0, "seed": 1, **values}), [], logits.size)
    return np.bincount([sampler.sample(logits) for _ in range(n)], minlength=logits.size) / n


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", np.nan),
        ("temperature", "hot"), ("top_k", -1), ("top_k", 2.0), ("top_p", 0), ("top_p", 1.01), ("min_p", -0.5),
        ("min_p", 2),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")), ("seed", -1), ("seed", 2**64), ("seed", "x"),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 3), ("logprobs", -1), ("logprobs", 101), ("bits", 1), ("bits", 9),
        ("bits", "3"), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} (is|holds) .*expected"):
        SamplingParams.make({name: value})


def test_an_unknown_name_is_refused_and_the_near_one_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown sampling parameter 'temprature'; did you mean 'temperature'\?"):
        SamplingParams.make({"temprature": 1})
    with pytest.raises(ConfigError, match="known are max_tokens"):
        SamplingParams.make({"xyzzy": 1})


def test_stop_is_a_text_or_a_list_of_texts() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams.make({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.make({"stop": None}).stop == ()


def test_greedy_takes_the_first_of_the_highest() -> None:
    assert Sampler(SamplingParams(), [], 4).sample(np.array([0, 3, 3, 1], np.float32)) == 1


def test_plain_sampling_follows_the_distribution() -> None:
    n = 40_000
    expected = softmax(LOGITS)
    assert np.abs(draw(n) - expected).max() < 4 * np.sqrt(0.25 / n)


def test_temperature_scales_the_logits() -> None:
    n = 40_000
    assert np.abs(draw(n, temperature=0.5) - softmax(LOGITS / 0.5)).max() < 4 * np.sqrt(0.25 / n)
    assert draw(200, temperature=1e-4)[0] == 1.0


def test_top_k_keeps_the_k_highest_and_their_ties() -> None:
    assert set(kept(LOGITS, top_k=3)) == {0, 6, 1}
    assert set(kept(np.array([1, 2, 2, 0], np.float32), top_k=1)) == {1, 2}
    assert set(kept(LOGITS, top_k=1000)) == set(range(8))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    assert set(kept(logits, top_p=0.45)) == {0}
    assert set(kept(logits, top_p=0.51)) == {0, 1}
    assert set(kept(logits, top_p=0.74)) == {0, 1}
    assert set(kept(logits, top_p=0.76)) == {0, 1, 2}
    assert set(kept(logits, top_p=1e-9)) == {0}
    assert kept(logits, top_p=0.76)[2] == pytest.approx(0.15 / 0.9, rel=1e-5)


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two that top_k leaves the first has 4/7 of the mass.
    assert set(kept(logits, top_k=2, top_p=0.56)) == {0}
    assert set(kept(logits, top_k=2, top_p=0.58)) == {0, 1}


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.26, 0.14, 0.1], np.float32))
    assert set(kept(logits, min_p=0.5)) == {0, 1}
    assert set(kept(logits, min_p=0.25)) == {0, 1, 2}
    assert set(kept(logits, min_p=0.25, top_p=0.7)) == {0, 1}
    assert set(kept(logits, min_p=1.0)) == {0}


def test_repetition_penalty_counts_prompt_and_answer_once_each() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0, 0, 2], 4)
    assert sampler.sample(logits) == 1  # 2.0 / 1.5 is below 1.9
    assert sampler.sample(logits) == 0  # now both are divided
    below = Sampler(SamplingParams(repetition_penalty=1.5), [2], 4)
    assert below.sample(np.array([-9, -9, -1.0, -1.1], np.float32)) == 3  # a negative logit is multiplied
    assert logits.tolist() == np.array([2.0, 1.9, -1.0, -1.1], np.float32).tolist()  # the caller's row is not changed


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it() -> None:
    def tokens(seed: int | None, disturb: bool) -> list[int]:
        mine = Sampler(SamplingParams(temperature=1.0, seed=seed), [], 8)
        other = Sampler(SamplingParams(temperature=1.0, seed=9), [], 8)
        out = []
        for _ in range(30):
            if disturb:
                other.sample(LOGITS)
            out.append(mine.sample(LOGITS))
        return out

    assert tokens(5, False) == tokens(5, True)
    assert tokens(5, False) != tokens(6, False)
    assert tokens(None, False) != tokens(None, False)


def test_tokens_of_no_weight_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert draw(2000, logits)[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, value: float) -> None:
    logits = np.array([0, value, 1], np.float32)
    with pytest.raises(D2MoeError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), [], 3).sample(logits)


def test_logprobs_are_the_models_own() -> None:
    p = np.log(softmax(LOGITS))
    got = logprob(LOGITS, 4, 3)
    assert got.logprob == pytest.approx(p[4], abs=1e-6)
    assert [t for t, _ in got.top] == [0, 6, 1]
    assert [v for _, v in got.top] == pytest.approx([p[0], p[6], p[1]], abs=1e-6)
    assert logprob(LOGITS, 0, 0).top == ()
    assert len(logprob(LOGITS, 0, 100).top) == 8


def test_the_cut_of_a_large_vocabulary_equals_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(5000) * 3).astype(np.float32)
    for top_p, min_p in [(0.9, 0.0), (0.99, 0.0), (0.5, 0.0), (0.999, 0.001), (0.95, 0.05)]:
        p = softmax(logits)
        order = np.argsort(-p)
        above = np.cumsum(p[order]) - p[order]
        expected = {int(i) for i in order[above < top_p] if p[i] >= min_p * p.max()}
        assert set(kept(logits, top_p=top_p, min_p=min_p)) == expected


def test_a_vocabulary_of_150k_is_sampled_in_milliseconds() -> None:
    # A bound far from the usual 1 to 3 ms, to catch a full sort or a Python loop and not a busy machine.
    logits = (np.random.default_rng(0).standard_normal(151_936) * 2).astype(np.float32)
    sampler = Sampler(
        SamplingParams(temperature=0.8, top_p=0.95, top_k=50, repetition_penalty=1.1), [1, 2], logits.size
    )
    best = 1.0
    for _ in range(10):
        start = time.perf_counter()
        sampler.sample(logits)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05
