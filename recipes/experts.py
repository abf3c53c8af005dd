"""The experts of a mixture layer as two batched products, for training: transformers' own loops over experts are slower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def padded_experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts: every expert's tokens padded to the fullest one's, then one product for all.

    `self` has `gate_up_proj` [experts, 2 * inner, hidden], `down_proj` [experts, hidden, inner] and `act_fn`; `hidden`
    [n, hidden], `chosen` and `weights` [n, k]; returns [n, hidden] of hidden's dtype. The products run in autocast's dtype.
    """
    n, k = chosen.shape
    experts = self.gate_up_proj.shape[0]
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    starts = counts.cumsum(0) - counts
    longest = int(counts.max())
    # Slot of every (token, choice): its expert's block, and its place among the expert's tokens.
    slot = torch.empty_like(flat)
    slot[order] = flat[order] * longest + torch.arange(n * k, device=flat.device) - starts[flat[order]]
    choice = torch.full((experts * longest,), n * k, device=flat.device)  # n * k: an empty slot
    choice[slot] = torch.arange(n * k, device=flat.device)
    token = torch.where(choice < n * k, choice // k, n)

    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    rows = _Gather.apply(hidden.to(dtype), token, slot.view(n, k)).view(experts, longest, -1)
    gate, up = torch.bmm(rows, self.gate_up_proj.to(dtype).transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(self.act_fn(gate) * up, self.down_proj.to(dtype).transpose(1, 2)).flatten(0, 1)
    picked = _Gather.apply(out, slot, choice[:, None]).view(n, k, -1)
    return torch.einsum("nkh,nk->nh", picked, weights.to(dtype)).to(hidden.dtype)
