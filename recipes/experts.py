"""The experts of a mixture layer for training: transformers' own loops over experts are slower.

On a GPU two batched products, every expert's tokens padded to the fullest one's. On a CPU, where starting a product costs little, a
product an expert over exactly its tokens: an untrained router sends four times as many to some as to others.
"""

from __future__ import annotations

import ctypes
import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class _Gather(torch.autograd.Function):
    """`rows[index]` whose gradient is a gather too: scattered sums are slow, and the way back is known here.

    `rows` [n, h], `index` [m], `back` [n, k]: where in `index` each row was taken, k times each; row m of the gradient
    is zero for those `back` entries that point there.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        (grad,) = grads
        padded = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))
        return padded[back].sum(1) if back.shape[1] > 1 else padded[back[:, 0]], None, None


class _Sliced(torch.autograd.Function):
    """Experts over their own rows: `rows` [m, h] in the order of experts, those of expert e end before `ends`[e]; `gate_up`
    [experts, 2 i, h] and `down` [experts, h, i]; the answer is [m, h]. The gate is a SiLU's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, ends: list[int]) -> Tensor:
        both = rows.new_empty(len(rows), gate_up.shape[1])
        out = torch.empty_like(rows)
        parts = [(e, slice(at, end)) for e, (at, end) in enumerate(pairwise([0, *ends])) if end > at]
        for e, part in parts:
            torch.mm(rows[part], gate_up[e].t(), out=both[part])
        gate, up = both.chunk(2, dim=-1)
        mid = silu(gate) * up
        for e, part in parts:
            torch.mm(mid[part], down[e].t(), out=out[part])
        ctx.save_for_backward(rows, gate_up, down, both, mid)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, gate_up, down, both, mid = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_rows, of_mid, of_both = (torch.empty_like(t) for t in (rows, mid, both))
        of_gate_up, of_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, part in ctx.parts:
            torch.mm(grad[part], down[e], out=of_mid[part])
            torch.mm(grad[part].t(), mid[part], out=of_down[e])
        gate, up = both.chunk(2, dim=-1)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        of_gate.copy_(torch.ops.aten.silu_backward(of_mid * up, gate))
        torch.mul(of_mid, silu(gate), out=of_up)
        for e, part in ctx.parts:
            torch.mm(of_both[part], gate_up[e], out=of_rows[part])
            torch.mm(of_both[part].t(), rows[part], out=of_gate_up[e])
        return of_rows, of_gate_up, of_down, None


def fast_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts.

    `self` has `gate_up_proj` [experts, 2 * inner, hidden], `down_proj` [experts, hidden, inner] and a SiLU for `act_fn`; `hidden`
    [n, hidden], `chosen` and `weights` [n, k]; returns [n, hidden] of hidden's dtype. The products run in autocast's dtype.
    """
    n, k = chosen.shape
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    gate_up, down, experts = self.gate_up_proj.to(dtype), self.down_proj.to(dtype), self.gate_up_proj.shape[0]
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    ends = counts.cumsum(0)
    # `slot`: where each (token, choice) is computed; `token`: whose row is at each slot, n for none.
    slot = torch.empty_like(flat)
    if device == "cpu":
        slot[order] = torch.arange(n * k)
        rows = _Gather.apply(hidden.to(dtype), order // k, slot.view(n, k))
        out, choice = _Sliced.apply(rows, gate_up, down, ends.tolist()), order
    else:
        longest = int(counts.max())
        slot[order] = flat[order] * longest + torch.arange(n * k, device=flat.device) - (ends - counts)[flat[order]]
        choice = torch.full((experts * longest,), n * k, device=flat.device)  # n * k: an empty slot
        choice[slot] = torch.arange(n * k, device=flat.device)
        token = torch.where(choice < n * k, choice // k, n)
        rows = _Gather.apply(hidden.to(dtype), token, slot.view(n, k)).view(experts, longest, -1)
        gate, up = torch.bmm(rows, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(silu(gate) * up, down.transpose(1, 2)).flatten(0, 1)
    picked = _Gather.apply(out, slot, choice[:, None]).view(n, k, -1)
    return torch.einsum("nkh,nk->nh", picked, weights.to(dtype)).to(hidden.dtype)


def prepare_cpu() -> None:
    """Settings of the libraries below, before the first product: what is freed stays with the process, as giving back and getting a
    step's gigabyte again takes as long as its products; and oneDNN keeps what it compiled for each number of rows (1,024 by default, which
    experts use up in two steps). Without glibc, only the second."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
