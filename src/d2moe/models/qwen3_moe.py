"""Qwen3-MoE (`qwen3_moe`): RMS norm over each query and key head, dense layers possible, no shared expert."""

from __future__ import annotations

from d2moe.models.config import (
    Config,
    SourceNames,
    check_layer_types,
    check_shape,
    common,
    dense_sources,
    sparse_layers,
    special_tokens,
)
from d2moe.types import ModelShape

MODEL_TYPE = "qwen3_moe"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' Qwen3MoeConfig."""
    base = common(c, norm_top_k=False, theta=10_000.0, context=32_768, rms_eps=1e-6)
    layers = base["layers"]
    window = 0
    if c.flag("use_sliding_window", False):
        # transformers 4 windows the layers from max_window_layers on, transformers 5 all of them: no guess.
        c.fixed("max_window_layers", 0, advice="with use_sliding_window the two disagree on larger numbers")
        window = c.integer("sliding_window", 4096)
    c.get("sliding_window")
    c.get("max_window_layers")
    windows = (window,) * layers
    check_layer_types(c, windows)
    c.fixed("use_qk_norm", True)  # in the Coder checkpoints
    bias = c.flag("attention_bias", False)
    moe_layers = sparse_layers(c, layers)
    dense_inner = c.integer("intermediate_size", 6144)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"]),
            expert_inner=c.integer("moe_intermediate_size"),
            moe_layers=moe_layers,
            windows=windows,
            dense_inner=dense_inner if len(moe_layers) < layers else 0,
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    return SourceNames(dense_sources(shape))
