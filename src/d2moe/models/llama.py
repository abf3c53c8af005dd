"""Llama (`llama`): the plain dense decoder; the feed-forward block of each layer is served as its one expert."""

from __future__ import annotations

from d2moe.models.config import (
    Config,
    SourceNames,
    check_layer_types,
    check_shape,
    common,
    dense_model,
    special_tokens,
)
from d2moe.types import ModelShape

MODEL_TYPE = "llama"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' LlamaConfig."""
    base = common(c, norm_top_k=None, theta=10_000.0, context=2048, rms_eps=1e-6, is_dense=True)
    layers = base["layers"]
    windows = (0,) * layers
    check_layer_types(c, windows)
    bias = c.flag("attention_bias", False)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"], bos=1, eos=2),
            expert_inner=c.integer("intermediate_size"),
            moe_layers=tuple(range(layers)),
            windows=windows,
            qkv_bias=bias,
            o_bias=bias,
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    return dense_model(shape)
