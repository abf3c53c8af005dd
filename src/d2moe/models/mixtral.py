"""Mixtral (`mixtral`): the plain decoder; gates always sum to one, one sliding window for all layers if any."""

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

MODEL_TYPE = "mixtral"


def shape(c: Config) -> ModelShape:
    """ModelShape of a config; defaults as in transformers' MixtralConfig."""
    base = common(c, norm_top_k=None, theta=1_000_000.0, context=131_072, rms_eps=1e-5)
    layers = base["layers"]
    # transformers windows every layer as soon as sliding_window is not null, whatever use_sliding_window says.
    window = c.integer("sliding_window") if c.has("sliding_window") else 0
    c.fixed("use_sliding_window", bool(window))
    windows = (window,) * layers
    check_layer_types(c, windows)
    return check_shape(
        c,
        ModelShape(
            **base,
            **special_tokens(c, base["vocab"], bos=1, eos=2),
            expert_inner=c.integer("intermediate_size"),
            moe_layers=tuple(range(layers)),
            windows=windows,
        ),
    )


def source_names(shape: ModelShape) -> SourceNames:
    """Hub checkpoints say block_sparse_moe and w1, w3, w2; the state_dict of transformers 5 says mlp."""
    return SourceNames(
        dense_sources(shape, router=("block_sparse_moe.gate.weight", "mlp.gate.weight")),
        blocks=("model.layers.{layer}.block_sparse_moe.experts", "model.layers.{layer}.mlp.experts"),
        projections=(("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")),
    )
