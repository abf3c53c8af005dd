"""Tokenizers out of GGUF metadata: the same tokens as the original tokenizer.json, or an error that asks for it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from gguf_models import VOCAB, write
from tokenizers import Tokenizer as Backend

from d2moe.convert.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from d2moe.convert.source import open_source
from d2moe.errors import CheckpointError
from d2moe.runtime.tokenizer import Tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
RNG = np.random.default_rng()
TEXTS = [
    "Once upon a time, naïve 東京 🙂👩‍👩‍👧 — the  end.\n\n\tκόσμος 日本語 don't \u200b✓",
    "  leading,        many spaces                        and more\t\t\n   \n",
    "e\u0301tude caf\u0065\u0301 \uac00 \u1100\u1161",  # not composed: a normaliser shows
    "I'LL we'Ve 12345678 3.14 ...!!! <|endoftext|> a<|endoftext|>b |||IP_ADDRESS||| <|padding|>",
]
Keys = dict[str, Any]


def random_text() -> str:
    """Letters, digits, spaces and characters from all over Unicode."""
    codes = RNG.integers(0x20, 0x3000, 60)
    common = [ord(c) for c in "  aeiou tnsr 0123 .,'\n"]
    mixed = np.where(RNG.random(60) < 0.7, RNG.choice(common, 60), codes)
    return "".join(chr(c) for c in mixed)


def metadata_of(source: Keys, pre: str, size: int) -> Keys:
    """What llama.cpp's converter writes of a byte-level tokenizer.json."""
    added = {t["id"]: t for t in source["added_tokens"]}
    names = {i: text for text, i in source["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    kinds = {i: TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for i, t in added.items()}
    plain = dict.fromkeys(names, TokenType.NORMAL) | kinds
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": np.array([plain.get(i, TokenType.UNUSED) for i in range(size)], np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": next(i for i, t in added.items() if t["content"] == "<|endoftext|>"),
    }


def built(path: Path, metadata: Keys) -> Tokenizer:
    """The tokenizer a container would have."""
    path.mkdir(exist_ok=True)
    for name, data in tokenizer_files(metadata, "m.gguf", len(metadata["tokenizer.ggml.tokens"])).items():
        (path / name).write_bytes(data)
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "pre"), [("gpt2.tokenizer.json", "gpt-2"), ("olmoe_gpt-neox-olmo-dolma-v1_5.tokenizer.json", "olmo")]
)
def test_real_tokenizers_come_back(name: str, pre: str, tmp_path: Path) -> None:
    if not (REAL / name).is_file():
        pytest.skip(f"{REAL / name} is not there")
    original = Backend.from_file(str(REAL / name))
    source = json.loads((REAL / name).read_text())
    tokenizer = built(tmp_path, metadata_of(source, pre, original.get_vocab_size() + 24))
    for text in TEXTS + [random_text() for _ in range(300)]:
        tokens = original.encode(text).ids
        assert tokenizer.encode(text) == tokens, text
        assert tokenizer.decode(tokens) == original.decode(tokens)
        assert tokenizer.decode(tokens, skip_special=False) == original.decode(tokens, skip_special_tokens=False)
    assert tokenizer.backend.get_vocab_size() == original.get_vocab_size()
    assert tokenizer.special["eos_token"] == "<|endoftext|>" and not tokenizer.has_chat


def words(pre: str, text: str) -> list[str]:
    """How a name cuts a text, by a vocabulary of single bytes."""
    tokens = sorted({c for t in TEXTS for c in t} | set("ab"))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"] if "ab" in tokens else [],
    }
    files = tokenizer_files(metadata, "m.gguf", len(tokens))
    cut = Backend.from_str(files["tokenizer.json"].decode()).pre_tokenizer
    return [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)]


def test_names_of_pre_tokenizers() -> None:
    """What tells them apart: case of contractions, digits in ones or threes, line ends."""
    text = "I'LL pay 12345 (now)\n\nok"
    gpt2 = ["I", "'", "LL", " pay", " 12345", " (", "now", ")", "\n", "\n", "ok"]
    qwen2 = ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " (", "now", ")\n\n", "ok"]
    llama3 = ["I", "'LL", " pay", " ", "123", "45", " (", "now", ")\n\n", "ok"]
    wanted = {"gpt-2": gpt2, "mpt": gpt2, "olmo": gpt2, "qwen2": qwen2}
    for name in PRE_TOKENIZERS:
        assert words(name, text) == wanted.get(name, llama3), name


# --- SentencePiece ---


def sentencepiece(n_merged: int = 200) -> Keys:
    """A vocabulary as SentencePiece trains it: bytes, letters, and pieces of two pieces with falling scores."""
    letters = ["▁", *"abcdeä"]
    pieces = list(letters)
    while len(pieces) < len(letters) + n_merged:
        a, b = RNG.choice(pieces, 2)
        if a + b not in pieces and len(a + b) < 9 and "▁" not in (a + b)[1:]:
            pieces.append(str(a + b))
    merged = pieces[len(letters) :]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *merged, *letters, "<|im_end|>", "  x  "]
    n, start = len(tokens), 259
    scores = np.zeros(n, np.float32)
    scores[start : n - 2] = -np.arange(n - 2 - start)
    kinds = np.full(n, 1, np.int32)
    kinds[:3], kinds[3:start], kinds[n - 2], kinds[n - 1] = (2, 3, 3), 6, 3, 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def by_scores(metadata: Keys, text: str) -> list[int] | None:
    """llama.cpp's way: join the neighbours whose piece has the best score, the leftmost first; the rest are bytes. None if a part could
    join either neighbour to the same piece: merges, which have an order of their own, may then take the right one."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores, parts = metadata["tokenizer.ggml.scores"], list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        best, at = min(pairs)
        if (best, at + 1) in pairs:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_sentencepiece_joins_by_scores(tmp_path: Path) -> None:
    metadata = sentencepiece()
    tokenizer = built(tmp_path, metadata)
    for _ in range(300):
        text = "".join(RNG.choice(list("abcdeä abcdeä xé\n"), RNG.integers(1, 40)))
        tokens, expected = tokenizer.encode(text), by_scores(metadata, text)
        assert expected is None or tokens == [1, *expected], text
        assert tokenizer.decode(tokens) == text
    n = len(metadata["tokenizer.ggml.tokens"])
    between = tokenizer.encode("ab<|im_end|>cd", add_special=False)
    assert between == [*(by_scores(metadata, "ab") or ()), n - 2, *(by_scores(metadata, "cd") or ())]
    assert n - 1 in tokenizer.encode("a  x  b") and tokenizer.is_special(n - 2) and not tokenizer.is_special(n - 1)
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_ends_and_spaces_as_the_file_says(tmp_path: Path) -> None:
    metadata = sentencepiece() | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    plain = built(tmp_path / "a", metadata)
    assert plain.encode("ab") == [*by_scores(metadata, "ab"), 2]
    bare = built(tmp_path / "b", metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode(" ab")) == " ab"
    assert bare.encode("ab", add_special=False) != plain.encode("ab", add_special=False)


def test_chat_template_goes_along(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = built(tmp_path, sentencepiece() | {"tokenizer.chat_template": template})
    assert tokenizer.chat_text([{"role": "user", "content": "ä"}]) == "<user>ä</s>"


# --- a tokenizer.json beside the file ---


def write_beside(path: Path, edit: Any = None) -> Backend:
    """The model's own tokenizer.json, which the metadata cannot tell: it lowers the case."""
    write(path / "m.gguf", "olmoe", RNG)
    with open_source(path / "m.gguf") as model:
        table = json.loads(model.companions()["tokenizer.json"])
    table["normalizer"] = {"type": "Lowercase"}
    if edit:
        edit(table)
    (path / "tokenizer.json").write_text(json.dumps(table))
    return Backend.from_file(str(path / "tokenizer.json"))


def test_a_tokenizer_beside_the_file_is_preferred(tmp_path: Path) -> None:
    write_beside(tmp_path)
    with open_source(tmp_path / "m.gguf") as model:
        files = model.companions()
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|end|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    (tmp_path / "chat_template.jinja").write_text("hello")
    with open_source(tmp_path / "m.gguf") as model:
        files = model.companions()
    assert files["tokenizer_config.json"] == b'{"eos_token": "A"}' and files["chat_template.jinja"] == b"hello"


def test_it_helps_where_the_metadata_does_not(tmp_path: Path) -> None:
    write_beside(tmp_path)
    for key in ("pre", "merges", "tokens"):
        write(tmp_path / "m.gguf", "olmoe", RNG, keys={f"tokenizer.ggml.{key}": None})
        with open_source(tmp_path / "m.gguf") as model:
            assert model.companions()["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    def swap(table: Keys) -> None:
        vocab = table["model"]["vocab"]
        vocab["C"], vocab["D"] = vocab["D"], vocab["C"]

    write_beside(tmp_path, swap)
    with pytest.raises(CheckpointError, match=r"has token '[CD]' as \d+, m\.gguf as \d+; they are of"):
        open_source(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="is not a tokenizer the tokenizers library can read"):
        open_source(tmp_path / "m.gguf")


# --- what is refused ---


BAD: dict[str, tuple[Keys, str]] = {
    "no tokens": ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    "too few": ({"tokens": ["a"] * 3}, "has 3 tokens for the 48 rows"),
    "twice": ({"tokens": ["a"] * VOCAB}, "has token 'a' 48 times"),
    "types": ({"token_type": [1, 2]}, "that is not a list of 48 numbers"),
    "id": ({"padding_token_id": 99}, "tokenizer.ggml.padding_token_id 99, expected one of its tokens"),
    "model": ({"model": "t5"}, "has tokenizer.ggml.model 't5', expected 'gpt2' or 'llama'"),
    "no name": ({"pre": None}, "has no tokenizer.ggml.pre, so it is not known how text is cut"),
    "name": ({"pre": "tekken"}, "has tokenizer.ggml.pre 'tekken', so it is not known how text is cut"),
    "no merges": ({"merges": None}, "has no tokenizer.ggml.merges"),
    "merge": ({"merges": ["AB"]}, "merges that are not two tokens and a space"),
    "merge of nothing": ({"merges": ["A zz"]}, "refuses (Error while initializing BPE"),
    "prefix": ({"add_space_prefix": True}, "add_space_prefix true"),
    "flag": ({"add_bos_token": "yes"}, "add_bos_token 'yes', expected true or false"),
    "no scores": ({"model": "llama"}, "has no tokenizer.ggml.scores of 48 numbers"),
    "equal scores": ({"model": "llama", "scores": [-1000.0] * VOCAB}, "scores that order nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = BAD[name]
    write(tmp_path / "m.gguf", "olmoe", RNG, keys={f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "m.gguf")
    assert message in str(caught.value) and str(tmp_path / "m.gguf") in str(caught.value)
    assert "put the tokenizer.json of the original model beside the file" in str(caught.value)
