"""Qwen2-MoE (`qwen2_moe`, also Qwen1.5-MoE): biases on q, k, v, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from d2moe.models.config import (
    Config,
    SourceNames,
    check_shape,
    common,
    dense_sources,
    layer_windows,
    sparse_layers,
    special_tokens,
)
from d2moe.types import ModelShape

MODEL_TYPE = "qwen2_moe"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' Qwen2MoeConfig."""
    base = common(c, norm_top_k=False, theta=10_000.0, context=32_768, rms_eps=1e-6)
    layers = base["layers"]
    moe_layers = sparse_layers(c, layers)
    dense_inner = c.integer("intermediate_size", 5632)
    below = c.integer("max_window_layers", 28, least=0)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"]),
            expert_inner=c.integer("moe_intermediate_size"),
            moe_layers=moe_layers,
            windows=layer_windows(c, tuple(i % 2 == 0 and i < below for i in range(layers))),
            dense_inner=dense_inner if len(moe_layers) < layers else 0,
            shared_inner=c.integer("shared_expert_intermediate_size"),
            qkv_bias=c.flag("qkv_bias", True),
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    return SourceNames(dense_sources(shape))
