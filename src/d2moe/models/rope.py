"""Rotary position embedding: which variants are supported, and their frequencies, as transformers computes them.

Variants: "default"; "linear" (positions divided by a factor); "yarn" (arXiv 2309.00071, with the attention factor of
DeepSeek's mscale); "llama3" (of Llama 3.1). Those that change with the length of the prompt (dynamic, longrope) and the
rest are refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import ConfigError
from d2moe.types import RopeShape

if TYPE_CHECKING:  # config.py imports this file
    from d2moe.models.config import Config

SUPPORTED = ("default", "linear", "yarn", "llama3")
KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def rope_shape(c: Config, theta: float, context: int) -> tuple[RopeShape, int]:
    """The rope of a config, and the context it reaches in tokens.

    Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4); `theta` is the
    family's default. Yarn reaches factor * original context, even where max_position_embeddings says less.
    Raises ConfigError for other variants and for unknown keys inside.
    """
    c.get("original_max_position_embeddings")  # means nothing to the other kinds of rope
    name, table = _table(c)
    kind = table.pop("rope_type", None) or table.pop("type", None) or "default"
    table.pop("type", None)
    if kind not in SUPPORTED:
        raise ConfigError(f"{c.where}: {name} has rope_type {kind!r}, supported are {', '.join(SUPPORTED)}")
    if table.pop("partial_rotary_factor", 1.0) not in (1, None):
        raise ConfigError(f"{c.where}: {name} has a partial_rotary_factor, only 1.0 is supported")
    numbers = {key: _number(c, name, key, table.pop(key, None)) for key in ("rope_theta", *KEYS[kind])}
    truncate = table.pop("truncate", True) if kind == "yarn" else True
    if not isinstance(truncate, bool):
        raise ConfigError(f"{c.where}: {name} has truncate {truncate!r}, expected true or false")
    if table:
        raise ConfigError(f"{c.where}: {name} has unknown keys {', '.join(sorted(table))} for rope_type {kind!r}")
    outer = c.number("rope_theta", theta)
    base = outer if numbers["rope_theta"] is None else numbers["rope_theta"]
    if c.has("rope_theta") and base != outer:
        raise c.error("rope_theta", f"{name} says {base:g}; they must agree, remove the wrong one")
    if base <= 1:
        raise ConfigError(f"{c.where}: rope_theta is {base:g}, expected more than 1")
    if kind == "default":
        return RopeShape(theta=base), context
    factor = numbers["factor"]
    if kind == "linear":
        if factor is None:
            raise ConfigError(f"{c.where}: {name} has rope_type 'linear' and no factor, expected a positive number")
        return RopeShape(theta=base, kind=kind, factor=factor), context
    # The top level has priority, as in transformers (standardize_rope_params).
    inside = numbers["original_max_position_embeddings"] or context
    original = c.integer("original_max_position_embeddings", int(inside))
    if kind == "llama3":
        return _llama3(c, name, base, original, numbers), context
    factor = context / original if factor is None else factor
    shape = RopeShape(
        theta=base,
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=numbers["beta_fast"] or 32.0,
        beta_slow=numbers["beta_slow"] or 1.0,
        attention_factor=numbers["attention_factor"],
        mscale=numbers["mscale"],
        mscale_all_dim=numbers["mscale_all_dim"],
        truncate=truncate,
    )
    return shape, max(context, min(int(factor * original), 2**31 - 1))


def _llama3(c: Config, name: str, base: float, original: int, numbers: dict[str, float | None]) -> RopeShape:
    factor, low, high = (numbers[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if factor is None or low is None or high is None:
        missing = next(key for key in ("factor", "low_freq_factor", "high_freq_factor") if numbers[key] is None)
        raise ConfigError(f"{c.where}: {name} has rope_type 'llama3' and no {missing}, expected a positive number")
    if high <= low:
        raise ConfigError(f"{c.where}: {name} has high_freq_factor {high:g}, expected more than low_freq_factor, {low:g}")
    return RopeShape(
        theta=base, kind="llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high
    )


def _table(c: Config) -> tuple[str, dict[str, Any]]:
    """The dictionary that holds the rope settings and the key it came under; a copy."""
    new, old = c.get("rope_parameters"), c.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise c.error(key, "expected an object or null")
    if new and old and new != old:
        raise c.error("rope_scaling", f"rope_parameters says {new!r}; they must agree, remove the wrong one")
    name, table = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    nested = sorted(key for key, value in table.items() if isinstance(value, dict))
    if nested:
        raise ConfigError(f"{c.where}: {name} differs by layer type ({', '.join(nested)}), supported is one for all")
    return name, dict(table)


def _number(c: Config, name: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 <= value <= 1e12:
        raise ConfigError(f"{c.where}: {name} has {key} {value!r}, expected a number from 1e-9 to 1e12")
    return float(value)


def inverse_frequencies(rope: RopeShape, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians per token, float32 [head_dim/2]; element i turns the pair (i, i + head_dim/2) of a head."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    period = np.float32(rope.theta) ** exponent
    plain: npt.NDArray[np.float32] = np.float32(1.0) / period
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return np.asarray(plain / np.float32(rope.factor), np.float32)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, plain)
    if rope.kind != "yarn":
        raise ConfigError(f"rope kind is {rope.kind!r}, supported are {', '.join(SUPPORTED)}")
    stretched = np.float32(1.0) / (np.float32(rope.factor) * period)
    low, high = _yarn_range(rope, head_dim)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1.0) - ramp.astype(np.float32)
    return np.asarray(stretched * (np.float32(1.0) - keep) + plain * keep, np.float32)


def _llama3_frequencies(rope: RopeShape, plain: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pairs that turn more than high_freq_factor times in the original context keep their frequency, those that turn less
    than low_freq_factor times are stretched by the whole factor, those between by a part of it."""
    turns = rope.original_context * plain / np.float32(2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(plain / np.float32(rope.factor) * (1 - keep) + plain * keep, np.float32)


def _yarn_range(rope: RopeShape, head_dim: int) -> tuple[float, float]:
    """Pairs below the first number keep their frequency, those above the second are stretched by the whole factor."""

    def pair(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def attention_scale(rope: RopeShape) -> float:
    """The factor on cos and sin; 1 except for yarn."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
