"""The decoder of `models/layers.py` in torch, on a container's own weights: any width for each (token, expert), and gradients.

Activations stay float32, dense weights are read at 8 bits. Layers are loaded when they are asked for, and kept as long as
KEEP_BYTES of expert weights allow; experts are held as codes and dequantised for use. So a model larger than memory can be run
layer by layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from d2moe import planes
from d2moe.container import PROJECTIONS, Container, NestedMatrix
from d2moe.models import shape_from_config
from d2moe.models.rope import attention_scale, inverse_frequencies
from d2moe.types import BASE_BITS, MAX_BITS, WIDTHS

KEEP_BYTES = 2 << 30
"""Dequantised expert weights that are kept."""

Choose = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [n, hidden] before the norm, h [n, hidden], experts [n, top_k], gates [n, top_k]) -> widths int64 [n, top_k], 0 for none."""


def matrix(m: NestedMatrix, bits: int, rows: int, cols: int, rotation: int = 0) -> Tensor:
    """A nested matrix as float32 [rows, cols] at `bits`, of which it may have more, for inputs that are not rotated."""
    codes = planes.untile(planes.unpack(m.base, m.planes[: bits - BASE_BITS]))
    w = planes.dequantize(codes, planes.untile_affine(m.affine), m.row_scale.reshape(-1), bits, rows, cols)
    return torch.from_numpy(planes.rotate(w, rotation) if rotation else w)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class TorchDecoder:
    """One container; `moe_layers` are the layers that have experts."""

    def __init__(self, container: Container):
        self.container, self.shape = container, shape_from_config(container.config, str(container.path / "config.json"))
        s = self.shape
        self.moe_layers = container.moe_layers
        self._embed = self._dense("embed", s.vocab, s.hidden)
        self._head = self._embed if s.tied_embeddings else self._dense("head", s.vocab, s.hidden)
        self._final_norm = self._vector("final_norm")
        self._layers: dict[int, dict[str, Any]] = {}
        self._experts: OrderedDict[tuple[int, int, int], list[Tensor]] = OrderedDict()
        self._records: OrderedDict[tuple[int, int], dict[str, NestedMatrix]] = OrderedDict()
        shapes = {p: container.record.matrix(p) for p in PROJECTIONS}
        self._shapes = {p: (shapes[p].rows, shapes[p].cols) for p in PROJECTIONS}
        expert_bytes = 4 * 3 * s.hidden * s.expert_inner
        self._kept = max(len(WIDTHS), KEEP_BYTES // expert_bytes)
        self._inverse = torch.tensor(inverse_frequencies(s.rope, s.head_dim), dtype=torch.float32)

    def _dense(self, name: str, rows: int, cols: int) -> Tensor:
        rotation = self.container.record.rotation_of(name)
        found = self.container.read_nested(name, MAX_BITS)
        return matrix(found, found.bits, rows, cols, rotation)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(self.container.read_dense(name))

    def embed(self, tokens: Tensor) -> Tensor:
        """float32 [..., hidden] of ids [...]."""
        return self._embed[tokens]

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-softmax over the vocabulary after the last layer."""
        return torch.log_softmax(rms_norm(x, self._final_norm, self.shape.rms_eps) @ self._head.T, -1)

    def layer(self, index: int, x: Tensor, choose: Choose) -> Tensor:
        """x [windows, tokens, hidden] after layer `index`; `choose` says how wide its experts are."""
        w = self._layer(index)
        x = self._attention(w, x)
        if index not in self.moe_layers:
            h = rms_norm(x, w["mlp_norm"], self.shape.rms_eps)
            return x + gated(h, w["mlp"])
        flat = x.reshape(-1, self.shape.hidden)
        h, ids, gates = self.route(index, flat)
        out = self.experts(index, h, ids, gates, choose(flat, h, ids, gates))
        if "shared" in w:
            out = out + torch.sigmoid(h @ w["mix"])[:, None] * gated(h, w["shared"])
        return x + out.view_as(x)

    def route(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input [n, hidden], experts and gates [n, top_k] of x [n, hidden], largest gate first."""
        w = self._layer(index)
        h = rms_norm(x, w["mlp_norm"], self.shape.rms_eps)
        gates, ids = torch.softmax(h @ w["router"].T, -1).topk(self.shape.top_k, -1)
        return h, ids, gates / gates.sum(-1, keepdim=True) if self.shape.norm_top_k else gates

    def experts(self, index: int, h: Tensor, ids: Tensor, gates: Tensor, widths: Tensor) -> Tensor:
        """Sum of gate times expert, [n, hidden]; each pair of token and expert at its own width."""
        return (gates[..., None] * self.each_expert(index, h, ids, widths)).sum(1)

    def each_expert(self, index: int, h: Tensor, ids: Tensor, widths: Tensor) -> Tensor:
        """What each expert of each token answers, [n, top_k, hidden], at its own width; 0 for none."""
        places: list[tuple[Tensor, Tensor]] = []
        answers: list[Tensor] = []
        for expert in ids.unique().tolist():
            mine = ids == expert
            for bits in widths[mine].unique().tolist():
                if bits:
                    places.append((mine & (widths == bits)).nonzero(as_tuple=True))
                    answers.append(gated(h[places[-1][0]], self.expert(index, expert, bits)))
        out = h.new_zeros(*ids.shape, h.shape[-1])
        if not answers:
            return out
        token, rank = (torch.cat(part) for part in zip(*places, strict=True))
        return out.index_put((token, rank), torch.cat(answers))

    def expert(self, index: int, expert: int, bits: int) -> list[Tensor]:
        """Gate, up and down of an expert as float32 at `bits`, or at what its record has."""
        bits = self.container.width(index, expert, bits)
        key = index, expert, bits
        if key not in self._experts:
            record = self._records.get((index, expert))
            if record is None:
                record = self._records[index, expert] = self.container.read_expert(index, expert, self.container.width(index, expert))
                if len(self._records) > self._kept:
                    self._records.popitem(last=False)
            self._experts[key] = [matrix(record[p], bits, *self._shapes[p], self.container.record.rotation_of(p)) for p in PROJECTIONS]
            if len(self._experts) > self._kept:
                self._experts.popitem(last=False)
        return self._experts[key]

    def _layer(self, index: int) -> dict[str, Any]:
        if index in self._layers:
            return self._layers[index]
        s, name = self.shape, f"layers.{index}"
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        w: dict[str, Any] = {"window": s.windows[index]}
        for key, shape in {"q": (q, s.hidden), "k": (kv, s.hidden), "v": (kv, s.hidden), "o": (s.hidden, q)}.items():
            bias = f"{name}.attn.{key}_bias"
            w[key] = self._dense(f"{name}.attn.{key}", *shape), self._vector(bias) if self.container.has(bias) else None
        vectors = {"attn_norm": "attn_norm", "mlp_norm": "mlp_norm", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
        vectors |= {"router": "router", "mix": "shared.mix"}
        w |= {key: self._vector(f"{name}.{n}") for key, n in vectors.items() if self.container.has(f"{name}.{n}")}
        for key, inner in (("mlp", s.dense_inner), ("shared", s.shared_inner)):
            if self.container.has(f"{name}.{key}.gate"):
                sizes = {"gate": (inner, s.hidden), "up": (inner, s.hidden), "down": (s.hidden, inner)}
                w[key] = [self._dense(f"{name}.{key}.{p}", *size) for p, size in sizes.items()]
        if len(self._layers) * sum(t.nbytes for t, _ in (w[k] for k in "qkvo")) > KEEP_BYTES:
            self._layers.clear()
        self._layers[index] = w
        return w

    def _attention(self, w: dict[str, Any], x: Tensor) -> Tensor:
        s, (windows, tokens, _) = self.shape, x.shape
        h = rms_norm(x, w["attn_norm"], s.rms_eps)

        def heads(key: str, count: int) -> Tensor:
            weight, bias = w[key]
            y = linear(h, weight, bias)
            if key != "v" and s.qk_norm == "all":
                y = rms_norm(y, w[f"{key}_norm"], s.rms_eps)
            if s.clip_qkv:
                y = y.clamp(-s.clip_qkv, s.clip_qkv)
            y = y.view(windows, tokens, count, s.head_dim).transpose(1, 2)
            return rms_norm(y, w[f"{key}_norm"], s.rms_eps) if key != "v" and s.qk_norm == "head" else y

        angle = torch.arange(tokens, dtype=torch.float32)[:, None] * self._inverse
        cos, sin = (f(angle) * attention_scale(s.rope) for f in (torch.cos, torch.sin))

        def turn(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        place = torch.arange(tokens)
        past = place[:, None] - place
        seen = (past >= 0) & (past < w["window"]) if w["window"] else past >= 0
        y = scaled_dot_product_attention(
            turn(heads("q", s.heads)), turn(heads("k", s.kv_heads)), heads("v", s.kv_heads), attn_mask=seen, enable_gqa=True
        )
        weight, bias = w["o"]
        return x + linear(y.transpose(1, 2).reshape(windows, tokens, -1), weight, bias)


def gated(h: Tensor, weights: list[Tensor]) -> Tensor:
    """down(silu(gate h) * up h)."""
    gate, up, down = weights
    return (silu(h @ gate.T) * (h @ up.T)) @ down.T


def uniform(bits: int) -> Choose:
    """All experts at one width."""
    return lambda x, h, ids, gates: torch.full_like(ids, bits)
