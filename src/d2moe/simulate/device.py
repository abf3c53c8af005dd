"""How long things take on a device: measured by `d2moe profile`, or guessed from two bandwidths."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2moe.errors import ConfigError
from d2moe.runtime.config import parse_bytes
from d2moe.types import WIDTHS

FORMAT = 2
GUESSED_DECIDE_S = 150e-6
"""A plan in Python, on the machines of docs/log.md."""
GUESSED_READ_S = 100e-6
GUESSED_MULTIPLY_ADDS_PER_S = 300e9
"""Two cores with AVX-512 (docs/log.md); what counts where many tokens share an expert."""


@dataclass(frozen=True)
class Device:
    """Times of one device with one model. Seconds and bytes per second.

    A read among many takes `read_each_s` + bytes / `read_bytes_per_s`; one alone `read_latency_s` more. `expert_s[bits]` is
    (one token, each further token) of one expert; `dense_s` the same of all else in a step; `decide_s` one plan.
    """

    name: str
    read_bytes_per_s: float
    read_each_s: float
    read_latency_s: float
    expert_s: dict[int, tuple[float, float]]
    dense_s: tuple[float, float]
    decide_s: float
    memory_bytes_per_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was measured, and on what."""

    def expert_seconds(self, bits: int, tokens: int) -> float:
        """Computing one expert on `tokens` tokens at width `bits`; widths between measured ones are interpolated."""
        first, more = self._at(bits)
        return first + more * (tokens - 1)

    def _at(self, bits: int) -> tuple[float, float]:
        known = sorted(self.expert_s)
        low = max((b for b in known if b <= bits), default=known[0])
        high = min((b for b in known if b >= bits), default=known[-1])
        if low == high:
            return self.expert_s[low]
        part = (bits - low) / (high - low)
        a, b = self.expert_s[low], self.expert_s[high]
        return a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])

    def dense_seconds(self, tokens: int) -> float:
        """All of a step but its experts."""
        return self.dense_s[0] + self.dense_s[1] * (tokens - 1)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Device:
        """Read a profile; ConfigError if it is none."""
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            values["expert_s"] = {int(b): (float(t[0]), float(t[1])) for b, t in values["expert_s"].items()}
            values["dense_s"] = (float(values["dense_s"][0]), float(values["dense_s"][1]))
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f'{path} is not a device profile ({error}); make one with "d2moe profile"') from None


def guess(read_rate: float, memory_rate: float, *, expert_bytes: dict[int, int], dense_bytes: int, expert_weights: int) -> Device:
    """A device known by its bandwidths only: what is touched is read from memory once, prompts are bound by arithmetic.

    `expert_bytes` of one expert by width, `expert_weights` of one expert, `dense_bytes` of all else.
    """
    arithmetic = expert_weights / GUESSED_MULTIPLY_ADDS_PER_S
    return Device(
        name=f"io={read_rate / 1e9:g}GB,memory={memory_rate / 1e9:g}GB",
        read_bytes_per_s=read_rate,
        read_each_s=0.0,
        read_latency_s=GUESSED_READ_S,
        expert_s={bits: (expert_bytes[bits] / memory_rate, arithmetic) for bits in WIDTHS},
        dense_s=(dense_bytes / memory_rate, dense_bytes / GUESSED_MULTIPLY_ADDS_PER_S),
        decide_s=GUESSED_DECIDE_S,
        memory_bytes_per_s=memory_rate,
        facts={"guessed": True},
    )


def parse_rates(text: str) -> tuple[float, float] | None:
    """(storage, memory) bytes per second of "io=1.2GB,memory=30GB"; None if the text is no such thing."""
    match = re.fullmatch(r"io=([^,]+),memory=([^,]+)", text)
    if not match:
        return None
    read, memory = (parse_bytes(part.removesuffix("/s"), "device") for part in match.groups())
    return float(read), float(memory)
