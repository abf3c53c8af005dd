"""What several commands share: engine options, opening a model, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2moe.errors import ConfigError, ContainerError, RequestError
from d2moe.policy import POLICIES
from d2moe.types import BASE_BITS, MAX_BITS, QUALITIES, DenseWidths

if TYPE_CHECKING:
    from d2moe.runtime.generate import Model


ENGINE_OPTIONS = [
    click.option(
        "--memory", metavar="SIZE", help="Memory of the whole process, as 256MB or 6GB [default: what is free]."
    ),
    click.option(
        "--expert-memory", metavar="SIZE", help="Memory of the expert slots alone [default: the rest of --memory]."
    ),
    click.option(
        "--bits",
        type=click.FloatRange(BASE_BITS, MAX_BITS),
        help="Average width at which experts are read, any number from 2 to 8 for a model with a width router, else a whole "
        "one [default: 4].",
    ),
    click.option(
        "--quality",
        type=click.Choice(list(QUALITIES)),
        help=f"A name for --bits: {', '.join(f'{name} is {bits:g}' for name, bits in QUALITIES.items())}.",
    ),
    click.option("--uniform", is_flag=True, default=None, help="One plain width for all experts, although there is a router."),
    click.option(
        "--dense-bits",
        type=click.IntRange(BASE_BITS, MAX_BITS),
        help="Width of all other weights, which stay in memory [default: about --bits + 2, or + 3 where a width router "
        "spends them, from 5 to 8, by kind].",
    ),
    click.option(
        "--kv",
        type=click.Choice(["f16", "q8"]),
        help="Keys and values in two bytes each or in one: half the memory, faster on long contexts [default: f16].",
    ),
    click.option(
        "--policy",
        type=click.Choice(list(POLICIES)),
        help="Which experts are read, kept and computed; see docs/policies.md [default: hebf].",
    ),
    click.option("--learn", metavar="TRACE", help="A trace that the policy may learn from beforehand (d2moe trace)."),
    click.option(
        "--timeline", metavar="FILE", help="Write reads, arithmetic and waits as a trace for ui.perfetto.dev or chrome://tracing."
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Threads [default: all CPUs this process may use]."),
]


CONTEXT_OPTION = click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Tokens a sequence may hold [default: the model's, to 4096].",
)

ENGINE_NAMES = (
    *("memory", "expert_memory", "bits", "quality", "uniform", "dense_bits"),
    *("kv", "policy", "learn", "timeline", "threads", "context"),
)
"""Parameters that `ENGINE_OPTIONS` and `CONTEXT_OPTION` give to a command."""


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `ENGINE_OPTIONS` to a command."""
    for option in reversed(ENGINE_OPTIONS):
        function = option(function)
    return function


def model_path(name: str | None) -> Path:
    """The folder of a model by name; None and "builtin" are the one that comes with the package."""
    import d2moe

    if name is not None and name != "builtin":
        return Path(name)
    path = d2moe.builtin_model()
    if not path.is_dir():
        raise ContainerError(
            f"{path} is missing: this installation has no built-in model; name a model, or install again"
        )
    return path


def measured(path: Path, threads: int | None) -> dict[str, Any]:
    """How the model's experts are best read here, if `d2moe profile` has measured it."""
    from d2moe.container import Container
    from d2moe.evaluate.profile import known_profile

    profile = known_profile(Container.open(path), threads)
    return {k: v for k, v in profile.facts["chosen"].items() if k in ("direct", "read_depth", "policy")} if profile else {}


def open_model(path: Path, options: dict[str, Any]) -> Model:
    """Load the model in `path` with those engine options that were given."""
    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.runtime.config import EngineConfig
    from d2moe.runtime.engine import Engine
    from d2moe.runtime.generate import Model
    from d2moe.runtime.tokenizer import Tokenizer

    given = {k: v for k, v in options.items() if v is not None}
    EngineConfig.from_options(**given)  # refuse a bad value before anything is opened
    if not (path / "tokenizer.json").is_file():
        Container.open(path)  # says better what is wrong with something that is no container at all
    tokenizer = Tokenizer.load(path)
    config = EngineConfig.from_options(**{**measured(path, given.get("threads")), **given})
    with Bar(f"loading {path.name}", light=True) as bar:
        return Model(Engine.load(path, config, bar), tokenizer)


def announce(model: Model) -> None:
    """What the engine chose and why, on stderr."""
    from d2moe.evaluate.profile import known_profile
    from d2moe.runtime.config import show_bytes
    from d2moe.runtime.memory import usable_cpus

    engine: Any = model.engine
    container = getattr(engine, "container", None)
    if container is None:
        return
    about = engine.describe()
    bits, experts = engine.config.bits, about["budget"]["experts"]
    whole = container.experts_bytes(math.ceil(bits))
    profile = known_profile(container, engine.config.threads)
    asked = engine.config.threads or usable_cpus()
    fewer = "" if about["threads"] >= asked else f" (of {asked}: the system lets no more start)"
    how = "past the page cache" if about["direct"] else "through the page cache"
    why = profile.facts["chosen"]["why"] if profile else f'not measured yet, "d2moe profile {container.path.name}" does'
    fits = "all experts fit" if experts >= whole else f"{show_bytes(experts)} for {show_bytes(whole)} of experts"
    click.echo(
        f"{container.path.name}: {bits:g} bits, {fits}; other weights {dense_text(about)}; "
        f"kernels {about['kernels']}, {about['threads']} threads{fewer}; "
        f"policy {about['policy']}; reads {how}, {about['read_depth']} in flight ({why})",
        err=True,
    )


def dense_text(facts: dict[str, Any]) -> str:
    """The widths of the dense weights that `Engine.describe`, a bench or a profile names."""
    return str(DenseWidths(facts["dense_bits"], facts.get("dense_widths") or {}))


def read_text(path: str) -> str:
    """A text file, newlines as they are; RequestError if it is not UTF-8 or empty."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text:
        raise RequestError(f"{path} is empty; give a file with text")
    return text


def print_table(title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> None:
    """A table on stdout, numbers to the right; plain where stdout is not a terminal or NO_COLOR is set."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(head))
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        console = Console(highlight=False, width=100)
    console.print(table)


def print_json(values: dict[str, Any]) -> None:
    """The last line of a measuring command: one JSON object. Numbers that are not finite become null."""
    import json
    import math

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    click.echo(json.dumps(plain(values)))


def seed_of(text: str | None) -> dict[str, int | None]:
    """--seed as a sampling parameter: a number, or "random" for a fresh one each time."""
    if text is None:
        return {}
    if text == "random":
        return {"seed": None}
    try:
        return {"seed": int(text)}
    except ValueError:
        raise ConfigError(f'seed is {text!r}, expected a whole number or "random"') from None
