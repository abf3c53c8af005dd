"""Strict reading of a Hugging Face `config.json`: every key is used, known not to matter, or an error that names it.

Truth is transformers (5.x, with the older 4.x spellings); a value that would change the computation in a way the engine
does not follow is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from d2moe.errors import ConfigError
from d2moe.models.rope import rope_shape
from d2moe.types import ModelShape

# Bookkeeping of transformers and of training: none of it changes what a decoder answers.
# fmt: off
IRRELEVANT = frozenset(
    {
        "_attn_implementation_autoset", "_experts_implementation", "_name_or_path", "architectures",
        "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
        "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range",
        "is_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
        "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
        "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "suppress_tokens",
        "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
        "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache",
    }
)
# fmt: on

# Keys that some checkpoints carry and whose other values would need code: the value, besides null, that changes nothing
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "clip_qkv": None,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "qkv_bias": False,
    "quantization_config": None,
    "rope_interleaved": False,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "use_sliding_window": False,
}
ADVICE = {
    "quantization_config": "convert the unquantised checkpoint (bf16, f16 or f32) instead",
    "is_encoder_decoder": "only decoder models are supported",
}

_MISSING: Any = object()


class Config:
    """A `config.json` and the record of which keys were looked at. `where` is the file named in errors."""

    def __init__(self, data: dict[str, Any], where: str, ignore_keys: Collection[str] = ()):
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: holds a JSON {type(data).__name__}, expected an object of settings")
        self.where = where
        # An ignored key counts as absent, so that its default applies.
        self._data = {key: value for key, value in data.items() if key not in ignore_keys}
        self._used: set[str] = set()

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that is not what this key may hold."""
        found = repr(self._data[key]) if key in self._data else "missing"
        return ConfigError(f"{self.where}: {key} is {found}, {expected}")

    def names(self, key: str) -> bool:
        """Whether the key is there, even with null."""
        return key in self._data

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._data.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; null and absent give `default`."""
        self._used.add(key)
        value = self._data.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _MISSING, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if value is _MISSING:
            raise self.error(key, "expected a whole number; is this the config.json of a complete checkpoint?")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"expected a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self.get(key, default)
        if value is _MISSING:
            raise self.error(key, "expected a positive number; is this the config.json of a complete checkpoint?")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(key, "expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def one_of(self, keys: Iterable[str], default: Any = _MISSING) -> int:
        """A whole number that has had several names; if more than one is there, they must agree."""
        names = list(keys)
        there = [key for key in names if self.has(key)]
        if not there:
            return self.integer(names[0], default)
        values = {key: self.integer(key) for key in there}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{key} is {value}" for key, value in values.items())
            raise ConfigError(f"{self.where}: {listed}; they mean the same thing and must agree, remove the wrong one")
        return values[there[0]]

    def fixed(self, key: str, *allowed: Any, advice: str = "") -> None:
        """Accept the key only if it is absent, null, or one of the values that change nothing."""
        value = self.get(key)
        if value is None or any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            return
        shown = " or ".join("null" if a is None else json.dumps(a) for a in allowed)
        raise self.error(key, f"only {shown} is supported for this model_type{'; ' + advice if advice else ''}")

    def finish(self) -> None:
        """Check what no one asked for: neutral values pass, unknown keys are an error."""
        for key, allowed in NEUTRAL.items():
            if key not in self._used:
                self.fixed(key, allowed, advice=ADVICE.get(key, ""))
        unknown = sorted(key for key in set(self._data) - self._used - IRRELEVANT if self.has(key))
        if unknown:
            names, options = ", ".join(unknown), " ".join(f"--ignore-config-key {key}" for key in unknown)
            raise ConfigError(
                f"{self.where}: unknown key{'s' if len(unknown) > 1 else ''} {names}, which may change what the model "
                f"computes; if you know that it does not, convert with {options}"
            )


def common(
    c: Config, *, norm_top_k: bool | None, theta: float, context: int, rms_eps: float, is_dense: bool = False
) -> dict[str, Any]:
    """The part of ModelShape that all families spell alike; the arguments are the family's own defaults.

    `norm_top_k` None means that the family always normalises, and a config that says otherwise is refused. A dense family
    has no keys of experts: the feed-forward block of each layer is its one expert, whose gate is always 1.
    """
    c.get("model_type")
    c.fixed("hidden_act", "silu", "swish", advice="the experts compute silu(gate) * up")
    heads = c.integer("num_attention_heads")
    hidden = c.integer("hidden_size")
    kv_heads = c.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise c.error("num_key_value_heads", f"expected a divisor of num_attention_heads, {heads}")
    if not c.has("head_dim") and hidden % heads:
        raise c.error("num_attention_heads", f"expected a divisor of hidden_size, {hidden}, as there is no head_dim")
    head_dim = c.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise c.error("head_dim", f"found heads of {head_dim}; rotary embedding needs an even number")
    experts, top_k = (1, 1) if is_dense else _experts(c)
    if norm_top_k is None and not is_dense:
        c.fixed("norm_topk_prob", True)
    longest = c.integer("max_position_embeddings", context)
    rope, longest = rope_shape(c, theta, longest)
    vocab = c.integer("vocab_size")
    return {
        "model_type": str(c.get("model_type")),
        "vocab": vocab,
        "hidden": hidden,
        "layers": c.integer("num_hidden_layers", most=10_000),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": longest,
        "rms_eps": c.number("rms_norm_eps", rms_eps),
        "rope": rope,
        "experts": experts,
        "top_k": top_k,
        "norm_top_k": True if norm_top_k is None else c.flag("norm_topk_prob", norm_top_k),
        "tied_embeddings": c.flag("tie_word_embeddings", False),
    }


def _experts(c: Config) -> tuple[int, int]:
    """Experts of a layer, and of a token."""
    experts = c.one_of(("num_experts", "num_local_experts"))
    top_k = c.integer("num_experts_per_tok")
    if top_k > experts:
        raise c.error("num_experts_per_tok", f"expected at most the number of experts, {experts}")
    return experts, top_k


def token_ids(c: Config, key: str, vocab: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Special tokens that may be one number, a list, or null for none. `default` is for an absent key."""
    value = c.get(key)
    if value is None:
        return () if c.names(key) else tuple(i for i in default if i < vocab)
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab for i in ids):
        raise c.error(key, f"expected a token id or a list of them, each below vocab_size, {vocab}")
    return tuple(dict.fromkeys(ids))


def special_tokens(c: Config, vocab: int, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """`bos_id` and `eos_ids` of ModelShape; the arguments are the family's defaults."""
    first = token_ids(c, "bos_token_id", vocab, () if bos is None else (bos,))
    if len(first) > 1:
        raise c.error("bos_token_id", "expected one token id")
    return {
        "bos_id": first[0] if first else None,
        "eos_ids": token_ids(c, "eos_token_id", vocab, () if eos is None else (eos,)),
    }


def sparse_layers(c: Config, layers: int) -> tuple[int, ...]:
    """Layers with experts under `mlp_only_layers` and `decoder_sparse_step` (the qwen families)."""
    step = c.integer("decoder_sparse_step", 1)
    dense = c.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise c.error("mlp_only_layers", "expected a list of layer numbers")
    moe = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    if not moe:
        raise ConfigError(
            f"{c.where}: decoder_sparse_step {step} and mlp_only_layers {dense} leave no layer with experts; "
            "expected at least one for this model_type"
        )
    return moe


def check_layer_types(c: Config, windows: tuple[int, ...]) -> None:
    """Accept `layer_types` where the family ignores it only if it says what is done anyway."""
    kinds = c.get("layer_types")
    done = ["sliding_attention" if w else "full_attention" for w in windows]
    if kinds is not None and kinds != done:
        raise c.error("layer_types", f"this model_type with these windows does {done}")


def layer_windows(c: Config, sliding: tuple[bool, ...]) -> tuple[int, ...]:
    """Each layer's window under `use_sliding_window` and `layer_types` (qwen families); 0 is full attention.

    `sliding` says which layers the family's own rule gives a window where there are no layer_types.
    """
    on = c.flag("use_sliding_window", False)
    kinds = c.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if on and here else "full_attention" for here in sliding]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != len(sliding) or any(kind not in known for kind in kinds):
        raise c.error("layer_types", f'expected a list of {len(sliding)} times "full_attention" or "sliding_attention"')
    c.get("sliding_window")
    if "sliding_attention" not in kinds:
        return (0,) * len(sliding)
    if not on:
        raise c.error("use_sliding_window", "layer_types asks for sliding_attention; they must agree")
    if c.names("sliding_window") and not c.has("sliding_window"):
        raise c.error("sliding_window", "expected a number of tokens, as layers have sliding_attention")
    window = c.integer("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def check_shape(c: Config, shape: ModelShape) -> ModelShape:
    """Last look at a finished shape: unknown keys, and sizes that no real file can have."""
    c.finish()
    weights = shape.experts * len(shape.moe_layers) * 3 * shape.expert_inner * shape.hidden
    if weights > 2**44:
        raise ConfigError(f"{c.where}: describes {weights:.2e} expert weights, more than any model has; file damaged?")
    return shape


@dataclass(frozen=True)
class Source:
    """A dense tensor in the checkpoint: the names it may have (one of them is there) and its shape.

    A quantised tensor becomes `.codes` and `.affine`; the others become float32. Without names it is in no checkpoint, and
    all zeros: the router of a dense model's one expert.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    quantized: bool = False


@dataclass(frozen=True)
class SourceNames:
    """Where a family's checkpoint keeps each tensor: `dense` by canonical name, experts by layer.

    `blocks` are the spellings of a layer's expert list, `projections` the spellings of (gate, up, down) in it. Fused
    tensors are `<block>.gate_up_proj` [experts, 2*inner, hidden], gate first, and `<block>.down_proj` [experts, hidden,
    inner]. In a dense model each block is the layer's one expert itself.
    """

    dense: dict[str, Source]
    blocks: tuple[str, ...] = ("model.layers.{layer}.mlp.experts",)
    projections: tuple[tuple[str, str, str], ...] = (("gate_proj", "up_proj", "down_proj"),)
    is_dense: bool = False

    def expert(self, layer: int, index: int) -> list[tuple[str, str, str]]:
        """Possible names of one expert's (gate, up, down), one tensor each."""
        out = []
        for block in self.blocks:
            for gate, up, down in self.projections:
                stem = block.format(layer=layer) + ("" if self.is_dense else f".{index}")
                out.append((f"{stem}.{gate}.weight", f"{stem}.{up}.weight", f"{stem}.{down}.weight"))
        return out

    def fused(self, layer: int) -> list[tuple[str, str]]:
        """Possible names of a layer's (gate and up, down), all experts in one tensor."""
        stems = [] if self.is_dense else [block.format(layer=layer) for block in self.blocks]
        return [(f"{stem}.gate_up_proj", f"{stem}.down_proj") for stem in stems]


def dense_model(shape: ModelShape) -> SourceNames:
    """Names of a dense model: feed-forward blocks in place of experts, and routers that no checkpoint has."""
    return SourceNames(dense_sources(shape, router=()), blocks=("model.layers.{layer}.mlp",), is_dense=True)


def dense_sources(shape: ModelShape, router: tuple[str, ...] = ("mlp.gate.weight",)) -> dict[str, Source]:
    """What all families share: embedding, head, norms, attention, dense blocks, router (its spellings in a layer)."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out = {"embed": Source(("model.embed_tokens.weight",), (shape.vocab, hidden), True)}

    def linear(layer: int, name: str, source: str, rows: int, cols: int, bias: bool = False) -> None:
        stem = f"model.layers.{layer}.{source}"
        out[f"layers.{layer}.{name}"] = Source((f"{stem}.weight",), (rows, cols), True)
        if bias:
            out[f"layers.{layer}.{name}_bias"] = Source((f"{stem}.bias",), (rows,))

    for layer in range(shape.layers):
        stem, here = f"model.layers.{layer}", f"layers.{layer}"

        out[f"{here}.attn_norm"] = Source((f"{stem}.input_layernorm.weight",), (hidden,))
        linear(layer, "attn.q", "self_attn.q_proj", q, hidden, shape.qkv_bias)
        linear(layer, "attn.k", "self_attn.k_proj", kv, hidden, shape.qkv_bias)
        linear(layer, "attn.v", "self_attn.v_proj", kv, hidden, shape.qkv_bias)
        linear(layer, "attn.o", "self_attn.o_proj", hidden, q, shape.o_bias)
        if shape.qk_norm != "none":
            sizes = (shape.head_dim, shape.head_dim) if shape.qk_norm == "head" else (q, kv)
            out[f"{here}.attn.q_norm"] = Source((f"{stem}.self_attn.q_norm.weight",), (sizes[0],))
            out[f"{here}.attn.k_norm"] = Source((f"{stem}.self_attn.k_norm.weight",), (sizes[1],))
        out[f"{here}.mlp_norm"] = Source((f"{stem}.post_attention_layernorm.weight",), (hidden,))
        if layer in shape.moe_layers:
            out[f"{here}.router"] = Source(tuple(f"{stem}.{name}" for name in router), (shape.experts, hidden))
            if shape.shared_inner:
                linear(layer, "shared.gate", "mlp.shared_expert.gate_proj", shape.shared_inner, hidden)
                linear(layer, "shared.up", "mlp.shared_expert.up_proj", shape.shared_inner, hidden)
                linear(layer, "shared.down", "mlp.shared_expert.down_proj", hidden, shape.shared_inner)
                out[f"{here}.shared.mix"] = Source((f"{stem}.mlp.shared_expert_gate.weight",), (1, hidden))
        else:
            linear(layer, "mlp.gate", "mlp.gate_proj", shape.dense_inner, hidden)
            linear(layer, "mlp.up", "mlp.up_proj", shape.dense_inner, hidden)
            linear(layer, "mlp.down", "mlp.down_proj", hidden, shape.dense_inner)
    out["final_norm"] = Source(("model.norm.weight",), (hidden,))
    if not shape.tied_embeddings:
        out["head"] = Source(("lm_head.weight",), (shape.vocab, hidden), True)
    return out
