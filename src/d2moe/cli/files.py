"""`d2moe convert`, `inspect` and `verify`: what concerns model files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2moe.cli.shared import model_path, print_json, print_table, read_text
from d2moe.types import GROUP, MAX_BITS

if TYPE_CHECKING:
    from d2moe.convert.calibration import Calibration


class _Conversion:
    """Conversion progress, counted in weights, as a bar."""

    def __init__(self, bar: Any):
        self._bar, self._done, self._total = bar, 0, 1

    def start(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._bar(done, total)

    def advance(self, weights: int, text: str) -> None:
        self._done += weights
        self._bar(self._done, self._total, text)


REPORT_TEXT = click.option(
    "--report-text",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="The text by which --report tells perplexity, of which it takes --report-tokens.",
)
REPORT_TOKENS = click.option(
    "--report-tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens to tell perplexity by."
)


@click.command()
@click.argument("src", type=click.Path(exists=True))
@click.argument("dst", type=click.Path())
@click.option(
    "--group", type=click.Choice(["64", "128"]), default=str(GROUP), show_default=True, help="Weights that share a scale."
)
@click.option(
    "--balance/--no-balance",
    default=True,
    show_default=True,
    help="Move factors between weights that follow each other (norms and columns, up and down, v and o): no output "
    "changes, and low widths lose less.",
)
@click.option(
    "--rotate/--no-rotate",
    default=True,
    show_default=True,
    help="Rotate what every down meets (Walsh-Hadamard transforms while running): its weights become alike in size, "
    "and all widths lose less.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="Text by which weights are rounded with error feedback: slower, and a quarter to a third less is lost. May be "
    "given several times; a few hundred KB of what the model will read are enough.",
)
@click.option(
    "--self-calibration",
    is_flag=True,
    help="The model writes what it is calibrated with, or half of it beside --calibration. Takes room for a second model, "
    "in DST.samples, until it has.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    default=32768,
    show_default=True,
    help="Tokens to take of the calibration text, spread over it, or to have the model write.",
)
@click.option(
    "--widths-of",
    type=click.Path(exists=True, file_okay=False),
    metavar="MODEL",
    help="Keep the bits that each expert has in MODEL, which was converted from SRC and trimmed, and round for these: better than MODEL at "
    "its size, worse at the widths below. Needs calibration text.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Then write a page (.html or .md) of what each width loses: errors by layer and expert, bytes, perplexity.",
)
@REPORT_TEXT
@REPORT_TOKENS
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: all CPUs this process may use].")
@click.option(
    "--ignore-config-key",
    "ignore_config_keys",
    multiple=True,
    metavar="KEY",
    help="Convert although the config has this key, which d2moe does not know; may be given several times.",
)
def convert(
    src: str,
    dst: str,
    group: str,
    balance: bool,
    rotate: bool,
    calibration: tuple[str, ...],
    self_calibration: bool,
    calibration_tokens: int,
    widths_of: str | None,
    report: str | None,
    report_text: str | None,
    report_tokens: int,
    threads: int | None,
    ignore_config_keys: tuple[str, ...],
) -> None:
    """Convert a checkpoint to a nested model.

    SRC is the folder of a Hugging Face checkpoint (safetensors, sharded or not) or a GGUF file of llama.cpp, DST the
    model to make. It is read tensor by tensor. Interrupted, it leaves DST.partial, and the same command goes on there.

    With --calibration the model reads that text, layer by layer in float32 (memory: one layer and 4 bytes x hidden size
    x tokens, twice), and every weight is rounded for the inputs that it meets there. With --self-calibration the checkpoint is first
    rounded to the nearest, and the engine has it write the text at 8 bits; with both, half of the tokens come from each.

    --report measures perplexity, of SRC in float32 too, on --report-text, or else on that part of the calibration text which
    calibration did not read.

    A GGUF file needs pip install gguf. A tokenizer.json beside it is preferred to the one made of it.

    \b
    Examples:
      d2moe convert ~/models/OLMoE-1B-7B-0924 olmoe.d2moe
      d2moe convert ~/models/OLMoE-1B-7B-0924 olmoe.d2moe --calibration wiki.txt --calibration code.txt
      d2moe convert ~/models/OLMoE-1B-7B-0924 olmoe.d2moe --calibration wiki.txt --report olmoe.html
      d2moe convert ~/models/OLMoE-1B-7B-0924 olmoe.d2moe --self-calibration
      d2moe convert ~/models/OLMoE-1B-7B-0924 best.d2moe --calibration wiki.txt --widths-of small.d2moe
      d2moe convert Qwen3-30B-A3B qwen3.d2moe --group 64 --threads 8
      d2moe convert Qwen3-30B-A3B-Q8_0.gguf qwen3.d2moe
      d2moe convert Llama-3.2-1B llama.d2moe           a dense model: its feed-forward blocks are the experts
    """
    from d2moe.cli.progress import Bar
    from d2moe.convert import samples
    from d2moe.convert.calibration import WINDOW, Calibration
    from d2moe.convert.pipeline import convert as run

    plan = _report_plan(report, report_text)
    tokens, length = (calibration_tokens // 2, samples.WINDOW) if calibration and self_calibration else (calibration_tokens, WINDOW)
    given = Calibration(tuple(map(Path, calibration)), tokens, length) if calibration else None
    text = samples.OwnSamples(tokens, given) if self_calibration else given
    if widths_of is not None and text is None:
        raise click.UsageError("--widths-of needs text to round by: give --calibration or --self-calibration")

    with Bar("converting") as bar:
        made = run(
            src,
            dst,
            group=int(group),
            balance=balance,
            rotate=rotate,
            calibration=text,
            widths_of=widths_of,
            threads=threads,
            progress=_Conversion(bar),
            ignore_config_keys=ignore_config_keys,
        )
    click.echo(str(made))
    if plan is not None:
        read = given  # of its own samples the model has left none
        _report(made, plan, src, read, report_text, report_tokens, threads, ignore_config_keys)


def _report_plan(report: str | None, report_text: str | None) -> Path | None:
    """Where the report goes; what is wrong with that is said before anything is measured."""
    from d2moe.evaluate.report import check

    if report is None:
        if report_text is not None:
            raise click.UsageError("--report-text is for --report FILE; name a page to write")
        return None
    check(Path(report))
    if report_text is not None:
        read_text(report_text)
    return Path(report)


def _report(
    model: Path, file: Path, source: str | None, calibration: Calibration | None, text: str | None, most: int, threads: int | None,
    ignore_config_keys: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Measure and write the page of a converted model: perplexity if there is a text, or calibration text that was not read."""
    from contextlib import nullcontext

    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.container.inspect import describe
    from d2moe.convert.float_model import float_nll, unread_windows
    from d2moe.convert.source import open_source
    from d2moe.evaluate.report import CONTEXT, Report, errors_of, width_rows, windows_of, write
    from d2moe.runtime.tokenizer import Tokenizer

    container = Container.open(model)
    with nullcontext() if source is None else open_source(source, ignore_config_keys) as opened:
        about, windows, plain = None, None, None
        length = min(CONTEXT, int(container.config.get("max_position_embeddings", CONTEXT)))
        if text is not None:
            windows = windows_of(Tokenizer.load(model).encode(read_text(text)), length, max(1, most // length))
            about = f"{Path(text).name}, from its beginning"
        elif calibration is not None and opened is not None:
            windows = unread_windows(calibration, opened, length, max(1, most // length))
            about = "The part of the calibration text that calibration did not read"
            if not len(windows):
                click.echo("calibration read all of its text, so there is none left for perplexity; give --report-text", err=True)
                windows = about = None
        if windows is not None:
            predicted = windows.size - len(windows)
            about = f"{about}: {predicted:,} predictions in windows of {windows.shape[1] - 1} tokens without overlap"
            if opened is not None:
                with Bar("unquantised model") as bar:
                    plain = math.exp(float_nll(opened, windows, bar) / predicted)
        with Bar("perplexity") as bar:
            rows = width_rows(container, windows, threads, bar)
        with Bar("errors of weights") as bar:
            errors = errors_of(container, bar)
    for written in write(file, Report(model.name, describe(container), errors, rows, about, plain)):
        click.echo(str(written))


@click.command()
@click.argument("model", required=False)
@click.option("--tensors", is_flag=True, help="List every dense tensor too.")
@click.option("--losses", is_flag=True, help="What each layer and projection loses at each width, as measured with calibration text.")
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE", help="Write a page (.html or .md) of what each width loses.")
@REPORT_TEXT
@REPORT_TOKENS
@click.option(
    "--reference", type=click.Path(exists=True), metavar="SRC", help="The checkpoint it was made from, for its perplexity in the report."
)
def inspect(
    model: str | None, tensors: bool, losses: bool, as_json: bool, report: str | None, report_text: str | None, report_tokens: int,
    reference: str | None,
) -> None:  # fmt: skip
    """Show what is in MODEL, without reading its weights (but for --report).

    \b
    Examples:
      d2moe inspect olmoe.d2moe
      d2moe inspect olmoe.d2moe --json | jq .widths
      d2moe inspect olmoe.d2moe --losses
      d2moe inspect olmoe.d2moe --report olmoe.html --report-text wiki.txt --reference ~/models/OLMoE-1B-7B-0924
    """
    from dataclasses import asdict

    from d2moe.container import Container
    from d2moe.container.inspect import describe, measured_losses
    from d2moe.container.layout import PROJECTIONS
    from d2moe.errors import RequestError
    from d2moe.runtime.config import show_bytes

    if reference is not None and (report is None or report_text is None):
        raise click.UsageError("--reference is for the perplexity of --report FILE --report-text FILE; give both")
    if (plan := _report_plan(report, report_text)) is not None:
        _report(model_path(model), plan, reference, None, report_text, report_tokens, None)
        return
    container = Container.open(model_path(model))
    if losses:
        measured = measured_losses(container)
        if measured is None:
            raise RequestError(f"{container.path}: was converted without calibration text; d2moe convert --calibration measures losses")
        widths, by_layer = measured
        if as_json:
            print_json({"widths": widths, "layers": {layer: table.tolist() for layer, table in by_layer.items()}})
            return
        table = [
            (f"layer {layer} {name}", *(f"{100 * loss:.3g} %" for loss in row))
            for layer, of_layer in by_layer.items()
            for name, row in zip(PROJECTIONS, of_layer, strict=True)
        ]
        print_table("squared error of the outputs, of their own squares", table, ("", *(f"{bits} bits" for bits in widths)))
        return
    found = describe(container)
    rotated = f", down rotated in spans of {found.rotation}" if found.rotation else ""
    if as_json:
        print_json(asdict(found))
        return
    facts = [
        ("model type", found.model_type),
        ("layers with experts", str(len(found.moe_layers))),
        ("experts per layer", str(found.experts)),
        ("experts per token", str(found.experts_per_token or "unknown")),
        ("expert shape", f"{found.hidden} x {found.inner}, groups of {found.group}{rotated}"),
        ("weights in experts", f"{found.expert_weights:,}"),
        *([("bits of an expert", f"{found.kept_bits:.2f} on average, at most {found.most_bits}")] if found.kept_bits < MAX_BITS else []),
        ("whole file", show_bytes(found.total_bytes)),
    ]
    print_table(found.path, facts)
    rows = [
        (
            str(w.bits),
            f"{w.bits_per_weight:.2f}",
            show_bytes(w.expert_bytes),
            show_bytes(w.all_experts_bytes),
            show_bytes(w.token_bytes) if w.token_bytes is not None else "unknown",
            show_bytes(w.dense_bytes),
        )
        for w in found.widths
    ]
    header = ("bits", "per weight", "one expert", "all experts", "per token, none resident", "dense weights")
    print_table("widths", rows, header)
    defaults = [(f"experts at {w.bits} bits", str(w.dense_widths), show_bytes(w.default_dense_bytes)) for w in found.widths]
    print_table("dense weights beside one width for all; by a width router they get a bit more", defaults, ("", "widths", "size"))
    print_table("files", [(f.name, show_bytes(f.n_bytes)) for f in found.files], ("file", "size"))
    if tensors:
        listed = [(t.name, t.dtype, " x ".join(map(str, t.shape)), show_bytes(t.n_bytes)) for t in found.dense]
        print_table("dense tensors", listed, ("tensor", "dtype", "shape", "size"))


@click.command()
@click.argument("model", required=False)
def verify(model: str | None) -> None:
    """Check every byte of MODEL.

    All of it is read and compared with the checksums it was written with.

    \b
    Example:
      d2moe verify olmoe.d2moe
    """
    from d2moe.cli.progress import Bar
    from d2moe.container.verify import verify as run
    from d2moe.errors import ContainerError
    from d2moe.runtime.config import show_bytes

    path = model_path(model)
    with Bar(f"verifying {path.name}") as bar:
        report = run(path, bar)
    for problem in report.problems:
        click.echo(problem, err=True)
    if report.problems:
        count = len(report.problems)
        raise ContainerError(f"{path} has {count} problem{'s' if count > 1 else ''}; copy or convert the model again")
    files = report.files if isinstance(report.files, int) else len(report.files)
    click.echo(f"{path}: {files} files, {show_bytes(report.n_bytes)}, all as they were written")
    if report.unlisted:
        click.echo(f"not part of the model, not checked: {', '.join(report.unlisted)}", err=True)
