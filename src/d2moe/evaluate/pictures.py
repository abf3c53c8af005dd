"""Pictures of a report, as SVG text: numbers and the names of widths, layers and projections, nothing that needs escaping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

LIGHT, DARK = (0xF1, 0xF6, 0xFB), (0x08, 0x2F, 0x6B)
INK, FAINT, LINE = "#1c2733", "#5d6b7a", "#1f6fb4"
FONT = "font-family='system-ui, sans-serif'"


class _Scale:
    """Values to colours, by logarithm between the least and the largest above zero."""

    def __init__(self, values: F64):
        seen = values[np.isfinite(values) & (values > 0)]
        self.low, self.high = (float(seen.min()), float(seen.max())) if len(seen) else (1e-3, 1.0)

    def share(self, value: float) -> float:
        if not value > self.low or self.high <= self.low:
            return 0.0
        return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))

    def colour(self, value: float) -> str:
        t = self.share(value)
        return "#" + "".join(f"{round(a + t * (b - a)):02x}" for a, b in zip(LIGHT, DARK, strict=True))

    def legend(self, x: float, y: float) -> str:
        steps = [self.low * (self.high / self.low) ** (i / 5) for i in range(6)]
        cells = "".join(
            f"<rect x='{x + 58 * i}' y='{y}' width='58' height='10' fill='{self.colour(v)}'/>"
            + _text(x + 58 * i + 29, y + 22, f"{percent(v)} %")
            for i, v in enumerate(steps)
        )
        return f"<g>{cells}</g>"


def percent(share: float) -> str:
    """Two figures, without an exponent."""
    value = 100 * share
    if value <= 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    return f"{value:.{min(max(0, 1 - math.floor(math.log10(value))), 5)}f}"


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = FAINT, size: int = 11) -> str:
    return f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-size='{size}' fill='{fill}'>{text}</text>"


def _svg(width: float, height: float, title: str, body: str) -> str:
    size = f"viewBox='0 0 {width:g} {height:g}' width='{width:g}' height='{height:g}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' {FONT}><title>{title}</title>{body}</svg>"


def layer_map(layers: Sequence[int], projections: Sequence[str], widths: Sequence[int], values: F64) -> str:
    """Heat map of `values` [layers, projections, widths] in %: a row for each layer, columns of widths under each projection."""
    left, top, cell_w, cell_h, gap = 70, 44, 58, 22, 14
    scale, parts = _Scale(values), []
    block = cell_w * len(widths) + gap
    for p, name in enumerate(projections):
        x = left + p * block
        parts.append(_text(x + cell_w * len(widths) / 2, 14, name, fill=INK, size=13))
        parts += [_text(x + cell_w * (i + 0.5), 34, f"{bits} bits") for i, bits in enumerate(widths)]
    for row, layer in enumerate(layers):
        y = top + cell_h * row
        parts.append(_text(left - 8, y + 15, f"layer {layer}", "end"))
        for p in range(len(projections)):
            for i in range(len(widths)):
                value, x = float(values[row, p, i]), left + p * block + cell_w * i
                ink = "#fff" if scale.share(value) > 0.5 else INK
                parts.append(f"<rect x='{x}' y='{y}' width='{cell_w - 1}' height='{cell_h - 1}' fill='{scale.colour(value)}'/>")
                parts.append(_text(x + cell_w / 2, y + 15, percent(value), fill=ink))
    bottom = top + cell_h * len(layers)
    parts.append(scale.legend(left, bottom + 10))
    return _svg(left + block * len(projections), bottom + 40, "squared error by layer, projection and width", "".join(parts))


def expert_maps(layers: Sequence[int], widths: Sequence[int], values: F64) -> str:
    """Heat maps of `values` [layers, experts, widths], one under the other for each width, each with its own range of colours: a row
    for each layer, a column for each expert."""
    left, top, experts = 70, 8, values.shape[1]
    cell = max(4.0, min(16.0, 900 / experts))
    parts, y = [], float(top)
    for i, bits in enumerate(widths):
        scale = _Scale(values[..., i])
        parts.append(_text(left, y + 12, f"{bits} bits: {percent(scale.low)} to {percent(scale.high)} %", "start", INK, 13))
        y += 20
        for row, layer in enumerate(layers):
            if cell >= 9 or row % 4 == 0:
                parts.append(_text(left - 8, y + cell * row + cell / 2 + 4, f"layer {layer}", "end"))
            for e in range(experts):
                value = float(values[row, e, i])
                parts.append(
                    f"<rect x='{left + cell * e:g}' y='{y + cell * row:g}' width='{cell - 0.5:g}' height='{cell - 0.5:g}' "
                    f"fill='{scale.colour(value)}'><title>layer {layer} expert {e}, {bits} bits: {percent(value)} %</title></rect>"
                )
        y += cell * len(layers) + 16
    return _svg(max(left + cell * experts + 10, left + 360), y, "squared error by layer, expert and width", "".join(parts))


def perplexity_curve(points: Sequence[tuple[int, int, float]], float_perplexity: float | None) -> str:
    """Perplexity over the bytes of all weights; `points` are (bits, bytes, perplexity). The unquantised model's is a dashed line."""
    width, height, left, right, top, bottom = 720, 320, 70, 30, 20, 48
    seen = [p for _, _, p in points] + ([float_perplexity] if float_perplexity is not None else [])
    low, high = min(seen), max(seen)
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)
    most = max(n for _, n, _ in points) * 1.04

    def at(n: float, p: float) -> tuple[float, float]:
        return left + (width - left - right) * n / most, top + (height - top - bottom) * (high - p) / (high - low)

    parts = []
    for tick in _ticks(low, high):
        _, y = at(0, tick)
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e2e8ee'/>")
        parts.append(_text(left - 8, y + 4, f"{tick:g}", "end"))
    unit, name = (1e9, "GB") if most >= 2e9 else (1e6, "MB")
    for tick in _ticks(0, most / unit):
        x, _ = at(tick * unit, low)
        parts.append(_text(x, height - bottom + 18, f"{tick:g}"))
    parts.append(_text((left + width - right) / 2, height - 8, f"{name} of all weights"))
    parts.append(f"<line x1='{left}' x2='{width - right}' y1='{height - bottom}' y2='{height - bottom}' stroke='{FAINT}'/>")
    if float_perplexity is not None:
        _, y = at(0, float_perplexity)
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{y:.1f}' y2='{y:.1f}' stroke='{FAINT}' stroke-dasharray='5 4'/>")
        parts.append(_text(left + 6, y - 5, f"unquantised, {float_perplexity:.3f}", "start"))
    places = [(*at(n, p), bits, p) for bits, n, p in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    parts.append(f"<polyline fill='none' stroke='{LINE}' stroke-width='2' points='{line}'/>")
    for x, y, bits, p in places:
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{LINE}'><title>{bits} bits: {p:.4f}</title></circle>")
        parts.append(_text(x + 6, y - 8, f"{bits} bits", "start", INK))
    return _svg(width, height, "perplexity over bytes", "".join(parts))


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(f for f in (1, 2, 5, 10) if f * power >= rough) * power
    first = math.ceil(low / step)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step) + 1)]
