"""Which widths lose least at a wanted speed or number of bytes a token, on a device's cost model: the idea of JAQ (arXiv 2501.05339).

The search is over the width router's price: at one price every (token, expert) has the planes that are worth it, so among all ways to
spend the same bits none loses less by the router's own measure. Each price is simulated over a trace whose widths it gives, and the highest
average that reaches the target is the answer; it is what `--bits` takes. Deviations: JAQ also searches the
architecture, and bits of a whole expert; those are the case of gates that are all alike.

A model whose width router looks at more than gates, which is all a trace has of a token, or that has none gets one for the search from the
losses that calibration measured (`from_losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2moe.container import BitRouter, Container
from d2moe.errors import ConfigError
from d2moe.policy.trace import Trace
from d2moe.simulate.device import Device
from d2moe.simulate.simulate import simulate
from d2moe.types import BASE_BITS, MAX_BITS, WIDTHS

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

TINY = 1e-30
"""Keeps logarithms finite, as in csrc/widths.cpp."""
STEP = 0.05
"""Between the averages that are tried."""
GATE_POWER = 2.0
"""Errors of experts add to the residual stream with their gates, and the loss grows with their square (docs/routing.md)."""


@dataclass(frozen=True)
class Outcome:
    """What `bits` (an average, or one width for all if `plain`) gives: the average that came out, speed, bytes, and the loss a token."""

    bits: float
    plain: bool
    average_bits: float
    tokens_per_s: float
    bytes_per_token: float
    loss: float


def from_losses(container: Container, trace: Trace) -> BitRouter:
    """A width router from the squared errors of expert outputs that calibration measured, with prices for the gates of `trace`.

    The value of a plane is gate² times the fall of the relative error of gate, up and down together; widths between measured ones by
    geometric interpolation, layers alike. ConfigError if the model was converted without calibration text.
    """
    targets = container.manifest.quantizer.get("targets")
    names = [f"optional.losses.{layer}" for layer in container.moe_layers]
    if not isinstance(targets, dict) or not all(name in container.dense for name in names):
        raise ConfigError(
            f"{container.path} has neither measured losses nor a width router that looks at gates alone; convert it with --calibration FILE"
        )
    known = np.array([float(b) for b in targets["experts"]])
    order = np.argsort(known)
    measured = np.stack([container.read_dense(name) for name in names]).astype(np.float64).sum(2)[..., order]  # [layers, experts, widths]
    logs = np.log(np.maximum(measured, TINY))
    flat = np.stack([np.interp(WIDTHS, known[order], row) for row in logs.reshape(-1, len(known))])
    error = np.exp(flat).reshape(*logs.shape[:2], len(WIDTHS))
    planes = np.minimum.accumulate(np.log(np.maximum(error[..., :-1] - error[..., 1:], TINY)), axis=-1)
    return priced(planes, trace)


def gates_alone(router: BitRouter) -> bool:
    """Whether a trace holds all that the router's rule needs, and each expert has two bits at least."""
    return router.weight is None and router.base is None and not router.powers[:, 1].any()


def priced(planes: F64, trace: Trace) -> BitRouter:
    """A width router of these logarithms [layers, experts, 6], of planes met by gates of 1, with prices for the gates of `trace`."""
    powers = np.tile(np.array([GATE_POWER, 0.0], np.float32), (len(planes), 1))
    made = BitRouter(planes.astype(np.float32), powers, None, np.zeros((2, 2), np.float32))
    falling = -np.sort(-_values(trace, made).reshape(-1))
    averages = np.arange(BASE_BITS, MAX_BITS + STEP / 2, STEP)
    each = np.minimum((averages - BASE_BITS) * trace.arrays["ids"].size, falling.size - 1).astype(np.int64)
    return BitRouter(made.planes, powers, None, np.column_stack([averages, falling[each]]).astype(np.float32))


def widths(trace: Trace, router: BitRouter, bits: float) -> U8:
    """uint8 [calls, top_k]: what the router asks of each choice of the trace at this average.

    ConfigError for a router that looks at more than gates, which is all a trace has.
    """
    if bits in (BASE_BITS, MAX_BITS):
        return np.full(trace.arrays["ids"].shape, bits, np.uint8)
    found: U8 = (BASE_BITS + (_values(trace, router) >= router.price(bits)).sum(-1)).astype(np.uint8)
    return found


def loss(trace: Trace, router: BitRouter, bits: U8) -> float:
    """What these widths lose a token by the router's measure: the values of all planes that are left out."""
    value = np.exp(_values(trace, router))
    left = np.arange(BASE_BITS + 1, MAX_BITS + 1) > bits[..., None]
    return float(value[left].sum() / trace.tokens)


def _values(trace: Trace, router: BitRouter) -> F64:
    """Logarithm of the value of planes 3 to 8 to each choice [calls, top_k, 6]."""
    if not gates_alone(router):
        raise ConfigError("the width router looks at more than a trace holds, or leaves experts out")
    layer = trace.layers()
    gate = router.powers[layer, :1] * np.log(np.maximum(trace.arrays["gates"], np.float32(TINY)))
    return np.asarray(gate[..., None] + router.planes[layer[:, None], trace.arrays["ids"]], np.float64)


def optimise(
    trace: Trace,
    router: BitRouter,
    device: Device,
    memory_bytes: int,
    *,
    tokens_per_s: float = 0.0,
    bytes_per_token: float = float("inf"),
    policy: str = "hebf",
    kept: npt.NDArray[np.int64] | None = None,
    progress: Callable[[], None] | None = None,
) -> tuple[Outcome | None, Outcome | None]:
    """The widest average by the router, and the widest plain width, that reach both targets with `memory_bytes` for experts, of which each
    has the bits in `kept` [layers, experts] (None: all); None
    where not even 2 bits do. About 12 simulations; speed is taken to fall with width.

    MemoryBudgetError if the memory does not hold one expert of 8 bits.
    """

    def outcome(bits: float, plain: bool) -> Outcome:
        wanted = trace.asking(bits if plain else widths(trace, router, bits), kept)
        asked: U8 = wanted.arrays["bits"]
        found = simulate(wanted, device, memory_bytes, policy=policy)
        if progress is not None:
            progress()
        return Outcome(bits, plain, float(asked.mean()), found.tokens_per_s, found.bytes_per_token, loss(trace, router, asked))

    def widest(choices: list[float], plain: bool) -> Outcome | None:
        best, low, high = None, 0, len(choices)
        while low < high:
            middle = (low + high) // 2
            tried = outcome(choices[middle], plain)
            if tried.tokens_per_s >= tokens_per_s and tried.bytes_per_token <= bytes_per_token:
                best, low = tried, middle + 1
            else:
                high = middle
        return best

    count = round((MAX_BITS - BASE_BITS) / STEP)
    return widest([round(BASE_BITS + i * STEP, 2) for i in range(count + 1)], False), widest([float(b) for b in WIDTHS], True)
