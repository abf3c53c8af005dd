"""Tool calls in the forms that chat templates ask models to write them in; which one is read from the template.

| form | a call | templates |
|---|---|---|
| tags | `<tool_call>{"name": …, "arguments": …}</tool_call>` | Qwen, Hermes |
| xml | `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` | Qwen3-Coder |
| list | `[TOOL_CALLS] [{"name": …, "arguments": …}, …]` to the end | Mixtral, Mistral |
| json | `{"name": …, "parameters": …}` and nothing else, perhaps after `<|python_tag|>` | Llama 3 |

A template that shows none of them is refused, not guessed.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from typing import Any, ClassVar

from d2moe.errors import RequestError
from d2moe.serve.schema import ChatRequest, Message, NamedTool, Tool

Calls = list[tuple[str, Any]]
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of demanded calls' JSON: what json.dumps and templates write."""
DEFINITIONS = {"$defs", "definitions"}
NO_PARAMETERS = {"type": "object", "additionalProperties": False}


class Form:
    """How calls are written: `opening` begins them, `closing` ends one (None: the end of the text does)."""

    opening: ClassVar[str] = "<tool_call>"
    closing: ClassVar[str | None] = "</tool_call>"
    arguments: ClassVar[str] = "arguments"
    id_length: ClassVar[int] = 24

    @classmethod
    def of(cls, template: str) -> bool:
        """Whether a chat template writes calls like this."""
        return cls.opening in template

    def find(self, text: str, first: bool) -> tuple[int, int] | None:
        """Where a call begins in `text`, and its inside; `first`: nothing was said before `text`."""
        at = text.find(self.opening)
        return None if at < 0 else (at, at + len(self.opening))

    def undecided(self, text: str, first: bool) -> int:
        """How many characters at the end of `text`, in which no call begins, could be the beginning of one."""
        return next((n for n in range(min(len(text), len(self.opening) - 1), 0, -1) if text.endswith(self.opening[:n])), 0)

    def read(self, text: str, tools: dict[str, Tool]) -> Calls | None:
        """The calls that are the inside of a place where calls are; None if it is something else."""
        found: list[Any] = []
        at = 0
        while at < len(text):
            if text[at] in " \t\r\n;,":
                at += 1
                continue
            try:
                value, at = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError):
                return None
            found += value if isinstance(value, list) else [value]
        if any(not isinstance(v, dict) or not isinstance(v.get("name"), str) for v in found):
            return None
        return [(v["name"], v.get("arguments", v.get("parameters", {}))) for v in found]

    def grammar(self, tools: list[Tool], several: bool, tag: Callable[[str], str]) -> str:
        """A Lark grammar of calls; `tag` gives a marker as a term of it."""
        one = f'{tag(self.opening)} "\\n" body "\\n" {tag(str(self.closing))}'
        start = 'start: call ("\\n" call)*' if several else "start: call"
        return f"{start}\ncall: {one}\nbody: %json {json.dumps(self.schema(tools))}\n"

    def schema(self, tools: list[Tool]) -> dict[str, Any]:
        """JSON schema of one call."""
        calls = []
        shared: dict[str, Any] = {}  # references count from the root
        for tool in tools:
            parameters = dict(tool.function.parameters or NO_PARAMETERS)
            for place in DEFINITIONS & parameters.keys():
                for name, schema in parameters.pop(place).items():
                    if shared.setdefault(place, {}).setdefault(name, schema) != schema:
                        raise RequestError(f"two tools mean different things by {place}/{name}; give them different names")
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": tool.function.name}, self.arguments: parameters},
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
            )
        return {**({"anyOf": calls} if len(calls) > 1 else calls[0]), **shared, "x-guidance": COMPACT}

    def new_id(self) -> str:
        letters = string.ascii_letters + string.digits
        return ("call_" if self.id_length > 9 else "") + "".join(secrets.choice(letters) for _ in range(self.id_length))


class Xml(Form):
    @classmethod
    def of(cls, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def read(self, text: str, tools: dict[str, Tool]) -> Calls | None:
        whole = re.fullmatch(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", text, re.S)
        if not whole:
            return None
        tool = tools.get(whole[1])
        known = _properties(tool) if tool else {}
        values = {}
        for key, value in re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", whole[2], re.S):
            values[key] = value if _is_text(known.get(key)) else _json_or_text(value)
        return [(whole[1], values)]

    def grammar(self, tools: list[Tool], several: bool, tag: Callable[[str], str]) -> str:
        rules, functions = [], []
        for i, tool in enumerate(tools):
            parameters = tool.function.parameters or {}
            parts = []
            for j, (key, schema) in enumerate(_properties(tool).items()):
                name = f"value_{i}_{j}"
                if _is_text(schema) and not {"enum", "const"} & schema.keys():
                    # Ends at the first sign of its end, and takes that along.
                    rules.append(f'{name}[suffix="\\n</parameter>\\n"]: /(.|\\n)*/')
                elif _is_text(schema):
                    words = " | ".join(json.dumps(str(w)) for w in schema.get("enum", [schema.get("const")]))
                    rules.append(f'{name}: ({words}) "\\n</parameter>\\n"')
                else:
                    inner = {**schema, **{k: parameters[k] for k in DEFINITIONS & parameters.keys()}, "x-guidance": COMPACT}
                    rules.append(f'{name}: json_{i}_{j} "\\n</parameter>\\n"\njson_{i}_{j}: %json {json.dumps(inner)}')
                part = f"({json.dumps(f'<parameter={key}>' + chr(10))} {name})"
                parts.append(part if key in parameters.get("required", ()) else f"{part}?")
            rules.append(f"function_{i}: {json.dumps(f'<function={tool.function.name}>' + chr(10))} {' '.join(parts)} \"</function>\"")
            functions.append(f"function_{i}")
        start = 'start: call ("\\n" call)*' if several else "start: call"
        call = f'call: {tag(self.opening)} "\\n" ({" | ".join(functions)}) "\\n" {tag(str(self.closing))}'
        return "\n".join([start, call, *rules, ""])


class List(Form):
    opening, closing = "[TOOL_CALLS]", None
    id_length = 9  # Mistral's templates refuse others

    def grammar(self, tools: list[Tool], several: bool, tag: Callable[[str], str]) -> str:
        one = self.schema(tools)
        root = {k: one.pop(k) for k in (*DEFINITIONS, "x-guidance") if k in one}
        schema = {"type": "array", "items": one, "minItems": 1, **({} if several else {"maxItems": 1}), **root}
        return f'start: {tag(self.opening)} " " body\nbody: %json {json.dumps(schema)}\n'


class Json(Form):
    opening, closing, arguments = "<|python_tag|>", None, "parameters"

    @classmethod
    def of(cls, template: str) -> bool:
        return cls.opening in template or '{"name": function name, "parameters": ' in template

    def find(self, text: str, first: bool) -> tuple[int, int] | None:
        if first and re.match(r'\s*\{\s*"name"\s*:', text):
            return 0, 0
        return super().find(text, first)

    def undecided(self, text: str, first: bool) -> int:
        if first and '{"name":'.startswith("".join(text.split())):
            return len(text)
        return super().undecided(text, first)

    def grammar(self, tools: list[Tool], several: bool, tag: Callable[[str], str]) -> str:
        return f"start: body\nbody: %json {json.dumps(self.schema(tools))}\n"


FORMS: tuple[type[Form], ...] = (Xml, Form, List, Json)
"""The more special before the more general."""


def form_of(template: str | None) -> Form | None:
    """The form of calls that a chat template asks for."""
    if template is None or "tools" not in template:
        return None
    return next((kind() for kind in FORMS if kind.of(template)), None)


def offered(body: ChatRequest, template: str | None) -> tuple[list[Tool], Form]:
    """The tools the model shall see, and how it calls them; RequestError if its template has no place for them or the choice
    names none of them."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    choice = body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a call and there are no tools")
        return [], Form()
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestError(f"tool_choice names {choice.function.name!r}, the tools are {', '.join(names)}")
    if choice == "none":
        return [], Form()
    form = form_of(template)
    if form is None:
        known = ", ".join(sorted({kind.opening for kind in FORMS}))
        raise RequestError(f"the model's chat template does not show how tools are called (known are {known}, and Llama's JSON)")
    return tools, form


def forced(body: ChatRequest, tools: list[Tool], form: Form, token_id: Callable[[str], int | None]) -> str | None:
    """A Lark grammar of calls if the request demands one, else None. `token_id`: of a marker that is a token of the vocabulary;
    llguidance wants such a one by its number, not as text."""
    choice = body.tool_choice
    if not tools or choice in (None, "none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]

    def tag(marker: str) -> str:
        token = token_id(marker)
        return json.dumps(marker) if token is None else f"<[{token}]>"

    return form.grammar(tools, body.parallel_tool_calls is not False, tag)


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


def _properties(tool: Tool) -> dict[str, dict[str, Any]]:
    found = (tool.function.parameters or {}).get("properties")
    return {k: v if isinstance(v, dict) else {} for k, v in found.items()} if isinstance(found, dict) else {}


def _is_text(schema: dict[str, Any] | None) -> bool:
    """Whether a value of this schema can only be text, which is written as it is."""
    if schema is None:
        return False
    kind, words = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
    return kind == "string" or (kind is None and words is not None and all(isinstance(w, str) for w in words))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class ToolReader:
    """Cuts a stream of text into what is said and the calls in it; a call comes out when it is complete.

    What is no call to one of `tools` stays text.
    """

    def __init__(self, form: Form, tools: list[Tool], several: bool):
        self._form, self._several = form, several
        self._tools = {tool.function.name: tool for tool in tools}
        self._held = ""
        self._first = True
        self.calls = 0

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Text that is none of a call for certain, and calls as OpenAI's `tool_calls` (with "index")."""
        self._held += text
        said: list[str] = []
        calls: list[dict[str, Any]] = []
        closing = self._form.closing
        while (found := self._form.find(self._held, self._first)) is not None:
            begin, inside = found
            end = self._held.find(closing, inside) if closing else len(self._held) if last else -1
            if end < 0:
                keep = 0 if last else len(self._held) - begin
                break
            whole = end + len(closing or "")
            made = self._calls(self._held[inside:end])
            said.append(self._held[:begin].rstrip() if made else self._held[:whole])
            calls += made
            self._held, self._first = self._held[whole:], False
        else:
            keep = 0 if last else self._form.undecided(self._held, self._first)
        sure = self._held[: len(self._held) - keep]
        if not last or self.calls:
            sure = sure.rstrip()  # space around calls belongs to them
        said.append(sure)
        self._held, self._first = self._held[len(sure) :], self._first and not sure
        return "".join(said), calls

    def _calls(self, text: str) -> list[dict[str, Any]]:
        found = self._form.read(text, self._tools)
        if not found or any(name not in self._tools for name, _ in found):
            return []
        if not self._several and self.calls + len(found) > 1:
            found = found[: 1 - self.calls]
        out = []
        for name, arguments in found:
            function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
            out.append({"index": self.calls, "id": self._form.new_id(), "type": "function", "function": function})
            self.calls += 1
        return out
