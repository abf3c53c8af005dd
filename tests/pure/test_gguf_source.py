"""GGUF files as a source: every family's tensors in their places, metadata as a config, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_models import EXPERTS, HEAD_DIM, HIDDEN, INNER, KINDS, KV_HEADS, LAYERS, SHARED, VOCAB, metadata, write

from d2moe.convert.gguf_config import ARCHITECTURES
from d2moe.convert.gguf_source import GgufModel, file_name
from d2moe.convert.huggingface import Checkpoint
from d2moe.convert.source import open_source
from d2moe.errors import CheckpointError, ConfigError
from d2moe.types import RopeShape

RNG = np.random.default_rng()
Keys = dict[str, Any]


def halves_apart(w: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Row by row: llama.cpp's pair (2i, 2i + 1) of a head is the pair (i, i + head_dim/2) of transformers."""
    out = np.empty_like(w)
    for row in range(len(w)):
        head, at = divmod(row, head_dim)
        half, i = divmod(at, head_dim // 2)
        out[row] = w[head * head_dim + 2 * i + half]
    return out


@pytest.mark.parametrize("kind", [Kind.F32, KINDS[RNG.integers(1, len(KINDS))]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_weight_is_in_its_place(arch: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly what gguf decodes, in pieces of whole tiles and heads; q and k of Mixtral in the config's order."""
    monkeypatch.setattr("d2moe.convert.gguf_source.PIECE_BYTES", 50 * HIDDEN * 4)
    weights = write(tmp_path / "m.gguf", arch, RNG, kind)
    with open_source(tmp_path / "m.gguf") as model:
        assert isinstance(model, GgufModel)
        for name, source in model.names.dense.items():
            wanted = weights.pop(file_name(name))
            if not source.quantized:
                assert np.array_equal(model.read_dense(name), wanted), name
                continue
            if arch == "llama" and name.endswith((".attn.q", ".attn.k")):
                wanted = halves_apart(wanted, HEAD_DIM)
            pieces = list(model.linear_pieces(name, 16))
            assert all(len(piece) % 16 == 0 for piece in pieces[:-1])
            assert len(pieces) > 1 or len(wanted) <= 80
            assert np.array_equal(np.concatenate(pieces), wanted), name
            assert model.weights(name) == wanted.size
        for layer in range(LAYERS):
            three = {p: weights.pop(f"blk.{layer}.ffn_{p}_exps.weight") for p in ("gate", "up", "down")}
            for index in range(EXPERTS):
                found = dict(model.read_expert(layer, index))
                assert list(found) == ["gate", "up", "down"]
                assert all(np.array_equal(found[p], w[index]) for p, w in three.items())
        facts = model.facts()
    assert not weights
    assert facts["name"] == "m" and kind.name in facts["dtype"] and list(facts["files"]) == ["m.gguf"]


def test_the_same_file_gives_the_same_facts_and_files(tmp_path: Path) -> None:
    """A conversion that was interrupted must recognise its source."""
    seed = int(RNG.integers(1 << 31))
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "m.gguf", "olmoe", np.random.default_rng(seed))
    with open_source(tmp_path / "a" / "m.gguf") as a, open_source(tmp_path / "b" / "m.gguf") as b:
        assert a.facts() == b.facts() and a.companions() == b.companions()
        assert list(a.companions()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    write(tmp_path / "b" / "m.gguf", "olmoe", np.random.default_rng(seed + 1))
    with open_source(tmp_path / "b" / "m.gguf") as b:
        assert a.facts()["fingerprint"] != b.facts()["fingerprint"]


# --- metadata ---


def test_shapes_of_the_families(tmp_path: Path) -> None:
    shapes = {}
    for arch in ARCHITECTURES:
        write(tmp_path / "m.gguf", arch, RNG)
        with open_source(tmp_path / "m.gguf") as model:
            shapes[arch] = model.shape
    for arch, shape in shapes.items():
        assert (shape.vocab, shape.hidden, shape.layers, shape.kv_heads) == (VOCAB, HIDDEN, LAYERS, KV_HEADS)
        assert (shape.experts, shape.expert_inner, shape.rms_eps) == (EXPERTS, INNER, 1e-5)
        assert shape.rope == RopeShape(theta=1e6) and shape.context == 512
        assert shape.eos_ids == (VOCAB - 2,) and shape.bos_id is None
        assert shape.moe_layers == (0, 1) and shape.windows == (0, 0) and not shape.tied_embeddings
        assert shape.norm_top_k is (arch in ("llama", "qwen3moe"))
        assert shape.qkv_bias is (arch == "qwen2moe") and not shape.o_bias
        assert shape.shared_inner == (SHARED if arch == "qwen2moe" else 0)
        assert shape.qk_norm == {"olmoe": "all", "qwen3moe": "head"}.get(arch, "none")
        assert shape.head_dim == (HIDDEN // 4 if arch == "olmoe" else HEAD_DIM)


def shape_of(path: Path, arch: str, keys: Keys | None = None, tensors: Keys | None = None, *ignore: str) -> Any:
    write(path / "m.gguf", arch, RNG, keys=keys, tensors=tensors)
    with open_source(path / "m.gguf", ignore) as model:
        return model.shape


def test_keys_that_change_the_shape(tmp_path: Path) -> None:
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_attn_factor": 1.25,
    }
    shape = shape_of(tmp_path, "llama", yarn | {"llama.context_length": 2048})
    assert shape.context == 2048
    assert shape.rope == RopeShape(1e6, "yarn", 4.0, 512, beta_fast=16.0, attention_factor=1.25)
    linear = {"qwen3moe.rope.scale_linear": 2.0}
    assert shape_of(tmp_path, "qwen3moe", linear).rope == RopeShape(1e6, "linear", 2.0)
    none = {"qwen3moe.rope.scaling.type": "none", "qwen3moe.rope.scaling.factor": 2.0}
    assert shape_of(tmp_path, "qwen3moe", none).rope == RopeShape(1e6)
    assert shape_of(tmp_path, "llama", {"llama.attention.sliding_window": 64}).windows == (64, 64)
    assert shape_of(tmp_path, "olmoe", {"olmoe.attention.clamp_kqv": 8.0}).clip_qkv == 8.0
    assert shape_of(tmp_path, "olmoe", {"olmoe.attention.head_count_kv": [KV_HEADS] * LAYERS}).kv_heads == KV_HEADS
    for arch in ("llama", "qwen3moe"):
        assert shape_of(tmp_path, arch, tensors={"output.weight": None}).tied_embeddings
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.bos_token_id": 1}
    assert shape_of(tmp_path, "qwen3moe", ends).eos_ids == (VOCAB - 2, 3)
    assert shape_of(tmp_path, "qwen3moe", ends).bos_id == 1
    assert shape_of(tmp_path, "llama", {"llama.new": 1}, None, "llama.new").experts == EXPERTS


def test_widths_of_old_files(tmp_path: Path) -> None:
    """Before these keys, llama.cpp divided feed_forward_length."""
    keys = {
        "qwen2moe.expert_feed_forward_length": None,
        "qwen2moe.expert_shared_feed_forward_length": None,
        "qwen2moe.feed_forward_length": 512,
    }
    shape = shape_of(tmp_path, "qwen2moe", keys)
    assert (shape.expert_inner, shape.shared_inner) == (256, 512)


def test_dense_models(tmp_path: Path) -> None:
    """Their blocks are one expert each; the whole of the weights is compared in tests/torch/test_gguf.py."""
    none: Keys = {}
    for layer in range(LAYERS):
        none |= {f"blk.{layer}.ffn_{p}_exps.weight": None for p in ("gate", "up", "down")}
        none |= {f"blk.{layer}.ffn_{p}.weight": RNG.normal(size=(INNER, HIDDEN)).astype(np.float32) for p in ("gate", "up", "down")}
        none[f"blk.{layer}.ffn_gate_inp.weight"] = None
    keys = {"llama.expert_count": None, "llama.expert_used_count": None}
    write(tmp_path / "m.gguf", "llama", RNG, keys=keys, tensors=none)
    with open_source(tmp_path / "m.gguf") as model:
        shape = model.shape
        assert (shape.model_type, shape.experts, shape.top_k, shape.expert_inner) == ("llama", 1, 1, INNER)
        assert shape.moe_layers == (0, 1) and shape.rope == RopeShape(1e6)
        assert not model.read_dense("layers.1.router").any() and model.weights("layers.1.router") == 0
        assert np.array_equal(dict(model.read_expert(1, 0))["up"], none["blk.1.ffn_up.weight"])
    window = {"llama.attention.sliding_window": 64}
    with pytest.raises(ConfigError, match=r"sliding_window is 64"):
        shape_of(tmp_path, "llama", keys | window, none)
    rope = np.full(HEAD_DIM // 2, np.nan, np.float32)
    with pytest.raises(CheckpointError, match="scales the rotary"):
        shape_of(tmp_path, "llama", keys, none | {"rope_freqs.weight": rope})


def test_biases(tmp_path: Path) -> None:
    bias: Keys = {"blk.0.attn_output.bias": RNG.normal(size=HIDDEN).astype(np.float32)}
    for layer in range(LAYERS):
        for part, n in (("q", 4 * HEAD_DIM), ("k", 2 * HEAD_DIM), ("v", 2 * HEAD_DIM), ("output", HIDDEN)):
            bias[f"blk.{layer}.attn_{part}.bias"] = RNG.normal(size=n).astype(np.float32)
    assert shape_of(tmp_path, "qwen3moe", None, bias).o_bias
    none = {f"blk.{layer}.attn_{part}.bias": None for layer in range(LAYERS) for part in "qkv"}
    assert not shape_of(tmp_path, "qwen2moe", None, none).qkv_bias


BAD_KEYS: dict[str, tuple[str, Keys, str]] = {
    "architecture": ("olmoe", {"general.architecture": "gemma"}, "general.architecture is 'gemma', supported are llama"),
    "no experts": ("olmoe", {"olmoe.expert_count": None}, "architecture 'olmoe' without experts (olmoe.expert_count), supp"),
    "zero experts": ("llama", {"llama.expert_count": 0}, "llama.expert_used_count is 2, expected 0, as there are no exp"),
    "dense experts": ("qwen3", {}, "architecture 'qwen3' with experts (qwen3.expert_count), supported so are llama, olmoe"),
    "split": ("olmoe", {"split.count": 3, "split.no": 0}, "split into 3 files; join them with llama-gguf-split --merge"),
    "adapter": ("olmoe", {"general.type": "adapter"}, "general.type is 'adapter', expected 'model'"),
    "layers": ("olmoe", {"olmoe.block_count": None}, "olmoe.block_count is missing, expected a whole number"),
    "absurd layers": ("olmoe", {"olmoe.block_count": 1 << 30}, "fewer layers than the file has tensors"),
    "theta": ("llama", {"llama.rope.freq_base": None}, "llama.rope.freq_base is missing, expected a positive number"),
    "epsilon": ("llama", {"llama.attention.layer_norm_rms_epsilon": 0.0}, "is 0.0, expected a positive number"),
    "lists": ("olmoe", {"olmoe.attention.head_count": [4, 8]}, "the same for all layers"),
    "text": ("olmoe", {"olmoe.context_length": "long"}, "olmoe.context_length is 'long', expected a whole number"),
    "rotary part": ("llama", {"llama.rope.dimension_count": 20}, "llama.rope.dimension_count is 20, expected the size"),
    "values": ("qwen3moe", {"qwen3moe.attention.value_length": 64}, "expected the size of a head, 40"),
    "vocabulary": ("llama", {"llama.vocab_size": 49}, "llama.vocab_size is 49, expected the 48 rows"),
    "top k": ("olmoe", {"olmoe.expert_used_count": 7}, "num_experts_per_tok is 7, expected at most"),
    "gating": ("qwen3moe", {"qwen3moe.expert_gating_func": 2}, "expert_gating_func is 2, expected 1"),
    "scale": ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}, "expert_weights_scale is 2.5, expected 0 or 1"),
    "norm": ("qwen2moe", {"qwen2moe.expert_weights_norm": True}, "expert_weights_norm is True, expected False"),
    "shared": ("llama", {"llama.expert_shared_count": 1}, "expert_shared_count is 1, expected 0"),
    "width": ("olmoe", {"olmoe.expert_feed_forward_length": 128}, "expected feed_forward_length, 256"),
    "rope": ("llama", {"llama.rope.scaling.type": "longrope"}, "is 'longrope', expected none, linear or yarn"),
    "yarn": ("llama", {"llama.rope.scaling.type": "yarn"}, "rope.scaling.factor is missing, expected a positive"),
    "window": ("qwen3moe", {"qwen3moe.attention.sliding_window": 64}, "sliding_window is 64, expected none"),
    "unknown": ("olmoe", {"olmoe.a.b": 1, "olmoe.c": "x"}, "unknown keys olmoe.a.b, olmoe.c, which may change"),
    "one unknown": ("olmoe", {"olmoe.logit_scale": 2.0}, "convert with --ignore-config-key olmoe.logit_scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_metadata_that_is_refused(name: str, tmp_path: Path) -> None:
    arch, keys, message = BAD_KEYS[name]
    path = tmp_path / "m.gguf"
    write(path, arch, RNG, keys={key: value for key, value in keys.items() if key != "general.architecture"})
    if "general.architecture" in keys:
        path.write_bytes(path.read_bytes().replace(b"olmoe", b"gemma", 1))
    with pytest.raises(ConfigError) as caught:
        open_source(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


# --- tensors ---


BAD_TENSORS: dict[str, tuple[str, Keys, str]] = {
    "missing": ("qwen3moe", {"blk.1.ffn_norm.weight": None}, "has no tensor 'blk.1.ffn_norm.weight', needed for this"),
    "no head": ("olmoe", {"output.weight": None}, "has no tensor 'output.weight'"),
    "no router": ("qwen2moe", {"blk.0.ffn_gate_inp.weight": None}, "has no tensor 'blk.0.ffn_gate_inp.weight'"),
    "no experts": ("llama", {"blk.1.ffn_up_exps.weight": None}, "has no tensor 'blk.1.ffn_up_exps.weight'"),
    "a bias": ("qwen2moe", {"blk.1.attn_k.bias": None}, "has no tensor 'blk.1.attn_k.bias'"),
    "fused qkv": (
        "olmoe", {"blk.0.attn_q.weight": None, "blk.0.attn_qkv.weight": (512, HIDDEN)}, "make it without --fuse-qkv"
    ),
    "fused gate": (
        "olmoe",
        {"blk.0.ffn_gate_exps.weight": None, "blk.0.ffn_gate_up_exps.weight": (EXPERTS, 512, HIDDEN)},
        "make it without --fuse-gate-up-exps",
    ),
    "old experts": (
        "llama",
        {"blk.0.ffn_gate_exps.weight": None, "blk.0.ffn_gate.0.weight": (INNER, HIDDEN)},
        "one tensor per expert is of an old llama.cpp",
    ),
    "shape": ("llama", {"blk.0.attn_v.weight": (HIDDEN, 2 * HEAD_DIM)}, "has shape [256, 80], expected [80, 256]"),
    "a dense layer": (
        "qwen3moe",
        {"blk.1.ffn_gate_inp.weight": None, "blk.1.ffn_up.weight": (INNER, HIDDEN)},
        "has no tensor 'blk.1.ffn_gate_inp.weight'",
    ),
    "scaled rope": ("llama", {"rope_freqs.weight": (HEAD_DIM // 2,)}, "'rope_freqs.weight' scales the rotary"),
    "rope of another size": ("llama", {"rope_freqs.weight": (2, HEAD_DIM)}, "'rope_freqs.weight' scales the rotary"),
    "leftover": ("qwen3moe", {"blk.0.attn_v.bias_2": (9,)}, "'blk.0.attn_v.bias_2' is not part of the qwen3_moe"),
    "a bias too many": ("llama", {"blk.0.attn_q.bias": (160,)}, "'blk.0.attn_q.bias' is not part of the mixtral"),
    "no vocabulary": ("llama", {"token_embd.weight": None}, "has no matrix 'token_embd.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_are_refused(name: str, tmp_path: Path) -> None:
    arch, changes, message = BAD_TENSORS[name]
    tensors = {n: s and RNG.normal(size=s).astype(np.float32) for n, s in changes.items()}
    write(tmp_path / "m.gguf", arch, RNG, tensors=tensors)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_source(tmp_path / "m.gguf")
    assert message in str(caught.value) and str(tmp_path / "m.gguf") in str(caught.value)


@pytest.mark.parametrize("kind", [np.int32, np.float64])
def test_types_that_are_no_weights(kind: type, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "olmoe", RNG, tensors={"blk.0.attn_q.weight": np.ones((HIDDEN, HIDDEN), kind)})
    with pytest.raises(
        CheckpointError, match=r"attn_q.weight' has type [IF]\d\d, which the gguf package cannot decode"
    ):
        open_source(tmp_path / "m.gguf")


# --- choosing the format ---


def test_what_is_opened_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By suffix or first bytes; a folder is a checkpoint; without the gguf package the error says what to install."""
    write(tmp_path / "m.gguf", "olmoe", RNG)
    with pytest.raises(
        CheckpointError, match=f"has no config.json, but GGUF files; give one of them, such as {tmp_path}"
    ):
        open_source(tmp_path)
    src = (tmp_path / "m.gguf").rename(tmp_path / "sha256-abc")
    open_source(src).close()
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(tmp_path / "none.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"is a file; give a \.gguf file, or the folder"):
        open_source(tmp_path / "model.safetensors")
    opened = []
    monkeypatch.setattr(Checkpoint, "open", lambda path, ignored: opened.append(path))
    open_source(tmp_path)
    assert opened == [tmp_path]
    blocked = (
        f"import sys; sys.modules['gguf'] = None; from d2moe.cli import main; main(['convert', {str(src)!r}, 'x'])"
    )
    run = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert run.stderr.startswith(f"error: {src}: reading a GGUF file needs the gguf package; pip install gguf")


def test_names_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    """The table of tensor names and the keys of the tests against the package's own lists."""
    known = {key.replace("{arch}", arch) for arch in ARCHITECTURES for group in vars(gguf.Keys).values()
             if isinstance(group, type) for key in vars(group).values() if isinstance(key, str)}  # fmt: skip
    for arch in ARCHITECTURES:
        assert set(metadata(arch)) <= known
        write(tmp_path / "m.gguf", arch, RNG)
        model_arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        stems = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[model_arch]}
        with open_source(tmp_path / "m.gguf") as model:
            assert isinstance(model, GgufModel)
            for name in model.file.tensors:
                stem = name.rpartition(".")[0]
                assert stem in {s.format(bid=stem.split(".")[1] if "." in stem else "") for s in stems}, name
