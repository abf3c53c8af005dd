"""Reading config.json: the families in old and new spelling, and everything that is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2moe.errors import ConfigError
from d2moe.models import FAMILIES, family, shape_from_config
from d2moe.models.rope import attention_scale, inverse_frequencies
from d2moe.types import ModelShape, RopeShape

# As published on the Hub (transformers 4 spelling).
QWEN3_CODER: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "qkv_bias": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_cache": True,
    "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
ALL = (QWEN3_CODER, OLMOE, MIXTRAL, QWEN2, LLAMA, QWEN3)
DENSE = (LLAMA, QWEN3)


def shape(
    base: dict[str, Any], remove: tuple[str, ...] = (), ignore: tuple[str, ...] = (), **change: Any
) -> ModelShape:
    config = {key: value for key, value in {**base, **change}.items() if key not in remove}
    return shape_from_config(config, "dir/config.json", ignore)


def refusal(base: dict[str, Any], remove: tuple[str, ...] = (), **change: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        shape(base, remove, **change)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    return message


def test_qwen3_moe() -> None:
    s = shape(QWEN3_CODER)
    assert s == ModelShape(
        model_type="qwen3_moe", vocab=151936, hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128,
        context=262144, rms_eps=1e-6, rope=RopeShape(1e7), experts=128, top_k=8, expert_inner=768, norm_top_k=True,
        moe_layers=tuple(range(48)), windows=(0,) * 48, qk_norm="head", eos_ids=(151645,),
    )  # fmt: skip


def test_olmoe() -> None:
    s = shape(OLMOE)
    assert (s.qk_norm, s.norm_top_k, s.expert_inner, s.experts, s.head_dim) == ("all", False, 1024, 64, 128)
    assert (s.context, s.eos_ids, s.clip_qkv, s.qkv_bias) == (4096, (50279,), None, False)
    s = shape(OLMOE, clip_qkv=8.0, attention_bias=True)
    assert (s.clip_qkv, s.qkv_bias, s.o_bias) == (8.0, True, True)


def test_mixtral() -> None:
    s = shape(MIXTRAL)
    assert (s.qk_norm, s.norm_top_k, s.expert_inner, s.experts, s.top_k) == ("none", True, 14336, 8, 2)
    assert (s.bos_id, s.eos_ids, s.windows, s.rope.theta) == (1, (2,), (0,) * 32, 1e6)
    assert shape(MIXTRAL, sliding_window=4096).windows == (4096,) * 32


def test_qwen2_moe() -> None:
    s = shape(QWEN2)
    assert (s.qkv_bias, s.o_bias, s.shared_inner, s.expert_inner) == (True, False, 5632, 1408)
    assert (s.windows, s.dense_inner) == ((0,) * 24, 0)
    assert shape(QWEN2, qkv_bias=False).qkv_bias is False


def test_llama() -> None:
    s = shape(LLAMA)
    rope = RopeShape(5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert s == ModelShape(
        model_type="llama", vocab=128256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, context=131072,
        rms_eps=1e-5, rope=rope, experts=1, top_k=1, expert_inner=14336, norm_top_k=True, moe_layers=tuple(range(32)),
        windows=(0,) * 32, bos_id=128000, eos_ids=(128001, 128008, 128009),
    )  # fmt: skip
    s = shape(LLAMA, attention_bias=True, head_dim=64, tie_word_embeddings=True)
    assert (s.qkv_bias, s.o_bias, s.head_dim, s.tied_embeddings) == (True, True, 64, True)
    s = shape(LLAMA, remove=("bos_token_id", "eos_token_id", "num_key_value_heads", "rope_scaling", "rope_theta"))
    assert (s.bos_id, s.eos_ids, s.kv_heads, s.rope) == (1, (2,), 32, RopeShape(1e4))
    assert shape(LLAMA, is_llama_config=True, rope_interleaved=False) == shape(LLAMA)  # of SmolLM
    assert "rope_interleaved is True" in refusal(LLAMA, rope_interleaved=True)
    assert "mlp_bias is True, only false is supported" in refusal(LLAMA, mlp_bias=True)
    assert "unknown keys num_experts_per_tok, num_local_experts" in refusal(LLAMA, num_local_experts=8, num_experts_per_tok=2)


def test_qwen3() -> None:
    s = shape(QWEN3)
    assert (s.experts, s.top_k, s.expert_inner, s.qk_norm, s.qkv_bias) == (1, 1, 3072, "head", False)
    assert (s.moe_layers, s.windows, s.tied_embeddings) == (tuple(range(28)), (0,) * 28, True)
    assert "head_dim is missing" in refusal(QWEN3, remove=("head_dim",))
    on = {"use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 3}
    assert shape(QWEN3, sliding_window=64, **on).windows == (0, 0, 0, 64)
    assert shape(QWEN3, remove=("sliding_window",), **on).windows == (0, 0, 0, 4096)
    assert shape(QWEN3, **on).windows == (0,) * 4  # null is no window
    kinds = ["sliding_attention", "full_attention"] * 2
    assert shape(QWEN3, sliding_window=64, layer_types=kinds, **on).windows == (64, 0) * 2
    assert "sliding_window is None, expected a number of tokens" in refusal(QWEN3, layer_types=kinds, **on)


def test_defaults_of_absent_keys_are_the_familys() -> None:
    assert shape(QWEN3_CODER, remove=("norm_topk_prob",)).norm_top_k is False
    assert shape(OLMOE, remove=("norm_topk_prob", "num_key_value_heads")).kv_heads == 16
    assert shape(MIXTRAL, remove=("rope_theta",)).rope.theta == 1e6
    assert shape(QWEN2, remove=("rope_theta",)).rope.theta == 1e4
    assert shape(MIXTRAL, remove=("bos_token_id", "eos_token_id")).eos_ids == (2,)
    assert shape(MIXTRAL, bos_token_id=None, eos_token_id=None).eos_ids == ()  # null means none
    assert shape(OLMOE, remove=("eos_token_id",), vocab_size=100).eos_ids == ()


def test_new_spellings() -> None:
    """What transformers 5 writes: num_local_experts, rope_parameters, dtype, layer_types."""
    new = {
        "num_local_experts": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
        "dtype": "bfloat16",
    }
    assert shape(QWEN3_CODER, remove=("num_experts", "rope_theta", "rope_scaling", "torch_dtype"), **new) == shape(
        QWEN3_CODER
    )
    assert shape(MIXTRAL, remove=("num_local_experts",), num_experts=8) == shape(MIXTRAL)
    assert shape(QWEN2, layer_types=["full_attention"] * 24, sliding_window=0) == shape(QWEN2)


def test_dense_layers() -> None:
    s = shape(QWEN3_CODER, mlp_only_layers=[0, 3], num_hidden_layers=6)
    assert (s.moe_layers, s.dense_inner) == ((1, 2, 4, 5), 5472)
    s = shape(QWEN2, decoder_sparse_step=2, num_hidden_layers=4)
    assert (s.moe_layers, s.dense_inner) == ((1, 3), 5632)
    assert "no layer with experts" in refusal(QWEN2, decoder_sparse_step=30)
    assert "mlp_only_layers is 'x'" in refusal(QWEN2, mlp_only_layers="x")


def test_windows_of_qwen() -> None:
    on = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 6}
    assert shape(QWEN3_CODER, max_window_layers=0, **on).windows == (64,) * 6
    assert "max_window_layers is 3" in refusal(QWEN3_CODER, max_window_layers=3, **on)
    assert shape(QWEN2, max_window_layers=3, **on).windows == (64, 0, 64, 0, 0, 0)
    kinds = ["full_attention", "sliding_attention"] * 3
    assert shape(QWEN2, layer_types=kinds, **on).windows == (0, 64) * 3
    assert "they must agree" in refusal(QWEN2, layer_types=kinds, num_hidden_layers=6)
    assert "layer_types is ['chunked']" in refusal(QWEN2, layer_types=["chunked"])
    assert "layer_types" in refusal(MIXTRAL, layer_types=["sliding_attention"] * 32)


@pytest.mark.parametrize("base", ALL, ids=lambda c: c["model_type"])
def test_unknown_keys_are_errors_with_a_way_out(base: dict[str, Any]) -> None:
    message = refusal(base, attention_sinks=4, moe_temperature=2)
    assert "unknown keys attention_sinks, moe_temperature" in message
    assert "--ignore-config-key attention_sinks --ignore-config-key moe_temperature" in message
    assert shape(base, attention_sinks=4, ignore=("attention_sinks",)) == shape(base)
    assert shape(base, attention_sinks=None) == shape(base)


@pytest.mark.parametrize("base", ALL, ids=lambda c: c["model_type"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only \"silu\" or \"swish\" is supported"),
        ({"quantization_config": {"bits": 4}}, "convert the unquantised checkpoint"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True, only false is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, only 1 is supported"),
        ({"num_experts_per_tok": 1000}, "num_experts_per_tok is 1000, expected at most the number of experts"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts is 4, num_local_experts is 8"),
        ({"num_key_value_heads": 3}, "expected a divisor of num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a whole number from 1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 10000"),
        ({"head_dim": 63, "hidden_size": 63 * 32}, "head"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1], expected a token id"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"vocab_size": None}, "vocab_size is None, expected a whole number"),
        ({"moe_intermediate_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "damaged"),
    ],
)  # fmt: skip
def test_refused_values(base: dict[str, Any], change: dict[str, Any], said: str) -> None:
    if base in DENSE and ("num_experts" in change or "num_experts_per_tok" in change):
        said = "unknown key"
    if base not in (QWEN3_CODER, QWEN2):
        change = {key: value for key, value in change.items() if key != "moe_intermediate_size"}
    assert said in refusal(base, **change)


def test_refused_for_one_family() -> None:
    assert "norm_topk_prob is False, only true" in refusal(MIXTRAL, norm_topk_prob=False)
    assert "attention_bias is True" in refusal(MIXTRAL, attention_bias=True)
    assert "clip_qkv is 8.0" in refusal(QWEN2, clip_qkv=8.0)
    assert "use_qk_norm is False" in refusal(QWEN3_CODER, use_qk_norm=False)
    assert "shared_expert_intermediate_size is 512" in refusal(QWEN3_CODER, shared_expert_intermediate_size=512)
    assert "head_dim is 64" in refusal(OLMOE, head_dim=64)
    assert "sliding_window is 4096" in refusal(OLMOE, sliding_window=4096)
    assert "use_sliding_window is False" in refusal(MIXTRAL, sliding_window=4096, use_sliding_window=False)
    assert "num_attention_heads is missing" in refusal(OLMOE, remove=("num_attention_heads",))


def test_unknown_model_type() -> None:
    with pytest.raises(
        ConfigError, match=r"^x: model_type is 'gpt2', supported are mixtral, olmoe, qwen2_moe, qwen3_moe, llama, qwen3$"
    ):
        family("gpt2", "x")
    with pytest.raises(ConfigError, match="model_type is missing"):
        shape_from_config({}, "x")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        shape_from_config([], "x")  # type: ignore[arg-type]


def test_eos_lists() -> None:
    s = shape(QWEN2, eos_token_id=[7, 8, 7])
    assert s.eos_ids == (7, 8)


# --- rope ---


def rope(**change: Any) -> ModelShape:
    return shape(OLMOE, **change)


def test_rope_spellings() -> None:
    old = rope(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, rope_theta=5e5)
    new = rope(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        rope_theta=None,
    )
    assert old.rope == new.rope == RopeShape(5e5, "yarn", 4.0, 1024)
    assert rope(rope_scaling={"rope_type": "linear", "factor": 2}).rope == RopeShape(1e4, "linear", 2.0)
    assert rope(rope_scaling={"rope_type": "default"}).rope == RopeShape(1e4)


def test_yarn_reaches_further() -> None:
    assert rope(rope_scaling={"type": "yarn", "factor": 4.0}).context == 4 * 4096
    assert rope(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}).context == 4096
    yarn = rope(rope_scaling={"type": "yarn", "original_max_position_embeddings": 512})
    assert (yarn.rope.factor, yarn.context) == (8.0, 4096)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic', supported are default, linear, yarn, llama3"),
        ({"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}, "rope_type 'llama3' and no factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1}, "rope_type 'llama3' and no high_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4.0},
            "high_freq_factor 4, expected more than low_freq_factor, 4",
        ),
        ({"rope_type": "longrope"}, "rope_type 'longrope'"),
        ({"rope_type": ["yarn"]}, "rope_type ['yarn']"),
        ({"rope_type": "linear"}, "no factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor '2', expected a number from"),
        ({"rope_type": "yarn", "factor": 2.0, "twist": 1}, "unknown keys twist for rope_type 'yarn'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate 1, expected true or false"),
        ({"rope_type": "default", "rope_theta": 5.0}, "they must agree"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "differs by layer type (full_attention)"),
        ("yarn", "expected an object or null"),
    ],
)
def test_rope_refusals(scaling: Any, said: str) -> None:
    assert said in refusal(OLMOE, rope_scaling=scaling)
    assert said in refusal(OLMOE, remove=("rope_scaling",), rope_parameters=scaling)


def test_rope_theta_of_one() -> None:
    assert "rope_theta is 1, expected more than 1" in refusal(OLMOE, rope_theta=1.0)


def test_frequencies_from_transformers() -> None:
    """A few values printed by transformers 5.23; the whole comparison is in tests/torch/test_convert.py."""
    assert inverse_frequencies(RopeShape(1e4), 8).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=3e-7)
    linear = inverse_frequencies(RopeShape(1e4, "linear", 4.0), 8)
    assert linear.dtype == np.float32
    assert linear.tolist() == pytest.approx([0.25, 0.025, 0.0025, 0.00025], rel=3e-7)
    assert attention_scale(RopeShape(1e4, "linear", 4.0)) == 1.0
    yarn = RopeShape(1e4, "yarn", 4.0, 1024)
    assert attention_scale(yarn) == pytest.approx(1.1386294361119891)
    f = inverse_frequencies(yarn, 64)
    plain = inverse_frequencies(RopeShape(1e4), 64)
    assert f[0] == plain[0]
    assert f[-1] == pytest.approx(plain[-1] / 4)
    assert (f <= plain).all()
    assert (f >= plain / np.float32(4.01)).all()


# --- tensor names ---


@pytest.mark.parametrize("base", ALL, ids=lambda c: c["model_type"])
def test_source_names(base: dict[str, Any]) -> None:
    s = shape(base)
    names = family(s.model_type).source_names(s)
    assert names.dense["embed"].shape == (s.vocab, s.hidden)
    assert ("head" in names.dense) != s.tied_embeddings
    assert s.tied_embeddings or names.dense["head"].names == ("lm_head.weight",)
    assert names.dense["layers.0.router"].shape == (s.experts, s.hidden)
    assert ("layers.0.attn.q_bias" in names.dense) == s.qkv_bias
    assert ("layers.0.attn.q_norm" in names.dense) == (s.qk_norm != "none")
    assert ("layers.0.shared.mix" in names.dense) == (s.shared_inner > 0)
    if base in DENSE:
        stem = "model.layers.5.mlp"
        assert names.expert(5, 0) == [tuple(f"{stem}.{part}_proj.weight" for part in ("gate", "up", "down"))]
        assert not names.fused(5) and not names.dense["layers.5.router"].names
        return
    gates = [gate for gate, _, _ in names.expert(5, 3)]
    if s.model_type == "mixtral":
        assert gates[0] == "model.layers.5.block_sparse_moe.experts.3.w1.weight"
        assert names.expert(5, 3)[0][2].endswith("w2.weight")
    assert "model.layers.5.mlp.experts.3.gate_proj.weight" in gates
    assert "model.layers.5.mlp.experts.gate_up_proj" in [first for first, _ in names.fused(5)]


def test_source_names_of_tied_and_dense_models() -> None:
    s = shape(QWEN3_CODER, tie_word_embeddings=True, mlp_only_layers=[1], num_hidden_layers=3)
    dense = FAMILIES["qwen3_moe"].source_names(s).dense
    assert "head" not in dense
    assert "layers.1.router" not in dense
    assert dense["layers.1.mlp.down"].shape == (2048, 5472)


# --- any config at all ---

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70_000)
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["silu", "yarn", "linear", "llama3", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rope_type", "type", "factor", "rope_theta", "truncate", "low_freq_factor", "high_freq_factor", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=5,
)
KEYS = sorted(
    {key for base in ALL for key in base} | {"rope_parameters", "layer_types", "clip_qkv", "num_local_experts"}
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_value_gives_a_shape_or_a_config_error(base: dict[str, Any], change: dict[str, Any]) -> None:
    try:
        s = shape(base, **change)
    except ConfigError as e:
        assert "config.json" in str(e)
        return
    assert inverse_frequencies(s.rope, s.head_dim).shape == (s.head_dim // 2,)
    assert np.isfinite(attention_scale(s.rope))
    assert len(s.windows) == s.layers
    assert family(s.model_type).source_names(s).dense
