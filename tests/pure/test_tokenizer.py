"""Tokenizers: the same tokens whatever the files say, streams that join to it, chat templates in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from d2moe.errors import ContainerError, RequestError
from d2moe.runtime.tokenizer import Tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
TEXT = "Once upon a time, naïve 東京 🙂👩‍👩‍👧 — the  end.\n\n\tκόσμος 日本語 don't \u200b✓"


def bytes_tokenizer() -> Backend:
    """Every byte is a token (ids 0 to 255), then <|end|> 256 and <|begin|> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|begin|>", special=True)])
    return backend


def fallback_tokenizer() -> Backend:
    """As Llama's: words with a leading mark, bytes for all else."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for text in ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "▁abc"]:
        vocab[text] = len(vocab)
    backend = Backend(
        models.BPE(
            vocab,
            [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁ab", "c")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def streamed(tokenizer: Tokenizer, tokens: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip)
    return [*(stream.push(t) for t in tokens), stream.finish()]


def real(name: str) -> Tokenizer:
    file = REAL / name
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return Tokenizer(Backend.from_file(str(file)))


def directory(path: Path, **files: Any) -> Path:
    bytes_tokenizer().save(str(path / "tokenizer.json"))
    for name, value in files.items():
        suffix = "jinja" if name == "chat_template" else "json"
        (path / f"{name}.{suffix}").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("name", ["gpt2.tokenizer.json", "olmoe_gpt-neox-olmo-dolma-v1_5.tokenizer.json"])
def test_real_text_streams_to_itself(name: str) -> None:
    tokenizer = real(name)
    tokens = tokenizer.encode(TEXT * 5)
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == TEXT * 5
    assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize(
    "kind", ["bytes", "fallback", "gpt2.tokenizer.json", "olmoe_gpt-neox-olmo-dolma-v1_5.tokenizer.json"]
)
@pytest.mark.parametrize("skip", [True, False])
def test_any_tokens_stream_to_their_full_decode(kind: str, skip: bool) -> None:
    made = {"bytes": bytes_tokenizer, "fallback": fallback_tokenizer}
    tokenizer = Tokenizer(made[kind]()) if kind in made else real(kind)
    rng = np.random.default_rng(1)
    vocab = tokenizer.backend.get_vocab_size()
    for length in [1, 2, 5, 30, 31, 100, 300] * 6:
        tokens = rng.integers(0, vocab, length).tolist()
        assert "".join(streamed(tokenizer, tokens, skip)) == tokenizer.decode(tokens, skip)


def test_half_characters_are_held_back_and_flushed() -> None:
    tokenizer = Tokenizer(bytes_tokenizer())
    tokens = tokenizer.encode("é🙂")
    assert [len(p) for p in streamed(tokenizer, tokens)] == [0, 1, 0, 0, 0, 1, 0]
    assert streamed(tokenizer, tokens[:-1])[-1] == "\ufffd"
    replacement = tokenizer.encode("\ufffdx")
    assert "".join(streamed(tokenizer, replacement)) == "\ufffdx"


def test_byte_fallback_runs_are_held_as_a_whole() -> None:
    tokenizer = Tokenizer(fallback_tokenizer())
    tokens = tokenizer.encode("ab 你 abc")
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == "ab 你 abc"
    # Valid bytes and then an invalid one: the library makes all of the run U+FFFD, so none may leave early.
    bad = [*tokens[:6], 3 + 0xFF, tokenizer.encode("ab")[0]]
    assert "".join(streamed(tokenizer, bad)) == tokenizer.decode(bad)


def test_a_special_token_inside_a_character_changes_nothing() -> None:
    for backend in (bytes_tokenizer(), fallback_tokenizer()):
        tokenizer = Tokenizer(backend)
        for at in range(1, 8):
            tokens = tokenizer.encode("你好 ab")
            tokens.insert(at, tokenizer.backend.token_to_id("</s>") or tokenizer.backend.token_to_id("<|end|>"))
            assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_ends_come_from_the_post_processor_or_else_from_the_config() -> None:
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    assert Tokenizer(bytes_tokenizer(), config).encode("a") == Tokenizer(bytes_tokenizer()).encode("a")
    with_bos = Tokenizer(bytes_tokenizer(), {**config, "add_bos_token": True})
    assert with_bos.encode("a")[0] == with_bos.bos_id == 257
    assert with_bos.encode("a", add_special=False) == with_bos.encode("a")[1:]
    both = Tokenizer(bytes_tokenizer(), {**config, "add_bos_token": True, "add_eos_token": True})
    assert both.encode("a")[-1] == both.eos_id == 256 and len(both.encode("a")) == 3
    backend = bytes_tokenizer()
    backend.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 256)])
    own = Tokenizer(backend, {**config, "add_bos_token": True})
    assert own.encode("a") == [*own.encode("a", add_special=False), 256]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = bytes_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("abcdefgh")) == 8


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        Tokenizer(bytes_tokenizer()).encode("a\udc80")


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "[]", "\x00\x01"])
def test_a_bad_tokenizer_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ContainerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_missing_and_bad_side_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    directory(tmp_path, tokenizer_config="{nonsense")
    with pytest.raises(ContainerError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    directory(tmp_path, tokenizer_config=[1])
    with pytest.raises(ContainerError, match="expected a JSON object"):
        Tokenizer.load(tmp_path)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}\n"
    "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "héllo"}]


def test_chat_templates_render_as_written(tmp_path: Path) -> None:
    path = directory(
        tmp_path, chat_template=TEMPLATE, tokenizer_config={"bos_token": "<|begin|>", "chat_template": "other"}
    )
    tokenizer = Tokenizer.load(path)
    assert tokenizer.has_chat
    assert tokenizer.chat_text(USER) == "<|begin|><user>héllo<assistant>"
    assert tokenizer.chat_text([*USER, {"role": "assistant", "content": "x"}], add_generation_prompt=False).endswith(
        "<assistant>x"
    )
    assert tokenizer.chat(USER)[0] == 257 and tokenizer.decode(tokenizer.chat(USER)) == "<user>héllo<assistant>"
    with pytest.raises(RequestError, match="refuses these messages: unknown role system"):
        tokenizer.chat_text([{"role": "system", "content": ""}])


def test_chat_templates_from_the_config_and_from_a_list(tmp_path: Path) -> None:
    path = directory(tmp_path, tokenizer_config={"chat_template": "{{ messages[0].content | tojson }}"})
    assert Tokenizer.load(path).chat_text(USER) == '"héllo"'
    path = directory(
        tmp_path,
        tokenizer_config={
            "chat_template": [
                {"name": "tool_use", "template": "t{{ tools | length }}"},
                {"name": "default", "template": "d{{ strftime_now('%Y') }}"},
            ]
        },
    )
    tokenizer = Tokenizer.load(path)
    assert tokenizer.chat_text(USER).startswith("d2") and tokenizer.chat_text(USER, tools=[]).startswith("d2")
    assert tokenizer.chat_text(USER, tools=[{}, {}]) == "t2" and tokenizer.tool_template != tokenizer.template
    given = Tokenizer.load(path, "g{{ tools | length }}")
    assert given.chat_text(USER, tools=[{}]) == "g1" and given.tool_template == given.template


def test_no_template_is_a_clear_error() -> None:
    tokenizer = Tokenizer(bytes_tokenizer(), where="tiny.d2moe")
    assert not tokenizer.has_chat
    with pytest.raises(RequestError, match=r"tiny\.d2moe has no chat template .*--raw"):
        tokenizer.chat_text(USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}{{ nothing.here }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        Tokenizer(bytes_tokenizer(), template=template).chat_text(USER)


def test_a_broken_template_and_broken_messages_are_clear_errors() -> None:
    with pytest.raises(ContainerError, match="does not compile"):
        Tokenizer(bytes_tokenizer(), template="{% if %}").chat_text(USER)
    with pytest.raises(RequestError, match="plain values"):
        Tokenizer(bytes_tokenizer(), template="x").chat_text([{"role": object()}])
