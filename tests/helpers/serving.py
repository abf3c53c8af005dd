"""A real server on the built-in model, with a chat template in the manner of Qwen's."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx

import d2moe
from d2moe.runtime.config import EngineConfig
from d2moe.serve.gate import Guard, names_for
from d2moe.serve.load import load_service
from d2moe.serve.server import Server
from d2moe.serve.service import Limits

TEMPLATE = """
{%- if tools %}{{- "Tools, called as <tool_call>{name, arguments}</tool_call>:\\n" }}
{%- for tool in tools %}{{- tool.function | tojson ~ "\\n" }}{% endfor %}{% endif %}
{%- for m in messages %}{{- m.role ~ ": " ~ m.content }}
{%- for call in m.tool_calls or [] %}{{- "<tool_call>" ~ call.function | tojson ~ "</tool_call>" }}{% endfor %}
{{- "\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{- "assistant:" }}{% endif %}"""
NAME = "tiny"


@contextlib.contextmanager
def serving(
    limits: Limits | None = None, guard: Guard | None = None, template: str | None = TEMPLATE, **options: Any
) -> Iterator[SimpleNamespace]:
    """`url`, `service`, and `http`, a client with that base."""
    config = EngineConfig.from_options(**{"max_sequences": 8, "kv_tokens": 8192, **options})
    service = load_service(d2moe.builtin_model(), config, limits, NAME, template)
    guard = guard or Guard(names=names_for("127.0.0.1"), body_bytes=service.limits.body_bytes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(service, guard)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                time.sleep(0.01)
            with httpx.Client(base_url=url, timeout=60) as http:
                yield SimpleNamespace(url=url, service=service, http=http, name=NAME, stop=lambda: setattr(server, "should_exit", True))
        finally:
            server.should_exit = True
            thread.join()
            service.model.close()


def wait_idle(server: SimpleNamespace, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while server.service.worker.live:
        assert time.monotonic() < end, f"{server.service.worker.live} answers still run"
        time.sleep(0.01)
