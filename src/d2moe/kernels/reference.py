"""The NumPy twin of `d2moe.kernels.native`: slow, readable, and what the compiled classes are tested against.

`Runtime(activations="int8")` quantises activations exactly as the kernels do; `"float"` multiplies the dequantised
weights by float activations instead, which shows what the integer activations cost. Keys and values are rounded as in
the compiled cache with "int8", and kept as they are with "float".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.types import BASE_BITS, MAX_BITS

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


class StorageFailure(RuntimeError):
    """A read failed."""


class Runtime:
    def __init__(self, threads: int = 1, table: str | None = None, scratch_bytes: int = 0, activations: str = "int8"):
        self.threads, self.table, self.activations = 1, f"reference-{activations}", activations


class Linear:
    """A nested matrix at width `bits` in storage order: base and bits - 2 planes, affine, row scale, bias float32 [rows]."""

    def __init__(
        self, rows: int, cols: int, group: int, bits: int, row_scale: Any, affine: Any, base: Any, more: list[Any], bias: F32 | None = None
    ):
        self.rows, self.cols, self.group, self.bits, self.bias = rows, cols, group, bits, bias
        self.codes = planes.untile(planes.unpack(np.asarray(base), [np.asarray(p) for p in more]))
        self.affine = planes.untile_affine(np.asarray(affine))
        self.row_scale = np.asarray(row_scale).reshape(-1)

    def weights(self) -> F32:
        return planes.dequantize(self.codes, self.affine, self.row_scale, self.bits, self.rows, self.cols)

    def multiply(self, runtime: Runtime, x: F32) -> F32:
        """y float32 [m, rows] = x [m, cols] times the transposed matrix."""
        if runtime.activations == "float":
            y = x @ self.weights().T
        else:
            q, scale, total = planes.quantize_activations(x, self.group)
            y = planes.matmul(self.codes, self.affine, self.row_scale, self.bits, q, scale, total)[:, : self.rows]
        return np.asarray(y + self.bias if self.bias is not None else y, np.float32)


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return np.asarray(weight * (x * scale), np.float32)


def inner_of(gate: F32, up: F32, rotation: int) -> F32:
    """What gate and up make for down."""
    inner = silu(gate) * up
    return planes.rotate(inner, rotation) if rotation else inner


def silu(x: F32) -> F32:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)), np.float32)


class KvCache:
    def __init__(self, kind: str, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int):
        self.kind, self.block_tokens = kind, block_tokens
        self.data: dict[int, F32] = {}
        self.shape = (layers, 2, block_tokens, kv_heads, head_dim)

    def block(self, index: int) -> F32:
        return self.data.setdefault(index, np.zeros(self.shape, np.float32))

    def rounded(self, x: F32) -> F32:
        """Keys or values float32 [..., head_dim] as the compiled cache would give them back."""
        return x.astype(np.float16).astype(np.float32) if self.kind == "f16" else round_head(x)


def round_head(x: F32) -> F32:
    """Each head float32 [..., head_dim] in steps of its largest magnitude / 127."""
    largest = np.abs(x).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(largest > planes.TINY, np.rint(x * (np.float32(127) / largest)), np.float32(0))
    return np.asarray(codes * (largest / np.float32(127)), np.float32)


class Attention:
    def __init__(self, **weights: Any):
        self.w: dict[str, Any] = weights

    def forward(self, step: Program, layer: int) -> None:
        w, tokens, runtime, kv = self.w, len(step.position), step.runtime, step.kv
        heads, kv_heads, head_dim = w["heads"], w["kv_heads"], w["head_dim"]
        h = rms_norm(step.x, w["norm"], w["eps"])
        q = self.heads_of(w["q"].multiply(runtime, h), w["q_norm"], heads)
        k = self.heads_of(w["k"].multiply(runtime, h), w["k_norm"], kv_heads)
        v = w["v"].multiply(runtime, h)
        v = (np.clip(v, -w["clip"], w["clip"]) if w["clip"] > 0 else v).reshape(tokens, kv_heads, head_dim)
        angle = step.position[:, None].astype(np.float32) * step.inverse_frequency
        cos, sin = (f(angle)[:, None] * np.float32(step.rope_scale) for f in (np.cos, np.sin))
        q, k = (np.concatenate([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (np.split(y, 2, -1) for y in (q, k)))
        if runtime.activations == "int8":
            k, v = kv.rounded(k), kv.rounded(v)
            q = round_head(q) if kv.kind == "q8" else q
        mixed = np.zeros((tokens, heads, head_dim), np.float32)
        for t in range(tokens):
            p, table = int(step.position[t]), step.tables[step.sequence[t]]
            block = kv.block(int(table[p // kv.block_tokens]))
            block[layer, 0, p % kv.block_tokens], block[layer, 1, p % kv.block_tokens] = k[t], v[t]
        for t in range(tokens):
            p, table = int(step.position[t]), step.tables[step.sequence[t]]
            first = max(p - w["window"] + 1, 0) if w["window"] else 0
            past = np.concatenate([kv.block(int(b))[layer] for b in table[: p // kv.block_tokens + 1]], axis=1)
            keys, values = np.repeat(past[:, first : p + 1], heads // kv_heads, axis=2)
            scores = np.einsum("hd,nhd->hn", q[t], keys) / np.float32(np.sqrt(head_dim))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[t] = np.einsum("hn,nhd->hd", scores / scores.sum(-1, keepdims=True), values)
        step.x += w["o"].multiply(runtime, mixed.reshape(tokens, -1))

    def heads_of(self, y: F32, norm: F32 | None, heads: int) -> F32:
        w = self.w
        if w["qk_norm"] == 2:
            assert norm is not None
            y = rms_norm(y, norm, w["eps"])
        if w["clip"] > 0:
            y = np.clip(y, -w["clip"], w["clip"])
        y = y.reshape(len(y), heads, w["head_dim"])
        return rms_norm(y, norm, w["eps"]) if w["qk_norm"] == 1 and norm is not None else y


class Router:
    def __init__(self, norm: F32, weight: F32, top_k: int, normalise: bool, eps: float):
        self.norm, self.weight, self.top_k, self.normalise, self.eps = norm, weight, top_k, normalise, eps

    def forward(self, x: F32) -> tuple[F32, I32, F32]:
        """Normed input [tokens, hidden], experts and gates [tokens, top_k]."""
        h = rms_norm(x, self.norm, self.eps)
        logits = h @ self.weight.T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        best = np.argsort(-p, axis=-1, kind="stable")[:, : self.top_k].astype(np.int32)
        gate = np.take_along_axis(p, best, -1)
        return h, best, np.asarray(gate / gate.sum(-1, keepdims=True) if self.normalise else gate, np.float32)


class WidthRouter:
    """How many bits a token asks of an expert; see csrc/widths.h."""

    def __init__(self, planes: F32, weight: F32 | None, base: F32 | None, gate_power: float, norm_power: float):
        self.planes, self.weight, self.base, self.gate_power, self.norm_power = planes, weight, base, gate_power, norm_power

    def widths(self, x: F32, h: F32, ids: I32, gates: F32, least: I32, most: I32, price: F32) -> I32:
        """int32 [tokens, top_k] for experts `ids` with `gates`; least, most and price are [tokens]."""
        tiny = np.float32(1e-30)
        value = np.float32(self.norm_power) * np.log(np.maximum(np.mean(np.square(x), -1, dtype=np.float32), tiny))[:, None]
        value = value + np.float32(self.gate_power) * np.log(np.maximum(gates, tiny))
        if self.weight is not None:
            value = value + np.einsum("tkh,th->tk", self.weight[ids], h)
        worth = (value[..., None] + self.planes[ids] >= price[:, None, None]).cumprod(-1).sum(-1) + BASE_BITS
        out = np.clip(worth, least[:, None], most[:, None])
        if self.base is not None:
            out[(value + self.base[ids] < price[:, None]) & (least < most)[:, None]] = 0
        return np.asarray(out, np.int32)


class FeedForward:
    def __init__(self, gate: Linear, up: Linear, down: Linear, mix: F32 | None, norm: F32 | None, eps: float, rotation: int = 0):
        self.gate, self.up, self.down, self.mix, self.norm, self.eps = gate, up, down, mix, norm, eps
        self.rotation = rotation

    def forward(self, runtime: Runtime, h: F32, x: F32) -> None:
        if self.norm is not None:
            h = rms_norm(x, self.norm, self.eps)
        inner = inner_of(self.gate.multiply(runtime, h), self.up.multiply(runtime, h), self.rotation)
        y = self.down.multiply(runtime, inner)
        x += y / (1 + np.exp(-(h @ self.mix)))[:, None] if self.mix is not None else y


class Program:
    """A step through all layers; see csrc/program.h."""

    busy_ns = None

    def __init__(self, runtime: Runtime, **facts: Any):
        self.runtime, self.kv, self.experts = runtime, facts["kv"], facts["experts"]
        self.embedding, self.head, self.norm, self.eps = (facts[k] for k in ("embedding", "head", "norm", "eps"))
        self.inverse_frequency = np.asarray(facts["inverse_frequency"], np.float32)
        self.rope_scale, self.ids, self.bits = facts["rope_scale"], facts["ids"], facts["bits"]
        self.dials: tuple[I32, I32, F32] = (facts["least"], facts["most"], facts["price"])
        self.layers: list[tuple[Attention, Router | None, FeedForward | None, WidthRouter | None, int]] = []
        self.next, self.routed = 0, False
        self._wanted, self._used = (np.zeros(MAX_BITS + 1, np.int64) for _ in range(2))
        self.when, self.held = "missing", False
        self.notes: list[tuple[int, I32, I32]] = []

    def add_layer(
        self, attention: Attention, router: Router | None, feed_forward: FeedForward | None, widths: WidthRouter | None
    ) -> None:
        moe_index = sum(known is not None for _, known, *_ in self.layers)
        self.layers.append((attention, router, feed_forward, widths, moe_index))

    def start(self, tokens: I32, tables: I32, rows: I32, out: F32) -> None:
        ids, self.position, self.sequence = tokens
        self.tables, self.rows, self.out = tables, rows, out
        self._taken = np.zeros((len(tables), MAX_BITS + 1), np.int64)
        least, most, price = self.dials
        n = len(ids)
        self.left = least[:n], most[:n], price[:n]  # of the tokens that are left
        e = self.embedding
        self.x = planes.dequantize(e.codes[ids], e.affine[ids], e.row_scale[ids], e.bits, n, e.cols)
        self.next, self.routed = 0, False

    def run(self) -> int:
        while self.next < len(self.layers):
            attention, router, feed_forward, widths, moe = self.layers[self.next]
            if not self.routed:
                attention.forward(self, self.next)
                if self.next + 1 == len(self.layers):  # nothing but keys and values is needed of the others
                    least, most, price = self.left
                    self.x, self.left = self.x[self.rows], (least[self.rows], most[self.rows], price[self.rows])
                n = len(self.x)
                if not n:
                    self.next += 1
                    continue
                if router is None:
                    assert feed_forward is not None, "a layer without a router has a dense block"
                    feed_forward.forward(self.runtime, self.x, self.x)
                    self.next += 1
                    continue
                self.h, self.ids[moe, :n], self.gates = router.forward(self.x)
                least, most, price = self.left
                wide = np.repeat(least[:, None], self.ids.shape[2], 1)
                if widths is not None:
                    wide = widths.widths(self.x, self.h, self.ids[moe, :n], self.gates, least, most, price)
                self.bits[moe, :n] = wide = np.minimum(wide, self.experts.f["kept"][moe][self.ids[moe, :n]]).astype(np.int32)
                self.routed, self.begun = True, False
                widest = self.widest(moe)
                self._wanted += self.count(widest)
                missing = any(self.experts.width(moe, int(e)) < widest[e] for e in np.flatnonzero(widest))
                self.held = self.when != "decide" and not missing
                if self.held:
                    self.notes.append((moe, self.ids[moe : moe + 1, :n].copy(), wide[None]))
                if not self.held or self.when != "missing":
                    return moe
            self.compute(None)
            self.experts.finish(self.gates, self.x)
            owner = self.sequence[self.rows] if self.next + 1 == len(self.layers) else self.sequence
            np.add.at(self._taken, (owner[:, None], self.bits[moe, : len(owner)]), 1)
            self.next, self.routed = self.next + 1, False
        if len(self.out):
            self.out[:] = self.head.multiply(self.runtime, rms_norm(self.x, self.norm, self.eps))
        self._used += self._taken.sum(0)
        return -1

    def widest(self, moe: int) -> I32:
        """The most bits that the layer's choices ask of each expert."""
        widest = np.zeros(self.experts.f["experts"], np.int32)
        n = len(self.x)
        np.maximum.at(widest, self.ids[moe, :n].reshape(-1), self.bits[moe, :n].reshape(-1))
        return widest

    @staticmethod
    def count(widest: I32) -> npt.NDArray[np.int64]:
        """Experts by the widest width asked of them."""
        return np.bincount(widest[widest > 0], minlength=MAX_BITS + 1)

    @property
    def counts(self) -> tuple[list[tuple[int, int]], int, int, int, int, tuple[int, ...], tuple[int, ...]]:
        taken = [(sum(counts), sum(b * n for b, n in enumerate(counts))) for counts in self._taken.tolist()]
        planes = self._wanted[::-1].cumsum()[::-1].tolist()  # who wants a plane wants all lower ones
        wanted = (0,) * BASE_BITS + tuple(planes[BASE_BITS:])
        return taken, self.experts.read_bytes, self.experts.reads, 0, 0, tuple(self._used.tolist()), wanted

    def pause(self, when: str) -> None:
        self.when = when

    def forecast(self, ahead: int) -> I32:
        out = np.full((len(self.h), ahead, self.ids.shape[2]), -1, np.int32)
        later = [(n, router) for n, (_, router, *_) in enumerate(self.layers) if n > self.next and router is not None]
        for step, (n, router) in enumerate(later[:ahead]):
            if n + 1 == len(self.layers) and len(self.rows) != len(self.h):
                break
            out[:, step] = np.argsort(-(self.h @ router.weight.T), axis=1, kind="stable")[:, : router.top_k]
        return out

    def choose(self, bits: I32, gates: F32 | None = None) -> None:
        moe = self.layers[self.next][-1]
        self._wanted -= self.count(self.widest(moe))
        self.bits[moe, : len(self.x)] = np.minimum(bits, self.experts.f["kept"][moe][self.ids[moe, : len(self.x)]])
        self._wanted += self.count(self.widest(moe))
        self.gates = self.gates if gates is None else gates.copy()

    def compute(self, experts: I32 | None) -> None:
        _, _, feed_forward, _, moe = self.layers[self.next]
        if not self.begun:
            n = len(self.x)
            self.experts.begin(moe, self.h, self.ids[moe, :n], self.bits[moe, :n])
            if feed_forward is not None:
                feed_forward.forward(self.runtime, self.h, self.x)
            self.begun = True
        self.experts.compute(experts)

    def take_notes(self) -> list[tuple[int, I32, I32]]:
        notes, self.notes = self.notes, []
        return notes

    def abandon(self) -> None:
        self.next, self.routed = len(self.layers), False


class Experts:
    """Reads records with plain file I/O when they are asked for; keeps what the plan says is resident."""

    def __init__(self, runtime: Runtime, **facts: Any):
        self.runtime, self.f = runtime, facts
        self.widths: dict[tuple[int, int], int] = {}
        self.read_bytes = self.reads = 0
        self.direct, self.depth = False, 1

    def set_limit(self, n_bytes: int) -> None:
        pass  # nothing is kept beyond the widths: every product reads its record again

    def width(self, layer: int, expert: int) -> int:
        return self.widths.get((layer, expert), 0)

    def evict(self, moves: I32) -> None:
        for layer, expert, bits in moves.tolist():
            self.widths[layer, expert] = min(self.width(layer, expert), bits)

    def cancel(self, moves: I32) -> None:
        pass  # nothing waits

    def read(self, moves: I32, may_wait: bool = False) -> None:
        for layer, expert, bits in moves.tolist():
            have, bits = self.width(layer, expert), min(bits, int(self.f["kept"][layer, expert]))
            if bits > have:
                self.read_bytes += self.prefix_bytes(bits) - self.prefix_bytes(have)
                self.reads += 1
                self.widths[layer, expert] = bits

    def prefix_bytes(self, bits: int) -> int:
        return int(self.f["base_bytes"] + (bits - BASE_BITS) * self.f["plane_bytes"]) if bits else 0

    def begin(self, layer: int, h: F32, ids: I32, bits: I32) -> None:
        self.layer, self.h, self.ids, self.bits = layer, h.copy(), ids.copy(), bits.copy()
        self.out = np.full((*ids.shape, h.shape[1]), np.nan, np.float32)
        self.out[bits == 0] = 0  # left out

    def compute(self, experts: I32 | None) -> None:
        """All that was not computed yet, for None."""
        missing = np.isnan(self.out[..., 0])
        for expert in np.unique(self.ids[missing]) if experts is None else experts:
            for bits in np.unique(self.bits[(self.ids == expert) & (self.bits > 0)]):
                if self.width(self.layer, int(expert)) < bits:
                    raise RuntimeError(f"layer {self.layer} expert {expert} is not resident at {bits} bits")
                token, rank = np.nonzero((self.ids == expert) & (self.bits == bits))
                gate, up, down = self.matrices(self.layer, int(expert), int(bits))
                h = self.h[token]
                inner = inner_of(gate.multiply(self.runtime, h), up.multiply(self.runtime, h), self.f.get("rotation", 0))
                self.out[token, rank] = down.multiply(self.runtime, inner)

    def finish(self, gates: F32, x: F32) -> None:
        total = np.zeros_like(x)
        for k in range(gates.shape[1]):
            total = total + gates[:, k, None] * self.out[:, k]
        x += total

    def abandon(self) -> None:
        pass  # nothing outlives a call here

    def matrices(self, layer: int, expert: int, bits: int) -> list[Linear]:
        """Gate, up and down as they lie in the record (docs/format.md, "Expert records")."""
        f, group = self.f, self.f["group"]
        with Path(f["paths"][layer]).open("rb") as file:
            file.seek(f["offsets"][layer, expert])
            data = np.frombuffer(file.read(self.prefix_bytes(bits)), np.uint8)
        shapes = [(f["inner"], f["hidden"])] * 2 + [(f["hidden"], f["inner"])]
        blocks = [(-(-rows // 16), -(-cols // group)) for rows, cols in shapes]
        at = 0

        def cut(n_bytes: int) -> Any:
            nonlocal at
            at += n_bytes
            return data[at - n_bytes : at]

        bases = [cut(t * g * group * 4).reshape(t, g, group // 16, 64) for t, g in blocks]
        rows = [cut(t * 64).view(np.float32) for t, _ in blocks]
        affines = [cut(t * g * 32).reshape(t, g, 2, 16) for t, g in blocks]
        more: list[list[Any]] = [[], [], []]
        for p in range(bits - BASE_BITS):
            at = f["base_bytes"] + p * f["plane_bytes"]
            for i, (t, g) in enumerate(blocks):
                more[i].append(cut(t * g * group * 2).reshape(t, g, group // 32, 64))
        return [Linear(*shapes[i], group, bits, rows[i], affines[i], bases[i], more[i]) for i in range(3)]
