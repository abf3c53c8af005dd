"""`d2moe serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import click

from d2moe.cli.shared import CONTEXT_OPTION, engine_options, measured, model_path, read_text
from d2moe.errors import ConfigError

if TYPE_CHECKING:
    from d2moe.serve.service import Service

KEY_VARIABLE = "D2MOE_API_KEY"
SWITCH_S = 0.0005
"""Python's own is ten times that: a step while a long prompt was read in waited up to 20 ms for the interpreter."""


@click.command(context_settings={"show_default": False})
@click.argument("model")
@engine_options
@CONTEXT_OPTION
@click.option("--host", default="127.0.0.1", help="Address to listen on [default: 127.0.0.1, this machine only].")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port; 0 takes a free one [default: 8000].")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name clients may use for a server on 127.0.0.1, as behind a proxy.")
@click.option("--name", metavar="TEXT", help="The model's name for clients [default: its folder's name].")
@click.option("--chat-template", type=click.Path(exists=True, dir_okay=False), help="A Jinja file instead of the model's own template.")
@click.option("--max-sequences", type=click.IntRange(min=1), help="Answers in one batch [default: 16].")
@click.option(
    "--kv-tokens", type=click.IntRange(min=1), help="Tokens of all texts together, at least a context [default: a quarter of memory]."
)
@click.option("--queue", type=click.IntRange(min=0), default=64, help="Requests that may wait; more get 429 [default: 64].")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of an answer [default: what the context holds].")
@click.option("--max-body", metavar="SIZE", default="4MB", help="Largest request [default: 4MB].")
@click.option("--drain-seconds", type=click.IntRange(min=0), default=30, help="Time for running answers at the end [default: 30].")
@click.option("--log", type=click.Choice(["text", "json", "off"]), default="text", help="Lines on stderr, one a request [default: text].")
def serve(model: str, **options: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's interface, with a page at /.

    MODEL is a converted model's folder, or "builtin". Requests are batched as they come; each may name its own `bits` (2 to 8)
    or `quality` (fast, balanced, best: 2.5, 3, 5 bits). With the environment variable D2MOE_API_KEY set, clients must send that
    key. Ctrl-C lets running answers end; a second one does not.

    \b
    Examples:
      d2moe serve olmoe.d2moe --memory 6GB
      d2moe serve builtin --memory 256MB --port 8080
      D2MOE_API_KEY=secret d2moe serve qwen3.d2moe --memory 12GB --host 0.0.0.0
      curl localhost:8000/v1/completions -H 'content-type: application/json' \\
           -d '{"model": "olmoe", "prompt": "Once upon a time", "max_tokens": 40, "bits": 3}'
    """
    # What the server is made of must be in memory before the engine measures the process.
    try:
        import fastapi  # noqa: F401 - the modules below need them
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed, which the server needs; run: pip install 'd2moe[serve]'") from None

    from d2moe.cli.progress import Bar
    from d2moe.runtime.config import EngineConfig, parse_bytes
    from d2moe.serve.gate import Guard, Lines, is_loopback, names_for
    from d2moe.serve.load import SEQUENCES, load_service
    from d2moe.serve.server import Server
    from d2moe.serve.service import Limits

    names = ("host", "port", "allow_host", "name", "chat_template", "queue", "max_tokens", "max_body", "drain_seconds", "log")
    own = {k: options.pop(k) for k in names}
    options["max_sequences"] = options["max_sequences"] or SEQUENCES
    given = {k: v for k, v in options.items() if v is not None}
    config = EngineConfig.from_options(**given)
    limits = Limits(own["queue"], own["max_tokens"], parse_bytes(own["max_body"], "max-body"), own["drain_seconds"])
    template = read_text(own["chat_template"]) if own["chat_template"] else None
    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not key.isascii():
        raise ConfigError(f"{KEY_VARIABLE} holds characters beyond ASCII, which a header cannot carry")
    listener = _listen(own["host"], own["port"])
    with listener:
        path = model_path(model)
        config = EngineConfig.from_options(**{**measured(path, config.threads), **given})
        with Bar(f"loading {path.name}", light=True) as bar:
            service = load_service(path, config, limits, own["name"], template, bar)
        _log_to_stderr(Lines(own["log"] == "json"), own["log"])
        # The engine's thread comes back from the core several times a step, and would wait so long each time that another is at work.
        sys.setswitchinterval(SWITCH_S)
        server = Server(service, Guard(key, names_for(own["host"], own["allow_host"]), limits.body_bytes))
        _announce(service, own["host"], listener.getsockname()[1])
        if key is None and not is_loopback(own["host"]):
            click.echo(f"warning: anyone who reaches {own['host']} can use this server; set {KEY_VARIABLE} to ask for a key", err=True)
        # uvicorn raises the signals it has heeded once more at its end; there is nothing left to do for them then.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        try:
            server.run(sockets=[listener])
        finally:
            service.worker.close()
            service.model.close()
    if not server.started:
        sys.exit(1)


def _announce(service: Service, host: str, port: int) -> None:
    from d2moe.runtime.config import show_bytes
    from d2moe.runtime.kv import BLOCK_TOKENS

    budget, pages = service.engine.budget, service.engine.pages
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    parts = f"memory {show_bytes(budget.memory)}, of it experts {show_bytes(budget.experts)}"
    room = f"{pages.blocks * BLOCK_TOKENS:,} tokens in at most {service.worker.most_running} texts"
    click.echo(f"{service.name} at {where} ({parts}; {room})", err=True)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded: a port that is taken should be known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --host or --port") from None


def _log_to_stderr(lines: logging.Formatter, kind: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    for name in ("d2moe", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.WARNING if kind == "off" or name != "d2moe" else logging.INFO)
