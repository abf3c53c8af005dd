"""Plain value types shared by all layers. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from d2moe.errors import ConfigError

BASE_BITS = 2
"""Width of the base plane; every further plane adds one bit."""
MAX_BITS = 8
"""Width of the full code."""
WIDTHS = tuple(range(BASE_BITS, MAX_BITS + 1))
"""All widths a nested expert can be read at, in bits."""

TILE_ROWS = 16
"""Output rows that are stored side by side; one lane of a 512-bit register each."""
GROUP = 128
"""Columns that share a step and a zero, unless a conversion is told otherwise; the paper's own."""
ALIGN_BYTES = 4096
"""Alignment and size granularity of everything that is read with direct I/O."""


@dataclass(frozen=True)
class RopeShape:
    """Rotary position embedding: `kind` is "default", "linear", "yarn" or "llama3"; see `d2moe.models.rope`."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class ModelShape:
    """Everything the engine must know of an architecture; made from `config.json` by `d2moe.models`.

    `qk_norm` is "none", "head" (RMS norm over each head) or "all" (over all heads together).
    `moe_layers` lists the layers with experts; the others have a dense feed-forward block of `dense_inner`.
    `shared_inner` is the width of an always active expert with a sigmoid gate, 0 for none.
    `windows[l]` is layer l's sliding attention window in tokens, 0 for full attention.
    """

    model_type: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms_eps: float
    rope: RopeShape
    experts: int
    top_k: int
    expert_inner: int
    norm_top_k: bool
    moe_layers: tuple[int, ...]
    windows: tuple[int, ...]
    dense_inner: int = 0
    shared_inner: int = 0
    qk_norm: str = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    clip_qkv: float | None = None
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None


LEAST_DENSE_BITS = 5
NARROWER = ("q", "k", "o")
SPARED_BY_EXPERT, SPARED_BY_TOKEN = 0.5, 1.0
"""Bits that go where they are worth most, to some experts or some choices of a token, lose as little as so many more that are
spread evenly: the width of dense weights at which as many bytes lose least is higher by that (docs/log.md)."""


@dataclass(frozen=True)
class DenseWidths:
    """Widths in bits of the matrices that are no experts': `bits`, except for the kinds named in `others`, which are the last words of
    names in the container (docs/format.md, section 5)."""

    bits: int
    others: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def beside(cls, expert_bits: float, own_embedding: bool, spared: float = 0.0) -> DenseWidths:
        """The default beside experts of so many bits on average, that lose as if they had `spared` more. Every token reads these
        weights, they are few, and a bit less costs them far more quality than it costs the experts: they have two bits more. Errors
        in q, k and o count least, in head and embedding most, and of an embedding that is not the head (`own_embedding`) a token
        reads one row: all its bits pay for one less in q, k and o. Figures are in docs/log.md."""
        bits = min(MAX_BITS, max(LEAST_DENSE_BITS, int(expert_bits + spared + 2.5)))
        if bits == MAX_BITS or not own_embedding:
            return cls(bits)
        return cls(bits, dict.fromkeys(NARROWER, bits - 1) | {"embed": MAX_BITS})

    def of(self, name: str) -> int:
        """Width of the matrix of that canonical name."""
        return self.others.get(name.rpartition(".")[2], self.bits)

    def __str__(self) -> str:
        kinds = {bits: ", ".join(k for k, b in self.others.items() if b == bits) for bits in sorted(set(self.others.values()))}
        return f"{self.bits} bits" + (f" ({'; '.join(f'{names} {bits}' for bits, names in kinds.items())})" if kinds else "")


@dataclass(frozen=True)
class ExpertId:
    """One expert: `layer` counts all layers of the model, `index` the experts within the layer."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.index}"


def check_width(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is a whole number from 2 to 8; raise ConfigError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not BASE_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} is {bits!r}, expected a whole number from {BASE_BITS} to {MAX_BITS}")
    return bits


QUALITIES = {"fast": 2.5, "balanced": 3.0, "best": 5.0}
"""Named average widths, in bits."""


def quality_bits(quality: str, bits: float | None) -> float:
    """The average width that `quality` names; ConfigError if it names none, or `bits` are given as well."""
    if quality not in QUALITIES:
        raise ConfigError(f"quality is {quality!r}, expected one of {', '.join(QUALITIES)}")
    if bits is not None:
        raise ConfigError(f"quality {quality} is {QUALITIES[quality]:g} bits and bits is {bits:g}; give one of the two")
    return QUALITIES[quality]


def check_dial(bits: float, name: str = "bits") -> float:
    """Return `bits` if it is a number from 2 to 8, an average width; raise ConfigError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not BASE_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"{name} is {bits!r}, expected a number from {BASE_BITS} to {MAX_BITS}")
    return bits


def padded(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
