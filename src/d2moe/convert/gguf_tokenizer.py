"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, through the `tokenizers` library.

Two of llama.cpp's models: "gpt2", a byte-level BPE with its merges, and "llama", the BPE of SentencePiece, whose merges
follow from the scores. The rest of a byte-level tokenizer (how text is cut into words, normalisation) is behind a name,
`tokenizer.ggml.pre`; a name that is not known here is an error, since other words are other tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from d2moe.container.files import shown
from d2moe.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens in the file (gguf.TokenType)."""
BESIDE = "put the tokenizer.json of the original model beside the file"
SPACE = "▁"
"""SentencePiece writes a space so."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """What a name stands for: `pattern` cuts text into words (None is GPT-2's own), `nfc` normalises before.

    `ignore_merges` takes a word that is a token whole; `add_bos` is what holds where the file does not say.
    """

    pattern: str | None = None
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer(_WORDS.format(digits="{1,3}"), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "mpt": PreTokenizer(nfc=True),  # GPT-NeoX's, of which OLMo's is one
    "olmo": PreTokenizer(nfc=True),
    "qwen2": PreTokenizer(_WORDS.format(digits=""), nfc=True),
}


class Vocabulary:
    """The tokens of a file in the order of their ids, with their types; checked. `where` is the file for errors."""

    def __init__(self, metadata: Mapping[str, Any], where: str, size: int):
        self.where, self._metadata = where, metadata
        self.tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(self.tokens, list) or not self.tokens:
            raise self.error("has no tokenizer.ggml.tokens")
        if len(self.tokens) != size:
            raise self.error(f"has {len(self.tokens)} tokens for the {size} rows of token_embd.weight")
        most, times = Counter(self.tokens).most_common(1)[0]
        if times > 1:
            raise self.error(f"has token {shown(most)} {times} times")
        kinds = metadata.get("tokenizer.ggml.token_type", np.full(size, NORMAL))
        if not isinstance(kinds, np.ndarray) or kinds.shape != (size,):
            raise self.error(f"has a tokenizer.ggml.token_type that is not a list of {size} numbers")
        self.kinds: list[int] = kinds.tolist()
        # A file without types says at least which tokens are not text.
        for role in ("bos", "eos", "eot", "eom", "padding"):
            if (index := self.id(role)) is not None and self.kinds[index] != UNKNOWN:
                self.kinds[index] = CONTROL

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}; {BESIDE}")

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"has tokenizer.ggml.{key} {shown(value)}, expected true or false")
        return value

    def id(self, role: str) -> int | None:
        """The id of "bos", "eos", "unknown" or "padding"."""
        index = self.get(f"{role}_token_id")
        if index is not None and (not isinstance(index, int) or not 0 <= index < len(self.tokens)):
            raise self.error(f"has tokenizer.ggml.{role}_token_id {shown(index)}, expected one of its tokens")
        return index

    def ids(self, *kinds: int) -> dict[str, int]:
        """The tokens of some types, {text: id}."""
        return {text: i for i, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind in kinds}


def tokenizer_files(metadata: Mapping[str, Any], where: str, size: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a file whose embedding has `size` rows. Raises CheckpointError."""
    vocabulary = Vocabulary(metadata, where, size)
    kind = vocabulary.get("model")
    if kind not in ("gpt2", "llama"):
        raise vocabulary.error(f"has tokenizer.ggml.model {shown(kind)}, expected 'gpt2' or 'llama'")
    try:
        backend = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise vocabulary.error(f"has a tokenizer that the tokenizers library refuses ({error})") from None
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        added = [AddedToken(text, normalized=False, special=special) for text in vocabulary.ids(*kinds)]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    settings = tokenizer_settings(metadata, where, size)
    _add_ends(backend, json.loads(settings))
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": settings}


def tokenizer_settings(metadata: Mapping[str, Any], where: str, size: int) -> bytes:
    """tokenizer_config.json: special tokens by their role and the chat template. Raises CheckpointError."""
    vocabulary = Vocabulary(metadata, where, size)
    is_sentencepiece = vocabulary.get("model") == "llama"
    pre = PRE_TOKENIZERS.get(vocabulary.get("pre"), PreTokenizer())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.flag("add_bos_token", is_sentencepiece or pre.add_bos),
        "add_eos_token": vocabulary.flag("add_eos_token", False),
    }
    # llama.cpp's defaults for SentencePiece; those for a byte-level vocabulary mean nothing in another one's.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_sentencepiece and size > 2 else {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for role, name in names.items():
        index = vocabulary.id(role)
        if index is not None or role in defaults:
            settings[name] = vocabulary.tokens[defaults[role] if index is None else index]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return json.dumps(settings, ensure_ascii=False, indent=2).encode()


def _add_ends(backend: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Tokens before and after a text, in the tokenizer.json itself."""
    single, used = ["$A"], {}
    for name, at in (("bos", 0), ("eos", 2)):
        text = settings.get(f"{name}_token")
        if settings[f"add_{name}_token"] and text is not None:
            single.insert(at, text)
            used[text] = backend.token_to_id(text)
    if used:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(used.items()))


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    name = vocabulary.get("pre")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        found = "no tokenizer.ggml.pre" if name is None else f"tokenizer.ggml.pre {shown(name)}"
        raise vocabulary.error(f"has {found}, so it is not known how text is cut into words (known are {known})")
    if vocabulary.flag("add_space_prefix", False):
        raise vocabulary.error("has tokenizer.ggml.add_space_prefix true, which llama.cpp ignores for 'gpt2'")
    pre = PRE_TOKENIZERS[name]
    lines = vocabulary.get("merges")
    if not isinstance(lines, list):
        raise vocabulary.error("has no tokenizer.ggml.merges")
    merges = [(line[:at], line[at + 1 :]) for line in lines if (at := line.find(" ", 1)) > 0]
    if len(merges) != len(lines):
        raise vocabulary.error("has tokenizer.ggml.merges that are not two tokens and a space between")
    # Added tokens are in the model's vocabulary, too: so they keep their ids, and no merge leads to them.
    vocab = vocabulary.ids(NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None)
    if pre.pattern is None:
        backend.pre_tokenizer = bytes_only
    else:
        split = pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """As llama.cpp does it: a space before the text and after every special token, unknown characters as bytes."""
    scores, normal = vocabulary.get("scores"), vocabulary.ids(NORMAL)
    if not isinstance(scores, np.ndarray) or scores.shape != (len(vocabulary.tokens),):
        raise vocabulary.error(f"has no tokenizer.ggml.scores of {len(vocabulary.tokens)} numbers")
    if not np.isfinite(scores).all() or (len(normal) > 1 and np.ptp(scores[list(normal.values())]) == 0):
        raise vocabulary.error("has tokenizer.ggml.scores that order nothing, so merges are not known")
    unknown = vocabulary.ids(UNKNOWN)
    vocab = normal | unknown | vocabulary.ids(CONTROL, USER_DEFINED, BYTE)
    backend = Tokenizer(
        models.BPE(
            vocab,
            _merges(normal, scores),
            unk_token=next(iter(unknown), None),
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(normal: Mapping[str, int], scores: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """Every way to put a token together from two, the best token first, as transformers converts SentencePiece."""
    found: list[tuple[float, int, int, str, str]] = []
    for text, index in normal.items():
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        rank = -float(scores[index])
        found += [(rank, -len(a), -len(b), a, b) for a, b in pairs if a in normal and b in normal]
    return [(a, b) for *_, a, b in sorted(found)]
