"""What every request passes: an id, the host's name, the key, the size, and one line in the log."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2moe.serve.answers import error_body

log = logging.getLogger("d2moe.serve")

HEADER_BYTES = 32 * 1024
OPEN_PATHS = ("/", "/health", "/page/page.css", "/page/page.js", "/page/icon.svg")
"""Served without the key: what a browser needs to ask for it, and what tells that the server is alive."""
HEADERS = {
    b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Guard:
    """`api_key` None: none is asked for, and /admin answers to this machine alone. `names`: the host names that requests may be
    addressed to (None: any); it keeps web pages elsewhere from reaching a local server by a name of theirs."""

    api_key: str | None = None
    names: frozenset[str] | None = None
    body_bytes: int = 4_000_000


def names_for(host: str, more: Iterable[str] = ()) -> frozenset[str] | None:
    """Host names for a server bound to `host`: the local ones and `more` if it is bound to loopback, else any."""
    return frozenset({*LOCAL_NAMES, *(name.lower() for name in more)}) if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware. Sets `request_id` in scope["state"]; a route may put a function `say` there, for facts of the log line."""

    def __init__(self, app: ASGIApp, guard: Guard, responded: Callable[[int], None]):
        self.app, self.guard, self._responded = app, guard, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = name
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode()), *HEADERS.items()]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal:
                await _refuse(answer, *refusal)
            else:
                await self._pass(scope, receive, answer, lambda: status)
        finally:
            self._responded(status)
            said = state["say"]() if "say" in state else {}
            facts = {"request_id": name, "method": scope["method"], "path": scope["path"], "status": status}
            log.info("request", extra={"facts": {**facts, "seconds": round(time.perf_counter() - begin, 4), **said}})

    async def _pass(self, scope: Scope, receive: Receive, answer: Send, status: Callable[[], int]) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.guard.body_bytes:
                raise HTTPException(413, self._too_large()[1])
            return message

        try:
            await self.app(scope, limited, answer)
        except Exception:  # the last line of defence: a bug is an answer of 500 and a line in the log
            log.exception("unexpected error", extra={"facts": {"request_id": scope["state"]["request_id"]}})
            if not status():
                await _refuse(answer, 500, "an unexpected error; the server's log says more", "server_error")

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        guard, path = self.guard, scope["path"]
        # The parser's own limit is on what has come so far: headers that come at once pass it.
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"]) > HEADER_BYTES:
            return 431, f"the request's headers have more than the {HEADER_BYTES:,} bytes that this server takes", "invalid_request_error"
        host = re.sub(r":[0-9]+$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if guard.names is not None and host not in guard.names:
            return 421, f"this server answers to {', '.join(sorted(guard.names))}; more names with --allow-host", "invalid_request_error"
        if guard.api_key is not None and path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + guard.api_key.encode()):
                return 401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "authentication_error"
        if guard.api_key is None and path.startswith("/admin") and not is_loopback((scope.get("client") or ("", 0))[0]):
            return 403, "without an API key /admin answers to the server's own machine only", "permission_error"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > guard.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str, str]:
        return 413, f"the request has more than the {self.guard.body_bytes:,} bytes that this server takes", "invalid_request_error"


async def _refuse(send: Send, status: int, message: str, kind: str) -> None:
    body = json.dumps(error_body(message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Lines(logging.Formatter):
    """A log record as one line: JSON, or for people. `facts` are what a record carries beyond its message."""

    def __init__(self, as_json: bool):
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        trace = self.formatException(record.exc_info) if record.exc_info else None
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._json:
            values = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **facts}
            return json.dumps({**values, "trace": trace} if trace else values)
        shown = " ".join(f"{k}={v}" for k, v in facts.items() if v is not None)
        return f"{when} {record.levelname.lower()} {record.getMessage()} {shown}".rstrip() + (f"\n{trace}" if trace else "")
