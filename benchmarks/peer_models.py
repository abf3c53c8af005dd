"""GGUF files of true shapes with random weights, for measuring llama.cpp where no checkpoint is at hand.

    PEER/bin/python benchmarks/peer_models.py --shape olmoe --type Q4_0 --tokenizer tokenizer.json olmoe-Q4_0.gguf

Runs with the peer's interpreter, which needs `gguf`, `numpy` and `click`. Tensors are written one after another, so never
more than one is in memory. Quantised blocks are random bits with scales that make the weights' standard deviation
1 / sqrt(columns) around zero, drawn once per type and width, checked with gguf's own decoder, and tiled; a prime number
of them, so that no two rows near each other, and no two experts, are alike. The router and the embedding are random too.
The attention's output is a tenth as large: random attention averages over all tokens, and at full size it would make their
states, and so the experts they choose, more alike from layer to layer (`peer_llama.py --routing` tells).

Which tensor has which type follows llama_tensor_get_type_impl of llama.cpp's src/llama-quant.cpp without an importance matrix:

    all       output Q6_K; norms and routers float32; everything else, embedding included, the type's own
    Q4_0      nothing more
    Q4_K_M    attn_v and ffn_down Q6_K in the first and the last eighth of the layers and every third one between them
    Q2_K      attn_output and ffn_down Q3_K; attn_v Q4_K where 4 or more heads share keys and values, else Q3_K
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

BLOCKS = 8191
"""Distinct blocks of a type: a prime, so each of 8191 successive rows begins at another block."""

MIXES = {
    "Q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "Q4_K_M": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "Q2_K": (Type.Q2_K, gguf.LlamaFileType.MOSTLY_Q2_K),
}


@dataclass(frozen=True)
class Shape:
    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_all_heads: bool
    experts: int
    top_k: int
    expert_inner: int
    vocab: int
    context: int
    rope_base: float
    rms_eps: float


SHAPES = {
    "olmoe": Shape("olmoe", 16, 2048, 16, 16, 128, True, 64, 8, 1024, 50304, 4096, 1e4, 1e-5),
    "qwen3-30b": Shape("qwen3moe", 48, 2048, 32, 4, 128, False, 128, 8, 768, 151936, 40960, 1e6, 1e-6),
}


@dataclass(frozen=True)
class Tensor:
    name: str
    size: tuple[int, ...]  # rows first, as numpy
    type: Type
    spread: float = 0.0  # standard deviation; 0 is a norm of ones


def tensors(shape: Shape, mix: str) -> Iterator[Tensor]:
    """All tensors in the order of the file, with the types that llama.cpp's quantiser gives them."""
    own, n = MIXES[mix][0], shape.layers
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_head = (shape.head_dim, shape.head_dim)
    q_norm, k_norm = (q, kv) if shape.norm_all_heads else per_head

    def matrix(name: str, *size: int, layer: int | None = None) -> Tensor:
        kind, role = own, name.split(".")[-1]
        if layer is not None:
            name = f"blk.{layer}.{name}"
            more_bits = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
            if mix == "Q4_K_M" and role in ("attn_v", "ffn_down_exps") and more_bits:
                kind = Type.Q6_K
            elif mix == "Q2_K" and role == "attn_v":
                kind = Type.Q4_K if shape.heads // shape.kv_heads >= 4 else Type.Q3_K
            elif mix == "Q2_K" and role in ("attn_output", "ffn_down_exps"):
                kind = Type.Q3_K
        elif role == "output":
            kind = Type.Q6_K
        scale = {"token_embd": 1.0, "attn_output": 0.1 * size[-1] ** -0.5}.get(role, size[-1] ** -0.5)
        return Tensor(f"{name}.weight", size, kind, scale)

    def norm(name: str, size: int) -> Tensor:
        return Tensor(f"{name}.weight", (size,), Type.F32)

    yield matrix("token_embd", shape.vocab, shape.hidden)
    for i in range(n):
        yield norm(f"blk.{i}.attn_norm", shape.hidden)
        yield matrix("attn_q", q, shape.hidden, layer=i)
        yield matrix("attn_k", kv, shape.hidden, layer=i)
        yield matrix("attn_v", kv, shape.hidden, layer=i)
        yield matrix("attn_output", shape.hidden, q, layer=i)
        yield norm(f"blk.{i}.attn_q_norm", q_norm)
        yield norm(f"blk.{i}.attn_k_norm", k_norm)
        yield norm(f"blk.{i}.ffn_norm", shape.hidden)
        router = (shape.experts, shape.hidden)
        yield Tensor(f"blk.{i}.ffn_gate_inp.weight", router, Type.F32, 2 * shape.hidden**-0.5)
        yield matrix("ffn_gate_exps", shape.experts, shape.expert_inner, shape.hidden, layer=i)
        yield matrix("ffn_up_exps", shape.experts, shape.expert_inner, shape.hidden, layer=i)
        yield matrix("ffn_down_exps", shape.experts, shape.hidden, shape.expert_inner, layer=i)
    yield norm("output_norm", shape.hidden)
    yield matrix("output", shape.vocab, shape.hidden)


def halves(rng: np.random.Generator, value: float, signed: bool = False) -> np.ndarray:
    """Float16 scales about `value`, as bytes; of both signs where the codes alone are not even about zero."""
    scales = value * rng.uniform(0.8, 1.2, BLOCKS) * (rng.choice([-1, 1], BLOCKS) if signed else 1)
    return scales.astype(np.float16).view(np.uint8).reshape(BLOCKS, 2)


def blocks(rng: np.random.Generator, kind: Type, spread: float) -> np.ndarray:
    """BLOCKS random blocks of a type, whose weights have the standard deviation `spread` and no mean."""

    def noise(n: int) -> np.ndarray:
        return rng.integers(0, 256, (BLOCKS, n), dtype=np.uint8)

    def scale_is_min(n: int) -> np.ndarray:
        """Bytes whose low and high four bits agree: scale and minimum of a group the same number."""
        return rng.integers(0, 16, (BLOCKS, n), dtype=np.uint8) * 17

    def q4_0() -> list[np.ndarray]:  # scale (code - 8)
        return [halves(rng, spread / 4.64, signed=True), noise(16)]

    def q2_k() -> list[np.ndarray]:  # d scale code - m min, codes 0 to 3 centred by m = 1.5 d
        d = halves(rng, spread / 9.84).view(np.float16)
        return [scale_is_min(16), noise(64), d.view(np.uint8), (d * np.float16(1.5)).view(np.uint8)]

    def q3_k() -> list[np.ndarray]:  # d (scale - 32) (code - 4)
        return [noise(32), noise(64), noise(12), halves(rng, spread / 43.4)]

    def q4_k() -> list[np.ndarray]:  # d scale code - m min, codes 0 to 15 centred by m = 7.5 d
        d, low = halves(rng, spread / 168).view(np.float16), noise(4)
        return [d.view(np.uint8), (d * np.float16(7.5)).view(np.uint8), low, low, scale_is_min(4), noise(128)]

    def q6_k() -> list[np.ndarray]:  # d scale (code - 32), scales int8
        return [noise(128), noise(64), noise(16), halves(rng, spread / 1366)]

    parts: dict[Type, Callable[[], list[np.ndarray]]] = {
        Type.Q4_0: q4_0,
        Type.Q2_K: q2_k,
        Type.Q3_K: q3_k,
        Type.Q4_K: q4_k,
        Type.Q6_K: q6_k,
    }
    found = np.concatenate(parts[kind](), axis=1)
    weights = gguf.quants.dequantize(found, kind)
    if abs(weights.std() / spread - 1) > 0.05 or abs(weights.mean()) > 0.02 * spread:
        raise RuntimeError(
            f"{kind.name}: deviation {weights.std():.3g}, mean {weights.mean():.3g}, wanted {spread:.3g}"
        )
    return found


def add_tokenizer(writer: gguf.GGUFWriter, path: Path, vocab: int) -> None:
    """The byte-level BPE of a tokenizer.json; ids that it lacks are named and marked as unused."""
    source = json.loads(path.read_text(encoding="utf-8"))
    model, added = source["model"], source.get("added_tokens", [])
    if model["type"] != "BPE":
        raise click.UsageError(f"{path} is a {model['type']} tokenizer, expected BPE")
    names = {i: text for text, i in model["vocab"].items()} | {t["id"]: t["content"] for t in added}
    if max(names) >= vocab:
        raise click.UsageError(f"{path} has token {max(names)}, but the shape only {vocab} tokens")
    kinds = {t["id"]: gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED for t in added}
    plain = dict.fromkeys(names, gguf.TokenType.NORMAL) | kinds
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[UNUSED{i}]") for i in range(vocab)])
    writer.add_token_types([int(plain.get(i, gguf.TokenType.UNUSED)) for i in range(vocab)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_eos_token_id(next((t["id"] for t in added if t["content"] == "<|endoftext|>"), vocab - 1))
    writer.add_add_bos_token(False)


def add_shape(writer: gguf.GGUFWriter, shape: Any, rope_base: float, file_type: int) -> None:
    """Metadata of a `Shape`, or of a d2moe ModelShape."""
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_inner)
    writer.add_expert_feed_forward_length(shape.expert_inner)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_freq_base(rope_base)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def make(path: Path, shape: Shape, mix: str, tokenizer: Path, seed: int) -> dict[str, int]:
    """Write the file under another name, then rename it; returns bytes by type."""
    rng = np.random.default_rng(seed)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, shape.arch)
    add_shape(writer, shape, shape.rope_base, int(MIXES[mix][1]))
    add_tokenizer(writer, tokenizer, shape.vocab)
    plan, used = list(tensors(shape, mix)), dict[str, int]()
    for t in plan:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[t.type]
        n_bytes = int(np.prod(t.size)) // per_block * block_bytes
        used[t.type.name] = used.get(t.type.name, 0) + n_bytes
        dtype = np.float32 if t.type is Type.F32 else np.uint8
        size = t.size if t.type is Type.F32 else (*t.size[:-1], t.size[-1] // per_block * block_bytes)
        writer.add_tensor_info(t.name, size, np.dtype(dtype), n_bytes, raw_dtype=t.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools: dict[tuple[Type, float], np.ndarray] = {}
    for t in plan:
        if t.type is Type.F32:
            drawn = rng.normal(0, t.spread, t.size) if t.spread else np.ones(t.size)
            writer.write_tensor_data(drawn.astype(np.float32))
            continue
        pool = pools.setdefault((t.type, t.spread), np.empty(0))
        if not pool.size:
            pool = pools[t.type, t.spread] = blocks(rng, t.type, t.spread)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[t.type]
        turned = np.roll(pool, int(rng.integers(BLOCKS)), axis=0)
        writer.write_tensor_data(np.resize(turned, (int(np.prod(t.size)) // per_block, block_bytes)))
    writer.close()
    part.replace(path)
    return used


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), default="olmoe", show_default=True)
@click.option("--type", "mix", type=click.Choice(list(MIXES)), default="Q4_0", show_default=True)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="A tokenizer.json."
)
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the model has, for trying out.")
@click.option("--seed", default=0, show_default=True)
def main(path: Path, name: str, mix: str, tokenizer: Path, layers: int | None, seed: int) -> None:
    """Write the GGUF file PATH with random weights of a model's true shape. Prints one JSON line."""
    shape = replace(SHAPES[name], layers=layers or SHAPES[name].layers)
    start = time.perf_counter()
    used = make(path, shape, mix, tokenizer, seed)
    line = {"made": path.name, "shape": name, "layers": shape.layers, "type": mix, "bytes": path.stat().st_size}
    print(json.dumps({**line, "bytes_by_type": used, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
