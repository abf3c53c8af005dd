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
from d2moe.models.rope import attention_scale, inverse_frequencies
from d2moe.types import ModelShape

Weights = dict[str, Tensor]
Tap = Callable[[str, Tensor, "int | None"], None]
BATCH = 16
PARTS = ("gate", "up", "down")
FAMILIES = ("qwen3_moe", "olmoe", "mixtral")


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
    """Forward pass of models whose every layer has routed experts and nothing beside them (`FAMILIES`). ValueError for others."""

    def __init__(self, shape: ModelShape):
        whole = tuple(range(shape.layers)) == shape.moe_layers and not any(shape.windows) and not shape.qkv_bias and not shape.o_bias
        if shape.model_type not in FAMILIES or not whole:
            raise ValueError(f"of the family {shape.model_type}, expected one of {', '.join(FAMILIES)}, with experts in every layer")
        self.shape = shape
        self._frequency = torch.from_numpy(inverse_frequencies(shape.rope, shape.head_dim))
        self._scale = attention_scale(shape.rope)

    def _norm(self, x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.rms_eps) * w

    def _rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2]).float(), self._frequency).repeat(1, 2)
        half = x.shape[-1] // 2
        return (x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()) * self._scale

    def _heads(self, w: Weights, at: str, part: str, h: Tensor) -> Tensor:
        """q, k or v [windows, heads, tokens, head_dim], normed and clipped as the family does."""
        s, y, norm = self.shape, h @ w[f"{at}.attn.{part}"].T, w.get(f"{at}.attn.{part}_norm")
        if norm is not None and s.qk_norm == "all":
            y = self._norm(y, norm)
        if s.clip_qkv is not None:
            y = y.clamp(-s.clip_qkv, s.clip_qkv)
        y = y.unflatten(-1, (-1, s.head_dim))
        if norm is not None and s.qk_norm == "head":
            y = self._norm(y, norm)
        return y.transpose(1, 2) if part == "v" else self._rotate(y.transpose(1, 2))

    def logits(self, w: Weights, ids: Tensor, tap: Tap | None = None) -> Tensor:
        """float32 [windows, tokens, vocab] of int64 [windows, tokens]; `tap(name, inputs, expert)` sees what meets each matrix."""
        s = self.shape
        n, length = ids.shape
        x = w["embed"][ids]
        for layer in range(s.layers):
            at = f"layers.{layer}"
            h = self._norm(x, w[f"{at}.attn_norm"])
            q, k, v = (self._heads(w, at, part, h) for part in "qkv")
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(n, length, -1)
            if tap:
                for part in "qkv":
                    tap(f"{at}.attn.{part}", h.flatten(0, 1), None)
                tap(f"{at}.attn.o", mixed.flatten(0, 1), None)
            x = x + mixed @ w[f"{at}.attn.o"].T
            x = x + self._experts(w, at, self._norm(x, w[f"{at}.mlp_norm"]).flatten(0, 1), tap).view_as(x)
        x = self._norm(x, w["final_norm"])
        head = "embed" if s.tied_embeddings else "head"
        if tap:
            tap(head, x.flatten(0, 1), None)
        return x @ w[head].T

    def _experts(self, w: Weights, at: str, h: Tensor, tap: Tap | None) -> Tensor:
        gates, chosen = torch.softmax(h @ w[f"{at}.router"].T, -1).topk(self.shape.top_k, -1)
        if self.shape.norm_top_k:
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

    @torch.no_grad()
    def hessians(self, w: Weights, ids: Tensor, tell: Callable[[str], None]) -> Weights:
        """Per matrix the mean of x xᵀ over its inputs x, float32 [1 or experts, cols, cols]; of an embedding that is no head, whose rows
        are looked up one by one, the identity."""
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
        if not self.shape.tied_embeddings:
            sums["embed"] = torch.eye(self.shape.hidden)[None]
        return {name: found / counts[name].clamp(min=1)[:, None, None] for name, found in sums.items()}

    def sensitivities(self, w: Weights, ids: Tensor, tell: Callable[[str], None]) -> Weights:
        """Per matrix the mean square of the loss's gradients by its weights, one window at a time: the diagonal of the Fisher
        information that SqueezeLLM (arXiv 2306.07629) weighs errors with. Shaped as the weights."""
        names = matrices(w)
        grown = {n: v.clone().requires_grad_(n in names) for n, v in w.items()}
        total = {n: torch.zeros_like(w[n]) for n in names}
        for i, window in enumerate(ids):
            logits = self.logits(grown, window[None, :-1])[0]
            torch.nn.functional.cross_entropy(logits, window[1:]).backward()
            for name in names:
                if (grad := grown[name].grad) is not None:
                    total[name] += grad.square() / len(ids)
                grown[name].grad = None
            if i % 32 == 0:
                tell(f"sensitivities of all weights: {i} of {len(ids)} windows")
        return total


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

    @torch.no_grad()
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
