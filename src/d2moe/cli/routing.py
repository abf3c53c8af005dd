"""`d2moe route`: the width router, which decides how many bits each token asks of each of its experts."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from d2moe.cli.shared import CONTEXT_OPTION, engine_options, model_path, open_model, print_json, print_table, read_text
from d2moe.errors import ConfigError, D2MoeError


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="UTF-8 text to measure on; give several for several domains, each counts the same.",
)
@click.option(
    "--reference",
    type=click.Path(exists=True, file_okay=False),
    help="The Hugging Face checkpoint that was converted, as the teacher [default: the model at 8 bits].",
)
@click.option(
    "--method",
    type=click.Choice(["measured", "learned"]),
    default="measured",
    show_default=True,
    help="From measured errors, or from there by gradients; then the better of the two is kept.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1024), default=16384, show_default=True, help="Tokens to measure on, a quarter of them held back."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=300, show_default=True, help="Batches of 1,024 tokens of more text to learn from."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: torch's].")
def train(
    model: str, texts: tuple[str, ...], reference: str | None, method: str, tokens: int, steps: int, threads: int | None
) -> None:
    """Give MODEL a width router, so that --bits takes any number.

    The router is written into the folder of MODEL as bit_router.safetensors; weights are not touched, and "d2moe route remove" takes it out
    again. Interrupted, the same command goes on where it was. Needs d2moe[torch].

    \b
    Examples:
      d2moe route train olmoe.d2moe --text c4.txt --text wiki.txt
      d2moe route train olmoe.d2moe --text c4.txt --reference OLMoE-1B-7B-0924 --method learned
    """
    if find_spec("torch") is None:
        raise D2MoeError("route train needs torch, which is not installed; run: pip install 'd2moe[torch]'")
    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.convert.route_training import train as run
    from d2moe.runtime.tokenizer import Tokenizer

    path = model_path(model)
    Container.open(path)  # says better what is wrong with something that is no container at all
    tokenizer = Tokenizer.load(path)
    tokenised = {text: tokenizer.encode(read_text(text)) for text in texts}
    with contextlib.ExitStack() as bars:

        def stage(name: str) -> Any:
            bars.close()
            return bars.enter_context(Bar(name))

        made = run(
            path, tokenised, reference=reference, method=method, tokens=tokens, steps=steps, threads=threads, stage=stage
        )
    rows = [(name, f"{bits:.3f}", f"{kl:.5f}") for name, bits, kl in made.table]
    print_table(
        f"{made.tokens:,} tokens held back; KL divergence from {made.teacher}, nats a token", rows, ("widths", "average bits", "KL")
    )
    click.echo(f"{path / 'bit_router.safetensors'}: the {made.method} router was written", err=True)
    table = [{"widths": name, "bits": bits, "kl": kl} for name, bits, kl in made.table]
    print_json({"model": str(path), "method": made.method, "teacher": made.teacher, "held_back_tokens": made.tokens, "table": table})


@click.command()
@click.argument("model")
def remove(model: str) -> None:
    """Take the width router out of MODEL.

    \b
    Example:
      d2moe route remove olmoe.d2moe
    """
    from d2moe.container import Container, read_router, write_router

    path = model_path(model)
    if read_router(Container.open(path)) is None:
        raise ConfigError(f"{path} has no width router, so there is nothing to remove")
    write_router(path, None, {})
    click.echo(f"{path}: the width router was removed", err=True)


@click.command()
@click.argument("model")
@click.argument("text")
@engine_options
@CONTEXT_OPTION
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every choice.")
def show(model: str, text: str, as_json: bool, **engine: Any) -> None:
    """Show how many bits MODEL takes for each token of TEXT, in each layer and of each expert.

    A cell has the experts of a token in a layer, the one with the largest gate first, each with its width, – if it was left out.

    \b
    Examples:
      d2moe route show builtin "Once upon a time" --bits 2.7
      d2moe route show olmoe.d2moe "The capital of France" --quality balanced --json | jq .average_bits
    """
    from d2moe.evaluate.routes import routes

    with contextlib.closing(open_model(model_path(model), engine)) as m:
        found = routes(m, text)
    if as_json:
        print_json(found)
        return
    _draw(Path(model).name, found)


COLOURS = {0: "bright_black", 2: "bright_black", 3: "blue", 4: "cyan", 5: "green", 6: "yellow", 7: "red", 8: "bold red"}


def _draw(name: str, found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(100, 16 + (3 + 7 * found["experts_per_token"]) * len(found["layers"])))
    table = Table(title=f"{name}: expert:bits, {found['average_bits']:.3f} bits on average", title_justify="left", box=box.SIMPLE)
    table.add_column("token")
    for layer in found["layers"]:
        table.add_column(f"layer {layer}")
    table.add_column("mean", justify="right")
    for token in found["tokens"]:
        cells = []
        for layer in token["layers"]:
            cell = Text()
            for expert, bits in zip(layer["experts"], layer["bits"], strict=True):
                cell.append(f"{expert:>3}:").append(str(bits or "–"), COLOURS[bits]).append(" ")
            cells.append(cell)
        table.add_row(Text(repr(token["text"])[1:-1]), *cells, f"{token['average_bits']:.2f}")
    means = [f"{bits:.2f}" for bits in found["layer_bits"]]
    table.add_section()
    table.add_row("mean", *means, f"{found['average_bits']:.2f}")
    console.print(table)
    share = " ".join(f"[{COLOURS[int(b)]}]{b} bits {100 * s:.0f} %[/]" for b, s in found["shares"].items() if s)
    console.print(share)
