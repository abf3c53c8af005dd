"""Containers with true shapes and random weights, for measuring speed and memory where no checkpoint is at hand.

Experts of a layer share a few distinct records, so making gigabytes takes seconds; every expert has bytes of its own on
disk and in memory, and the router is random, so traffic is that of a model with evenly used experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from d2moe.container import PROJECTIONS, ContainerWriter, NestedMatrix, RecordLayout, pack_record
from d2moe.kernels import native
from d2moe.models import family, shape_from_config

DISTINCT = 4

OLMOE_1B_7B: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 50279,
}


def synthesise(dst: Path, config: dict[str, Any], tokenizer: Path, *, group: int = 64, seed: int = 0) -> Path:
    """Write a container of `config`'s shape to `dst` with random weights and the given tokenizer.json."""
    shape = shape_from_config(config, "synthetic config")
    record = RecordLayout(shape.hidden, shape.expert_inner, group)
    rng = np.random.default_rng(seed)
    names = family(shape.model_type).source_names(shape)
    dense: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, source in names.dense.items():
        if source.quantized:
            rows, cols = source.shape
            tiles, groups = -(-rows // 16), -(-cols // group)
            dense[f"{name}.codes"] = ("U8", (tiles, groups, group // 4, 64))
            dense[f"{name}.affine"] = ("F16", (tiles, groups, 2, 16))
        else:
            dense[name] = ("F32", tuple(source.shape))
    writer = ContainerWriter(
        dst,
        record=record,
        layers=shape.moe_layers,
        experts=shape.experts,
        dense=dense,
        files={"config.json": json.dumps(config).encode(), "tokenizer.json": tokenizer},
        source={"synthetic": True, "seed": seed, "ignored_config_keys": []},
        quantizer={"name": "none", "group": group},
    )
    with writer:
        for name, (dtype, size) in dense.items():
            if not writer.is_dense_done(name):
                writer.add_dense(name, _random(rng, name, dtype, size, shape.hidden))
        records = [_record(rng, record) for _ in range(DISTINCT)]
        for layer in shape.moe_layers:
            done = writer.done_experts(layer)
            for expert in range(shape.experts):
                if expert not in done:
                    writer.add_record(layer, expert, records[(expert + layer) % DISTINCT])
        return writer.finish()


def _random(rng: np.random.Generator, name: str, dtype: str, size: tuple[int, ...], hidden: int) -> np.ndarray[Any, Any]:
    if dtype == "U8":
        return rng.integers(0, 256, size, dtype=np.uint8)
    if dtype == "F16":  # codes are uniform, so the weights' standard deviation is range / sqrt(12)
        spread = 1.0 if name.startswith("embed") else hidden**-0.5
        out = np.empty(size, np.float16)
        out[..., 0, :], out[..., 1, :] = spread * 12**0.5, -spread * 12**0.5 / 2
        return out
    if "norm" in name:
        return np.ones(size, np.float32)
    return rng.normal(0, 2 * hidden**-0.5, size).astype(np.float32)


def _record(rng: np.random.Generator, layout: RecordLayout) -> np.ndarray[Any, Any]:
    parts = {}
    for projection in PROJECTIONS:
        matrix = layout.matrix(projection)
        w = rng.normal(0, matrix.cols**-0.5, (matrix.rows, matrix.cols)).astype(np.float32)
        tiles, affine = native.encode(w, layout.group)
        base, planes = native.pack(tiles)
        parts[projection] = NestedMatrix(affine.view(np.float16), base, planes)
    return pack_record(layout, parts)
