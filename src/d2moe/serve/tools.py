"""Tool calls in the form that models with <tool_call> in their chat template write: JSON with a name and arguments between two tags.

That is the form of Qwen's and Hermes' templates. Other forms are refused, not guessed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

from d2moe.errors import RequestError
from d2moe.serve.schema import ChatRequest, Message, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def offered(body: ChatRequest, template: str | None) -> list[Tool]:
    """The tools the model shall see; RequestError if its template has no place for them or the choice names none of them."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    choice = body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a call and there are no tools")
        return []
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(f"tool_choice names {choice.function.name!r}, the tools are {', '.join(names)}")
    if choice == "none":
        return []
    if template is None or OPEN not in template or "tools" not in template:
        raise RequestError(f"the model's chat template does not show how tools are called (with {OPEN})")
    return tools


def forced(body: ChatRequest, tools: list[Tool], is_token: Callable[[str], bool]) -> str | None:
    """A Lark grammar of calls if the request demands one, else None. `is_token` says whether a tag is a token of the vocabulary:
    llguidance wants such a one by its name, not as text."""
    choice = body.tool_choice
    if not tools or choice in (None, "none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object", "additionalProperties": False},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"anyOf": calls} if len(calls) > 1 else dict(calls[0])
    schema["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    before, after = (tag if is_token(tag) else f'"{tag}"' for tag in (OPEN, CLOSE))
    one = f'{before} "\\n" body "\\n" {after}'
    several = f'start: call ("\\n" call)*\ncall: {one}' if body.parallel_tool_calls is not False else f"start: {one}"
    return f"{several}\nbody: %json {json.dumps(schema)}\n"


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates want it: text in one piece, arguments as values."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments)}}
            for c in message.tool_calls
        ]
    return out


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise RequestError(f"the arguments of a tool call are not JSON: {text[:80]!r}") from None


class ToolReader:
    """Cuts a stream of text into what is said and the calls in it; a call comes out when it is complete.

    What is no call to one of `names` stays text.
    """

    def __init__(self, names: set[str], several: bool):
        self._names, self._several = names, several
        self._held = ""
        self.calls = 0

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Text that is none of a call for certain, and calls as OpenAI's `tool_calls` (with "index")."""
        self._held += text
        said: list[str] = []
        calls: list[dict[str, Any]] = []
        while True:
            at = self._held.find(OPEN)
            if at < 0:
                keep = 0 if last else _overlap(self._held)
                break
            end = self._held.find(CLOSE, at)
            if end < 0:
                keep = 0 if last else len(self._held) - at
                break
            call = self._call(self._held[at + len(OPEN) : end])
            whole = end + len(CLOSE)
            said.append(self._held[: at if call else whole])
            calls += [call] if call else []
            self._held = self._held[whole:]
        said.append(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        out = "".join(said)
        # Line ends around calls belong to their form.
        return (out if out.strip() or not (self.calls or calls) else ""), calls

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names or (self.calls and not self._several):
            return None
        arguments = value.get("arguments", {})
        function = {"name": value["name"], "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
        self.calls += 1
        return {"index": self.calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _overlap(text: str) -> int:
    return next((n for n in range(min(len(text), len(OPEN) - 1), 0, -1) if text.endswith(OPEN[:n])), 0)
