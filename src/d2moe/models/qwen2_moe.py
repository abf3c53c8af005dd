"""Qwen2-MoE (`qwen2_moe`, also Qwen1.5-MoE): biases on q, k, v, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from d2moe.models.config import Config, SourceNames, check_shape, common, dense_sources, sparse_layers, special_tokens
from d2moe.types import ModelShape

MODEL_TYPE = "qwen2_moe"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' Qwen2MoeConfig."""
    base = common(c, norm_top_k=False, theta=10_000.0, context=32_768, rms_eps=1e-6)
    layers = base["layers"]
    moe_layers = sparse_layers(c, layers)
    dense_inner = c.integer("intermediate_size", 5632)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"]),
            expert_inner=c.integer("moe_intermediate_size"),
            moe_layers=moe_layers,
            windows=_windows(c, layers),
            dense_inner=dense_inner if len(moe_layers) < layers else 0,
            shared_inner=c.integer("shared_expert_intermediate_size"),
            qkv_bias=c.flag("qkv_bias", True),
        ),
    )


def _windows(c: Config, layers: int) -> tuple[int, ...]:
    on = c.flag("use_sliding_window", False)
    below = c.integer("max_window_layers", 28, least=0)
    kinds = c.get("layer_types")
    if kinds is None:  # the rule of transformers' Qwen2MoeConfig: every second layer below max_window_layers
        kinds = ["sliding_attention" if on and i % 2 == 0 and i < below else "full_attention" for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise c.error("layer_types", f'expected a list of {layers} times "full_attention" or "sliding_attention"')
    c.get("sliding_window")
    if "sliding_attention" not in kinds:
        return (0,) * layers
    if not on:
        raise c.error("use_sliding_window", "layer_types asks for sliding_attention; they must agree")
    window = c.integer("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def source_names(shape: ModelShape) -> SourceNames:
    return SourceNames(dense_sources(shape))
