"""A checkpoint and its GGUF file give the same container, to the byte; memory of a conversion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import FAMILIES, tiny_checkpoint, write_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_blocks import random_blocks
from gguf_files import ARCHITECTURES, write_gguf
from peak import MEASURE

from d2moe.container import Container
from d2moe.convert.pipeline import convert
from d2moe.models import shape_from_config

RNG = np.random.default_rng()
MB = 2**20


def check_same(src: Path, file: Path, dst: Path) -> None:
    """Weights, tokenizer and shape of the two containers."""
    one, other = convert(src, dst / "folder.d2moe"), convert(file, dst / "file.d2moe")
    weights = ["dense.safetensors", *(f"experts/{p.name}" for p in (one / "experts").iterdir())]
    for name in [*weights, "tokenizer.json", "tokenizer_config.json"]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    shapes = [shape_from_config(json.loads((x / "config.json").read_text()), str(x)) for x in (one, other)]
    assert shapes[0] == shapes[1]
    source = Container.open(other).manifest.source
    assert source["name"] == file.stem and source["model_type"] == shapes[0].model_type


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def made(
    family: str, path: Path, dtype: str, kind: Kind, quantized: bool = False, **overrides: Any
) -> tuple[Path, Path]:
    """A fresh tiny checkpoint and its GGUF file."""
    src, file = path / "src", path / "file" / "m.gguf"
    file.parent.mkdir()
    if family.endswith("_moe"):  # llama.cpp knows no dense layers in these
        overrides = {"mlp_only_layers": [], **overrides}
    if family == "llama":  # the file has what comes of these numbers, but not the numbers
        overrides = {"rope_parameters": LLAMA3, **overrides}
    tiny_checkpoint(family, src, dtype=dtype, seed=int(RNG.integers(1 << 31)), **overrides)
    clip = json.loads((src / "config.json").read_text()).get("clip_qkv")
    keys = {} if clip is None else {"olmoe.attention.clamp_kqv": clip}
    write_gguf(src, file, kind, RNG if quantized else None, keys)
    return src, file


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", Kind.F32), ("bfloat16", Kind.BF16), ("float16", Kind.F16), ("bfloat16", Kind.F32)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_container(family: str, dtype: str, kind: Kind, tmp_path: Path) -> None:
    check_same(*made(family, tmp_path, dtype, kind), tmp_path)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied qwen3": ("qwen3_moe", {"tie_word_embeddings": True}),
    "tied mixtral": ("mixtral", {"tie_word_embeddings": True}),
    "heads of 40": ("mixtral", {"head_dim": 40, "num_key_value_heads": 4}),
    "biases": ("qwen3_moe", {"attention_bias": True}),
    "biases everywhere": ("olmoe", {"attention_bias": True}),
    "a biased llama": ("llama", {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "tied dense": ("qwen3", {"tie_word_embeddings": True}),
    "no biases": ("qwen2_moe", {"qkv_bias": False}),
    "linear": ("olmoe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}}),
    "yarn": (
        "qwen3_moe",
        {
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512,
                "beta_fast": 24.0,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_families(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    check_same(*made(family, tmp_path, "float32", Kind.F32, **overrides), tmp_path)


WIDE: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 256},
    "olmoe": {"hidden_size": 256, "intermediate_size": 256},
    "qwen2_moe": {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_moe": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256},
    "llama": {"hidden_size": 256, "intermediate_size": 512},
    "qwen3": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256},
}  # fmt: skip
"""Rows of whole blocks."""


@pytest.mark.parametrize(
    "kind",
    [Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K],
    ids=lambda kind: kind.name,
)
def test_quantised_weights_are_those_gguf_decodes(kind: Kind, tmp_path: Path) -> None:
    """As a float32 checkpoint of the decoded weights; each type with a family by chance."""
    family = FAMILIES[RNG.integers(len(FAMILIES))]
    src, file = made(family, tmp_path, "float32", kind, quantized=True, num_hidden_layers=2, **WIDE[family])
    check_same(src, file, tmp_path)


# --- memory ---

def write_large(path: Path, hidden: int, inner: int, experts: int, vocab: int) -> float:
    """One layer of Mixtral in Q8_0 with random weights; returns its MB."""
    path.parent.mkdir()
    write_tokenizer(path.parent)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES["mixtral"]])
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden)}
    shapes |= {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}_exps": (experts, inner, hidden) for part in ("gate", "up")}
    shapes["blk.0.ffn_down_exps"] = (experts, hidden, inner)
    for name, shape in shapes.items():
        row = random_blocks(RNG, Kind.Q8_0, 64, shape[-1])
        n_rows = int(np.prod(shape[:-1]))
        writer.add_tensor(
            f"{name}.weight", np.resize(row, (n_rows, row.shape[1])).reshape(*shape[:-1], -1), raw_dtype=Kind.Q8_0
        )
    writer.add_tensor("blk.0.ffn_gate_inp.weight", RNG.normal(size=(experts, hidden)).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size / MB


def test_peak_memory(tmp_path: Path) -> None:
    """Much less than the model, and than the tensors its experts are stacked in: a few experts and a piece."""
    hidden, inner, experts, vocab = 512, 512, 96, 24_000
    write_large(tmp_path / "small" / "m.gguf", 64, 64, 4, 512)
    model_mb = write_large(tmp_path / "large" / "m.gguf", hidden, inner, experts, vocab)
    paths = [str(tmp_path / name) for name in ("small/m.gguf", "small.d2moe", "large/m.gguf", "large.d2moe")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = map(float, run.stdout.split())
    expert_mb = 3 * hidden * inner * 4 / MB
    assert model_mb > 90
    # Beside a few experts, the float32 pieces of the embedding and their codes.
    assert after - before < 4 * expert_mb + 30, f"{after:.0f} MB after {before:.0f} MB"
