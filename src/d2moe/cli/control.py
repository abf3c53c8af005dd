"""`d2moe control`: a running server's memory, default width and policy, from the command line."""

from __future__ import annotations

import http.client
import json
import os
from typing import Any
from urllib.parse import urlsplit

import click

from d2moe.cli.serve import KEY_VARIABLE
from d2moe.cli.shared import print_json, print_table
from d2moe.errors import ConfigError
from d2moe.policy import POLICIES
from d2moe.types import BASE_BITS, MAX_BITS

TIMEOUT_S = 60


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", help="Where it serves [default: http://127.0.0.1:8000].")
@click.option("--memory", metavar="SIZE", help="Memory of its whole process from now on.")
@click.option("--bits", type=click.FloatRange(BASE_BITS, MAX_BITS), help="Average width of requests that name none.")
@click.option("--policy", type=click.Choice(list(POLICIES)), help="Which experts are read, kept and computed.")
@click.option("--json", "as_json", is_flag=True, help="The whole state as JSON, with the width and heat of each expert.")
def control(url: str, memory: str | None, bits: float | None, policy: str | None, as_json: bool) -> None:
    """Show what a running server holds, and change its memory, default width or policy while it serves.

    Answers under way go on. With a key, set D2MOE_API_KEY as for the server.

    \b
    Examples:
      d2moe control
      d2moe control --memory 4GB --bits 3
      d2moe control --url http://127.0.0.1:8080 --policy lru --json
    """
    for route, name, value in (("memory", "memory", memory), ("defaults", "bits", bits), ("policy", "policy", policy)):
        if value is not None:
            _ask(url, f"/admin/{route}", {name: value})
    state = _ask(url, "/admin/state")
    if as_json:
        print_json(state)
        return
    from d2moe.runtime.config import show_bytes

    print_table(
        f"{state['model']} at {url}",
        [
            ("answers running, waiting", f"{state['running']}, {state['waiting']}"),
            ("memory", f"{show_bytes(state['resident_bytes'])} of {show_bytes(state['memory_bytes'])}"),
            ("least memory", show_bytes(state["least_memory_bytes"])),
            ("experts", f"{show_bytes(state['expert_bytes'])} of {show_bytes(state['expert_budget_bytes'])}"),
            ("found in memory", f"{state['hit_rate']:.1%}"),
            ("default bits", f"{state['default_bits']:g}"),
            ("policy", state["policy"]),
        ],
    )


def _ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's state; ConfigError says what it refuses, or that there is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"url is {url!r}, expected one as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"content-type": "application/json"} if body else {}
    if key := os.environ.get(KEY_VARIABLE):
        headers["authorization"] = f"Bearer {key}"
    try:
        connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        try:
            connection.request("POST" if body else "GET", parts.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status == 200:
            return dict(answer)
        said = answer["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        why = str(error) or type(error).__name__
        raise ConfigError(f"no d2moe server answers at {url} ({why}); start one with d2moe serve, or name it with --url") from None
    raise ConfigError(f"the server at {url} refuses: {said}")
