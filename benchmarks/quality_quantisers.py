"""Other ways to quantise, for benchmarks/quality.py. Each gives the weights as they come back, and the bytes they take.

All work on W float32 [n, rows, cols], n matrices of one kind at once, with H float32 [n or 1, cols, cols], the mean of x xᵀ over
the inputs that each meets (the unquantised model's, for everyone). A group is a run of columns of one row.

- round to nearest: asymmetric, min-max; float16 scale and a zero of the code's width per group, as GPTQ stores it.
- GPTQ (arXiv 2210.17323) with the same storage. Columns with the largest inputs first, grids fixed beforehand from the original
  weights so that the order costs no bytes ("act order" and "static groups" in the authors' code); damping 1 %.
- HQQ: the package's own `Quantizer` with its defaults; scale and zero in float16.
- MWQ (arXiv 2504.15299): an asymmetric 2-bit base (float16 scale, 2-bit zero; the clip of least error by H's diagonal) and for each
  further bit a plane of signs with a float16 scale per group, by least squares under the group's own block of H. After each
  group its error is made up for by later columns, as in GPTQ. The paper does not say for which width; here each width has
  its own compensated weights, which is kinder than any one choice.
- MatGPTQ-like: one 8-bit code whose width-b value is its first b bits *rounded* with the next one, clamped (MatQuant's
  slicing); the codes chosen for all widths together, with error feedback, shares as in our own quantiser. Float16 scale, 8-bit zero.
- Any-Precision (arXiv 2402.10517): nested non-uniform codebooks. Each row's weights are clustered by k-means in 4 values, each cluster then
  split in two for every further bit, each time the best there is; errors weigh as much as the weight's squared gradient (SqueezeLLM). The
  paper begins at 3 bits; here at 2, since 2 is compared. A row keeps its values at the width in float16: 2^b of them, one for every
  column at 8 bits and 256 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2moe.convert.calibrated import TARGETS

DAMPING = 0.01
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class Quantised:
    weights: Tensor
    n_bytes: float


def per_group(n_weights: int, group: int, bits: int, extra_bits: float) -> float:
    """Bytes of codes of `bits` with `extra_bits` beside each group."""
    return n_weights * (bits + extra_bits / group) / 8


def factor(H: Tensor) -> Tensor:
    """Upper U with U^T U the inverse of the damped H: row j holds what the error of column j costs later ones."""
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
    damped = H + DAMPING * mean[:, None, None] * torch.eye(H.shape[-1])
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def grid(W: Tensor, group: int, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [n, rows, groups] of the min-max grid, zero included; the scale as float16 keeps it."""
    cut = W.unflatten(-1, (-1, group))
    low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
    scale = ((high - low) / (levels - 1)).clamp(min=1e-7).half().float()
    return scale, (-low / scale).round().clamp(0, levels - 1)


def nearest(W: Tensor, H: Tensor, bits: int, group: int) -> Quantised:
    scale, zero = (x.repeat_interleave(group, -1) for x in grid(W, group, 2**bits))
    codes = (W / scale + zero).round().clamp(0, 2**bits - 1)
    return Quantised(scale * (codes - zero), per_group(W.numel(), group, bits, 16 + bits))


Value = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a column becomes, [widths, n, rows], of its scale and zero [n, rows] and what is wanted of it, [widths, n, rows]."""


def feedback(W: Tensor, H: Tensor, widths: int, group: int, levels: int, value: Value) -> Tensor:
    """Columns one after the other, each matrix's largest inputs first; weights [widths, n, rows, cols] as they come back."""
    n, rows, cols = W.shape
    order = H.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    U = factor(H.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2))
    scale, zero, sorted_w = (
        x.take_along_dim(order[:, None], -1)
        for x in (*(g.repeat_interleave(group, -1) for g in grid(W, group, levels)), W)
    )
    wanted = sorted_w.expand(widths, n, rows, cols).clone()
    out = torch.empty_like(wanted)
    block = 32
    for begin in range(0, cols, block):
        end = begin + block
        errors = torch.zeros(widths, n, rows, block)
        for j in range(begin, end):
            out[..., j] = value(scale[..., j], zero[..., j], wanted[..., j])
            error = (wanted[..., j] - out[..., j]) / U[:, j, j, None]
            errors[..., j - begin] = error
            wanted[..., j + 1 : end] -= error[..., None] * U[:, None, j, j + 1 : end]
        wanted[..., end:] -= errors @ U[:, begin:end, end:]
    return torch.empty_like(out).scatter_(-1, order[:, None].expand_as(out), out)


def gptq(W: Tensor, H: Tensor, bits: int, group: int) -> Quantised:
    levels = 2**bits

    def value(s: Tensor, z: Tensor, wanted: Tensor) -> Tensor:
        return s * ((wanted / s + z).round().clamp(0, levels - 1) - z)

    return Quantised(feedback(W, H, 1, group, levels, value)[0], per_group(W.numel(), group, bits, 16 + bits))


def matgptq(W: Tensor, H: Tensor, group: int, kind: str) -> dict[int, Quantised]:
    """All widths of one code; `kind` names the shares in our quantiser."""
    codes = torch.arange(256)
    sliced = {b: ((codes + 2 ** (7 - b) if b < 8 else codes) >> (8 - b)).clamp(max=2**b - 1) << (8 - b) for b in WIDTHS}
    shares = {t.bits: t.share / 4 ** (8 - t.bits) for t in TARGETS[kind]}

    def value(s: Tensor, z: Tensor, wanted: Tensor) -> Tensor:
        cost = torch.zeros(*s.shape, 256)
        for i, b in enumerate(WIDTHS):
            if b in shares:
                cost += shares[b] * ((wanted[i] / s + z)[..., None] - sliced[b]).square_()
        chosen = cost.argmin(-1)
        return torch.stack([s * (sliced[b][chosen] - z) for b in WIDTHS])

    found = feedback(W, H, len(WIDTHS), group, 256, value)
    return {b: Quantised(found[i], per_group(W.numel(), group, b, 24)) for i, b in enumerate(WIDTHS)}


def clipped(W: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [n, rows, 1] of the 2-bit grid of one group, of that clip which costs least."""
    best = scale = zero = torch.empty(0)
    for ratio in CLIPS:
        s, z = grid(W * ratio, W.shape[-1], 4)
        back = s * ((W / s + z).round().clamp(0, 3) - z)
        cost = ((W - back).square() * weight).sum(-1, keepdim=True)
        if not best.numel():
            best, scale, zero = cost, s, z
        better = cost < best
        best, scale, zero = torch.where(better, cost, best), torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def mwq(W: Tensor, H: Tensor, group: int) -> dict[int, Quantised]:
    """Base and sign planes; all widths."""
    cols = W.shape[-1]
    U = factor(H)
    wanted = W.expand(len(WIDTHS), *W.shape).clone()
    out = torch.empty_like(wanted)
    for begin in range(0, cols, group):
        here = slice(begin, begin + group)
        block = H[:, here, here]
        scale, zero = clipped(wanted[0, ..., here], block.diagonal(dim1=-2, dim2=-1)[:, None])
        back = scale * ((wanted[0, ..., here] / scale + zero).round().clamp(0, 3) - zero)
        out[0, ..., here] = back
        for i in range(1, len(WIDTHS)):
            rest = wanted[i, ..., here] - back
            signs = torch.where(rest >= 0, 1.0, -1.0)
            seen = signs @ block
            step = (
                ((seen * rest).sum(-1, keepdim=True) / (seen * signs).sum(-1, keepdim=True).clamp(min=1e-20))
                .half()
                .float()
            )
            back = back + step * signs
            out[i, ..., here] = back
        error = torch.linalg.solve_triangular(
            U[:, here, here], wanted[..., here] - out[..., here], upper=True, left=False
        )
        wanted[..., begin + group :] -= error @ U[:, here, begin + group :]
    return {b: Quantised(out[i], per_group(W.numel(), group, b, 18 + 16 * (b - 2))) for i, b in enumerate(WIDTHS)}


ROWS_AT_ONCE = 64


def any_precision(W: Tensor, sensitivity: Tensor) -> dict[int, Quantised]:
    """All widths of one code with a codebook per row and width; `sensitivity` is shaped as W. The four clusters, and every cut of
    one in two, are the best there are: of numbers in a row clusters are runs of the sorted ones."""
    rows = W.flatten(0, -2).double()
    # A weight that no loss depends on still counts a little, or an expert that no token chose would have no centres.
    weight = sensitivity.flatten(0, -2).double()
    weight = weight + 1e-3 * weight.mean(-1, keepdim=True) + 1e-20
    order = rows.argsort(-1)
    w, p = rows.gather(-1, order), (weight / weight.mean(-1, keepdim=True)).gather(-1, order)
    sums = torch.stack([torch.nn.functional.pad(x.cumsum(-1), (1, 0)) for x in (p, p * w)])
    code = torch.cat([_quarters(part) for part in sums.split(ROWS_AT_ONCE, 1)])
    out = {}
    for bits in WIDTHS:
        if bits > 2:
            code = _halved(sums, code, 2 ** (bits - 1))
        zero = torch.zeros(len(w), 2**bits, dtype=torch.float64)
        centres = zero.scatter_add(-1, code, p * w) / zero.scatter_add(-1, code, p).clamp(min=1e-30)
        back = torch.empty_like(w).scatter_(-1, order, centres.half().double().gather(-1, code))
        out[bits] = Quantised(back.float().view_as(W), rows.numel() * bits / 8 + 2.0 * len(rows) * 2**bits)
    return out


def _gain(p: Tensor, pw: Tensor) -> Tensor:
    """What one centre for values of weight `p`, whose weighted sum is `pw`, spares of the sum of their weighted squares."""
    return pw.square() / p.clamp(min=1e-30)


def _quarters(sums: Tensor) -> Tensor:
    """Codes 0 to 3 [rows, n] of the best four clusters, by dynamic programming over where each ends; `sums` [2, rows, n + 1]."""
    n = sums.shape[2] - 1
    at = torch.arange(n + 1)
    p, pw = sums.float()
    gain = _gain(p[:, :, None] - p[:, None], pw[:, :, None] - pw[:, None])  # [rows, end, first]
    gain.masked_fill_(at[:, None] < at, -torch.inf)
    best, cuts = gain[:, :, 0], []
    for _ in range(2):
        best, cut = (best[:, None] + gain).max(-1)
        cuts.append(cut)
    place = (best + gain[:, n]).argmax(-1, keepdim=True)
    code = (at[:n] >= place).long()
    for cut in reversed(cuts):
        place = cut.gather(-1, place)
        code += at[:n] >= place
    return code


def _halved(sums: Tensor, code: Tensor, count: int) -> Tensor:
    """Every cluster cut in two where that spares most; `code` [rows, n] ascends, below `count`."""
    rows, n = code.shape
    at = torch.arange(n).expand(rows, n)
    sizes = torch.zeros(rows, count, dtype=torch.int64).scatter_add(-1, code, torch.ones_like(code))
    ends = sizes.cumsum(-1)
    first, end = (ends - sizes).gather(-1, code), ends.gather(-1, code)
    before, middle, after = (sums.gather(-1, place.expand(2, -1, -1)) for place in (first, at, end))
    gain = (_gain(*(middle - before)) + _gain(*(after - middle))).masked_fill(at == first, -1.0)
    best = torch.full((rows, count), -1.0, dtype=torch.float64).scatter_reduce(-1, code, gain, "amax")
    chosen = torch.where((gain == best.gather(-1, code)) & (at > first), at, n)
    cut = torch.full((rows, count), n).scatter_reduce(-1, code, chosen, "amin")
    return 2 * code + (at >= cut.gather(-1, code)).long()


def hqq(W: Tensor, H: Tensor, bits: int, group: int) -> Quantised:
    """8 bits in place of 7, which the package lacks. ImportError without the package."""
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

    bits = 8 if bits == 7 else bits

    def one(w: Tensor) -> Tensor:
        q, meta = Quantizer.quantize(w, nbits=bits, group_size=group, device="cpu", bitpack=False)
        back = (q.float() - meta["zero"].half().float()) * meta["scale"].half().float()
        return back.reshape(w.shape)

    return Quantised(torch.stack([one(w) for w in W]), per_group(W.numel(), group, bits, 32))
