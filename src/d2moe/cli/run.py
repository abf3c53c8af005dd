"""`d2moe run`: text in, text out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2moe.cli.shared import CONTEXT_OPTION, ENGINE_NAMES, announce, engine_options, model_path, open_model, seed_of
from d2moe.errors import RequestError

if TYPE_CHECKING:
    from d2moe.runtime.generate import Model
    from d2moe.runtime.request import Piece


@click.command(context_settings={"show_default": False})
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@engine_options
@CONTEXT_OPTION
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of an answer [default: 256].")
@click.option("--temperature", type=float, help="0 takes the likeliest token; higher is more varied.")
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens; 0 from all.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that have this much probability together.")
@click.option("--min-p", type=float, help="Drop tokens less than this times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that occurred less likely.")
@click.option("--seed", metavar="N|random", help="The same seed gives the same text [default: 0].")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times."
)
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of text.")
@click.option(
    "--chat/--raw", "chat", default=None, help="With the chat template, or text as it is [default: by the model]."
)
@click.option("--report/--no-report", default=True, help="A short report on stderr at the end.")
def run(model: str | None, prompt: str | None, chat: bool | None, report: bool, **options: Any) -> None:
    """Generate text with MODEL after PROMPT, streamed to stdout.

    MODEL is a converted model's folder; without it, or with "builtin", it is the small model that comes with d2moe.
    Without PROMPT it is read from stdin, or from lines you type. Sampling options not given come from the model's own
    generation_config.json, and else are greedy.

    \b
    Examples:
      d2moe run builtin "Once upon a time" --memory 96MB --bits 3
      d2moe run builtin "Once upon a time" --bits 2.7  an average width, spent where it is worth most
      d2moe run olmoe.d2moe "The capital of France is" --memory 2GB --temperature 0 --max-tokens 20
      cat letter.txt | d2moe run olmoe.d2moe --chat --no-report > answer.txt
      d2moe run qwen3.d2moe                            a conversation, if the model has a chat template
    """
    if model is not None and prompt is None and model != "builtin" and not Path(model).exists() and " " in model:
        model, prompt = None, model  # one argument with spaces that is no path is a prompt
    engine = {k: options.pop(k) for k in ENGINE_NAMES}
    values = {k: v for k, v in options.items() if v is not None and v is not False and v != ()}
    values |= seed_of(values.get("seed"))
    from d2moe.runtime.sampling import SamplingParams

    SamplingParams.make(values)  # refuse a bad value before anything is loaded
    if prompt is not None and not prompt:
        raise RequestError("the prompt is empty; give at least one character of text")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
        if not prompt:
            raise RequestError("the prompt is empty: nothing came from stdin; give PROMPT or pipe text in")
    with contextlib.closing(open_model(model_path(model), engine)) as m:
        if report:
            announce(m)
        use_chat = m.tokenizer.has_chat if chat is None else chat
        if prompt is None:
            _converse(m, use_chat, values, report)
        else:
            turns = [{"role": "user", "content": prompt}]
            _show(m.stream_chat(turns, **values) if use_chat else m.stream(prompt, **values))
            if report:
                _report(m, values)


def _converse(m: Model, use_chat: bool, values: dict[str, Any], report: bool) -> None:
    """One answer per typed line; a chat keeps what was said."""
    kind = "message" if use_chat else "text to continue"
    click.echo(f"Type a {kind} and Enter; Ctrl-D ends.", err=True)
    turns: list[dict[str, str]] = []
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing keys
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo(err=True)
            break
        if not line:
            continue
        if use_chat:
            turns.append({"role": "user", "content": line})
            turns.append({"role": "assistant", "content": _show(m.stream_chat(turns, **values))})
        else:
            _show(m.stream(line, **values))
        if report:
            _report(m, values)


def _show(pieces: Iterator[Piece]) -> str:
    """Write pieces as they come and end the line; the whole text. Leaving early frees the engine's sequence."""
    said = ""
    try:
        for piece in pieces:
            said += piece.text
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    finally:
        pieces.close()  # type: ignore[attr-defined]
        if not said.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return said


def _report(m: Model, values: dict[str, Any]) -> None:
    """A few lines on stderr: speed, experts, memory, and the sampling that was used."""
    from d2moe.runtime.config import show_bytes
    from d2moe.runtime.memory import peak_bytes

    stats = m.last
    if stats is None:
        return
    about = m.engine.describe()
    allowed = about.get("budget", {}).get("memory")
    params = m.params(**values)
    if params.temperature == 0:
        sampling = "greedy"
    else:
        sampling = f"temperature {params.temperature:g}"
        sampling += f", top-k {params.top_k}" if params.top_k else ""
        sampling += f", top-p {params.top_p:g}" if params.top_p < 1 else ""
        sampling += f", min-p {params.min_p:g}" if params.min_p else ""
        sampling += f", seed {'random' if params.seed is None else params.seed}"
    per_token = stats.read_bytes / max(1, stats.prompt_tokens + stats.generated_tokens - 1)
    lines = [
        f"speed    {stats.generation_tokens_per_s:.1f} tokens/s, first token after {stats.ttft_s:.2f} s; "
        f"prompt of {stats.prompt_tokens} tokens, {stats.generated_tokens} generated",
        f"experts  {stats.bits:.2f} bits on average; {100 * stats.hit_rate:.1f} % of the bytes wanted were in memory, "
        f"{show_bytes(per_token)} per token read ({'direct I/O' if about.get('direct') else 'page cache'})",
        f"memory   peak {show_bytes(peak_bytes())}" + (f" of {show_bytes(allowed)} allowed" if allowed else ""),
        f"with     {sampling}; kernels {about.get('kernels')}, {about.get('threads')} threads",
    ]
    click.echo("\n" + "\n".join(lines), err=True)
