"""Text to tokens and back: the model's own tokenizer.json through the `tokenizers` library, and its chat template.

The same tokens as transformers gives for the same files: the post-processor of tokenizer.json decides about a token
at the beginning; where it has none, "add_bos_token" and "add_eos_token" of tokenizer_config.json do.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from d2moe.errors import ContainerError, RequestError

MAX_JSON_BYTES = 200_000_000
"""Refuse larger tokenizer files: the largest in use are about 35 MB."""
ANCHOR_TOKENS = 24
"""A stream decodes at most about this many tokens again per step."""
UNFINISHED = "\ufffd"


def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies spell the 256 bytes in, and their bytes: printable ones are themselves, the others
    follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()


class Tokenizer:
    """Encoder, decoder and chat template of one model directory."""

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any] | None = None,
        template: str | None = None,
        where: str = "tokenizer",
        tool_template: str | None = None,
    ):
        self.backend = backend
        self.config = dict(config or {})
        self.where = where
        self._template, self._tool_template = template, tool_template
        self._renderers: dict[str, Callable[[dict[str, Any]], str]] = {}
        # tokenizer.json may carry the settings of a training run; a prompt must never be cut or padded in silence.
        backend.no_truncation()
        backend.no_padding()
        self.special = {
            k: t for k in ("bos_token", "eos_token", "unk_token", "pad_token") if (t := _content(self.config.get(k)))
        }
        if backend.post_processor is None:
            self._add_ends()
        # A decoder with byte fallback turns a run of byte tokens into text only as a whole.
        self._byte_tokens = frozenset(i for b in range(256) if (i := backend.token_to_id(f"<0x{b:02X}>")) is not None)
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._token_bytes: dict[int, bytes] = {}
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @classmethod
    def load(cls, path: str | Path, template: str | None = None) -> Tokenizer:
        """Read the tokenizer's files from the folder `path`; ContainerError names the file that is missing or bad.

        `template` is used instead of the model's own chat template.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ContainerError(
                f"{file} is missing, so text cannot become tokens; convert again with it in the source folder"
            )
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ContainerError(f"{file} has {file.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ContainerError(f"{file} is not a tokenizer this library can read: {error}") from None
        config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        jinja = folder / "chat_template.jinja"
        tool_template = None
        try:
            if template is None and jinja.is_file():
                template = jinja.read_text("utf-8")
            elif template is None:
                template, tool_template = _named_templates(config.get("chat_template"))
        except UnicodeDecodeError:
            raise ContainerError(f"{jinja} is not UTF-8 text; copy it from the source checkpoint again") from None
        return cls(backend, config, template, folder.name, tool_template)

    @property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def template(self) -> str | None:
        """The chat template, in Jinja's language."""
        return self._template

    @property
    def tool_template(self) -> str | None:
        """The chat template for messages with tools; where there is none of its own it is the other."""
        return self._tool_template or self._template

    @property
    def has_chat(self) -> bool:
        """True if there is a chat template."""
        return self._template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds the tokens at the ends that the model was trained with."""
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special).ids)
        except (TypeError, UnicodeError):  # a lone surrogate, as from an undecodable command-line argument
            raise RequestError("the text holds characters that are not valid Unicode; give it as UTF-8") from None

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; half a character at the end becomes U+FFFD."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=skip_special))

    def stream(self, skip_special: bool = True, shown: Collection[int] = ()) -> TextStream:
        """A decoder that takes one token at a time; special tokens `shown` are part of the text even if it skips them."""
        return (ByteStream if self._byte_level else DecodeStream)(self, skip_special, shown)

    def token_bytes(self, token: int) -> bytes:
        """What a byte-level decoder makes of a token, whatever stands beside it."""
        found = self._token_bytes.get(token)
        if found is None:
            text = self.backend.id_to_token(token) or ""
            # A token that is not spelt in the 256 letters, as an added one, is its own text.
            known = all(letter in BYTE_OF_LETTER for letter in text)
            found = bytes(BYTE_OF_LETTER[letter] for letter in text) if known else text.encode()
            self._token_bytes[token] = found
        return found

    def n_bytes(self, tokens: Sequence[int]) -> int:
        """UTF-8 bytes of the text of `tokens`, special tokens included; the denominator of bits per byte."""
        return len(self.decode(tokens, skip_special=False).encode("utf-8", "replace"))

    def chat_text(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text the model's chat template makes of `messages` (dicts with "role" and "content")."""
        template = self.tool_template if variables.get("tools") else self._template
        if template is None:
            raise RequestError(
                f"{self.where} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "it is a plain text model: use generate() or `d2moe run --raw`"
            )
        if template not in self._renderers:
            self._renderers[template] = _compile(template, self.where)
        known = {
            **self.special,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            # Plain JSON values only: an object handed to a template of unknown origin could be called by it.
            plain = json.loads(json.dumps({**known, "messages": [dict(m) for m in messages]}))
        except (TypeError, ValueError) as error:
            raise RequestError(f'messages must be dicts of plain values with "role" and "content": {error}') from None
        return self._renderers[template](plain)

    def chat(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of `chat_text`; the template writes the special tokens itself, so none are added."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **variables), add_special=False)

    def token_id(self, text: str) -> int | None:
        """The token that is exactly `text`, if there is one."""
        found = self.backend.token_to_id(text)
        return None if found is None else int(found)

    def is_byte(self, token: int) -> bool:
        """True for a byte token of a vocabulary with byte fallback, as <0xE2>."""
        return token in self._byte_tokens

    def is_special(self, token: int) -> bool:
        """True for a token that `decode` leaves out with skip_special."""
        return token in self._special_ids

    def _id(self, name: str) -> int | None:
        text = self.special.get(name)
        return None if text is None else self.token_id(text)

    def _add_ends(self) -> None:
        from tokenizers.processors import TemplateProcessing

        bos = (
            self.special.get("bos_token")
            if self.config.get("add_bos_token") is True and self.bos_id is not None
            else None
        )
        eos = (
            self.special.get("eos_token")
            if self.config.get("add_eos_token") is True and self.eos_id is not None
            else None
        )
        if bos or eos:
            ends = {t: i for t, i in ((bos, self.bos_id), (eos, self.eos_id)) if t and i is not None}
            single = [t for t in (bos, "$A", eos) if t]
            self.backend.post_processor = TemplateProcessing(single=single, special_tokens=list(ends.items()))


class TextStream(Protocol):
    """Tokens in, text out, one token at a time; the pieces and `finish()` joined are exactly `decode` of all tokens.

    Text that a later token can still change is held back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: Collection[int] = ()): ...

    def push(self, token: int) -> str:
        """The text that became certain with `token`; may be empty."""
        ...

    def finish(self) -> str:
        """The text still held; the stream is then empty and can be used again."""
        ...


class ByteStream(TextStream):
    """Of a byte-level vocabulary, whose tokens are bytes of UTF-8: what is held back is half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: Collection[int] = ()):
        self._tokenizer, self._skip, self._shown = tokenizer, skip_special, frozenset(shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._shown:
            return self.finish() + self._utf8.decode(self._tokenizer.token_bytes(token))
        if self._skip and self._tokenizer.is_special(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text


class DecodeStream(TextStream):
    """Of any vocabulary. Held back is the last U+FFFD (perhaps half a character), and with a byte-fallback vocabulary the whole run of
    byte tokens. Only the last few tokens are decoded again each step: the window moves up once its own text proves to be the end of the
    text before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: Collection[int] = ()):
        self._tokenizer, self._skip, self._shown = tokenizer, skip_special, frozenset(shown)
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        if token in self._shown:
            return self.finish() + self._tokenizer.decode([token], skip_special=False)
        self._window.append(token)
        if self._tokenizer.is_byte(token) or (self._skip and self._tokenizer.is_special(token)):
            return ""
        text = self._tokenizer.decode(self._window, self._skip)
        piece = self._take(text, len(text) - text.endswith(UNFINISHED))
        if len(self._window) > ANCHOR_TOKENS and self._sent == len(text):
            self._move(text)
        return piece

    def finish(self) -> str:
        text = self._tokenizer.decode(self._window, self._skip)
        piece = self._take(text, len(text))
        self._window, self._sent = [], 0
        return piece

    def _take(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _move(self, text: str) -> None:
        for keep in (4, 8, 16):
            tail = self._window[-keep:]
            end = self._tokenizer.decode(tail, self._skip)
            # An empty text gives a first-word rule (strip one space) something to strip that is not at the beginning.
            if end.strip() and UNFINISHED not in end and text.endswith(end) and not self._tokenizer.is_byte(tail[0]):
                self._window, self._sent = tail, len(end)
                return


def _compile(template: str, where: str) -> Callable[[dict[str, Any]], str]:
    """A renderer of a Hugging Face chat template, with the names transformers gives it, in a sandbox.

    Templates are code of unknown origin: as in transformers, `dict` and `namespace` are limited ones and nothing can
    be changed from inside. Raises RequestError for what the template refuses, ContainerError if it does not compile.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The {% generation %} block, which marks the assistant's words for training; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace must not hold {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace
    )
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ContainerError(
            f"the chat template of {where} does not compile: {error}; use plain prompts (--raw)"
        ) from None

    def render(values: dict[str, Any]) -> str:
        try:
            return compiled.render(**values)
        except Exception as error:  # a template can fail in any way Python code can
            raise RequestError(f"the chat template of {where} refuses these messages: {error}") from None

    return render


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _named_templates(value: Any) -> tuple[str | None, str | None]:
    """tokenizer_config's "chat_template": a string, or a list of named ones, of which "default" is meant, and "tool_use" for
    messages with tools, as in transformers."""
    if not isinstance(value, list):
        return (value if isinstance(value, str) else None), None
    named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
    plain, tools = (t if isinstance(t := named.get(name), str) else None for name in ("default", "tool_use"))
    return plain, tools


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ContainerError(f"{file} has {file.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{file} is not valid JSON: {error}; copy it from the source checkpoint again") from None
    if not isinstance(value, dict):
        raise ContainerError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value
