"""The model of benchmarks/quality.py in torch: its weights by canonical name, its forward pass, inputs of every matrix, scores.

Names are those of the container (docs/format.md, section 5), and `layers.{l}.experts.{gate,up,down}` for the experts of a
layer in one tensor [experts, rows, cols]. A quantiser's result is the same dictionary with other numbers in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from d2moe.convert.source import ModelSource
from d2moe.types import ModelShape

Weights = dict[str, Tensor]
Tap = Callable[[str, Tensor, "int | None"], None]
BATCH = 16
PARTS = ("gate", "up", "down")


def read(source: ModelSource) -> Weights:
    """All weights of a checkpoint in float32."""
    weights = {name: torch.from_numpy(np.array(source.read_dense(name), np.float32)) for name in source.names.dense}
    for layer in source.shape.moe_layers:
        found = [dict(source.read_expert(layer, e)) for e in range(source.shape.experts)]
        for part in PARTS:
            stacked = np.stack([np.asarray(expert[part], np.float32) for expert in found])
            weights[f"layers.{layer}.experts.{part}"] = torch.from_numpy(stacked)
    return weights


def is_expert(name: str) -> bool:
    return ".experts." in name


def matrices(weights: Weights) -> list[str]:
    """Names of what is quantised: all but norms and routers."""
    return [n for n, w in weights.items() if w.ndim > 1 and not n.endswith("router")]


class Model:
    """Forward pass of qwen3_moe, the family of the shared checkpoint; softmax over all experts, gates of the chosen normed."""

    def __init__(self, shape: ModelShape, rope_theta: float, eps: float):
        self.shape, self.eps = shape, eps
        self._frequency = rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)

    def _norm(self, x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * w

    def _rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2]).float(), self._frequency).repeat(1, 2)
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()

    @torch.no_grad()
    def logits(self, w: Weights, ids: Tensor, tap: Tap | None = None) -> Tensor:
        """float32 [windows, tokens, vocab] of int64 [windows, tokens]; `tap(name, inputs, expert)` sees what meets each matrix."""
        s = self.shape
        n, length = ids.shape
        x = w["embed"][ids]
        for layer in range(s.layers):
            at = f"layers.{layer}"
            h = self._norm(x, w[f"{at}.attn_norm"])
            q, k, v = ((h @ w[f"{at}.attn.{p}"].T).view(n, length, -1, s.head_dim).transpose(1, 2) for p in "qkv")
            q = self._rotate(self._norm(q, w[f"{at}.attn.q_norm"]))
            k = self._rotate(self._norm(k, w[f"{at}.attn.k_norm"]))
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(n, length, -1)
            if tap:
                for part in "qkv":
                    tap(f"{at}.attn.{part}", h.flatten(0, 1), None)
                tap(f"{at}.attn.o", mixed.flatten(0, 1), None)
            x = x + mixed @ w[f"{at}.attn.o"].T
            x = x + self._experts(w, at, self._norm(x, w[f"{at}.mlp_norm"]).flatten(0, 1), tap).view_as(x)
        x = self._norm(x, w["final_norm"])
        if tap:
            tap("embed", x.flatten(0, 1), None)
        return x @ w["embed"].T

    def _experts(self, w: Weights, at: str, h: Tensor, tap: Tap | None) -> Tensor:
        gates, chosen = torch.softmax(h @ w[f"{at}.router"].T, -1).topk(self.shape.top_k, -1)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(h)
        gate, up, down = (w[f"{at}.experts.{part}"] for part in PARTS)
        for e in range(self.shape.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            inputs = h[token]
            inner = silu(inputs @ gate[e].T) * (inputs @ up[e].T)
            if tap:
                tap(f"{at}.experts.gate", inputs, e)
                tap(f"{at}.experts.up", inputs, e)
                tap(f"{at}.experts.down", inner, e)
            out.index_add_(0, token, gates[token, slot, None] * (inner @ down[e].T))
        return out

    def hessians(self, w: Weights, ids: Tensor, tell: Callable[[str], None]) -> Weights:
        """Per matrix the mean of x xᵀ over its inputs x, float32 [1 or experts, cols, cols]."""
        sums: Weights = {}
        counts: Weights = {}
        for name in matrices(w):
            many, cols = (w[name].shape[0] if w[name].ndim == 3 else 1), w[name].shape[-1]
            sums[name], counts[name] = torch.zeros(many, cols, cols), torch.zeros(many)

        def tap(name: str, x: Tensor, expert: int | None) -> None:
            counts[name][expert or 0] += len(x)
            # q, k and v, and gate and up, meet the same inputs.
            twin = {"k": "q", "v": "q", "up": "gate"}.get(name.rpartition(".")[2])
            if twin is None:
                sums[name][expert or 0] += x.T @ x

        for i in range(0, len(ids), BATCH):
            self.logits(w, ids[i : i + BATCH], tap)
            if i // BATCH % 8 == 0:
                tell(f"inputs of all matrices: {i} of {len(ids)} windows")
        for name in sums:
            stem, _, part = name.rpartition(".")
            twin = {"k": "q", "v": "q", "up": "gate"}.get(part)
            if twin is not None:
                sums[name] = sums[f"{stem}.{twin}"].clone()
        return {name: found / counts[name].clamp(min=1)[:, None, None] for name, found in sums.items()}


@dataclass(frozen=True)
class Score:
    """Sums over `tokens` predictions: negative log-likelihood in nats, and over the first `kl_tokens` the Kullback-Leibler
    divergence of this model's distribution from the float32 one's."""

    nll: float
    tokens: int
    kl: float
    kl_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def mean_kl(self) -> float:
        return self.kl / self.kl_tokens


class Text:
    """Windows of a text, without overlap; each input predicts the token after it, the last one the next window's first."""

    def __init__(self, name: str, ids: list[int], length: int, windows: int, kl_windows: int):
        windows = min(windows, (len(ids) - 1) // length)
        self.name = name
        self.inputs = torch.tensor(ids[: windows * length]).view(windows, length)
        self.targets = torch.tensor(ids[1 : windows * length + 1]).view(windows, length)
        self.kl_windows = min(kl_windows, windows)
        self.base: list[Tensor] = []

    def score(self, logits: Callable[[Tensor], Tensor]) -> Score:
        """`logits` gives float32 [windows, tokens, vocab] of inputs [windows, tokens]. The first model that is scored is the
        float32 one: later ones are compared with its distributions."""
        nll = kl = 0.0
        keep, base = not self.base, self.base
        kl_batches = -(-self.kl_windows // BATCH)
        for i, (x, y) in enumerate(self._batches()):
            found = torch.log_softmax(logits(x), -1)
            nll -= found.gather(-1, y[..., None]).sum(dtype=torch.float64).item()
            if i < kl_batches:
                if keep:
                    base.append(found)
                else:
                    kl += (base[i].exp() * (base[i] - found)).sum(dtype=torch.float64).item()
        kl_tokens = min(kl_batches * BATCH, len(self.inputs)) * self.inputs.shape[1]
        return Score(nll, self.inputs.numel(), kl, kl_tokens)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.inputs), BATCH):
            yield self.inputs[i : i + BATCH], self.targets[i : i + BATCH]


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
