"""Tiny random GGUF files, made with gguf's own writer, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf_blocks import random_blocks

HIDDEN, INNER, SHARED, DENSE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, VOCAB = (
    256,
    256,
    512,
    256,
    2,
    4,
    2,
    40,
    6,
    2,
    48,
)
KINDS = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ2_XXS,
)  # fmt: skip
ALPHABET = [chr(c) for c in range(0x21, 0x21 + VOCAB - 3)]


def tensor_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """All tensors of a tiny model."""
    head_dim = HIDDEN // HEADS if arch == "olmoe" else HEAD_DIM
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    out["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        part = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (q, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_output.weight": (HIDDEN, q),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
            "ffn_gate_exps.weight": (EXPERTS, INNER, HIDDEN),
            "ffn_up_exps.weight": (EXPERTS, INNER, HIDDEN),
            "ffn_down_exps.weight": (EXPERTS, HIDDEN, INNER),
        }
        if arch == "qwen2moe":
            part |= {f"attn_{p}.bias": (q if p == "q" else kv,) for p in "qkv"}
            part |= {f"ffn_{p}_shexp.weight": (SHARED, HIDDEN) for p in ("gate", "up")}
            part |= {"ffn_down_shexp.weight": (HIDDEN, SHARED), "ffn_gate_inp_shexp.weight": (HIDDEN,)}
        if arch in ("olmoe", "qwen3moe"):
            part |= {f"attn_{p}_norm.weight": (n if arch == "olmoe" else HEAD_DIM,) for p, n in (("q", q), ("k", kv))}
        out |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    return out


def metadata(arch: str) -> dict[str, Any]:
    """All keys of a tiny model but for the architecture; ints are uint32, floats float32."""
    out: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": DENSE if arch.startswith("qwen") else INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6,
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
    }
    if arch != "olmoe":
        out |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    if arch.startswith("qwen"):
        out["expert_feed_forward_length"] = INNER
    if arch == "qwen2moe":
        out["expert_shared_feed_forward_length"] = SHARED
    if arch == "llama":
        out |= {"rope.dimension_count": HEAD_DIM, "vocab_size": VOCAB}
    out = {f"{arch}.{key}": value for key, value in out.items()}
    return out | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*ALPHABET, "AB", "<|end|>", "[PAD]"],
        "tokenizer.ggml.token_type": [1] * (VOCAB - 2) + [3, 5],
        "tokenizer.ggml.merges": ["A B"],
        "tokenizer.ggml.eos_token_id": VOCAB - 2,
    }


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key as the type that llama.cpp's converter would give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write(
    path: Path,
    arch: str,
    rng: np.random.Generator,
    kind: Kind = Kind.F32,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model, matrices that allow it in `kind`, and return all weights as gguf decodes them, float32.

    `keys` and `tensors` are changed or added; None takes away. Tensors given are written as they are.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata(arch) | dict(keys or {})).items():
        if value is not None:
            add_value(writer, key, value)
    out = {}
    given = dict(tensors or {})
    for name, shape in (tensor_shapes(arch) | {n: t.shape for n, t in given.items() if t is not None}).items():
        if name in given:
            if given[name] is not None:
                out[name] = given[name]
                writer.add_tensor(name, given[name])
        elif len(shape) > 1 and "ffn_gate_inp" not in name and kind != Kind.F32 and shape[-1] % 256 == 0:
            raw = random_blocks(rng, kind, *shape)
            out[name] = gguf.quants.dequantize(raw, kind).reshape(shape)
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            out[name] = rng.normal(size=shape).astype(np.float32)
            writer.add_tensor(name, out[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
