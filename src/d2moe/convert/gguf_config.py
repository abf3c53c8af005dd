"""The metadata of a GGUF file as the `config.json` that the model had before llama.cpp's converter.

Truth is llama.cpp: conversion/*.py for what is written, src/models/*.cpp for what is fixed per architecture and stands
in no file. What a Hugging Face config says and the converter leaves out cannot come back: a sliding window that was
switched on, or a Qwen3-MoE trained without normalised gates. Keys nobody knows are an error, as in config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import shown
from d2moe.errors import ConfigError
from d2moe.models.rope import inverse_frequencies
from d2moe.types import RopeShape

ARCHITECTURES = {"llama": "mixtral", "olmoe": "olmoe", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""GGUF architecture → model_type where there are experts."""
DENSE = {"llama": "llama", "qwen3": "qwen3"}
"""GGUF architecture → model_type where there are none."""
TIED = ("llama", "qwen3moe", "qwen3")
"""Architectures whose head may be missing: it is the embedding then. llama.cpp refuses the others without a head."""
QWEN = ("qwen2moe", "qwen3moe")
LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""The rope of all models that Meta published since Llama 3.1, but for its factor."""
AGAIN = "make it again with a current llama.cpp, or convert the original checkpoint"
_MISSING: Any = object()

# Keys under the architecture whose other values would need code, and those values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# Of training, of other norms, or of how the file came about.
IRRELEVANT = frozenset({"attention.layer_norm_epsilon", "rope.scaling.finetuned", "tensor_data_layout"})


class Metadata:
    """The keys of a file and the record of which were looked at. `where` is the file named in errors.

    `architecture` is one of ARCHITECTURES or DENSE, `model_type` what it is there. Ignored keys count as absent. Raises
    ConfigError for files of another kind.
    """

    def __init__(self, values: Mapping[str, Any], where: str, ignore_keys: Collection[str] = ()):
        self.where = where
        self._values = {key: value for key, value in values.items() if key not in ignore_keys}
        self._used: set[str] = set()
        if self._values.get("split.count", 0) not in (0, 1):
            raise ConfigError(
                f"{where}: is part of a model that is split into {self._values['split.count']} files; join them with "
                "llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf and convert WHOLE.gguf"
            )
        kind = self._values.get("general.type", "model")
        if kind != "model":
            raise ConfigError(f"{where}: general.type is {kind!r}, expected 'model'; give the file of the model itself")
        architecture = self._values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES | DENSE:
            found = "missing" if architecture is None else shown(architecture)
            raise ConfigError(
                f"{where}: general.architecture is {found}, supported are {', '.join(ARCHITECTURES)} with experts, "
                f"{', '.join(DENSE)} without"
            )
        self.architecture = architecture
        self.has_experts = self.integer("expert_count", 0, least=0) > 0
        table = ARCHITECTURES if self.has_experts else DENSE
        if architecture not in table:
            raise ConfigError(
                f"{where}: architecture {architecture!r} {'with' if self.has_experts else 'without'} experts "
                f"({self.full('expert_count')}), supported so are {', '.join(table)}"
            )
        self.model_type = table[architecture]

    def full(self, key: str) -> str:
        """A key with the architecture before it, unless it has a section of its own."""
        return key if key.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        return self.full(key) in self._values

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(self.full(key))
        return self._values.get(self.full(key), default)

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that is not what this key may hold."""
        key = self.full(key)
        value = self._values.get(key)
        found = f"is {shown(value)}" if key in self._values else "is missing"
        return ConfigError(f"{self.where}: {key} {found}, expected {expected}; {AGAIN}")

    def integer(self, key: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number. A list, one per layer, must have the same everywhere."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.error(key, f"a whole number of at least {least}, the same for all layers")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(key, "a positive number")
        return float(value)

    def token(self, key: str, default: int | None = None) -> int | None:
        """A token id of the tokenizer section, or `default` where there is none."""
        key = f"tokenizer.ggml.{key}_token_id"
        return self.integer(key, least=0) if self.has(key) else default

    def finish(self) -> None:
        """Check what no one asked for: neutral values pass, unknown keys are an error."""
        prefix = f"{self.architecture}."
        mine = [key.removeprefix(prefix) for key in self._values if key.startswith(prefix) and key not in self._used]
        for key in mine:
            if key in NEUTRAL and not any(np.array_equal(self.get(key), allowed) for allowed in NEUTRAL[key]):
                raise self.error(key, " or ".join(map(str, NEUTRAL[key])))
        unknown = sorted(prefix + key for key in mine if key not in NEUTRAL and key not in IRRELEVANT)
        if unknown:
            options = " ".join(f"--ignore-config-key {key}" for key in unknown)
            raise ConfigError(
                f"{self.where}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, which may change "
                f"what the model computes; if you know that it does not, convert with {options}"
            )


def config_from(
    m: Metadata, tensors: Mapping[str, tuple[int, ...]], divisors: npt.NDArray[np.float32] | None = None
) -> dict[str, Any]:
    """The config.json of a file with these tensors, {name: shape}. Raises ConfigError.

    `divisors` float32 [head_dim / 2], of the rotary frequencies, are the contents of `rope_freqs.weight`, if it is there. The
    tensors tell what has no key: the rows of the vocabulary, biases, a head of its own. All layers have experts, or none
    has: llama.cpp knows no mixed models in these architectures.
    """
    hidden, heads, layers = m.integer("embedding_length"), m.integer("attention.head_count"), m.integer("block_count")
    if layers > len(tensors):
        raise m.error("block_count", f"fewer layers than the file has tensors, {len(tensors)}")
    head_dim = m.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if m.integer(key, head_dim) != head_dim:
            raise m.error(key, f"the size of a head, {head_dim}")
    config: dict[str, Any] = {
        "model_type": m.model_type,
        "vocab_size": _vocabulary(m, tensors),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": m.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base"),
        "rope_scaling": _rope_scaling(m) if divisors is None else _llama3(m, head_dim, divisors),
        "tie_word_embeddings": m.architecture in TIED and "output.weight" not in tensors,
        **_tokens(m),
        **(_experts(m) if m.has_experts else _block(m)),
        **_attention(m, tensors, layers),
    }
    m.finish()
    return config


def _vocabulary(m: Metadata, tensors: Mapping[str, tuple[int, ...]]) -> int:
    shape = tensors.get("token_embd.weight", ())
    if len(shape) != 2:
        raise ConfigError(f"{m.where}: has no matrix 'token_embd.weight', so no vocabulary; {AGAIN}")
    if m.integer("vocab_size", shape[0]) != shape[0]:
        raise m.error("vocab_size", f"the {shape[0]} rows of token_embd.weight")
    return shape[0]


def _rope_scaling(m: Metadata) -> dict[str, Any] | None:
    kind = m.get("rope.scaling.type", "linear")  # llama.cpp's default, which without a factor is none
    factor = m.get("rope.scaling.factor", m.get("rope.scale_linear", 0))
    context = m.get("rope.scaling.original_context_length")
    yarn = {key: m.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow", "attn_factor")}
    if kind not in ("none", "linear", "yarn"):
        raise m.error("rope.scaling.type", "none, linear or yarn")
    if not isinstance(factor, int | float) or (kind == "yarn" and not factor):
        raise m.error("rope.scaling.factor", "a positive number")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    yarn["attention_factor"] = yarn.pop("attn_factor")
    given = {"original_max_position_embeddings": context, **yarn}
    return {"rope_type": kind, "factor": factor, **{key: value for key, value in given.items() if value is not None}}


def _llama3(m: Metadata, head_dim: int, divisors: npt.NDArray[np.float32]) -> dict[str, Any] | None:
    """The rope scaling that gives these divisors, of which the file does not have the parameters; None if LLAMA3 does not."""
    theta, factor = m.number("rope.freq_base"), float(divisors.max())
    if not 1 <= factor < 1e9:
        return None
    context, low, high = LLAMA3["original_max_position_embeddings"], LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    scaled = RopeShape(theta, "llama3", factor, int(context), low_freq_factor=low, high_freq_factor=high)
    expected = inverse_frequencies(RopeShape(theta), head_dim) / inverse_frequencies(scaled, head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _tokens(m: Metadata) -> dict[str, Any]:
    """All tokens that end an answer; null where the file has none, as an absent key would mean the family's default."""
    is_sentencepiece = m.get("tokenizer.ggml.model") == "llama"
    ends = [m.token("eos", 2 if is_sentencepiece else None), m.token("eot"), m.token("eom")]
    found = list(dict.fromkeys(token for token in ends if token is not None))
    return {
        "bos_token_id": m.token("bos", 1 if is_sentencepiece else None),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
    }


def _block(m: Metadata) -> dict[str, Any]:
    """The feed-forward blocks of a dense model."""
    if m.integer("expert_used_count", 0, least=0):
        raise m.error("expert_used_count", "0, as there are no experts")
    return {"intermediate_size": m.integer("feed_forward_length")}


def _experts(m: Metadata) -> dict[str, Any]:
    """Numbers and widths of experts, and how gates are normalised: fixed per architecture in llama.cpp."""
    return {"num_experts_per_tok": m.integer("expert_used_count"), **_sizes(m)}


def _sizes(m: Metadata) -> dict[str, Any]:
    experts, inner = m.integer("expert_count"), m.integer("feed_forward_length")
    normalised = m.architecture in ("llama", "qwen3moe")
    if m.get("expert_weights_norm", normalised) is not normalised:
        raise m.error("expert_weights_norm", f"{normalised}, which is what llama.cpp does for {m.architecture}")
    if m.architecture not in QWEN:
        if m.integer("expert_feed_forward_length", inner) != inner:
            raise m.error("expert_feed_forward_length", f"feed_forward_length, {inner}")
        if m.architecture == "llama":
            return {"num_local_experts": experts, "intermediate_size": inner}
        return {"num_experts": experts, "intermediate_size": inner, "norm_topk_prob": normalised}
    # The defaults are llama.cpp's, for files from before these keys.
    each = m.integer("expert_feed_forward_length", inner // m.integer("expert_used_count"))
    found = {
        "num_experts": experts,
        "intermediate_size": inner,
        "moe_intermediate_size": each,
        "norm_topk_prob": normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if m.architecture == "qwen2moe":
        found["shared_expert_intermediate_size"] = m.integer("expert_shared_feed_forward_length", inner)
    return found


def _attention(m: Metadata, tensors: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, Any]:
    """Biases, clipping and windows."""
    found: dict[str, Any] = {}
    if m.has("attention.sliding_window"):
        window = m.integer("attention.sliding_window", least=0)
        if m.model_type == "mixtral":
            found["sliding_window"] = window or None
        elif 0 < window < m.integer("context_length"):
            raise m.error("attention.sliding_window", "none, or the whole context, for this architecture")
    if m.architecture == "olmoe" and m.has("attention.clamp_kqv"):
        found["clip_qkv"] = m.number("attention.clamp_kqv")
    if m.model_type != "mixtral":
        parts = ("q", "k", "v") if m.architecture == "qwen2moe" else ("q", "k", "v", "output")
        biased = any(f"blk.{i}.attn_{part}.bias" in tensors for i in range(layers) for part in parts)
        found["qkv_bias" if m.architecture == "qwen2moe" else "attention_bias"] = biased
    return found
