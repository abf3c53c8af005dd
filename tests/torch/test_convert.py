"""Checkpoints made by transformers become containers: all families, layouts, dtypes; bad weights; resuming; memory."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    DENSE,
    FAMILIES,
    LAYOUTS,
    copy,
    edit_json,
    edited,
    tiny_checkpoint,
    write_tokenizer,
)
from peak import MEASURE
from safetensors.torch import load_file

from d2moe import planes
from d2moe.container import Container, NestedMatrix
from d2moe.container.safetensors_header import build_header
from d2moe.convert.huggingface import Checkpoint
from d2moe.convert.pipeline import convert
from d2moe.errors import CheckpointError, ConfigError, D2MoeError
from d2moe.models import shape_from_config

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    tiny_checkpoint("qwen2_moe", path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module", params=["qwen2_moe", "llama"])
def sparse_or_dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint, and what is converted of it last."""
    path = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(request.param, path, num_hidden_layers=2)
    return path, "layer 1 expert 5" if request.param == "qwen2_moe" else "layer 1 expert 0"


# --- what comes out ---


def check_matrix(w: np.ndarray, matrix: NestedMatrix, rotation: int = 0, group: int = 128) -> None:
    """Codes and scales are exactly those of planes.py, and its values are near the weights."""
    rows, cols = w.shape
    w = planes.rotate(w, rotation) / np.float32(rotation) if rotation else w
    codes = planes.untile(planes.unpack(matrix.base, matrix.planes))
    stored = codes, planes.untile_affine(matrix.affine), matrix.row_scale.reshape(-1)
    for found, wanted in zip(stored, planes.quantize(w, group), strict=True):
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
    for bits, most in ((8, 0.01), (4, 0.15), (2, 0.6)):
        error = planes.dequantize(*stored, bits, rows, cols) - w
        assert np.sqrt(np.mean(error**2) / np.mean(w**2)) < most


def check_container(path: Path, model: Any) -> None:
    """Every tensor of the container against the weights in transformers' own modules."""
    container = Container.open(path)
    rotation = container.record.rotation
    span = container.record.inner & -container.record.inner
    assert rotation == (span if span >= 32 else 0)
    seen = set()

    def linear(name: str, module: Any) -> None:
        turned = rotation if name.endswith(".down") else 0
        check_matrix(module.weight.detach().numpy(), container.read_nested(name, 8), turned)
        seen.add(name)
        if getattr(module, "bias", None) is not None:
            plain(f"{name}_bias", module.bias)

    def plain(name: str, values: torch.Tensor) -> None:
        stored = container.read_dense(name)
        assert stored.dtype == np.float32
        assert np.array_equal(stored, values.detach().numpy())
        seen.add(name)

    def block(name: str, module: Any) -> None:
        for part in ("gate", "up", "down"):
            linear(f"{name}.{part}", getattr(module, f"{part}_proj"))

    linear("embed", model.model.embed_tokens)
    if not model.config.tie_word_embeddings:
        linear("head", model.lm_head)
    plain("final_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        name = f"layers.{index}"
        plain(f"{name}.attn_norm", layer.input_layernorm.weight)
        plain(f"{name}.mlp_norm", layer.post_attention_layernorm.weight)
        for part in ("q", "k", "v", "o"):
            linear(f"{name}.attn.{part}", getattr(layer.self_attn, f"{part}_proj"))
        for part in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, part):
                plain(f"{name}.attn.{part}", getattr(layer.self_attn, part).weight)
        if model.config.model_type in DENSE:  # the block is the one expert, and its router zeros
            plain(f"{name}.router", torch.zeros(1, model.config.hidden_size))
            stored = container.read_expert(index, 0, 8)
            for part in ("gate", "up", "down"):
                turned = rotation if part == "down" else 0
                check_matrix(getattr(layer.mlp, f"{part}_proj").weight.detach().numpy(), stored[part], turned)
            continue
        if not hasattr(layer.mlp, "experts"):
            block(f"{name}.mlp", layer.mlp)
            continue
        plain(f"{name}.router", layer.mlp.gate.weight)
        if hasattr(layer.mlp, "shared_expert"):
            block(f"{name}.shared", layer.mlp.shared_expert)
            plain(f"{name}.shared.mix", layer.mlp.shared_expert_gate.weight[0])
        inner = container.record.inner
        for e in range(container.experts):
            stored = container.read_expert(index, e, 8)
            both = layer.mlp.experts.gate_up_proj[e].detach().numpy()
            down = layer.mlp.experts.down_proj[e].detach().numpy()
            for part, w in (("gate", both[:inner]), ("up", both[inner:]), ("down", down)):
                check_matrix(np.ascontiguousarray(w), stored[part], rotation if part == "down" else 0)
    assert seen == set(container.nested) | set(container.floats)
    assert len(container.dense) == 9 * len(container.nested) + len(container.floats)


def tree(path: Path) -> dict[str, str]:
    """Hash of every file of a container."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_arrives(family: str, layout: str, dtype: str, tmp_path: Path) -> None:
    _, model = tiny_checkpoint(family, tmp_path / "src", layout, dtype)
    assert convert(tmp_path / "src", tmp_path / "dst", balance=False) == tmp_path / "dst"
    check_container(tmp_path / "dst", model)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    source = Container.open(tmp_path / "dst").manifest.source
    assert source["name"] == "src"
    assert source["dtype"] == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_and_layouts_give_the_same_container(layout: str, tmp_path: Path) -> None:
    tiny_checkpoint("mixtral", tmp_path / "a")
    tiny_checkpoint("mixtral", tmp_path / "b", layout, shards=3)
    convert(tmp_path / "a", tmp_path / "a.d2moe")
    convert(tmp_path / "b", tmp_path / "b.d2moe", threads=1)
    one, other = tree(tmp_path / "a.d2moe"), tree(tmp_path / "b.d2moe")
    assert one.pop("d2moe.json") != other.pop("d2moe.json")  # names the source
    assert one == other


def test_group_of_64_without_rotation_and_attention_biases(tmp_path: Path) -> None:
    _, model = tiny_checkpoint("qwen3_moe", tmp_path / "src", attention_bias=True, num_hidden_layers=2)
    convert(tmp_path / "src", tmp_path / "dst", group=64, balance=False, rotate=False)
    container = Container.open(tmp_path / "dst")
    assert container.record.group == 64 and container.record.rotation == 0
    assert np.abs(container.read_dense("layers.1.attn.o_bias")).max() > 0
    w = model.model.layers[1].self_attn.o_proj.weight.detach().numpy()
    check_matrix(w, container.read_nested("layers.1.attn.o", 8), group=64)
    layer = container.moe_layers[0]
    down = model.model.layers[layer].mlp.experts.down_proj[0].detach().numpy()
    check_matrix(np.ascontiguousarray(down), container.read_expert(layer, 0, 8)["down"], group=64)


def test_large_matrices_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = tiny_checkpoint("mixtral", tmp_path / "src", num_hidden_layers=1)
    convert(tmp_path / "src", tmp_path / "whole", balance=False)
    monkeypatch.setattr("d2moe.convert.huggingface.PIECE_BYTES", 64 * 4 * 40)  # 40 rows, so 32
    convert(tmp_path / "src", tmp_path / "pieces", balance=False)
    assert tree(tmp_path / "whole") == tree(tmp_path / "pieces")
    check_container(tmp_path / "pieces", model)


def test_tied_embeddings(tmp_path: Path) -> None:
    _, model = tiny_checkpoint("qwen3_moe", tmp_path / "src", num_hidden_layers=2, tie_word_embeddings=True)
    convert(tmp_path / "src", tmp_path / "dst", balance=False)
    check_container(tmp_path / "dst", model)

    def untie(tensors: dict[str, torch.Tensor], change: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7, 7] += change

    Checkpoint.open(edited(tmp_path / "src", tmp_path / "same", lambda t: untie(t, 0.0))).close()
    other = edited(tmp_path / "src", tmp_path / "other", lambda t: untie(t, 1.0))
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' differs from the embedding, but config.json ties them"
    ):
        Checkpoint.open(other)


# --- weights that cannot be stored ---


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        (NAME, (3, 5), float("nan"), "has nan at [3, 5], expected finite weights"),
        (NAME, (71, 95), float("-inf"), "has -inf at [71, 95], expected finite weights"),
        (NAME, (0, 0), 2e38, "has 2e+38 at [0, 0], expected at most 1.701e+38, so that ranges fit float32"),
        ("model.embed_tokens.weight", (299, 1), float("inf"), "has inf at [299, 1]"),
        ("model.norm.weight", (9,), float("nan"), "has nan at [9]"),
        ("model.layers.1.mlp.gate.weight", (2, 3), float("inf"), "has inf at [2, 3]"),
    ],
)
def test_bad_weights(
    single: Path,
    tmp_path: Path,
    name: str,
    at: tuple[int, ...],
    value: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at] = value

    monkeypatch.setattr("d2moe.convert.huggingface.PIECE_BYTES", 96 * 4 * 64)
    path = edited(single, tmp_path / "src", spoil)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "dst")
    assert f"{path / 'model.safetensors'}: tensor '{name}' {said}" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    ("part", "at"), [("gate_up_proj", (2, 70, 5)), ("gate_up_proj", (1, 3, 5)), ("down_proj", (3, 9, 1))]
)
def test_bad_fused_weights(tmp_path: Path, part: str, at: tuple[int, int, int]) -> None:
    tiny_checkpoint("olmoe", tmp_path / "a", layout="fused", num_hidden_layers=1)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.0.mlp.experts.{part}"][at] = float("nan")

    path = edited(tmp_path / "a", tmp_path / "b", spoil)
    with pytest.raises(CheckpointError, match=re.escape(f"experts.{part}' has nan at {list(at)}")):
        convert(path, tmp_path / "dst")


def test_bad_arguments(single: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group is 48, expected a multiple of 32"):
        convert(single, tmp_path / "dst", group=48)
    with pytest.raises(ConfigError, match="threads is 0"):
        convert(single, tmp_path / "dst", threads=0)
    (tmp_path / "dst").mkdir()
    with pytest.raises(D2MoeError, match="is there already"):
        convert(single, tmp_path / "dst")


def test_ignored_keys_are_remembered(single: Path, tmp_path: Path) -> None:
    path = copy(single, tmp_path / "src")
    edit_json(path / "config.json", lambda c: c.update(magic=1))
    convert(path, tmp_path / "dst", ignore_config_keys=["magic"])
    container = Container.open(tmp_path / "dst")
    keys = container.manifest.source["ignored_config_keys"]
    assert keys == ["magic"]
    shape_from_config(container.config, "x", keys)


# --- progress, interruption, resuming ---


class Counting:
    """Progress that remembers, and raises KeyboardInterrupt after `stop` calls."""

    def __init__(self, stop: int = 10**9):
        self.stop, self.total, self.done, self.texts = stop, 0, 0, list[str]()

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, weights: int, text: str) -> None:
        self.done += weights
        self.texts += [text] if weights else []
        if len(self.texts) == self.stop:
            raise KeyboardInterrupt


def test_progress_counts_every_weight(sparse_or_dense: tuple[Path, str], tmp_path: Path) -> None:
    single, last = sparse_or_dense
    counting = Counting()
    convert(single, tmp_path / "dst", progress=counting)
    tensors = load_file(single / "model.safetensors")
    assert counting.total == counting.done == sum(t.numel() for t in tensors.values())
    assert counting.texts[0] == "embed"
    assert counting.texts[-1] == last


def test_interrupted_runs_resume_to_the_same_bytes(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "whole")
    before = 0
    for stop in (1, 7, 22, 2):  # in the embedding, among dense tensors, among experts
        counting = Counting(stop)
        with pytest.raises(
            KeyboardInterrupt, match=r"dst.partial: stopped after [\d,]+ of [\d,]+ weights; the same command"
        ):
            convert(single, tmp_path / "dst", progress=counting)
        assert counting.done > before
        before = counting.done
        assert not (tmp_path / "dst").exists()
    counting = Counting()
    convert(single, tmp_path / "dst", progress=counting)
    assert counting.done == counting.total
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    assert not (tmp_path / "dst.partial").exists()


def test_resuming_something_else_is_refused(single: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(single, tmp_path / "dst", progress=Counting(5))
    with pytest.raises(D2MoeError, match=r"dst.partial: was begun with other facts"):
        convert(single, tmp_path / "dst", group=64)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] *= 2

    other = edited(single, tmp_path / single.name, change)
    with pytest.raises(D2MoeError, match=r"was begun with other facts: source.fingerprint"):
        convert(other, tmp_path / "dst")


SLOW = """
import sys, time
from d2moe.convert.pipeline import convert

class Slow:
    def start(self, total, done):
        print("start", done, flush=True)
    def advance(self, weights, text):
        if weights:
            print(text, flush=True)
            time.sleep(0.02)

convert(sys.argv[1], sys.argv[2], progress=Slow())
"""


def test_killed_runs_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9, three times in one conversion; nothing that was reported done is done again."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    tiny_checkpoint("olmoe", src, dtype="bfloat16", shards=2)
    convert(src, tmp_path / "whole")
    reported: list[str] = []
    for lines in (3, 12, 30):
        with subprocess.Popen(
            [sys.executable, "-c", SLOW, str(src), str(dst)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stdout.readline().startswith("start")
            mine = [process.stdout.readline().strip() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            mine += [line for line in process.stdout.read().splitlines() if line]
            assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
        assert not set(mine) & set(reported)
        reported += mine
        assert not dst.exists()
    counting = Counting()
    convert(src, dst, progress=counting)
    assert not set(counting.texts) & set(reported)
    assert counting.done == counting.total
    assert tree(dst) == tree(tmp_path / "whole")


# --- memory ---

def write_large(path: Path, hidden: int, inner: int, experts: int, vocab: int, layout: str) -> float:
    """One layer of Mixtral in bf16 with random weights, written without holding it; returns its MB."""
    path.mkdir()
    config = {
        "model_type": "mixtral", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": experts,
        "num_experts_per_tok": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    stem = "model.layers.0"
    shapes |= {f"{stem}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {f"{stem}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
    shapes[f"{stem}.mlp.gate.weight"] = (experts, hidden)
    if layout == "fused":
        shapes[f"{stem}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        shapes[f"{stem}.mlp.experts.down_proj"] = (experts, hidden, inner)
    else:
        for e in range(experts):
            one = f"{stem}.block_sparse_moe.experts.{e}"
            shapes |= {f"{one}.w1.weight": (inner, hidden), f"{one}.w3.weight": (inner, hidden)}
            shapes[f"{one}.w2.weight"] = (hidden, inner)
    header, entries = build_header({name: ("BF16", shape) for name, shape in shapes.items()})
    block = np.random.default_rng(0).normal(size=1 << 19).astype(np.float32).view(np.uint32) >> 16
    data = block.astype(np.uint16).tobytes()
    n_bytes = sum(entry.n_bytes for entry in entries.values())
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        for at in range(0, n_bytes, len(data)):
            file.write(data[: n_bytes - at])
    return n_bytes / 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory(layout: str, tmp_path: Path) -> None:
    """Much less than the model, and than the tensors its experts are fused in: a few experts and a piece."""
    hidden, inner, experts, vocab = 512, 512, 48, 24_000
    write_large(tmp_path / "small", 64, 64, 4, 512, layout)
    model_mb = write_large(tmp_path / "large", hidden, inner, experts, vocab, layout)
    folders = [str(tmp_path / name) for name in ("small", "small.d2moe", "large", "large.d2moe")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = map(float, run.stdout.split())
    expert_mb, embedding_mb = 3 * hidden * inner * 4 / 2**20, vocab * hidden * 2 / 2**20
    assert model_mb > 90
    assert after - before < 4 * expert_mb + embedding_mb, f"{after:.0f} MB after {before:.0f} MB"
