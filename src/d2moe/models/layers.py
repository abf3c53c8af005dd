"""The decoder that all supported families share, put together from a back end's blocks.

A family differs in its `ModelShape` and in its tensor names only; the flow is the same:

    x = embed(tokens)
    per layer:  x += attention(norm(x));  h = norm(x);  x += shared_expert(h) + Σ gate_i * expert_i(h)
    logits = head(norm(x))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from d2moe.models.rope import attention_scale, inverse_frequencies
from d2moe.types import ModelShape

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

QK_NORMS = {"none": 0, "head": 1, "all": 2}


class Weights(Protocol):
    """Where dense weights come from: a container, or anything that answers by canonical name."""

    def read_dense(self, name: str) -> npt.NDArray[Any]: ...
    def has(self, name: str) -> bool: ...


class ExpertStream(Protocol):
    """What a layer needs of the part that brings experts: reads start at `start`, the result is added at `finish`."""

    def start(self, moe_index: int, tokens: int, h: F32, ids: I32) -> None: ...
    def finish(self, tokens: int, gates: F32, x: F32) -> None: ...


@dataclass
class Places:
    """Where the tokens of a step sit: position [tokens], sequence row [tokens], block tables [sequences, blocks]."""

    position: I32
    sequence: I32
    tables: I32


@dataclass
class Layer:
    attention: Any
    router: Any | None
    feed_forward: Any | None  # the whole block of a dense layer, or the shared expert of an MoE layer
    moe_index: int


class Decoder:
    """All resident weights of a model, and its forward pass. Buffers hold up to `max_tokens` rows."""

    def __init__(
        self,
        backend: Any,
        runtime: Any,
        shape: ModelShape,
        weights: Weights,
        group: int,
        max_tokens: int,
        on_layer: Callable[[int], None] | None = None,
    ):
        self.shape, self.max_tokens = shape, max_tokens
        self._backend, self._runtime, self._weights, self._group = backend, runtime, weights, group
        embedding = self._linear("embed", shape.vocab, shape.hidden)
        head = embedding if shape.tied_embeddings else self._linear("head", shape.vocab, shape.hidden)
        self.ends = backend.Ends(runtime, embedding, head, weights.read_dense("final_norm"), shape.rms_eps)
        self.layers = []
        for index in range(shape.layers):
            self.layers.append(self._layer(index))
            if on_layer:
                on_layer(index)
        self.x = np.zeros((max_tokens, shape.hidden), np.float32)
        self.h = np.zeros((max_tokens, shape.hidden), np.float32)
        self.ids = np.zeros((max_tokens, shape.top_k), np.int32)
        self.gates = np.zeros((max_tokens, shape.top_k), np.float32)

    def _linear(self, name: str, rows: int, cols: int) -> Any:
        w = self._weights
        bias = w.read_dense(f"{name}_bias") if w.has(f"{name}_bias") else None
        affine = w.read_dense(f"{name}.affine").view(np.uint16)
        return self._backend.Linear(rows, cols, self._group, w.read_dense(f"{name}.codes"), affine, bias)

    def _feed_forward(self, name: str, inner: int, mix: F32 | None, norm: F32 | None) -> Any:
        hidden = self.shape.hidden
        gate, up = self._linear(f"{name}.gate", inner, hidden), self._linear(f"{name}.up", inner, hidden)
        down = self._linear(f"{name}.down", hidden, inner)
        return self._backend.FeedForward(self._runtime, gate, up, down, mix, norm, self.shape.rms_eps)

    def _layer(self, index: int) -> Layer:
        s, w, name = self.shape, self._weights, f"layers.{index}"
        q_dim, kv_dim = s.heads * s.head_dim, s.kv_heads * s.head_dim
        normed = s.qk_norm != "none"
        attention = self._backend.Attention(
            self._runtime,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            window=s.windows[index],
            qk_norm=QK_NORMS[s.qk_norm],
            eps=s.rms_eps,
            clip=s.clip_qkv or 0.0,
            rope_scale=attention_scale(s.rope),
            norm=w.read_dense(f"{name}.attn_norm"),
            q=self._linear(f"{name}.attn.q", q_dim, s.hidden),
            k=self._linear(f"{name}.attn.k", kv_dim, s.hidden),
            v=self._linear(f"{name}.attn.v", kv_dim, s.hidden),
            o=self._linear(f"{name}.attn.o", s.hidden, q_dim),
            q_norm=w.read_dense(f"{name}.attn.q_norm") if normed else None,
            k_norm=w.read_dense(f"{name}.attn.k_norm") if normed else None,
            inverse_frequency=inverse_frequencies(s.rope, s.head_dim),
        )
        norm = w.read_dense(f"{name}.mlp_norm")
        if index not in s.moe_layers:
            return Layer(attention, None, self._feed_forward(f"{name}.mlp", s.dense_inner, None, norm), -1)
        router = self._backend.Router(self._runtime, norm, w.read_dense(f"{name}.router"), s.top_k, s.norm_top_k, s.rms_eps)
        shared = None
        if s.shared_inner:
            mix = w.read_dense(f"{name}.shared.mix")
            shared = self._feed_forward(f"{name}.shared", s.shared_inner, mix, None)
        return Layer(attention, router, shared, s.moe_layers.index(index))

    def forward(self, tokens: I32, places: Places, kv: Any, experts: ExpertStream, rows: I32 | None) -> F32:
        """Logits float32 [len(rows), vocab] of the given rows of this step (none for an empty list).

        `tokens` int32 [n], n at most `max_tokens`; keys and values are appended to `kv`.
        """
        n, x, h, ids, gates = len(tokens), self.x, self.h, self.ids, self.gates
        self.ends.embed(tokens, x)
        for index, layer in enumerate(self.layers):
            layer.attention.forward(kv, index, places.position, places.sequence, places.tables, x)
            if layer.router is None:
                assert layer.feed_forward is not None, "a layer without a router has a dense block"
                layer.feed_forward.forward(n, h, x)
                continue
            layer.router.forward(n, x, h, ids, gates)
            experts.start(layer.moe_index, n, h, ids)
            if layer.feed_forward is not None:  # computed while the first planes are on their way
                layer.feed_forward.forward(n, h, x)
            experts.finish(n, gates, x)
        if rows is None or not len(rows):
            return np.zeros((0, self.shape.vocab), np.float32)
        chosen = x[:n] if len(rows) == n else np.ascontiguousarray(x[rows])
        out = np.empty((len(rows), self.shape.vocab), np.float32)
        self.ends.logits(len(rows), chosen, out)
        return out
