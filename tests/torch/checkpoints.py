"""Tiny random checkpoints of each family, made with transformers, for tests.

Weights are decisive: norms are not 1, biases not 0, routers sharp, so that a wrong name, order or norm changes the
logits. Sizes are awkward on purpose: head_dim * heads is not hidden, widths are not multiples of a group or of 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "llama", "qwen3")
DENSE = ("llama", "qwen3")
LAYOUTS = ("separate", "fused")
Edit = Callable[[dict[str, torch.Tensor]], None]

END = 256
"""Id of the token "<|end|>", after the 256 bytes."""

transformers.utils.logging.disable_progress_bar()

_COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 128,
        "head_dim": 40,
        "intermediate_size": 200,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "clip_qkv": 1.5,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "hidden_size": 96,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "moe_intermediate_size": 72,
        "shared_expert_intermediate_size": 136,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [0],
    },
    "llama": {
        "hidden_size": 96,
        "intermediate_size": 200,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3": {
        "hidden_size": 128,
        "head_dim": 40,
        "intermediate_size": 168,
    },
}  # fmt: skip


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model; `overrides` are keys of its config.json."""
    values = {**_COMMON, **_FAMILY[family], **overrides}
    return transformers.AutoConfig.for_model(family, **values)


def tiny_checkpoint(
    family: str,
    path: Path,
    layout: str = "separate",
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    decisive: bool = True,
    **overrides: Any,
) -> tuple[Any, Any]:
    """Write a checkpoint into `path`; returns (config, model), the model in float32 with exactly the saved weights.

    "separate" has one tensor per expert (what transformers' save_pretrained writes), "fused" one per layer (its
    state_dict). `decisive=False` leaves the weights as transformers initialises them.
    """
    assert layout in LAYOUTS, layout
    config = tiny_config(family, **overrides)
    config.dtype = dtype
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if decisive:
        randomize(model)
    model.to(getattr(torch, dtype))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    if layout == "fused":
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        tensors = load_file(path / "model.safetensors")
    write_shards(path, tensors, shards)
    write_tokenizer(path)
    return config, model.to(torch.float32)


def randomize(model: Any) -> None:
    """Weights of a size that keeps activations near 1, with everything that could be mixed up set apart."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
            elif p.dim() == 1:  # norms
                p.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                p.normal_(std=2.5 * p.shape[-1] ** -0.5)
            elif name.endswith("embed_tokens.weight"):
                p.normal_(std=1.0)
            else:
                p.normal_(std=1.3 * p.shape[-1] ** -0.5)


def write_shards(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` files and their index; removes what was there."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]  # a layer's tensors end up in different files
        save_file({name: tensors[name] for name in mine}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(path: Path) -> None:
    """A tokenizer of single bytes and "<|end|>", with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    assert tokenizer.token_to_id("<|end|>") == END
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def copy(source: Path, to: Path) -> Path:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edited(source: Path, to: Path, edit: Edit) -> Path:
    """A copy of a one-file checkpoint with other tensors."""
    copy(source, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))
