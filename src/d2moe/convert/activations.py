"""A model's own activations on calibration text, layer by layer in float32, with the weights of one layer in memory.

What a layer's matrices meet is gathered as Hessians: sums of squares x xᵀ of their inputs, each token weighted by how much
its error counts. What is added to the residual stream counts relative to that stream's own size, and an expert's output by
the square of its gate; so tokens whose residuals are huge (the first ones of a text, in large models) do not drown the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from d2moe.convert.source import ModelSource
from d2moe.kernels.reference import rms_norm, silu
from d2moe.models.rope import attention_scale, inverse_frequencies

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

CHUNK_BYTES = 64 << 20
"""Of attention scores, or of activations, at a time."""


def squares(x: F32, weight: F32 | None = None) -> F32:
    """Σ weight_i x_i x_iᵀ float32 [cols, cols] of x float32 [n, cols]."""
    scaled = x if weight is None else x * np.sqrt(weight)[:, None]
    found: F32 = scaled.T @ scaled
    return found


class Activations:
    """The residual stream x float32 [windows, length, hidden] of calibration text, moved on by one layer after the other.

    `tokens` int32 [windows, length]; `x` is that of an earlier run, at the input of the layer to go on with.
    """

    def __init__(self, source: ModelSource, tokens: I32, x: F32 | None = None):
        self.source, self.shape = source, source.shape
        self.x = self._embed(tokens) if x is None else x
        length = tokens.shape[1]
        angle = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(self.shape.rope, self.shape.head_dim)
        scale = np.float32(attention_scale(self.shape.rope))
        self._cos, self._sin = np.cos(angle) * scale, np.sin(angle) * scale

    def _embed(self, tokens: I32) -> F32:
        x, row = np.zeros((*tokens.shape, self.shape.hidden), np.float32), 0
        for piece in self.source.linear_pieces("embed", 1):
            here = (tokens >= row) & (tokens < row + len(piece))
            x[here] = piece[tokens[here] - row]
            row += len(piece)
        return x

    def _matrix(self, name: str) -> F32:
        return np.concatenate(list(self.source.linear_pieces(name, 1)))

    def _flat(self) -> F32:
        return self.x.reshape(-1, self.shape.hidden)

    def _chunks(self, row_bytes: int) -> Iterator[slice]:
        """Slices of windows so that the rows in one take about CHUNK_BYTES."""
        step = max(1, CHUNK_BYTES // max(row_bytes * self.x.shape[1], 1))
        for at in range(0, len(self.x), step):
            yield slice(at, at + step)

    def importance(self) -> F32:
        """What a squared error that is added to each token counts, float32 [tokens]: 1 / mean square of its residual."""
        mean: F32 = np.square(self._flat()).mean(-1, dtype=np.float32)
        return np.asarray(1 / (mean + np.float32(self.shape.rms_eps)), np.float32)

    # --- attention ---

    def attend(self, layer: int) -> tuple[F32, F32]:
        """Pass a layer's attention; Hessians of what q, k and v meet [hidden, hidden], and of what o meets."""
        s, name = self.shape, f"layers.{layer}"
        w = {part: self._matrix(f"{name}.attn.{part}") for part in "qkvo"}
        norm = self.source.read_dense(f"{name}.attn_norm")
        into = np.zeros((s.hidden, s.hidden), np.float32)
        out = np.zeros((w["o"].shape[1],) * 2, np.float32)
        for part in self._chunks(4 * s.heads * self.x.shape[1]):
            h = rms_norm(self.x[part], norm, s.rms_eps)
            into += squares(h.reshape(-1, s.hidden))
            mixed = self._mix(h, w, layer)
            y = mixed @ w["o"].T
            self.x[part] += y + self.source.read_dense(f"{name}.attn.o_bias") if s.o_bias else y
            mean = np.square(self.x[part]).mean(-1, dtype=np.float32).reshape(-1) + np.float32(s.rms_eps)
            out += squares(mixed.reshape(-1, mixed.shape[-1]), 1 / mean)
        return into, out

    def _mix(self, h: F32, w: dict[str, F32], layer: int) -> F32:
        """The heads' outputs float32 [windows, length, heads * head_dim] of normed inputs."""
        s, (n, length, _) = self.shape, h.shape
        q, k, v = (self._heads(h, w[part], layer, part) for part in "qkv")
        q, k = self._turn(q), self._turn(k)
        past = np.tri(length, dtype=bool)
        if s.windows[layer]:
            past &= ~np.tri(length, k=-s.windows[layer], dtype=bool)
        mixed = np.empty((n, length, s.heads, s.head_dim), np.float32)
        for head in range(s.heads):
            shared = head * s.kv_heads // s.heads
            scores = q[:, head] @ k[:, shared].transpose(0, 2, 1) / np.float32(np.sqrt(s.head_dim))
            scores = np.where(past, scores, np.float32(-np.inf))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, :, head] = (scores / scores.sum(-1, keepdims=True)) @ v[:, shared]
        return mixed.reshape(n, length, -1)

    def _heads(self, h: F32, w: F32, layer: int, part: str) -> F32:
        """q, k or v float32 [windows, heads, length, head_dim], normed and clipped as the model does."""
        s, name = self.shape, f"layers.{layer}.attn"
        y = h @ w.T
        if s.qkv_bias:
            y = y + self.source.read_dense(f"{name}.{part}_bias")
        norm = self.source.read_dense(f"{name}.{part}_norm") if part in "qk" and s.qk_norm != "none" else None
        if norm is not None and s.qk_norm == "all":
            y = rms_norm(y, norm, s.rms_eps)
        if s.clip_qkv is not None:
            y = np.clip(y, -s.clip_qkv, s.clip_qkv)
        y = y.reshape(*y.shape[:2], -1, s.head_dim)
        if norm is not None and s.qk_norm == "head":
            y = rms_norm(y, norm, s.rms_eps)
        return np.ascontiguousarray(y.transpose(0, 2, 1, 3))

    def _turn(self, y: F32) -> F32:
        a, b = np.split(y, 2, -1)
        return np.concatenate([a * self._cos - b * self._sin, b * self._cos + a * self._sin], -1)

    # --- feed-forward blocks ---

    def block(self, stem: str, h: F32, mix: F32 | None) -> tuple[F32, F32]:
        """Pass a dense block whose output is added to x; Hessians of what gate and up meet, and of what down meets.

        `h` float32 [tokens, hidden] is its normed input; `mix` float32 [hidden] weighs a shared expert's output.
        """
        gate, up, down = (self._matrix(f"{stem}.{part}") for part in ("gate", "up", "down"))
        weight = self.importance()
        share = 1 / (1 + np.exp(-(h @ mix))) if mix is not None else np.ones(len(h), np.float32)
        weight = weight * share**2
        inner_squares = np.zeros((gate.shape[0],) * 2, np.float32)
        x = self._flat()
        step = max(1, CHUNK_BYTES // (4 * gate.shape[0]))
        for at in range(0, len(h), step):
            part = slice(at, at + step)
            inner = silu(h[part] @ gate.T) * (h[part] @ up.T)
            inner_squares += squares(inner, weight[part])
            x[part] += share[part, None] * (inner @ down.T)
        return squares(h, weight), inner_squares

    def normed(self, layer: int) -> F32:
        """The input of a layer's feed-forward part float32 [tokens, hidden]."""
        return rms_norm(self._flat(), self.source.read_dense(f"layers.{layer}.mlp_norm"), self.shape.rms_eps)

    def final(self) -> F32:
        """Hessian [hidden, hidden] of what the head meets, after the last layer."""
        norm, total = self.source.read_dense("final_norm"), np.zeros((self.shape.hidden,) * 2, np.float32)
        for part in self._chunks(4 * self.shape.hidden):
            total += squares(rms_norm(self.x[part], norm, self.shape.rms_eps).reshape(-1, self.shape.hidden))
        return total


class Routed:
    """One layer's experts: which tokens each of them sees, and what their outputs add up to.

    An expert that few tokens chose sees, too, those that came nearest to choosing it, at the gate they would have given it:
    `least` tokens at least.
    """

    def __init__(self, activations: Activations, layer: int, h: F32, least: int):
        s = activations.shape
        self._activations, self._h, self._least = activations, h, min(least, len(h))
        logits = h @ activations.source.read_dense(f"layers.{layer}.router").T
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        best = np.argsort(-p, axis=-1, kind="stable")[:, : s.top_k]
        if s.norm_top_k:
            p = p / np.take_along_axis(p, best, -1).sum(-1, keepdims=True)
        self._gates = p.astype(np.float32)
        self._chosen = np.zeros(p.shape, bool)
        np.put_along_axis(self._chosen, best, True, axis=-1)
        self._importance = activations.importance()
        self.tokens = self._chosen.sum(0)
        """How many tokens chose each expert, int64 [experts]."""

    def pass_on(self, expert: int, gate: F32, up: F32, down: F32, *, measure: bool = True) -> tuple[F32, F32] | None:
        """Add an expert's output to the residual stream of the tokens that chose it; if asked to `measure`, Hessians of what
        its gate and up meet [hidden, hidden], and of what its down meets [inner, inner]."""
        seen = self._seen(expert)
        n_inner, n_hidden = gate.shape
        into, inner_squares = (np.zeros((n, n) if measure else (0, 0), np.float32) for n in (n_hidden, n_inner))
        x = self._activations._flat()
        step = max(1, CHUNK_BYTES // (4 * n_inner))
        for at in range(0, len(seen), step):
            part = seen[at : at + step]
            h, g, chosen = self._h[part], self._gates[part, expert], self._chosen[part, expert]
            inner = np.asarray(silu(h @ gate.T) * (h @ up.T), np.float32)
            x[part[chosen]] += g[chosen, None] * (inner[chosen] @ down.T)
            if measure:
                weight = g**2 * self._importance[part]
                into += squares(h, weight)
                inner_squares += squares(inner, weight)
        return (into, inner_squares) if measure else None

    def _seen(self, expert: int) -> I64:
        if self.tokens[expert] >= self._least:
            return np.flatnonzero(self._chosen[:, expert])
        order = np.argsort(-(self._gates[:, expert] + 2 * self._chosen[:, expert]), kind="stable")
        return np.sort(order[: self._least])
