"""The command line: a table of subcommands, each imported when it is used.

stdout carries the result and nothing else; progress, reports and errors go to stderr. Exit codes: 0 done, 1 an error in
one sentence, 2 wrong usage, 130 interrupted. D2MOE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from d2moe.errors import D2MoeError


class Table(click.Group):
    """A group whose commands are named by module and attribute and imported on demand."""

    def __init__(self, table: Mapping[str, str], **attributes: Any):
        super().__init__(**attributes)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, name = self.table[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise AssertionError(f"{self.table[cmd_name]} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.table:
            near = difflib.get_close_matches(name, self.table, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.table)}."
            ctx.fail(f"No such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from d2moe import __version__

        click.echo(f"d2moe {__version__}")
        ctx.exit()


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
evaluate = Table(
    {"perplexity": "d2moe.cli.measure:perplexity"},
    name="eval",
    help="Measure a model's quality.",
    no_args_is_help=True,
)
route = Table(
    {"train": "d2moe.cli.routing:train", "show": "d2moe.cli.routing:show", "remove": "d2moe.cli.routing:remove"},
    name="route",
    help="""The width router: how many bits each token asks of each of its experts.

    \b
    Examples:
      d2moe route train olmoe.d2moe --text c4.txt      then --bits takes any number
      d2moe route show olmoe.d2moe "Once upon a time" --bits 2.7
    """,
    no_args_is_help=True,
)
commands = Table(
    {
        "run": "d2moe.cli.run:run",
        "serve": "d2moe.cli.serve:serve",
        "control": "d2moe.cli.control:control",
        "convert": "d2moe.cli.files:convert",
        "trim": "d2moe.cli.trim:trim",
        "inspect": "d2moe.cli.files:inspect",
        "verify": "d2moe.cli.files:verify",
        "eval": "d2moe.cli:evaluate",
        "route": "d2moe.cli:route",
        "bench": "d2moe.cli.measure:bench",
        "trace": "d2moe.cli.laboratory:trace",
        "simulate": "d2moe.cli.laboratory:simulate",
        "profile": "d2moe.cli.planning:profile",
        "plan": "d2moe.cli.planning:plan",
        "version": "d2moe.cli:version",
    },
    name="d2moe",
    help="""Mixture-of-experts language models that do not fit in memory: nested 2- to 8-bit experts, read from storage
    as far as each token needs.

    \b
    Examples:
      d2moe run                                        the built-in model, line by line
      d2moe run builtin "Once upon a time" --memory 96MB --bits 4
      d2moe convert ~/OLMoE-1B-7B olmoe.d2moe          a Hugging Face checkpoint becomes one nested file
      d2moe run olmoe.d2moe "Once upon a time" --memory 2GB
      d2moe serve olmoe.d2moe --memory 2GB             OpenAI's interface and a page, at http://127.0.0.1:8000/
    """,
    context_settings=SETTINGS,
    no_args_is_help=True,
    params=[
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
        )
    ],
)


@click.command(help="Show versions and the kernel tables of this CPU.")
def version() -> None:
    from d2moe import __version__

    click.echo(f"d2moe {__version__}")
    click.echo(f"Python {sys.version.split()[0]} on {sys.platform}")
    try:
        from d2moe.kernels import native

        click.echo(f"kernel tables: {', '.join(native.tables())}")
    except ImportError as error:
        click.echo(f"kernel tables: none, the compiled part is missing ({error})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (default sys.argv) and return the exit code."""
    debug = os.environ.get("D2MOE_DEBUG", "") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets "?", not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = commands.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt) as stop:
        cause = stop.__cause__ if isinstance(stop, click.Abort) else stop
        click.echo(f"interrupted{f': {cause}' if cause is not None and str(cause) else ''}", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if debug:
            raise
        return _fail(_sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, D2MoeError):
        return " ".join(str(error).split())
    if isinstance(error, ImportError) and (error.name or "").startswith("d2moe._native"):
        return 'the compiled part d2moe._native is missing; build it with "pip install ." in the source folder'
    if isinstance(error, ImportError) and error.name:
        return f"{error.name} is not installed; run: pip install {error.name.split('.')[0]}"
    if isinstance(error, MemoryError):
        return "out of memory; allow less with --memory, or close other programs"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}; this is a bug, D2MOE_DEBUG=1 shows where"


def _fail(sentence: str) -> int:
    click.echo(f"error: {sentence}", err=True)
    return 1
