"""Qwen3 (`qwen3`): dense, RMS norm over each query and key head; the feed-forward blocks are served as experts."""

from __future__ import annotations

from d2moe.models.config import (
    Config,
    SourceNames,
    check_shape,
    common,
    dense_model,
    layer_windows,
    special_tokens,
)
from d2moe.types import ModelShape

MODEL_TYPE = "qwen3"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' Qwen3Config."""
    if not c.has("head_dim"):  # its default is 128, whatever hidden_size is; every published config says it
        raise c.error("head_dim", "expected the size of a head")
    base = common(c, norm_top_k=None, theta=10_000.0, context=32_768, rms_eps=1e-6, is_dense=True)
    layers = base["layers"]
    bias = c.flag("attention_bias", False)
    first = c.integer("max_window_layers", 28, least=0)
    is_windowed = c.has("sliding_window") or not c.names("sliding_window")  # null is no window, absent the default
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"]),
            expert_inner=c.integer("intermediate_size"),
            moe_layers=tuple(range(layers)),
            windows=layer_windows(c, tuple(is_windowed and i >= first for i in range(layers))),
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    return dense_model(shape)
