"""`d2moe eval perplexity` and `d2moe bench`: a table for people, then one JSON line, on stdout."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from d2moe.cli.shared import (
    CONTEXT_OPTION,
    announce,
    dense_text,
    engine_options,
    model_path,
    open_model,
    print_json,
    print_table,
    read_text,
)


@click.command()
@click.argument("model", required=False)
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="UTF-8 text file to score.")
@engine_options
@click.option("--context", type=click.IntRange(min=1), default=256, show_default=True, help="Input tokens per window.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from window to window [default: --context].")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Score only the first so many tokens.")
@click.option(
    "--chunk-tokens",
    type=click.IntRange(min=1),
    help="Tokens fed at a time [default: as many as memory allows]; 1 is as in generation, to see what a policy costs there.",
)
@click.option(
    "--reference",
    type=click.Path(exists=True, file_okay=False),
    help="Also score with transformers in float32 on this Hugging Face checkpoint (needs d2moe[torch]).",
)
def perplexity(
    model: str | None,
    text: str,
    context: int,
    stride: int | None,
    max_tokens: int | None,
    chunk_tokens: int | None,
    reference: str | None,
    **engine: Any,
) -> None:
    """Perplexity of MODEL on a text.

    The text is tokenised as a whole, as transformers would. A window feeds --context tokens to an empty sequence and
    each predicts the next one, so 256 inputs score 256 tokens; windows begin every --stride tokens and no token is
    scored twice. Bits per byte = summed negative log-likelihood in bits / UTF-8 bytes of the scored tokens.

    \b
    Examples:
      d2moe eval perplexity builtin --text wiki.txt --bits 3
      d2moe eval perplexity builtin --text wiki.txt --expert-memory 4MB --policy resident-first --chunk-tokens 1 --max-tokens 4096
      d2moe eval perplexity my.d2moe --text wiki.txt --max-tokens 119808 --reference checkpoint/
    """
    from d2moe.cli.progress import Bar
    from d2moe.evaluate.perplexity import Perplexity
    from d2moe.evaluate.perplexity import perplexity as measure

    content = read_text(text)
    path = model_path(model)
    step = context if stride is None else stride
    if step > context:
        raise click.BadParameter(
            f"{step} is more than --context {context}, which would skip text", param_hint="--stride"
        )
    with contextlib.closing(open_model(path, {**engine, "context": context, "chunk_tokens": chunk_tokens})) as m:
        tokenizer = m.tokenizer
        tokens = tokenizer.encode(content)
        with Bar(f"perplexity of {path.name}") as bar:
            found = measure(
                m.engine, tokens, tokenizer=tokenizer, context=context, stride=step, max_tokens=max_tokens, progress=bar
            )
        kernels, dial = m.engine.describe().get("kernels"), m.engine.config.bits
    rows = [_row(path.name, found)]
    line: dict[str, Any] = {**found.as_dict(), "model": str(path), "text": text, "kernels": kernels, "dial": dial}
    line["policy"] = engine["policy"] or "hebf"
    if reference is not None:
        from d2moe.evaluate.reference import reference_perplexity

        with Bar("reference") as bar:
            other: Perplexity = reference_perplexity(
                reference,
                tokens,
                tokenizer=tokenizer,
                context=context,
                stride=step,
                max_tokens=max_tokens,
                threads=engine["threads"],
                progress=bar,
            )
        rows.append(_row(f"{Path(reference).name}, transformers float32", other))
        line |= {
            "reference": reference,
            "reference_perplexity": other.perplexity,
            "reference_bits_per_byte": other.bits_per_byte,
            "ratio": found.perplexity / other.perplexity,
        }
    print_table(
        f"{Path(text).name}: windows of {context} tokens every {step}, {found.tokens:,} tokens scored",
        rows,
        ("model", "bits", "perplexity", "bits per byte", "tokens/s", "read per token"),
    )
    print_json(line)


def _row(name: str, found: Any) -> tuple[str, ...]:
    from d2moe.runtime.config import show_bytes

    bits = "-" if found.bits is None else f"{found.bits:.4g}"
    speed = found.tokens / found.seconds if found.seconds > 0 else 0.0
    read = show_bytes(found.read_bytes / found.tokens)
    return (name, bits, f"{found.perplexity:.4f}", f"{found.bits_per_byte:.4f}", f"{speed:.0f}", read)


@click.command()
@click.argument("model", required=False)
@engine_options
@CONTEXT_OPTION
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of the prompt."
)
@click.option("--generate", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to generate.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="How often; speeds are medians."
)
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Take the prompt from this text.")
@click.option("--explain", is_flag=True, help="Also show which kernel ran for each shape of matrix, and how often.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw speed and perplexity over the memory budget instead, as .png, .svg or .pdf; needs --text and d2moe[plot].",
)
def bench(
    model: str | None,
    prompt_tokens: int,
    generate: int,
    repeats: int,
    text: str | None,
    explain: bool,
    plot: Path | None,
    **engine: Any,
) -> None:
    """Measure the speed of MODEL.

    Prompt and generation speed, time to first token, bytes read, memory. roofline is the least time a token could take
    (weights touched at the measured memory bandwidth, or bytes read at the measured storage bandwidth, whichever is
    more) over the time it took. Experts are read past the page cache where the
    file system allows; "tier" says what was measured.

    With --plot a text is scored a token at a time with slots for 25, 35, 50, 75 and 100 % of the experts' 4-bit size, at 2, 3 and 4 bits
    or at --bits: --prompt-tokens fill the slots, --generate are measured. One JSON line per point.

    \b
    Examples:
      d2moe bench builtin --memory 96MB --bits 4
      d2moe bench olmoe.d2moe --memory 2GB --prompt-tokens 512 --generate 128 | tail -1 | jq .roofline
      d2moe bench olmoe.d2moe --bits 3 --dense-bits 4 --explain
      d2moe bench olmoe.d2moe --plot curve.svg --text wiki.txt --generate 256
    """
    from d2moe.cli.progress import Bar
    from d2moe.evaluate.bench import TEXT, prompt_of
    from d2moe.evaluate.bench import bench as measure

    content = read_text(text) if text is not None else TEXT
    path = model_path(model)
    if plot is not None:
        _plot(path, plot, text and content, prompt_tokens, generate, engine)
        return
    with contextlib.closing(open_model(path, engine)) as m:
        announce(m)
        prompt = prompt_of(m, prompt_tokens, content)
        with Bar(f"bench of {path.name}", light=True) as bar:
            found = measure(m, prompt, generate=generate, repeats=repeats, explain=explain, progress=bar)
    print_table(path.name, _bench_rows(found))
    if explain and found["products"] is None:
        click.echo("--explain: the NumPy twin has one way only", err=True)
    elif explain:
        rows = [(f"{r} x {c}", str(b), f"{t / n:.1f}", f"{n:,}", way) for r, c, b, way, n, t in found["products"]]
        print_table(
            f"matrix products, kernel table {found['kernels']}", rows, ("matrix", "bits", "tokens", "products", "way")
        )
    print_json({"model": str(path), **found})


def _plot(path: Path, plot: Path, text: str | None, warm: int, generate: int, engine: dict[str, Any]) -> None:
    from dataclasses import asdict

    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.evaluate.curve import WIDTHS, check_plot, curve, draw
    from d2moe.runtime.config import show_bytes
    from d2moe.runtime.tokenizer import Tokenizer

    for name in ("memory", "expert_memory", "repeats", "explain", "timeline", "quality"):
        if click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} says nothing to --plot, which takes its own points; leave it out")
    if text is None:
        raise click.UsageError("--plot draws perplexity, too; give a --text")
    check_plot(plot)
    container = Container.open(path)
    tokens = Tokenizer.load(path).encode(text)[: warm + generate + 1]
    widths = WIDTHS if engine["bits"] is None else (engine["bits"],)
    with Bar(f"curve of {path.name}", light=True) as bar:
        points = curve(
            lambda **point: open_model(path, {**engine, "context": engine["context"] or len(tokens), **point}),
            container, tokens, warm, widths, bar,
        )  # fmt: skip
    draw(points, plot, f"{path.name}, policy {engine['policy'] or 'hebf'}, {len(tokens) - 1 - warm} tokens")
    rows = [
        (show_bytes(p.memory_bytes), f"{100 * p.share:.0f} %", f"{p.bits:g}", f"{p.tokens_per_s:.2f}", show_bytes(p.read_bytes_per_token),
         f"{100 * p.hit_rate:.1f} %", f"{p.perplexity:.3f}")
        for p in points
    ]  # fmt: skip
    print_table(f"{path.name}, drawn in {plot}", rows, ("memory", "experts", "bits", "tokens/s", "read per token", "hits", "perplexity"))
    for p in points:
        print_json({"model": str(path), "policy": engine["policy"] or "hebf", **asdict(p)})


def _bench_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from d2moe.runtime.config import show_bytes

    def size(name: str, per: str = "") -> str:
        return "unknown" if found.get(name) is None else show_bytes(found[name]) + per

    def share(name: str) -> str:
        return "unknown" if found.get(name) is None else f"{100 * found[name]:.1f} %"

    return [
        ("generation", f"{found['generation_tokens_per_s']:.2f} tokens/s"),
        ("prompt", f"{found['prompt_tokens_per_s']:.1f} tokens/s"),
        ("time to first token", f"{found['ttft_s']:.3f} s (first repeat {found['ttft_first_s']:.3f} s)"),
        ("average width", f"{found['bits']:.2f} bits, keys and values {found['kv']}"),
        ("dense weights", dense_text(found)),
        ("read from storage per token", size("read_bytes_per_token")),
        ("hit rate", share("hit_rate")),
        ("peak memory", f"{size('peak_bytes')} of {size('memory_bytes')}"),
        ("expert slots", size("expert_memory_bytes")),
        ("waiting for reads", share("stall_share")),
        ("deciding", share("decide_share")),
        ("outside the compiled core", share("python_share")),
        ("roofline", share("roofline")),
        ("memory bandwidth", size("memory_bandwidth_bytes_per_s", "/s")),
        ("storage bandwidth", size("storage_bandwidth_bytes_per_s", "/s")),
        ("kernels", f"{found['kernels']}, {found['threads']} threads"),
        ("tier", str(found["tier"])),
    ]
