"""What a converted model loses at each width, as a page: errors by layer, expert and projection, bytes, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.container import Container, NestedMatrix
from d2moe.container.inspect import Description, describe
from d2moe.container.layout import PROJECTIONS
from d2moe.errors import ConfigError, StorageError
from d2moe.evaluate.perplexity import perplexity
from d2moe.evaluate.pictures import expert_maps, layer_map, perplexity_curve
from d2moe.runtime.config import EngineConfig, show_bytes
from d2moe.runtime.engine import Engine
from d2moe.types import DenseWidths

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]

WIDTHS = (2, 3, 4, 5, 6, 8)
"""At which perplexity is measured."""
WEIGHT_WIDTHS = (2, 3, 4, 6)
SAMPLED = 4
"""Experts of a layer whose weights are compared where no losses were measured."""
WORST = 10
FORMATS = (".html", ".md")
CONTEXT = 256
"""Tokens of a window, as `d2moe eval perplexity` has by default."""


@dataclass(frozen=True)
class Errors:
    """Squared errors at each of `widths` as a share of what they are errors of, by layer float64 [experts, projections, widths].

    Of the "outputs" on calibration text, whose `tokens` chose each expert so often (by layer float64 [experts]); or of the
    "weights" against their own 8 bits, of `experts` alone.
    """

    of: str
    widths: tuple[int, ...]
    by_layer: Mapping[int, F64]
    tokens: Mapping[int, F64] | None
    experts: Sequence[int]

    def layers(self) -> F64:
        """float64 [layers, projections, widths]: the mean over experts, each counted as often as the text chose it."""
        rows = []
        for layer, found in self.by_layer.items():
            counts = self.tokens[layer] if self.tokens is not None else None
            rows.append(np.average(found, axis=0, weights=counts if counts is not None and counts.sum() else None))
        return np.array(rows)

    def worst(self, count: int) -> list[tuple[int, int, str, float, float | None]]:
        """(layer, expert, projection, loss, share of its layer's choices) of the largest losses at the least width."""
        found = [
            (float(losses[e, p, 0]), layer, e, p)
            for layer, losses in self.by_layer.items()
            for e in range(len(losses))
            for p in range(len(PROJECTIONS))
        ]
        rows = []
        for loss, layer, e, p in sorted(found, reverse=True)[:count]:
            counts = self.tokens[layer] if self.tokens is not None else None
            share = float(counts[e] / max(counts.sum(), 1)) if counts is not None else None
            rows.append((layer, self.experts[e], PROJECTIONS[p], loss, share))
        return rows


@dataclass(frozen=True)
class WidthRow:
    """One width: bits of the experts, those of the other weights by default, bytes of all weights, perplexity if it was measured."""

    bits: int
    dense: DenseWidths
    bits_per_weight: float
    expert_bytes: int
    weights_bytes: int
    token_bytes: int | None
    perplexity: float | None


@dataclass(frozen=True)
class Report:
    """All that a page shows. `text` says which windows of which text; `float_perplexity` is the unquantised model's."""

    name: str
    description: Description
    errors: Errors
    rows: tuple[WidthRow, ...]
    text: str | None
    float_perplexity: float | None


def errors_of(container: Container, progress: Progress = lambda done, total: None) -> Errors:
    """The losses that conversion with calibration text measured; else errors of the weights of `SAMPLED` experts a layer."""
    targets = container.manifest.quantizer.get("targets")
    layers = container.moe_layers
    if isinstance(targets, dict) and all(f"optional.losses.{layer}" in container.dense for layer in layers):
        widths = tuple(int(bits) for bits in targets["experts"])
        losses, tokens = (
            {layer: container.read_dense(f"optional.{what}.{layer}").astype(np.float64) for layer in layers}
            for what in ("losses", "tokens")
        )
        return Errors("outputs", widths, losses, tokens, range(container.experts))
    count = min(SAMPLED, container.experts)
    experts = [e * container.experts // count for e in range(count)]
    found = {layer: np.zeros((count, len(PROJECTIONS), len(WEIGHT_WIDTHS))) for layer in layers}
    for done, (layer, e) in enumerate((layer, e) for layer in layers for e in range(count)):
        progress(done, len(layers) * count)
        matrices = container.read_expert(layer, experts[e], container.width(layer, experts[e]))
        for p, name in enumerate(PROJECTIONS):
            found[layer][e, p] = _weight_errors(matrices[name])
    return Errors("weights", WEIGHT_WIDTHS, found, None, experts)


def _weight_errors(matrix: NestedMatrix) -> F64:
    codes = planes.untile(planes.unpack(matrix.base, matrix.planes))
    affine, scale = planes.untile_affine(matrix.affine), matrix.row_scale.reshape(-1)
    whole = planes.dequantize(codes, affine, scale, matrix.bits, *codes.shape)
    energy = max(float(np.square(whole, dtype=np.float64).sum()), 1e-30)
    wrong = (planes.dequantize(codes, affine, scale, min(bits, matrix.bits), *codes.shape) - whole for bits in WEIGHT_WIDTHS)
    return np.array([np.square(w, dtype=np.float64).sum() / energy for w in wrong])


def windows_of(tokens: Sequence[int], length: int, most: int) -> I32:
    """The first windows of a text, int32 [windows, length + 1]: those of `d2moe eval perplexity`, without a short last one. A text shorter
    than one window is one by itself.

    ConfigError if the text has fewer than two tokens.
    """
    length = min(length, len(tokens) - 1)
    if length < 1:
        raise ConfigError(f"the text has {len(tokens)} token, perplexity needs at least 2; give a longer text")
    count = min((len(tokens) - 1) // length, most)
    return np.array([tokens[i * length : (i + 1) * length + 1] for i in range(count)], np.int32)


def width_rows(
    container: Container, windows: I32 | None, threads: int | None = None, progress: Progress = lambda done, total: None
) -> tuple[WidthRow, ...]:
    """Sizes at each of `WIDTHS`, and the engine's perplexity of `windows` [n, length + 1] if there are any: experts at one plain width,
    the other weights at the width that is the engine's default for it."""
    sizes = {w.bits: w for w in describe(container).widths}
    total, rows = len(WIDTHS) * (len(windows) if windows is not None else 0), []
    for place, bits in enumerate(WIDTHS):
        found = None
        length = windows.shape[1] if windows is not None else CONTEXT
        config = EngineConfig(bits=bits, uniform=True, context=length, threads=threads)
        if windows is not None:
            nll = 0.0
            with Engine.load(container.path, config) as engine:
                for i, window in enumerate(windows):
                    nll += perplexity(engine, window.tolist(), context=length - 1).nll
                    progress(place * len(windows) + i + 1, total)
            found = float(np.exp(nll / (windows.shape[0] * (length - 1))))
        size = sizes[bits]
        rows.append(
            WidthRow(
                bits, size.dense_widths, size.bits_per_weight, size.all_experts_bytes,
                size.all_experts_bytes + container.dense_bytes(size.dense_widths), size.token_bytes, found,
            )
        )  # fmt: skip
    return tuple(rows)


def check(file: Path) -> None:
    """ConfigError if a report cannot be written to `file`, before anything is measured for it."""
    if file.suffix not in FORMATS:
        raise ConfigError(f"{file}: a report is written as {' or '.join(FORMATS)}, not {file.suffix or 'without a suffix'!r}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: the folder {file.absolute().parent} does not exist; make it first")


def write(file: Path, report: Report) -> list[Path]:
    """Write the page, one self-contained HTML file, or Markdown with its pictures beside it; returns what was written."""
    check(file)
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("d2moe.evaluate", "."), trim_blocks=True, lstrip_blocks=True,
        autoescape=file.suffix == ".html", undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"bytes": show_bytes, "percent": lambda x: f"{100 * x:.3g}"}
    pictures = _pictures(report)
    files = {file: b""}
    shown: dict[str, Any] = {"experts": None, "perplexity": None, **pictures}
    if file.suffix == ".md":
        for name, picture in pictures.items():
            path = file.with_name(f"{file.stem}-{name}.svg")
            files[path], shown[name] = picture.encode(), path.name
    text = environment.get_template(f"report{file.suffix}.jinja").render(
        report=report, pictures=shown, projections=PROJECTIONS, layers=_layer_rows(report.errors), worst=report.errors.worst(WORST)
    )
    files[file] = text.encode()
    try:
        for path, data in files.items():
            path.write_bytes(data)
    except OSError as error:
        raise StorageError(f"{error.filename or file}: the report cannot be written: {error.strerror}") from None
    return list(files)


def _layer_rows(errors: Errors) -> list[tuple[int, str, list[float]]]:
    means = errors.layers()
    return [(layer, name, means[i, p].tolist()) for i, layer in enumerate(errors.by_layer) for p, name in enumerate(PROJECTIONS)]


def _pictures(report: Report) -> dict[str, str]:
    errors = report.errors
    found = {"layers": layer_map(list(errors.by_layer), PROJECTIONS, errors.widths, errors.layers())}
    if errors.of == "outputs" and len(errors.experts) > 1:
        cube = np.array([of_layer.mean(1) for of_layer in errors.by_layer.values()])  # [layers, experts, widths]
        found["experts"] = expert_maps(list(errors.by_layer), errors.widths, cube)
    points = [(row.bits, row.weights_bytes, row.perplexity) for row in report.rows if row.perplexity is not None]
    if points:
        found["perplexity"] = perplexity_curve(points, report.float_perplexity)
    return found
