"""The decoder that all supported families share, put together from a back end's blocks.

A family differs in its `ModelShape` and in its tensor names only; the flow is the same:

    x = embed(tokens)
    per layer:  x += attention(norm(x));  h = norm(x);  x += shared_expert(h) + Σ gate_i * expert_i(h)
    logits = head(norm(x))

The back end's `Program` holds all layers and runs through them by itself; it comes back where a layer's experts are not
all in memory, so that their reading can be planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from d2moe.models.rope import attention_scale, inverse_frequencies
from d2moe.types import MAX_BITS, DenseWidths, ModelShape

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

QK_NORMS = {"none": 0, "head": 1, "all": 2}


class Weights(Protocol):
    """Where dense weights come from: a container, or anything that answers by canonical name."""

    def read_dense(self, name: str) -> npt.NDArray[Any]: ...
    def read_nested(self, name: str, bits: int, allocate: Callable[[int], npt.NDArray[np.uint8]] | None = None) -> Any: ...
    def has(self, name: str) -> bool: ...


@dataclass(frozen=True)
class DenseOptions:
    """`widths` of the dense weights in memory; `group`: columns that share a step and a zero; `rotation`: of what down
    meets (`planes.rotate`), 0 for none; `allocate(n_bytes)` gives
    the memory of each array, uint8 [n_bytes] at a multiple of 64 bytes."""

    widths: DenseWidths
    group: int
    rotation: int = 0
    allocate: Callable[[int], npt.NDArray[np.uint8]] | None = None


class Decoder:
    """All resident weights of a model, and its steps of up to `max_tokens` tokens.

    A step is `start`, then `run` until it says -1: then the logits are where `start` was told to put them. `least`, `most` int32 and
    `price` float32 [max_tokens] say before `start` what each token allows (see `WidthRouter` in csrc/widths.h); `ids` and `bits` int32
    [moe_layers, max_tokens, top_k] tell afterwards which experts were chosen and how wide. `width_routers` has one for each MoE layer,
    or is empty.
    """

    def __init__(
        self,
        backend: Any,
        runtime: Any,
        shape: ModelShape,
        weights: Weights,
        dense: DenseOptions,
        max_tokens: int,
        kv: Any,
        experts: Any,
        on_layer: Callable[[int], None] | None = None,
        width_routers: Sequence[Mapping[str, Any]] = (),
    ):
        self.shape, self.max_tokens = shape, max_tokens
        self._backend, self._weights, self._dense, self._width_routers = backend, weights, dense, width_routers
        self.least, self.most = (np.full(max_tokens, MAX_BITS, np.int32) for _ in range(2))
        self.price = np.zeros(max_tokens, np.float32)
        self.ids, self.bits = (np.zeros((len(shape.moe_layers), max_tokens, shape.top_k), np.int32) for _ in range(2))
        embedding = self._linear("embed", shape.vocab, shape.hidden)
        head = embedding if shape.tied_embeddings else self._linear("head", shape.vocab, shape.hidden)
        self.program = backend.Program(
            runtime,
            embedding=embedding,
            head=head,
            norm=weights.read_dense("final_norm"),
            eps=shape.rms_eps,
            inverse_frequency=inverse_frequencies(shape.rope, shape.head_dim).tolist(),
            rope_scale=attention_scale(shape.rope),
            kv=kv,
            experts=experts,
            ids=self.ids,
            bits=self.bits,
            least=self.least,
            most=self.most,
            price=self.price,
        )
        for index in range(shape.layers):
            self._add_layer(index)
            if on_layer:
                on_layer(index)

    def _linear(self, name: str, rows: int, cols: int) -> Any:
        w, dense = self._weights, self._dense
        bias = w.read_dense(f"{name}_bias") if w.has(f"{name}_bias") else None
        m = w.read_nested(name, dense.widths.of(name), dense.allocate)
        return self._backend.Linear(rows, cols, dense.group, m.bits, m.row_scale, m.affine, m.base, m.planes, bias)

    def _feed_forward(self, name: str, inner: int, mix: F32 | None, norm: F32 | None) -> Any:
        hidden = self.shape.hidden
        gate, up = self._linear(f"{name}.gate", inner, hidden), self._linear(f"{name}.up", inner, hidden)
        down = self._linear(f"{name}.down", hidden, inner)
        return self._backend.FeedForward(gate, up, down, mix, norm, self.shape.rms_eps, self._dense.rotation)

    def _add_layer(self, index: int) -> None:
        s, w, name = self.shape, self._weights, f"layers.{index}"
        norm = w.read_dense(f"{name}.mlp_norm")
        router = feed_forward = widths = None
        if index not in s.moe_layers:
            feed_forward = self._feed_forward(f"{name}.mlp", s.dense_inner, None, norm)
        else:
            router = self._backend.Router(norm, w.read_dense(f"{name}.router"), s.top_k, s.norm_top_k, s.rms_eps)
            if s.shared_inner:
                mix = w.read_dense(f"{name}.shared.mix")
                feed_forward = self._feed_forward(f"{name}.shared", s.shared_inner, mix, None)
            if self._width_routers:
                widths = self._backend.WidthRouter(**self._width_routers[s.moe_layers.index(index)])
        self.program.add_layer(self._attention(index), router, feed_forward, widths)

    def _attention(self, index: int) -> Any:
        s, w, name = self.shape, self._weights, f"layers.{index}"
        q_dim, kv_dim = s.heads * s.head_dim, s.kv_heads * s.head_dim
        normed = s.qk_norm != "none"
        return self._backend.Attention(
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            window=s.windows[index],
            qk_norm=QK_NORMS[s.qk_norm],
            eps=s.rms_eps,
            clip=s.clip_qkv or 0.0,
            norm=w.read_dense(f"{name}.attn_norm"),
            q=self._linear(f"{name}.attn.q", q_dim, s.hidden),
            k=self._linear(f"{name}.attn.k", kv_dim, s.hidden),
            v=self._linear(f"{name}.attn.v", kv_dim, s.hidden),
            o=self._linear(f"{name}.attn.o", s.hidden, q_dim),
            q_norm=w.read_dense(f"{name}.attn.q_norm") if normed else None,
            k_norm=w.read_dense(f"{name}.attn.k_norm") if normed else None,
        )

    def start(self, tokens: I32, tables: I32, rows: I32, logits: F32) -> None:
        """Begin a step with `tokens` int32 [3, n]: id, position, and row of `tables` int32 [sequences, blocks], which says where the
        cache's blocks are; keys and values are appended there.

        `rows` int32, ascending: the tokens whose logits are wanted, in `logits` float32 [len(rows), vocab]; the last layer's experts see
        no others.
        """
        self._tokens, self._rows = tokens.shape[1], rows
        self.program.start(tokens, tables, rows, logits)

    def run(self) -> int:
        """Go on; -1 at the end, else the MoE layer (counted among those) that waits for reads of its experts."""
        return int(self.program.run())

    def choices(self, layer: int) -> tuple[I32, I32]:
        """Experts and widths int32 [tokens that the layer's experts see, top_k], of a MoE layer that has been routed."""
        n = len(self._rows) if self.ends_with(layer) else self._tokens
        return self.ids[layer, :n], self.bits[layer, :n]

    def ends_with(self, layer: int) -> bool:
        """Whether this MoE layer is the model's last layer, whose experts see only the tokens that are asked of."""
        return self.shape.moe_layers[layer] == self.shape.layers - 1

    def forecast(self, ahead: int) -> I32:
        """Experts int32 [tokens, ahead, top_k] that the routers of the next MoE layers choose for the input of this one, which
        waits, by falling weight; -1 past the last layer, and where that one sees fewer tokens (HOBBIT, arXiv 2411.01433)."""
        return np.asarray(self.program.forecast(ahead), np.int32)

    def compute(self, experts: I32) -> None:
        """Compute some experts of the layer that waits, as they arrive; `run` computes the rest."""
        self.program.compute(experts)
