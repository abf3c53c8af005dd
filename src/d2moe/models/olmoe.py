"""OLMoE (`olmoe`): RMS norm over all query and all key heads together, optional clipping of q, k, v."""

from __future__ import annotations

from d2moe.models.config import (
    Config,
    SourceNames,
    check_layer_types,
    check_shape,
    common,
    dense_sources,
    special_tokens,
)
from d2moe.types import ModelShape

MODEL_TYPE = "olmoe"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' OlmoeConfig."""
    base = common(c, norm_top_k=False, theta=10_000.0, context=4096, rms_eps=1e-5)
    layers = base["layers"]
    if base["head_dim"] * base["heads"] != base["hidden"]:  # its norms are as wide as hidden_size
        raise c.error("head_dim", f"expected hidden_size / num_attention_heads, {base['hidden'] / base['heads']:g}")
    windows = (0,) * layers
    check_layer_types(c, windows)
    bias = c.flag("attention_bias", False)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"], eos=50_279),
            expert_inner=c.integer("intermediate_size"),
            moe_layers=tuple(range(layers)),
            windows=windows,
            qk_norm="all",
            qkv_bias=bias,
            o_bias=bias,
            clip_qkv=c.number("clip_qkv") if c.has("clip_qkv") else None,
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    return SourceNames(dense_sources(shape))
