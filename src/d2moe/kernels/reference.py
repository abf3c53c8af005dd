"""The NumPy twin of `d2moe.kernels.native`: slow, readable, and what the compiled classes are tested against.

`Runtime(activations="int8")` quantises activations exactly as the kernels do; `"float"` multiplies the dequantised
weights by float activations instead, which shows what the integer activations cost. Keys and values are kept as
float16 with "int8" (as in the compiled cache) and float32 with "float".
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
    """Codes uint8 [tiles, groups, group/4, 64], affine float16 bits [tiles, groups, 2, 16], bias float32 [rows]."""

    def __init__(self, rows: int, cols: int, group: int, codes: Any, affine: Any, bias: F32 | None = None):
        self.rows, self.cols, self.group, self.bias = rows, cols, group, bias
        self.codes = planes.untile(np.asarray(codes))
        self.affine = planes.untile_affine(np.asarray(affine).view(np.float16))

    def weights(self, bits: int) -> F32:
        return planes.dequantize(self.codes, self.affine, bits, self.rows, self.cols)

    def multiply(self, runtime: Runtime, x: F32, bits: int = MAX_BITS) -> F32:
        """y float32 [m, rows] = x [m, cols] times the transposed matrix at width `bits`."""
        if runtime.activations == "float":
            y = x @ self.weights(bits).T
        else:
            q, scale, total = planes.quantize_activations(x, self.group)
            y = planes.matmul(self.codes, self.affine, bits, q, scale, total)[:, : self.rows]
        return np.asarray(y + self.bias if self.bias is not None else y, np.float32)


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return np.asarray(weight * (x * scale), np.float32)


def silu(x: F32) -> F32:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)), np.float32)


class KvCache:
    def __init__(self, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int):
        self.block_tokens = block_tokens
        self.data: dict[int, F32] = {}
        self.shape = (layers, 2, block_tokens, kv_heads, head_dim)

    def block(self, index: int) -> F32:
        return self.data.setdefault(index, np.zeros(self.shape, np.float32))

    def release(self, block: int) -> None:
        self.data.pop(block, None)


class Attention:
    def __init__(self, runtime: Runtime, **weights: Any):
        self.runtime = runtime
        self.w: dict[str, Any] = weights

    def forward(self, kv: KvCache, layer: int, position: I32, sequence: I32, tables: I32, x: F32) -> None:
        w, tokens = self.w, len(position)
        heads, kv_heads, head_dim = w["heads"], w["kv_heads"], w["head_dim"]
        rows = x.reshape(-1)[: tokens * w["norm"].size].reshape(tokens, -1)
        h = rms_norm(rows, w["norm"], w["eps"])
        q = self.heads_of(w["q"].multiply(self.runtime, h), w["q_norm"], heads)
        k = self.heads_of(w["k"].multiply(self.runtime, h), w["k_norm"], kv_heads)
        v = w["v"].multiply(self.runtime, h)
        v = (np.clip(v, -w["clip"], w["clip"]) if w["clip"] > 0 else v).reshape(tokens, kv_heads, head_dim)
        angle = position[:, None].astype(np.float32) * w["inverse_frequency"]
        cos, sin = (f(angle)[:, None] * np.float32(w["rope_scale"]) for f in (np.cos, np.sin))
        q, k = (np.concatenate([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (np.split(y, 2, -1) for y in (q, k)))
        if self.runtime.activations == "int8":
            k, v = k.astype(np.float16), v.astype(np.float16)
        mixed = np.zeros((tokens, heads, head_dim), np.float32)
        for t in range(tokens):
            p, table = int(position[t]), tables[sequence[t]]
            block = kv.block(int(table[p // kv.block_tokens]))
            block[layer, 0, p % kv.block_tokens], block[layer, 1, p % kv.block_tokens] = k[t], v[t]
        for t in range(tokens):
            p, table = int(position[t]), tables[sequence[t]]
            first = max(p - w["window"] + 1, 0) if w["window"] else 0
            past = np.concatenate([kv.block(int(b))[layer] for b in table[: p // kv.block_tokens + 1]], axis=1)
            keys, values = np.repeat(past[:, first : p + 1], heads // kv_heads, axis=2)
            scores = np.einsum("hd,nhd->hn", q[t], keys) / np.float32(np.sqrt(head_dim))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[t] = np.einsum("hn,nhd->hd", scores / scores.sum(-1, keepdims=True), values)
        rows += w["o"].multiply(self.runtime, mixed.reshape(tokens, -1))

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
    def __init__(self, runtime: Runtime, norm: F32, weight: F32, top_k: int, normalise: bool, eps: float):
        self.norm, self.weight, self.top_k, self.normalise, self.eps = norm, weight, top_k, normalise, eps

    def forward(self, tokens: int, x: F32, h: F32, ids: I32, gates: F32) -> None:
        hidden = self.norm.size
        normed = rms_norm(x.reshape(-1)[: tokens * hidden].reshape(tokens, hidden), self.norm, self.eps)
        h.reshape(-1)[: tokens * hidden] = normed.reshape(-1)
        logits = normed @ self.weight.T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        best = np.argsort(-p, axis=-1, kind="stable")[:, : self.top_k]
        gate = np.take_along_axis(p, best, -1)
        if self.normalise:
            gate = gate / gate.sum(-1, keepdims=True)
        ids.reshape(-1)[: best.size] = best.reshape(-1)
        gates.reshape(-1)[: best.size] = gate.reshape(-1)


class FeedForward:
    def __init__(self, runtime: Runtime, gate: Linear, up: Linear, down: Linear, mix: F32 | None, norm: F32 | None, eps: float):
        self.runtime, self.gate, self.up, self.down, self.mix, self.norm, self.eps = runtime, gate, up, down, mix, norm, eps

    def forward(self, tokens: int, h: F32, x: F32) -> None:
        hidden = self.gate.cols
        rows = x.reshape(-1)[: tokens * hidden].reshape(tokens, hidden)
        normed = h.reshape(-1)[: tokens * hidden].reshape(tokens, hidden)
        if self.norm is not None:
            normed[:] = rms_norm(rows, self.norm, self.eps)
        inner = silu(self.gate.multiply(self.runtime, normed)) * self.up.multiply(self.runtime, normed)
        y = self.down.multiply(self.runtime, inner)
        rows += y / (1 + np.exp(-(normed @ self.mix)))[:, None] if self.mix is not None else y


class Ends:
    def __init__(self, runtime: Runtime, embedding: Linear, head: Linear, norm: F32, eps: float):
        self.runtime, self.embedding, self.head, self.norm, self.eps = runtime, embedding, head, norm, eps

    def embed(self, ids: I32, x: F32) -> None:
        e = self.embedding
        rows = planes.dequantize(e.codes[ids], e.affine[ids], MAX_BITS, len(ids), e.cols)
        x.reshape(-1)[: rows.size] = rows.reshape(-1)

    def logits(self, tokens: int, x: F32, out: F32) -> None:
        rows = x.reshape(-1)[: tokens * self.norm.size].reshape(tokens, -1)
        y = self.head.multiply(self.runtime, rms_norm(rows, self.norm, self.eps))
        out.reshape(-1)[: y.size] = y.reshape(-1)


class Experts:
    """Reads records with plain file I/O when they are asked for; keeps what the plan says is resident."""

    def __init__(self, runtime: Runtime, **facts: Any):
        self.runtime, self.f = runtime, facts
        self.widths: dict[tuple[int, int], int] = {}
        self.read_bytes = self.reads = self.calls = 0
        self.direct = False

    @property
    def counters(self) -> tuple[int, int, int, int, int]:
        return self.read_bytes, self.reads, 0, 0, self.calls

    def set_limit(self, n_bytes: int) -> None:
        pass  # nothing is kept beyond the widths: every product reads its record again

    def width(self, layer: int, expert: int) -> int:
        return self.widths.get((layer, expert), 0)

    def evict(self, moves: I32) -> None:
        for layer, expert, bits in moves.tolist():
            self.widths[layer, expert] = min(self.width(layer, expert), bits)

    def read(self, moves: I32) -> None:
        for layer, expert, bits in moves.tolist():
            have = self.width(layer, expert)
            if bits > have:
                self.read_bytes += self.prefix_bytes(bits) - self.prefix_bytes(have)
                self.reads += 1
                self.widths[layer, expert] = bits

    def prefix_bytes(self, bits: int) -> int:
        return int(self.f["base_bytes"] + (bits - BASE_BITS) * self.f["plane_bytes"]) if bits else 0

    def begin(self, layer: int, tokens: int, top_k: int, h: F32, ids: I32, bits: I32) -> None:
        hidden = self.f["hidden"]
        self.layer, self.h = layer, h.reshape(-1)[: tokens * hidden].reshape(tokens, hidden).copy()
        self.ids = ids.reshape(-1)[: tokens * top_k].reshape(tokens, top_k).copy()
        self.bits = bits.reshape(-1)[: tokens * top_k].reshape(tokens, top_k).copy()
        self.out = np.full((tokens, top_k, hidden), np.nan, np.float32)

    def compute(self, experts: I32 | None = None) -> None:
        for expert in np.unique(self.ids) if experts is None else experts:
            for bits in np.unique(self.bits[self.ids == expert]):
                if self.width(self.layer, int(expert)) < bits:
                    raise RuntimeError(f"layer {self.layer} expert {expert} is not resident at {bits} bits")
                token, rank = np.nonzero((self.ids == expert) & (self.bits == bits))
                gate, up, down = self.matrices(self.layer, int(expert), int(bits))
                inner = silu(gate.multiply(self.runtime, self.h[token], int(bits))) * up.multiply(
                    self.runtime, self.h[token], int(bits)
                )
                self.out[token, rank] = down.multiply(self.runtime, inner, int(bits))

    def finish(self, tokens: int, top_k: int, gates: F32, x: F32) -> None:
        rows = x.reshape(-1)[: tokens * self.f["hidden"]].reshape(tokens, -1)
        total = np.zeros_like(rows)
        for k in range(top_k):
            total = total + gates.reshape(-1)[: tokens * top_k].reshape(tokens, top_k)[:, k, None] * self.out[:, k]
        rows += total
        self.calls += 1

    def abandon(self) -> None:
        pass  # nothing outlives a call here

    def matrices(self, layer: int, expert: int, bits: int) -> list[Linear]:
        f, group = self.f, self.f["group"]
        record = self.prefix_bytes(MAX_BITS)
        with Path(f["paths"][layer]).open("rb") as file:
            file.seek(f["offsets"][layer] + expert * record)
            data = np.frombuffer(file.read(self.prefix_bytes(bits)), np.uint8)
        shapes = [(f["inner"], f["hidden"])] * 2 + [(f["hidden"], f["inner"])]
        blocks = [(-(-rows // 16), -(-cols // group)) for rows, cols in shapes]
        out, at, affines = [], 0, []
        for t, g in blocks:
            affines.append(data[at : at + t * g * 64].view(np.float16).reshape(t, g, 2, 16))
            at += t * g * 64
        for i, (t, g) in enumerate(blocks):
            base = data[at : at + t * g * group * 4].reshape(t, g, group // 16, 64)
            at += base.size
            before = sum(a * b for a, b in blocks[:i]) * group * 2
            starts = [f["base_bytes"] + p * f["plane_bytes"] + before for p in range(bits - BASE_BITS)]
            extra = [data[s : s + t * g * group * 2].reshape(t, g, group // 32, 64) for s in starts]
            out.append(Linear(*shapes[i], group, planes.unpack(base, extra), affines[i]))
        return out
