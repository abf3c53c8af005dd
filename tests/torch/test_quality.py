"""The laboratory of benchmarks/quality.py: its model is transformers', and its peers do what they are said to."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from transformers import AutoModelForCausalLM

from d2moe.convert.source import open_source


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return __import__(name)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_model_and_gradients_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q = module("quality_model", monkeypatch)
    tiny_checkpoint(family, tmp_path, **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.from_numpy(np.random.default_rng().integers(0, 256, (2, 24)))
    with open_source(tmp_path) as source:
        weights, model = q.read(source), q.Model(source.shape)
    expected = theirs(ids).logits
    torch.testing.assert_close(model.logits(weights, ids), expected.detach(), rtol=1e-3, atol=1e-3)

    heads = theirs.lm_head.weight, theirs.model.layers[1].mlp.experts.down_proj
    squares = [torch.zeros_like(p) for p in heads]
    for row in ids:
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(theirs(row[None, :-1]).logits[0], row[1:]).backward()
        for total, p in zip(squares, heads, strict=True):
            total += p.grad.square() / 2
    found = model.sensitivities(weights, ids, lambda text: None)
    tied = source.shape.tied_embeddings
    for name, total in zip(("embed" if tied else "head", "layers.1.experts.down"), squares, strict=True):
        torch.testing.assert_close(found[name], total, rtol=1e-2, atol=1e-3 * float(total.max()))


def test_families_it_does_not_know_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint("qwen2_moe", tmp_path)
    with open_source(tmp_path) as source, pytest.raises(ValueError, match="family qwen2_moe"):
        module("quality_model", monkeypatch).Model(source.shape)


def test_any_precision_is_nested_and_no_worse_than_even_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("quality_quantisers", monkeypatch)
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    torch.manual_seed(seed)
    W = torch.distributions.StudentT(4.0).sample((2, 8, 128))
    weight = torch.rand(2, 8, 128) ** 3
    found = peers.any_precision(W, weight)
    flat = {bits: q.weights.flatten(0, 1) for bits, q in found.items()}
    for bits, back in flat.items():
        assert max(len(row.unique()) for row in back) <= 2**bits
        assert found[bits].n_bytes == 16 * 128 * bits / 8 + 16 * 2 * 2**bits
    strangers = 0  # a value at b bits has one parent at b - 1; but two neighbours' centres may round to one float16
    for bits in (3, 4, 5, 6, 7, 8):
        for wide, narrow in zip(flat[bits], flat[bits - 1], strict=True):
            strangers += len(torch.stack([wide, narrow]).unique(dim=1)[0]) - len(wide.unique())
    assert strangers <= 3  # of some 7,000
    even = peers.nearest(W, torch.empty(0), 3, 128).weights
    cost = [float((weight * (back - W).square()).sum()) for back in (found[2].weights, found[3].weights, found[4].weights, even)]
    assert cost[0] > cost[1] > cost[2]
    assert cost[1] < 0.7 * cost[3]
    few, of_few = W[0, 0, :16], weight[0, 0, :16]  # every way to cut its sorted values in four
    best = min(_cost(few, of_few, torch.tensor(cuts)) for cuts in combinations(range(1, 16), 3))
    back = peers.any_precision(few[None, None], of_few[None, None] + 1e-9)[2].weights[0, 0]
    assert float((of_few * (back - few).square()).sum()) <= 1.02 * best  # float16, and the little that each weight counts


def _cost(w: torch.Tensor, weight: torch.Tensor, cuts: torch.Tensor) -> float:
    order = w.argsort()
    parts = zip(w[order].tensor_split(cuts), weight[order].tensor_split(cuts), strict=True)
    return sum(float((p * (x - (p * x).sum() / p.sum()).square()).sum()) for x, p in parts)
