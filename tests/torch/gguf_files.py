"""GGUF files of Hugging Face checkpoints, as llama.cpp's converter writes them, for tests.

Names come from gguf's own map. Like the converter it stacks the experts of a layer, orders the rows of Mixtral's and
Llama's queries and keys for llama.cpp's rotary embedding, and stores norms, biases and routers as float32.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_blocks import random_blocks
from safetensors.torch import load_file, save_file

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
Array = np.ndarray[Any, Any]


def permute(w: Array, heads: int) -> Array:
    """LlamaModel.permute of llama.cpp's conversion/llama.py."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w: Array, heads: int) -> Array:
    return w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def llama3_divisors(config: dict[str, Any]) -> Array:
    """LlamaModel.generate_extra_tensors of llama.cpp's conversion/llama.py."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    out = []
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, np.float32)


def stacked(tensors: dict[str, Array]) -> dict[str, Array]:
    """One tensor for all experts of a layer, under the names the converter gives them."""
    out, experts = {}, defaultdict(dict[int, Array])
    for name, values in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            out[name] = values
            continue
        layer, block, index, part = match.groups()
        stem = f"layers.{layer}.feed_forward" if block == "block_sparse_moe" else f"model.layers.{layer}.mlp"
        experts[f"{stem}.experts.{part}.weight"][int(index)] = values
    return out | {name: np.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}


def write_gguf(
    src: Path, dst: Path, kind: Kind = Kind.F32, rng: np.random.Generator | None = None, keys: Any = None
) -> None:
    """Write the checkpoint in `src`, one tensor per expert, as a GGUF file with its tokenizer.json beside it.

    Matrices are of `kind`: F32, F16 or BF16 of the same values; another with `rng` gets random blocks, and the
    checkpoint their values in float32. `keys` are added to the metadata.
    """
    config = json.loads((src / "config.json").read_text())
    family, layers = config["model_type"], config["num_hidden_layers"]
    arch = ARCHITECTURES[family]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(arch, layers)
    saved = {name: t.to(torch.float32).numpy() for name, t in load_file(src / "model.safetensors").items()}
    writer = gguf.GGUFWriter(dst, gguf.MODEL_ARCH_NAMES[arch])
    _add_metadata(writer, config, family)
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    drawn: dict[str, Array] = {}
    for name, values in stacked(saved).items():
        role = next((role for role in heads if f".{role}." in name), None) if arch == gguf.MODEL_ARCH.LLAMA else None
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        values = np.squeeze(values)
        if values.ndim == 1 or "ffn_gate_inp" in target or kind == Kind.F32:
            writer.add_tensor(target, np.ascontiguousarray(permute(values, heads[role]) if role else values))
        elif rng is None:
            ordered = np.ascontiguousarray(permute(values, heads[role]) if role else values)
            writer.add_tensor(target, gguf.quants.quantize(ordered, kind), raw_dtype=kind)
        else:
            raw = random_blocks(rng, kind, *values.shape)
            writer.add_tensor(target, raw, raw_dtype=kind)
            decoded = gguf.quants.dequantize(raw, kind).reshape(values.shape)
            drawn[name] = unpermute(decoded, heads[role]) if role else decoded
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dst.parent / name).write_bytes((src / name).read_bytes())
    if drawn:
        save_file(
            {n: torch.from_numpy(v.copy()) for n, v in _separate(saved, drawn).items()}, src / "model.safetensors"
        )


def _separate(saved: dict[str, Array], drawn: dict[str, Array]) -> dict[str, Array]:
    """`saved` with the values of `drawn`, where experts are stacked."""
    out = dict(saved)
    for name in saved:
        key = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        key = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe\.experts", r"\1.feed_forward.experts", key)
        if key in drawn:
            match = re.search(r"\.experts\.(\d+)\.", name)
            out[name] = drawn[key][int(match[1])] if match else drawn[key]
    return out


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], family: str) -> None:
    """set_gguf_parameters of llama.cpp's conversion/base.py and those of the families."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{add}")(rope[key])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if family in ("mixtral", "llama"):
        writer.add_vocab_size(config["vocab_size"])
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(size)
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_eos_token_id(config["eos_token_id"])
