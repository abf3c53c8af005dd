"""Containers with true shapes and random weights, for measuring speed and memory where no checkpoint is at hand.

Experts of a layer share a few distinct records, so making gigabytes takes seconds; every expert has bytes of its own on
disk and in memory, and the router is random, so traffic is that of a model with evenly used experts.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.container import (
    PROJECTIONS,
    SEGMENTS,
    ContainerWriter,
    MatrixLayout,
    NestedMatrix,
    RecordLayout,
    pack_record,
)
from d2moe.container.layout import arrays_at
from d2moe.convert.huggingface import dense_tensors, target_shape
from d2moe.convert.pipeline import rotation_of
from d2moe.models import family, shape_from_config
from d2moe.models.config import Source
from d2moe.types import GROUP, MAX_BITS, TILE_ROWS, check_width

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

DISTINCT = 4
MIXING = 0.1
"""Factor on attention's output. Random attention averages all tokens; at full strength they soon look alike, choose the same
experts, and flatter every cache: 40 % of a token's experts were those of the token before, with 0.1 it is chance."""
PIECE_WEIGHTS = 1 << 24
"""Weights of a dense matrix that are made at a time."""
STEP, ZERO = 255, 128
"""Of every group: the cells lie around zero."""

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

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}


def synthesise(
    dst: Path,
    config: dict[str, Any],
    tokenizer: Path,
    *,
    group: int = GROUP,
    seed: int = 0,
    bits: int = MAX_BITS,
) -> Path:
    """Write a container of `config`'s shape to `dst` with random weights and the given tokenizer.json.

    Experts have `bits` bits, so a large model can be measured at these where it would not fit in full. The same arguments give the
    same bytes.
    """
    check_width(bits)
    shape = shape_from_config(config, "synthetic config")
    record = RecordLayout(shape.hidden, shape.expert_inner, group, rotation=rotation_of(shape.expert_inner))
    sources = family(shape.model_type).source_names(shape).dense
    writer = ContainerWriter(
        dst,
        record=record,
        layers=shape.moe_layers,
        experts=shape.experts,
        dense=dense_tensors(sources, group),
        files={"config.json": json.dumps(config).encode(), "tokenizer.json": tokenizer},
        source={"synthetic": True, "seed": seed, "ignored_config_keys": []},
        quantizer={"name": "none", "group": group, "bits": bits},
        kept=dict.fromkeys(shape.moe_layers, (bits,) * shape.experts) if bits < MAX_BITS else None,
    )
    with writer:
        for name, source in sources.items():
            # Each tensor has a generator of its own, so that a resumed run gives the same bytes.
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if not source.quantized and not writer.is_dense_done(name):
                writer.add_dense(name, _floats(rng, name, source, shape.hidden))
            elif source.quantized and not writer.is_nested_done(name):
                spread = 1.0 if name == "embed" else shape.hidden**-0.5
                if name.endswith("attn.o"):
                    spread *= MIXING
                _add_matrix(writer, rng, name, MatrixLayout(source.shape[0], source.shape[1], group), spread)
        rng = np.random.default_rng(seed)
        records = [_record(rng, record, bits) for _ in range(DISTINCT)]
        for layer in shape.moe_layers:
            done = writer.done_experts(layer)
            for expert in range(shape.experts):
                if expert not in done:
                    writer.add_record(layer, expert, records[(expert + layer) % DISTINCT])
        return writer.finish()


def _floats(rng: np.random.Generator, name: str, source: Source, hidden: int) -> F32:
    shape = target_shape(name, source)
    if "norm" in name:
        return np.ones(shape, np.float32)
    return rng.normal(0, 2 * hidden**-0.5, shape).astype(np.float32)


def _add_matrix(
    writer: ContainerWriter, rng: np.random.Generator, name: str, whole: MatrixLayout, spread: float
) -> None:
    """Write a dense matrix in pieces of whole tiles."""
    step = max(PIECE_WEIGHTS // (whole.cols * TILE_ROWS), 1) * TILE_ROWS
    for row in range(0, whole.rows, step):
        piece = MatrixLayout(min(step, whole.rows - row), whole.cols, whole.group)
        writer.add_nested(name, _matrix(rng, piece, spread, MAX_BITS), row // TILE_ROWS)


def _record(rng: np.random.Generator, layout: RecordLayout, bits: int) -> U8:
    matrices = {}
    for projection in PROJECTIONS:
        matrix = layout.matrix(projection)
        matrices[projection] = _matrix(rng, matrix, matrix.cols**-0.5, bits)
    return pack_record(layout, matrices, bits)


def _matrix(rng: np.random.Generator, layout: MatrixLayout, spread: float, bits: int) -> NestedMatrix:
    """Uniformly random codes and the scale that gives weights of standard deviation `spread`; padding is zero."""
    rows, cols, rows_p, cols_p = layout.rows, layout.cols, layout.tiles * TILE_ROWS, layout.groups * layout.group
    row_scale, affine = np.zeros(rows_p, np.float32), np.zeros((rows_p, layout.groups, 2), np.uint8)
    row_scale[:rows] = spread * 12**0.5 / (planes.LEVELS * STEP)  # a uniform variable has its range / sqrt(12)
    affine[:rows] = STEP, ZERO
    # Bytes of any array of codes are bits of codes, so random bytes are random codes.
    arrays = {kind: _bytes(rng, layout.array(kind)[1]) for kind in arrays_at(bits) if kind in SEGMENTS}
    if (rows, cols) != (rows_p, cols_p):
        real = np.zeros((rows_p, cols_p), np.uint8)
        real[:rows, :cols] = planes.LEVELS - 1
        tiles = planes.tile(real, layout.group)
        masks = {"base": planes.pack_base(tiles), "plane": planes.pack_plane(tiles, MAX_BITS)}
        for kind, array in arrays.items():
            array &= masks["base" if kind == "base" else "plane"]
    return NestedMatrix.of(arrays | {"rows": row_scale.reshape(-1, TILE_ROWS), "affine": planes.tile_affine(affine)})


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> U8:
    """Random uint8 of a shape whose last dimension is a multiple of 8; whole words are drawn, as they come faster."""
    words = rng.integers(0, 1 << 64, (*shape[:-1], shape[-1] // 8), dtype=np.uint64)
    return words.view(np.uint8)
