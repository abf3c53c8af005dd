"""Making a width router: what a plane of an expert is worth to a token, measured or learned, and the dial's table of prices.

The value of step s of expert e in layer l to a token, in nats of the token's KL divergence from full width for each bit, is taken as

    gate^2 * exp(weight[l, e] . h) * planes[l, e, s]                     "measured"
    gate^p * (mean x^2)^q * exp(weight[l, e] . h) * planes[l, e, s]      "learned"

The steps are the first two bits together, without which an expert is left out, and the planes 3 to 8.

measured: D[l, e, b], the mean squared difference of an expert's output at b bits from that at 8 (at 0: its own square), is taken from a
run over the text; S[l], what a squared difference in a layer costs at the end, from runs with one layer alone at SENSE_BITS. A step's
value is that of D times S, divided by its bits. Tokens differ: `weight` is the ridge regression of the logarithm of a token's own squared
difference on its normed input, and D is what is left beside it.

learned: from there by gradients, as in arXiv 2504.15299 (distillation, a price per bit, weights frozen). The loss is the KL
divergence from the teacher over the price, plus the bits taken; the price is drawn anew for each batch, so one router serves all
averages and no capacities are needed against collapse. Estimator: straight-through. Forward a plane is taken or not; backward
its switch is a sigmoid of (log value - log price) / TEMPERATURE, and a pair's output after step s is f_s + switch_(s+1) (f_(s+1) - f_s) +
(switch_s - 1) (f_s - f_(s-1)): only the steps next to the choice can move it, and others need not be computed.
Deviations from the paper: it has a softmax over widths and one fixed price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2moe.container import BitRouter
from d2moe.convert.torch_decoder import Choose, TorchDecoder, gated, uniform
from d2moe.errors import CheckpointError, RequestError
from d2moe.types import BASE_BITS, MAX_BITS, WIDTHS

WINDOW = 256
"""Tokens that are run together, from an empty context."""
BATCH = 16
"""Windows run at a time without gradients; LEARN_BATCH with."""
LEARN_BATCH = 4
SENSE_BITS = 3
PRIOR = 0.1
FITTED_BITS = (2, 3, 4)
RIDGE = 1.0
"""Of the inputs' mean square: halves what the text says of a direction as strong as the mean one."""
DRIFT = 30.0
"""How much more a direction counts along which whole windows differ: by those, the average of another domain's text would drift."""
TEMPERATURE = 0.7
RATE = 0.02
PRICED = (2.1, 5.0)
"""Averages between which the prices of training are drawn."""
DIAL_STEP = 0.05
TINY = 1e-30

Progress = Callable[[int, int], None]
Texts = Mapping[str, Sequence[int]]
"""Tokens by the name of the file they are of."""
STEPS = torch.tensor([0, *WIDTHS])
"""Widths after each step of value, 0 before the first."""
COSTS = STEPS.diff().float()


def windows_of(texts: Texts, tokens: int, learn: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(windows to measure on, windows held back for the report, windows to learn from), int64 [n, WINDOW], equal parts of each text.

    `tokens` are measured on and held back, every fourth window, spread evenly over a text: its beginning may be what the weights were
    calibrated on, and rounding errors there are not those of other text. `learn` windows, or as many as there are, are not held back.
    RequestError if a text is shorter than a window, or there are fewer than four windows.
    """
    each = max(1, tokens // WINDOW // len(texts))
    measured, held, learned = [], [], []
    for name, text in texts.items():
        count = len(text) // WINDOW
        if not count:
            raise RequestError(f"{name}: has {len(text)} tokens, expected at least {WINDOW}; give a longer text, or leave this one out")
        cut = torch.tensor(text[: count * WINDOW]).view(-1, WINDOW)
        chosen = torch.arange(min(each, count)) * count // min(each, count)
        measured.append(chosen[torch.arange(len(chosen)) % 4 != 3])
        held.append(chosen[3::4])
        rest = torch.ones(count, dtype=torch.bool)
        rest[held[-1]] = False
        left = rest.nonzero()[:, 0]
        wanted = min(len(left), -(-learn // len(texts)))
        learned.append(cut[left[torch.arange(wanted) * len(left) // max(wanted, 1)]])
        measured[-1], held[-1] = cut[measured[-1]], cut[held[-1]]
    if not sum(map(len, held)):
        found = ", ".join(f"{name} {len(text):,}" for name, text in texts.items())
        raise RequestError(f"too little text, tokens: {found}; expected one of at least {4 * WINDOW:,}; give a longer one")
    return torch.cat(measured), torch.cat(held), torch.cat(learned)


def batches(windows: Tensor, size: int = BATCH) -> Iterator[Tensor]:
    for at in range(0, len(windows), size):
        yield windows[at : at + size]


@dataclass
class Rule:
    """The values of all layers in torch: planes [layers, experts, 7], of the first two bits (infinite: an expert is never left out)
    and of each further one; powers [layers, 2], weight [layers, experts, hidden]."""

    planes: Tensor
    powers: Tensor
    weight: Tensor | None = None

    def values(self, layer: int, x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """Logarithms [n, top_k, 7] of the steps' values; csrc/widths.h has the same sum."""
        gate_power, norm_power = self.powers[layer]
        s = gate_power * gates.clamp(min=TINY).log() + norm_power * x.pow(2).mean(-1, keepdim=True).clamp(min=TINY).log()
        if self.weight is not None:
            s = s + torch.einsum("nkh,nh->nk", self.weight[layer][ids], h)
        return s[..., None] + self.monotone()[layer][ids]

    def monotone(self) -> Tensor:
        """A plane is worth no more than the one before it, or it could never be had alone."""
        return self.planes.cummin(-1)[0]

    def at(self, price: float) -> Callable[[int], Choose]:
        """The widths at a price, for each layer with experts."""

        def layer(m: int) -> Choose:
            return lambda x, h, ids, gates: STEPS[(self.values(m, x, h, ids, gates) >= price).sum(-1)]

        return layer

    def router(self, dial: np.ndarray[Any, np.dtype[np.float32]], worth: Tensor | None = None) -> BitRouter:
        weight = None if self.weight is None else self.weight.numpy()
        planes = self.monotone()
        base = planes[..., 0].numpy() if torch.isfinite(planes[..., 0]).all() else None
        return BitRouter(planes[..., 1:].numpy(), self.powers.numpy(), weight, dial, base, None if worth is None else worth.numpy())


Routed = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, h [n, hidden], ids and gates [n, top_k] of a layer."""


def looking(seen: list[Routed]) -> Choose:
    """Full width, and a note of what was routed."""

    def choose(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        seen.append((x, h, ids, gates))
        return torch.full_like(ids, MAX_BITS)

    return choose


def plain(bits: int) -> Callable[[int], Choose]:
    """One width in all layers."""
    return lambda m: uniform(bits)


def run(decoder: TorchDecoder, x: Tensor, choose: Callable[[int], Choose], first: int = 0) -> Tensor:
    """x after the last layer, from what goes into layer `first`; `choose(m)` is for the m-th layer with experts."""
    for index in range(first, decoder.shape.layers):
        m = decoder.moe_layers.index(index) if index in decoder.moe_layers else 0
        x = decoder.layer(index, x, choose(m))
    return x


@dataclass(frozen=True)
class Measured:
    """`difference` [layers, experts, 7] mean squared difference of an expert's output at 0 and 2 to 7 bits from that at 8; `mass`
    [layers, experts] summed squared gates; `sense` [layers] nats of KL per gate^2 * squared difference, summed over pairs. `weight`
    [layers, experts, hidden]: how a token's own squared difference depends on its normed input h, by a factor of exp(weight . h), whose
    means, weighted with squared gates, are `factor` [layers, experts]."""

    difference: Tensor
    mass: Tensor
    sense: Tensor
    weight: Tensor
    factor: Tensor

    def rule(self, prior: float = PRIOR, hidden: bool = True) -> Rule:
        """The untrained start, without `weight` if not `hidden`; `prior` as in `steps`."""
        planes = (self.steps(prior) / COSTS * self.sense[:, None, None]).clamp(min=TINY).log()
        if hidden:
            planes = planes - self.factor.log()[..., None]
        powers = torch.tensor([[2.0, 0.0]]).repeat(len(planes), 1)
        return Rule(planes.cummin(-1)[0].contiguous(), powers, self.weight if hidden else None)

    def worth(self, tokens: int) -> Tensor:
        """Nats a token that each step saved on average, [layers, experts, 7], not ascending from the first plane on; `tokens` were
        measured on."""
        found = (self.steps() * self.mass[..., None] / tokens * self.sense[:, None, None]).clamp(min=0)
        return torch.cat([found[..., :1], found[..., 1:].cummin(-1)[0]], -1).contiguous()

    def steps(self, prior: float = PRIOR) -> Tensor:
        """By how much each step lowers the mean squared difference, [layers, experts, 7]. An expert's difference is mixed with the layer's,
        which counts as much as `prior` of an even share of the text: experts that the text hardly used know little of themselves. Infinite:
        one row for a layer."""
        _, experts, _ = self.difference.shape
        share = (self.mass / self.mass.sum(-1, keepdim=True))[..., None]
        mean = (self.difference * share).sum(1, keepdim=True)
        own = share / (share + prior / experts)
        d = own * self.difference + (1 - own) * mean
        return d - torch.cat([d[..., 1:], torch.zeros_like(d[..., :1])], -1)


def measure(decoder: TorchDecoder, windows: Tensor, progress: Progress) -> Measured:
    """Differences and sensitivities on `windows`. A layer is loaded for all windows together; KL is taken from a quarter of them."""
    s, moe = decoder.shape, decoder.moe_layers
    few = windows[:: max(1, min(4, len(windows) // 8))]
    total, done = s.layers * 2 + sum(s.layers - layer for layer in moe), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    full = uniform(MAX_BITS)
    difference, mass = torch.zeros(len(moe), s.experts, len(COSTS)), torch.zeros(len(moe), s.experts)
    weight, factor = torch.zeros(len(moe), s.experts, s.hidden), torch.ones(len(moe), s.experts)
    x, inputs = decoder.embed(few), []
    for index in range(s.layers):
        inputs.append(x)
        x = torch.cat([decoder.layer(index, part, full) for part in batches(x)])
        tick()
    base, x = x, decoder.embed(windows)
    for index in range(s.layers):
        seen: list[Routed] = []
        x = torch.cat([decoder.layer(index, part, looking(seen)) for part in batches(x)])
        if index in moe:
            m = moe.index(index)
            _, h, ids, gates = (torch.cat(parts) for parts in zip(*seen, strict=True))
            own = _differences(decoder, index, h, ids, gates.square(), difference[m], mass[m])
            _dependence(own, h, ids, gates.square(), weight[m], factor[m])
        tick()
    sense = torch.zeros(len(moe))
    for m, index in enumerate(moe):
        y = torch.cat([decoder.layer(index, part, uniform(SENSE_BITS)) for part in batches(inputs[index])])
        tick()
        for later in range(index + 1, s.layers):
            y = torch.cat([decoder.layer(later, part, full) for part in batches(y)])
            tick()
        parts = zip(batches(base), batches(y), strict=True)
        kl = sum(float(divergence(decoder.log_probabilities(p), decoder.log_probabilities(q)).sum()) for p, q in parts)
        error = (mass[m] * difference[m, :, STEPS.tolist().index(SENSE_BITS)]).sum() / windows.numel()  # of a token
        sense[m] = kl / few.numel() / error.clamp(min=TINY)
    return Measured(difference, mass, sense, weight, factor)


def _differences(
    decoder: TorchDecoder, index: int, h: Tensor, ids: Tensor, weights: Tensor, difference: Tensor, mass: Tensor
) -> Tensor:
    """Fill `difference` [experts, 7] and `mass` [experts] of a layer; each pair's own mean logarithm [n, top_k] over FITTED_BITS."""
    own = torch.zeros(ids.shape)
    for expert in ids.unique().tolist():
        token, rank = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, rank]
        full = gated(h[token], decoder.expert(index, expert, MAX_BITS))
        for column, bits in enumerate(STEPS[:-1].tolist()):
            off = ((gated(h[token], decoder.expert(index, expert, bits)) if bits else 0) - full).square().sum(-1)
            difference[expert, column] = (weight * off).sum() / weight.sum().clamp(min=TINY)
            if bits in FITTED_BITS:
                own[token, rank] += off.clamp(min=TINY).log() / len(FITTED_BITS)
        mass[expert] = weight.sum()
    return own


def _dependence(own: Tensor, h: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, factor: Tensor) -> None:
    """Fill `weight` [experts, hidden] and `factor` [experts] of a layer from the pairs' logarithms `own` [n, top_k]: one regression for
    all experts, each about its own mean, and one for what an expert leaves over that met more tokens than there are coefficients."""
    hidden = h.shape[1]
    means = h.view(-1, WINDOW, hidden).mean(1)
    means = means - means.mean(0)
    domains = means.T @ means / len(means)

    def ridge(square: Tensor, product: Tensor, pairs: int) -> Tensor:
        pull = RIDGE * square.diagonal().mean().clamp(min=TINY) * torch.eye(hidden) + DRIFT * pairs * domains
        found: Tensor = torch.linalg.solve(square + pull, product)
        return found

    square, product, places = torch.zeros(hidden, hidden), torch.zeros(hidden), {}
    for expert in ids.unique().tolist():
        token, rank = places[expert] = (ids == expert).nonzero(as_tuple=True)
        x, y = h[token] - h[token].mean(0), own[token, rank]
        square += x.T @ x
        product += x.T @ (y - y.mean())
    weight += ridge(square, product, ids.numel())
    for expert, (token, rank) in places.items():
        if len(token) > hidden:
            x, y = h[token] - h[token].mean(0), own[token, rank]
            weight[expert] += ridge(x.T @ x, x.T @ (y - y.mean() - x @ weight[expert]), len(token))
        w = weights[token, rank]
        factor[expert] = (w * (h[token] @ weight[expert]).exp()).sum() / w.sum().clamp(min=TINY)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities [..., vocab]."""
    return (p.exp() * (p - q)).sum(-1)


def calibrate(decoder: TorchDecoder, rule: Rule, windows: Tensor, progress: Progress) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The dial float32 [n, 2]: average widths and the prices at which the windows' tokens take them.

    Values are taken at full width: what lower widths change in them moves the average by less than 0.02 bits.
    """
    values: list[Tensor] = []
    for number, part in enumerate(batches(windows)):
        seen: list[Routed] = []
        run(decoder, decoder.embed(part), lambda m, seen=seen: looking(seen))  # type: ignore[misc]
        values += [rule.values(m, *routed).flatten(0, 1) for m, routed in enumerate(seen)]
        progress(min(len(windows), (number + 1) * BATCH), len(windows))
    widths = np.arange(BASE_BITS, MAX_BITS - DIAL_STEP / 2, DIAL_STEP)
    dial = np.stack([widths, prices_of(torch.cat(values), widths)], 1).astype(np.float32)
    return dial[np.isfinite(dial[:, 1])]


def prices_of(values: Tensor, averages: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The prices at which pairs with `values` [pairs, 7] take each of `averages` bits."""
    ordered, order = values.flatten().sort(descending=True)
    taken = COSTS[order % len(COSTS)].double().cumsum(0) / len(values)
    places = torch.searchsorted(taken, torch.from_numpy(averages)).clamp(max=len(ordered) - 1)
    return np.asarray(ordered[places].numpy())


def bits_at(values: Tensor, price: float) -> float:
    """The average width that pairs with `values` [pairs, 7] take at a price."""
    return float(((values >= price) * COSTS).sum(-1).mean())


def score(decoder: TorchDecoder, windows: Tensor, teacher: Sequence[Tensor] | None, choose: Callable[[int], Choose]) -> tuple[float, float]:
    """(average width, KL from the teacher in nats a token); `teacher` has log-probabilities for each batch, None means 8 bits."""
    taken: list[Tensor] = []

    def noted(m: int) -> Choose:
        inner = choose(m)

        def note(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
            taken.append(inner(x, h, ids, gates).flatten())
            return taken[-1].view_as(ids)

        return note

    total = 0.0
    for number, part in enumerate(batches(windows)):
        q = decoder.log_probabilities(run(decoder, decoder.embed(part), noted))
        p = teacher[number] if teacher is not None else full_width(decoder, part)
        total += float(divergence(p, q).sum())
    return float(torch.cat(taken).float().mean()), total / windows.numel()


def full_width(decoder: TorchDecoder, windows: Tensor) -> Tensor:
    """Log-probabilities at 8 bits."""
    return decoder.log_probabilities(run(decoder, decoder.embed(windows), plain(MAX_BITS)))


class Learner:
    """Gradient training of a rule; `state` can be saved between steps and set again."""

    def __init__(self, decoder: TorchDecoder, start: Rule, prices: tuple[float, float], steps: int, seed: int = 0):
        self.decoder, self.prices, self.steps = decoder, prices, steps
        self._parts = {
            "planes": start.planes.clone(),
            "powers": start.powers.clone(),
        }
        if start.weight is not None:
            self._parts["weight"] = start.weight.clone()
        for tensor in self._parts.values():
            tensor.requires_grad_(True)
        # A weight meets `hidden` numbers of size one, so its steps are that much smaller.
        rates = {"planes": RATE, "powers": RATE, "weight": RATE / decoder.shape.hidden}
        self._adam = torch.optim.Adam([{"params": [t], "rate": rates[n]} for n, t in self._parts.items()], betas=(0.9, 0.98))
        self._random = torch.Generator().manual_seed(seed)
        self.done = 0

    @property
    def rule(self) -> Rule:
        """As it is now, without gradients."""
        return Rule(**{name: tensor.detach().clone() for name, tensor in self._parts.items()})

    @property
    def state(self) -> dict[str, Any]:
        parts = {name: tensor.detach() for name, tensor in self._parts.items()}
        return {"parts": parts, "adam": self._adam.state_dict(), "random": self._random.get_state(), "done": self.done}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in state["parts"].items():
                self._parts[name].copy_(tensor)
        self._adam.load_state_dict(state["adam"])
        self._random.set_state(state["random"])
        self.done = state["done"]

    def step(self, windows: Tensor, teacher: Callable[[Tensor], Tensor]) -> float:
        """One batch drawn from `windows`; the loss."""
        part = windows[torch.randint(len(windows), (LEARN_BATCH,), generator=self._random)]
        low, high = self.prices
        price = low + (high - low) * torch.rand(len(part), 1, generator=self._random).expand(part.shape)  # one for each window
        taken: list[Tensor] = []
        x = self.decoder.embed(part)
        for index in range(self.decoder.shape.layers):
            x = self._layer(index, x, price.reshape(-1, 1, 1), taken)
        kl = divergence(teacher(part), self.decoder.log_probabilities(x))
        bits = torch.stack(taken).sum(0)  # of a token
        loss = ((kl / price.exp()).flatten() + bits).mean()
        self._adam.zero_grad()
        loss.backward()
        for group in self._adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = group["rate"] * (1 - self.done / self.steps)  # to nothing at the end: what is left is the mean
        self._adam.step()
        self.done += 1
        return float(loss.detach())

    def _layer(self, index: int, x: Tensor, price: Tensor, taken: list[Tensor]) -> Tensor:
        decoder = self.decoder
        if index not in decoder.moe_layers:
            return decoder.layer(index, x, uniform(MAX_BITS))
        m = decoder.moe_layers.index(index)
        found: list[tuple[Tensor, ...]] = []

        def none(*routed: Tensor) -> Tensor:
            found.append(routed)
            return torch.zeros_like(routed[2])

        rest = decoder.layer(index, x, none)  # all but the experts
        flat, h, ids, gates = found[0]
        values = Rule(**self._parts).values(m, flat, h, ids, gates)
        step = (values >= price).sum(-1, keepdim=True)
        soft = torch.sigmoid((values - price) / TEMPERATURE)
        moves = torch.nn.functional.pad(soft - soft.detach(), (1, 1))  # nothing but gradients; none below 0 bits or above 8
        last, further = moves.gather(-1, step), moves.gather(-1, step + 1)
        below, here, above = (STEPS[(step + n).clamp(0, len(COSTS))] for n in (-1, 0, 1))
        y = decoder.each_expert(index, h, ids, here[..., 0])
        with torch.no_grad():
            less = y - decoder.each_expert(index, h, ids, below[..., 0])
            more = decoder.each_expert(index, h, ids, above[..., 0]) - y
        taken.append((here + last * (here - below) + further * (above - here)).sum((-1, -2)))
        out = (gates[..., None] * (y + last * less + further * more)).sum(1)
        return rest + out.view_as(rest)


def reference_teacher(src: str | Path, vocab: int) -> Callable[[Tensor], Tensor]:
    """Log-probabilities by the Hugging Face checkpoint in `src`, float32; CheckpointError if transformers cannot load it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(src), dtype=torch.float32, local_files_only=True)
    except Exception as error:  # transformers raises nearly anything
        raise CheckpointError(f"{src}: transformers cannot load this checkpoint: {' '.join(str(error).split())}") from None
    if model.config.vocab_size != vocab:
        raise CheckpointError(f"{src} has a vocabulary of {model.config.vocab_size}, the model {vocab}; is it what was converted?")
    model.eval()

    def teacher(windows: Tensor) -> Tensor:
        with torch.inference_mode():
            found = torch.log_softmax(model(windows, use_cache=False).logits.float(), -1)
        return found.clone()

    return teacher
