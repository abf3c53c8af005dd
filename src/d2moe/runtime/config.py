"""Options of an engine. Everything a user may set when a model is loaded; what varies per request is SamplingParams."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from d2moe.errors import ConfigError
from d2moe.policy import POLICIES
from d2moe.types import SPARED_BY_TOKEN, DenseWidths, check_dial, check_width, quality_bits

_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
KERNELS = ("native", "scalar", "avx2", "avx512", "neon", "reference", "reference-float")
KV_KINDS = ("f16", "q8")


def parse_bytes(text: str | int, name: str = "memory") -> int:
    """Bytes of "256MB", "1.5 GiB", "4g" or a plain number; ConfigError names `name` and shows the accepted forms."""
    if isinstance(text, int) and not isinstance(text, bool):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
        if not match or match[2].lower() not in _UNITS:
            raise ConfigError(f"{name} is {text!r}, expected a number of bytes with a unit, such as 256MB, 1.5GiB or 6GB")
        value = float(match[1]) * _UNITS[match[2].lower()]
    if value <= 0:
        raise ConfigError(f"{name} is {text!r}, expected more than nothing")
    return int(value)


def show_bytes(n: float) -> str:
    """`n` bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{int(n)} B"


@dataclass(frozen=True)
class EngineConfig:
    """`memory_bytes`: the whole process; None takes what the model needs, up to 80 % of the memory that is free.
    `expert_memory_bytes`: expert slots alone, instead of all that `memory_bytes` leaves.
    `bits`: the average width of requests that name none, any number from 2 to 8 where the model has a width router, else a whole
    one. `uniform`: one plain width for all experts even so. `dense_bits`: the width of all other weights (default: about two
    bits more than `bits`, see `DenseWidths.beside`). `kv`: keys and values as "f16"
    (two bytes each) or "q8" (one). `context`: tokens a sequence may hold (default: the model's, at most
    4096). `threads`: default all CPUs this process may use. `chunk_tokens`: tokens of a prompt computed at a time.
    `max_sequences`: sequences that may be alive at once. `kv_tokens`: tokens of all of them together (default: a full context
    each). `reserve_bytes`: memory left to whoever runs the engine. `kernels`: a kernel table, or the NumPy twin.
    `direct`: read experts past the page cache. `read_depth`: reads in flight. `policy`: which planes are read, kept and
    computed (d2moe.policy); `learn`: a trace that it may learn from beforehand. `timeline`: a file to write what happened when to.
    """

    memory_bytes: int | None = None
    expert_memory_bytes: int | None = None
    bits: float = 4
    uniform: bool = False
    dense_bits: int | None = None
    kv: str = "f16"
    context: int | None = None
    threads: int | None = None
    chunk_tokens: int | None = None
    max_sequences: int = 1
    kv_tokens: int | None = None
    reserve_bytes: int = 0
    kernels: str = "native"
    direct: bool = True
    read_depth: int = 4
    policy: str = "hebf"
    learn: str | None = None
    timeline: str | None = None

    def __post_init__(self) -> None:
        check_dial(self.bits)
        if self.dense_bits is not None:
            check_width(self.dense_bits)
        whole = ("memory_bytes", "expert_memory_bytes", "context", "threads", "chunk_tokens", "max_sequences", "kv_tokens", "read_depth")
        for name in (*whole, "reserve_bytes"):
            value, least = getattr(self, name), 0 if name == "reserve_bytes" else 1
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}, expected a whole number from {least} on")
        for name, known in (("kernels", KERNELS), ("kv", KV_KINDS), ("policy", tuple(POLICIES))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def dense_widths(self, own_embedding: bool, routed: bool = False) -> DenseWidths:
        """Of a model whose embedding is not its head, or of one where they are the same matrix; `routed` if a width router spends
        the bits."""
        if self.dense_bits is not None:
            return DenseWidths(self.dense_bits)
        return DenseWidths.beside(self.bits, own_embedding, SPARED_BY_TOKEN if routed else 0.0)

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """From keyword arguments; `memory` and `expert_memory` may be text like "6GB", `quality` may name the bits. Unknown names:
        ConfigError."""
        if (quality := options.pop("quality", None)) is not None:
            options["bits"] = quality_bits(quality, options.get("bits"))
        for short in ("memory", "expert_memory"):
            if options.get(short) is not None:
                options[f"{short}_bytes"] = parse_bytes(options[short], short)
            options.pop(short, None)
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown engine option {name!r}, expected one of {', '.join(sorted(known))}")
        return cls(**options)
