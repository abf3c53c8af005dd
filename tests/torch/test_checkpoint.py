"""What is refused of a checkpoint before anything is written, and that configs are read as transformers reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    FAMILIES,
    Edit,
    copy,
    drop,
    edit_json,
    edited,
    tiny_checkpoint,
    tiny_config,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from d2moe.convert.huggingface import Checkpoint
from d2moe.errors import CheckpointError, ConfigError, D2MoeError
from d2moe.models import shape_from_config
from d2moe.models.rope import attention_scale, inverse_frequencies


def refusal(path: Path, error: type[D2MoeError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        Checkpoint.open(path).close()
    return str(caught.value)


# --- config and rope against transformers ---


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0,
            "truncate": False, "beta_fast": 16, "beta_slow": 2,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.3},
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 2, "high_freq_factor": 2.5,
            "original_max_position_embeddings": 256,
        },
    ],
)  # fmt: skip
def test_rope_is_that_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    config = tiny_config("qwen3_moe", rope_parameters=dict(parameters), head_dim=head_dim)
    theirs = Qwen3MoeRotaryEmbedding(config)
    rope = shape_from_config(json.loads(config.to_json_string()), "config.json").rope
    ours = inverse_frequencies(rope, head_dim)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2.5e-7)  # two units in the last place of pow
    assert attention_scale(rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_spelling_give_one_shape(family: str, tmp_path: Path) -> None:
    """The config that transformers 5 writes, and the same one as transformers 4 wrote it."""
    new = json.loads(tiny_config(family).to_json_string(use_diff=False))
    old = dict(new)
    parameters = old.pop("rope_parameters")
    old |= {"rope_theta": parameters["rope_theta"], "rope_scaling": None, "torch_dtype": old.pop("dtype")}
    if parameters["rope_type"] != "default":
        old["rope_scaling"] = {"type" if key == "rope_type" else key: v for key, v in parameters.items() if key != "rope_theta"}
    for key in ("num_experts", "num_local_experts"):
        if key in old:
            old["num_local_experts" if family == "mixtral" else "num_experts"] = old.pop(key)
    assert shape_from_config(old, "old") == shape_from_config(new, "new")


# --- bad input, refused before anything is written ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    tiny_checkpoint("mixtral", path, shards=3, num_hidden_layers=1)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    tiny_checkpoint("qwen2_moe", path, num_hidden_layers=2)
    return path


def test_missing_folder_and_files(single: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "is a file" in refusal(single / "config.json")
    path = copy(single, tmp_path / "a")
    (path / "model.safetensors").unlink()
    assert "found no weights at all, expected model.safetensors or model.safetensors.index.json" in refusal(path)
    (path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights are not read, save the model again with save_pretrained" in refusal(path)
    (path / "config.json").unlink()
    assert "config.json: no such file" in refusal(path)


def test_missing_or_broken_tokenizer(single: Path, tmp_path: Path) -> None:
    path = copy(single, tmp_path / "a")
    (path / "tokenizer.json").write_text("{}")
    assert 'tokenizer.json: has no "model"' in refusal(path)
    (path / "tokenizer.json").unlink()
    message = refusal(path)
    assert "tokenizer.json: no such file" in message
    assert "AutoTokenizer" in message
    assert f".save_pretrained('{path}')" in message


def test_broken_config(single: Path, tmp_path: Path) -> None:
    path = copy(single, tmp_path / "a")
    edit_json(path / "config.json", lambda c: c.update(model_type="gpt2"))
    assert "model_type is 'gpt2'" in refusal(path, ConfigError)
    edit_json(path / "config.json", lambda c: c.update(model_type="qwen2_moe", magic=1))
    assert f"{path / 'config.json'}: unknown key magic" in refusal(path, ConfigError)
    Checkpoint.open(path, ignore_config_keys=["magic"]).close()
    (path / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(path)


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path / "a")
    (path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(path)
    assert "model-00002-of-00003.safetensors: no such file; model.safetensors.index.json places" in message
    assert "download the missing file" in message


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path / "a")
    shard = path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert re.search(r"model-00002-of-00003.safetensors: .*(cut|download)", refusal(path))
    shard.write_bytes(whole[:20])
    assert "model-00002-of-00003.safetensors: the header claims" in refusal(path)
    shard.write_bytes(b"")
    assert "has 0 bytes" in refusal(path)


def test_index_of_another_checkpoint(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path / "a")
    index = path / "model.safetensors.index.json"
    edit_json(index, lambda t: t["weight_map"].update({"model.extra": "model-00001-of-00003.safetensors"}))
    message = refusal(path)
    assert f"{index}: says that tensor 'model.extra' is in 'model-00001-of-00003.safetensors', which has no" in message
    edit_json(index, lambda t: (t["weight_map"].pop("model.extra"), t["weight_map"].pop("model.norm.weight")))
    assert f"{index}: has no tensor 'model.norm.weight', needed for final_norm" in refusal(path)


@pytest.mark.parametrize("file", ["../m.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..safetensors", 3, "x"])
def test_index_that_leaves_the_folder(sharded: Path, tmp_path: Path, file: object) -> None:
    path = copy(sharded, tmp_path / "a")
    edit_json(path / "model.safetensors.index.json", lambda t: t["weight_map"].update({"lm_head.weight": file}))
    message = refusal(path)
    assert f"places tensor 'lm_head.weight' in {file!r}, expected the name of a .safetensors file in the" in message


def test_index_without_map(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path / "a")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "has no weight_map" in refusal(path)


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_wrong_tensors(single: Path, tmp_path: Path) -> None:
    def case(name: str, edit: Edit) -> str:
        return refusal(edited(single, tmp_path / name, edit))

    message = case("shape", lambda t: t.update({NAME: t[NAME][:-1].contiguous()}))
    assert f"model.safetensors: tensor '{NAME}' has shape [71, 96], expected [72, 96] from config.json" in message
    message = case("type", lambda t: t.update({NAME: t[NAME].char()}))
    assert "has dtype I8, expected BF16, F16, F32; a quantised checkpoint" in message
    message = case("absent", lambda t: drop(t, NAME))
    assert f"has no tensor '{NAME}', needed for layer 1 expert 3; is the checkpoint complete" in message
    message = case("head", lambda t: drop(t, "lm_head.weight"))
    assert "needed for head; is tie_word_embeddings missing" in message
    message = case("extra", lambda t: t.update({"model.layers.2.mlp.gate.weight": torch.zeros(6, 96)}))
    assert "tensor 'model.layers.2.mlp.gate.weight' is not part of the qwen2_moe model that config.json" in message


def test_half_a_fused_layer(tmp_path: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path / "a", layout="fused", num_hidden_layers=1)
    path = edited(tmp_path / "a", tmp_path / "b", lambda t: drop(t, "model.layers.0.mlp.experts.down_proj"))
    assert "has no tensor 'model.layers.0.mlp.experts.down_proj', needed for the experts of layer 0" in refusal(path)


def test_ignorable_buffers(single: Path, tmp_path: Path) -> None:
    def add(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(12)

    Checkpoint.open(edited(single, tmp_path / "a", add)).close()
