"""Recorded routing: which experts each step of a real run chose, layer by layer. Policies learn from it, the simulator replays it.

A trace is one .npz file (NumPy's open format, no pickles), T tokens and S steps, N rows of layer calls:

    tokens    int32 [S]           tokens of each step
    wanted    int32 [S]           how many of them had their logits asked for; the last layer's experts see only those
    rows      int32 [sum wanted]  which, counted within their step
    position  int32 [T]           of each token in its sequence
    sequence  int32 [T]           row of its sequence within the step
    ids       uint16 [N, top_k]   experts, step by step, MoE layer by MoE layer, token by token, in the router's order
    bits      uint8 [N, top_k]    width asked for of each choice, 0 for none
    gates     float32 [N, top_k]
    forecast  int16 [N, ahead, top_k]   the router of the 1st … ahead-th next layer on this layer's input; -1 past the last
    meta      uint8 [n]           JSON: format, layers, experts, top_k, base_bytes, plane_bytes, ends_with_moe, model
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.errors import TraceError

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

FORMAT = 1
NO_FORECAST = -1
ARRAYS = ("tokens", "wanted", "rows", "position", "sequence", "ids", "bits", "gates", "forecast")


@dataclass(frozen=True)
class Meta:
    """What a trace is of. `layers`: those with experts; `ends_with_moe`: whether the model's last layer is one of them."""

    layers: int
    experts: int
    top_k: int
    base_bytes: int
    plane_bytes: int
    ends_with_moe: bool
    model: str
    format: int = FORMAT


@dataclass(frozen=True)
class Call:
    """One layer call: ids int32, bits int32 and gates float32 [tokens, top_k], forecast int32 [tokens, ahead, top_k]."""

    layer: int
    ids: I32
    bits: I32
    gates: F32
    forecast: I32


@dataclass(frozen=True)
class Step:
    """One step: `tokens` in it, of how many `sequences`, `rows` int32 of those whose logits were wanted, and its layer calls in order."""

    tokens: int
    sequences: int
    rows: I32
    calls: list[Call]


class Trace:
    """A recorded or made-up run; `arrays` as the module's docstring has them."""

    def __init__(self, meta: Meta, arrays: dict[str, npt.NDArray[Any]]):
        self.meta, self.arrays = meta, arrays

    @property
    def steps(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def tokens(self) -> int:
        return int(self.arrays["tokens"].sum())

    def __iter__(self) -> Iterator[Step]:
        a, m = self.arrays, self.meta
        token = row = call = 0
        for n, wanted in zip(a["tokens"].tolist(), a["wanted"].tolist(), strict=True):
            rows = a["rows"][row : row + wanted].astype(np.int32)
            calls = []
            for layer in range(m.layers):
                last = m.ends_with_moe and layer == m.layers - 1
                seen = wanted if last else n
                if seen:
                    part = slice(call, call + seen)
                    calls.append(
                        Call(
                            layer,
                            a["ids"][part].astype(np.int32),
                            a["bits"][part].astype(np.int32),
                            a["gates"][part],
                            a["forecast"][part].astype(np.int32),
                        )
                    )
                call += seen
            yield Step(n, len(np.unique(a["sequence"][token : token + n])), rows, calls)
            token, row = token + n, row + wanted

    def layers(self) -> I32:
        """int32 [N]: the layer of each row of ids, bits and gates."""
        a, m = self.arrays, self.meta
        rows = np.repeat(a["tokens"][:, None], m.layers, axis=1)
        if m.ends_with_moe:
            rows[:, -1] = a["wanted"]
        return np.repeat(np.tile(np.arange(m.layers, dtype=np.int32), len(rows)), rows.reshape(-1))

    def asking(self, bits: Any, kept: npt.NDArray[np.int64] | None = None) -> Trace:
        """The same choices at widths `bits`, a number or [N, top_k], or what their records have: `kept` [layers, experts], None for all."""
        ids = self.arrays["ids"]
        asked = np.broadcast_to(bits, ids.shape) if kept is None else np.minimum(bits, kept[self.layers()[:, None], ids])
        return Trace(self.meta, self.arrays | {"bits": asked.astype(np.uint8)})

    def overlap(self) -> tuple[float, float]:
        """Share of a token's experts that the token before it in its sequence had chosen too, and what chance would give."""
        a, m = self.arrays, self.meta
        earlier: dict[tuple[int, int], tuple[int, I32]] = {}
        same = total = at = 0
        for step in self:
            position, sequence = (a[name][at : at + step.tokens].tolist() for name in ("position", "sequence"))
            for call in step.calls:
                who = step.rows.tolist() if len(call.ids) < step.tokens else range(step.tokens)
                for ids, token in zip(call.ids, who, strict=True):
                    at_before, before = earlier.get((call.layer, sequence[token]), (-2, ids))
                    if at_before == position[token] - 1:
                        same += len(np.intersect1d(ids, before))
                        total += m.top_k
                    earlier[call.layer, sequence[token]] = (position[token], ids)
            at += step.tokens
        return (same / total if total else 0.0), m.top_k / m.experts

    def save(self, path: str | Path) -> None:
        meta = np.frombuffer(json.dumps(asdict(self.meta)).encode(), np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, meta=meta, **self.arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace; TraceError if it is none, or its arrays do not fit together."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            meta = Meta(**json.loads(found.pop("meta").tobytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise TraceError(f'{path}: no such file; record one with "d2moe trace"') from None
            raise TraceError(f'{path} is not a trace; record one with "d2moe trace"') from None
        if meta.format != FORMAT:
            raise TraceError(f"{path} is a trace of format {meta.format}, expected {FORMAT}; record it again")
        if missing := [name for name in ARRAYS if name not in found]:
            raise TraceError(f"{path} has no array {missing[0]!r}; record it again")
        trace = cls(meta, {name: found[name] for name in ARRAYS})
        if problem := trace.problem():
            raise TraceError(f"{path}: {problem}; record it again")
        return trace

    def problem(self) -> str | None:
        """What does not fit together, in words; None if all does."""
        a, m = self.arrays, self.meta
        n, tokens = len(a["ids"]), int(a["tokens"].sum())
        calls = tokens * (m.layers - m.ends_with_moe) + int(a["wanted"].sum()) * m.ends_with_moe
        shapes = {
            "wanted": (len(a["tokens"]),),
            "rows": (int(a["wanted"].sum()),),
            "position": (tokens,),
            "sequence": (tokens,),
            "ids": (calls, m.top_k),
            "bits": (n, m.top_k),
            "gates": (n, m.top_k),
        }
        for name, shape in shapes.items():
            if a[name].shape != shape:
                return f"{name} has the shape {a[name].shape}, expected {shape}"
        if a["forecast"].ndim != 3 or (a["forecast"].shape[0], a["forecast"].shape[2]) != (n, m.top_k):
            return f"forecast has the shape {a['forecast'].shape}, expected [{n}, ahead, {m.top_k}]"
        if n and int(a["ids"].max()) >= m.experts:
            return f"expert {int(a['ids'].max())} is named and there are {m.experts}"
        if a["forecast"].size and not NO_FORECAST <= int(a["forecast"].min()) <= int(a["forecast"].max()) < m.experts:
            return f"a forecast names an expert that is not one of {m.experts}"
        if n and ((a["bits"] == 1).any() or int(a["bits"].max()) > 8):
            return "widths are not 0, or from 2 to 8 bits"
        return None

    def check(self, layers: int, experts: int, top_k: int, where: str) -> None:
        """TraceError unless the trace is of a model of this shape."""
        found, expected = (self.meta.layers, self.meta.experts, self.meta.top_k), (layers, experts, top_k)
        if found != expected:
            raise TraceError(
                f"the trace is of {found[0]} layers x {found[1]} experts, {found[2]} a token, and {where} has "
                f"{expected[0]} x {expected[1]}, {expected[2]} a token; record one of this model"
            )


class Recorder:
    """Collects a trace while an engine runs; give it to `Engine.record`."""

    def __init__(self, meta: Meta, ahead: int = 3):
        self.meta, self.ahead = meta, ahead
        self._kept: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ARRAYS}
        self._now: dict[str, list[npt.NDArray[Any]]] = {}

    def begin(self, position: I32, sequence: I32, rows: I32) -> None:
        """A step starts; one that was begun and never ended is forgotten."""
        self._now = {name: [] for name in ARRAYS}
        self._add("tokens", np.array([len(position)]), np.int32)
        self._add("wanted", np.array([len(rows)]), np.int32)
        for name, array in (("rows", rows), ("position", position), ("sequence", sequence)):
            self._add(name, array, np.int32)

    def call(self, ids: I32, bits: I32, gates: F32, forecast: I32) -> None:
        self._add("ids", ids, np.uint16)
        self._add("bits", bits, np.uint8)
        self._add("gates", gates, np.float32)
        self._add("forecast", forecast, np.int16)

    def end(self) -> None:
        for name, arrays in self._now.items():
            self._kept[name] += arrays
        self._now = {}

    def _add(self, name: str, array: npt.NDArray[Any], dtype: Any) -> None:
        self._now[name].append(array.astype(dtype))  # a copy: the engine uses its arrays again

    def trace(self) -> Trace:
        empty = {name: np.zeros(0, np.int32) for name in ("tokens", "wanted", "rows", "position", "sequence")}
        k = self.meta.top_k
        empty |= {"bits": np.zeros((0, k), np.uint8), "ids": np.zeros((0, k), np.uint16), "gates": np.zeros((0, k), np.float32)}
        empty["forecast"] = np.zeros((0, self.ahead, k), np.int16)
        return Trace(self.meta, {n: np.concatenate(a) if a else empty[n] for n, a in self._kept.items()})
