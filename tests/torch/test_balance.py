"""Balanced weights: the same function as the source's, and the same weights however the factors fell in the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, tiny_checkpoint

from d2moe.container.layout import PROJECTIONS
from d2moe.convert import balance
from d2moe.convert.balance import Balanced, factors
from d2moe.convert.source import ModelSource, open_source


def rng() -> np.random.Generator:
    seed = np.random.default_rng().integers(1 << 31)
    print("seed", seed)
    return np.random.default_rng(seed)


def everything(source: ModelSource) -> dict[str, np.ndarray]:
    """All weights that a source gives, by canonical name; of experts "layers.L.experts.E.projection"."""
    out = {}
    for name, tensor in source.names.dense.items():
        out[name] = (
            np.concatenate(list(source.linear_pieces(name, 16))) if tensor.quantized else source.read_dense(name)
        )
    for layer in source.shape.moe_layers:
        for expert in range(source.shape.experts):
            for projection, w in source.read_expert(layer, expert):
                out[f"layers.{layer}.experts.{expert}.{projection}"] = w
    assert all(w.dtype == np.float32 and np.isfinite(w).all() for w in out.values())
    return out


def put(model: Any, source: ModelSource, weights: dict[str, np.ndarray]) -> None:
    """Write weights by canonical names into a transformers model."""
    state = model.state_dict()
    for name, tensor in source.names.dense.items():
        if not tensor.names:
            assert not weights[name].any()
            continue
        target = next(n for n in tensor.names if n in state)
        state[target].copy_(torch.from_numpy(weights[name]).reshape(tensor.shape))
    for layer in source.shape.moe_layers:
        if source.names.is_dense:
            for target, p in zip(source.names.expert(layer, 0)[0], PROJECTIONS, strict=True):
                state[target].copy_(torch.from_numpy(weights[f"layers.{layer}.experts.0.{p}"]))
            continue
        experts = model.model.layers[layer].mlp.experts
        for e in range(source.shape.experts):
            gate, up, down = (torch.from_numpy(weights[f"layers.{layer}.experts.{e}.{p}"]) for p in PROJECTIONS)
            experts.gate_up_proj.data[e].copy_(torch.cat([gate, up]))
            experts.down_proj.data[e].copy_(down)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.log_softmax(model(torch.randint(0, 256, (3, 40))).logits.double(), -1)


def rescale(model: Any, r: np.random.Generator, sigma: float) -> None:
    """Multiply by random factors what leaves the function alone, as `Balanced` may undo it; not in the embedding."""

    def draw(n: int) -> torch.Tensor:
        return torch.from_numpy(np.exp(r.normal(0, sigma, n)).astype(np.float32))

    config = model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            a, mlp, s = layer.self_attn, layer.mlp, draw(config.hidden_size)
            layer.input_layernorm.weight.mul_(s)
            for linear in (a.q_proj, a.k_proj, a.v_proj):
                linear.weight.div_(s)
            if getattr(config, "clip_qkv", None) is None:
                f = draw(a.v_proj.weight.shape[0])
                a.v_proj.weight.mul_(f[:, None])
                if a.v_proj.bias is not None:
                    a.v_proj.bias.mul_(f)
                a.o_proj.weight.div_(f.reshape(kv, 1, -1).expand(kv, heads // kv, -1).reshape(-1))
            s = draw(config.hidden_size)
            layer.post_attention_layernorm.weight.mul_(s)
            blocks = [mlp.shared_expert] if hasattr(mlp, "shared_expert") else []
            blocks += [] if hasattr(mlp, "experts") else [mlp]
            for block in blocks:
                f = draw(block.up_proj.weight.shape[0])
                block.gate_proj.weight.div_(s)
                block.up_proj.weight.div_(s).mul_(f[:, None])
                block.down_proj.weight.div_(f)
            if hasattr(mlp, "shared_expert"):
                mlp.shared_expert_gate.weight.div_(s)
            if hasattr(mlp, "experts"):
                mlp.gate.weight.div_(s)
                mlp.experts.gate_up_proj.div_(s)
                inner = mlp.experts.down_proj.shape[-1]
                for e in range(len(mlp.experts.down_proj)):
                    f = draw(inner)
                    mlp.experts.gate_up_proj[e, inner:].mul_(f[:, None])
                    mlp.experts.down_proj[e].div_(f)
        if not config.tie_word_embeddings:
            s = draw(config.hidden_size)
            model.model.norm.weight.mul_(s)
            model.lm_head.weight.div_(s)


CASES = [(family, {}) for family in FAMILIES] + [
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("olmoe", {"clip_qkv": None}),
]


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_the_function_stays(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Also from a source whose factors are far apart; by transformers, on the balanced weights."""
    r = rng()
    _, model = tiny_checkpoint(family, tmp_path / "src", seed=int(r.integers(1 << 31)), **overrides)
    rescale(model, r, 1.0)
    model.save_pretrained(tmp_path / "src")
    expected = logits(model)
    with open_source(tmp_path / "src") as source:
        plain, weights = everything(source), everything(Balanced(source))
        put(model, source, plain)
        assert torch.equal(logits(model), expected)  # the test itself: every weight has its place
        put(model, source, weights)
    assert sum(not np.array_equal(plain[name], w) for name, w in weights.items()) > len(weights) // 2
    assert (logits(model) - expected).abs().max() < 2e-3


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_twins_come_out_alike(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    r = rng()
    _, model = tiny_checkpoint(family, tmp_path / "one", seed=int(r.integers(1 << 31)), **overrides)
    tiny_checkpoint(family, tmp_path / "two", **overrides)
    rescale(model, r, 1.0)
    model.save_pretrained(tmp_path / "two")
    with open_source(tmp_path / "one") as source:
        one = everything(Balanced(source))
    with open_source(tmp_path / "two") as source:
        plain, two = everything(source), everything(Balanced(source))

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        """Of directions: one factor for all channels of a matrix is free."""
        a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        if not a.any():  # the router of a dense model
            return float(b.any())
        cosine = float((a @ b) / np.sqrt((a @ a) * (b @ b)))
        return 1 - cosine

    for name, w in one.items():
        assert difference(w, two[name]) < 1e-9, name
    assert max(difference(plain[name], w) for name, w in one.items() if name.endswith("down")) > 0.1


def test_groups_of_columns_are_even(tmp_path: Path) -> None:
    """What it is for: the largest column of a matrix is not far above the mean, whatever the source's are."""
    r = rng()
    _, model = tiny_checkpoint("mixtral", tmp_path / "src", num_hidden_layers=1)
    rescale(model, r, 1.0)
    model.save_pretrained(tmp_path / "src")

    def spread(source: ModelSource) -> float:
        norms = [np.linalg.norm(w, axis=0) for name, w in everything(source).items() if name.endswith(("down", ".o"))]
        return float(np.mean([n.max() / n.mean() for n in norms]))

    with open_source(tmp_path / "src") as source:
        assert spread(Balanced(source)) < 1.5 < 3 < spread(source)


def test_factors_of_odd_channels() -> None:
    a, b = np.array([1.0, 0.0, 4.0, 2.0]), np.array([1.0, 3.0, 0.0, 8.0])
    found = factors(a, b)
    assert found[1] == found[2] == 1  # a channel without weights on one side keeps its own
    p = np.array([1.0, 16.0])
    wanted = (p / p.mean()) ** balance.SHARE / np.array([1.0, 8.0]) * 8**0.5
    assert np.allclose(found[[0, 3]], wanted, rtol=1e-6)
    assert np.array_equal(factors(np.array([1e30, 1.0]), np.ones(2)), np.ones(2))
    assert np.array_equal(factors(np.zeros(3), np.ones(3)), np.ones(3))
