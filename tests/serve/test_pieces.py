"""Parts of the server by themselves: tool calls in streams of text, penalties, grammars, shared blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest

import d2moe
from d2moe.errors import ConfigError, RequestError
from d2moe.runtime.grammar import Grammars
from d2moe.runtime.sampling import Sampler, SamplingParams
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.serve.gate import is_loopback, names_for
from d2moe.serve.schema import ChatRequest, width_of
from d2moe.serve.tools import ToolReader, forced

CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("no call, 1 < 2", "no call, 1 < 2", 0),
        (CALL, "", 1),
        (f"Let me see.\n{CALL}", "Let me see.\n", 1),
        (f"{CALL}\n{CALL}", "", 2),
        ("<tool_call>not JSON</tool_call> x", "<tool_call>not JSON</tool_call> x", 0),
        (CALL.replace("weather", "other"), CALL.replace("weather", "other"), 0),
        ("half <tool_call>{", "half <tool_call>{", 0),
        ("half <tool_", "half <tool_", 0),
        ('<tool_call>["weather"]</tool_call>', '<tool_call>["weather"]</tool_call>', 0),
    ],
)
def test_tool_calls_are_cut_out_however_the_text_comes(text: str, said: str, calls: int) -> None:
    rng = np.random.default_rng()
    for size in (1, 3, len(text), *rng.integers(1, 20, 3).tolist()):
        reader, out, found = ToolReader({"weather"}, several=True), "", []
        for at in range(0, len(text), size):
            piece, some = reader.push(text[at : at + size], last=at + size >= len(text))
            out, found = out + piece, found + some
        assert (out, len(found)) == (said, calls), size
        for index, call in enumerate(found):
            assert call["index"] == index and json.loads(call["function"]["arguments"]) == {"town": "Oslo"}


def test_one_call_only_if_several_are_not_wanted() -> None:
    said, calls = ToolReader({"weather"}, several=False).push(f"{CALL}{CALL}", last=True)
    assert len(calls) == 1 and said == CALL


def test_penalties_and_biases_are_openais() -> None:
    rng = np.random.default_rng()
    logits = rng.standard_normal(50).astype(np.float32)
    bias = {int(t): float(b) for t, b in zip(rng.choice(50, 5, False), rng.uniform(-3, 3, 5), strict=True)}
    params = SamplingParams.make({"presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": bias, "ignore_eos": True})
    sampler, counts = Sampler(params, [1, 2, 3], 50), np.zeros(50)
    for _ in range(40):
        expected = logits - counts * 0.4 - (counts > 0) * 0.7
        for token, value in bias.items():
            expected[token] += value
        allowed = rng.random(50) < 0.5
        token = sampler.sample(logits, allowed)
        assert token == int(np.argmax(np.where(allowed, expected, -np.inf)))
        counts[token] += 1
    with pytest.raises(RequestError, match="logit_bias names token 50"):
        Sampler(SamplingParams(logit_bias={50: 1.0}), [], 50)  # type: ignore[arg-type]
    for bad in ({-1: 1.0}, {1: 101.0}, {1: "x"}, [(1, 2.0), (1, 3.0)]):
        with pytest.raises(ConfigError, match="logit_bias"):
            SamplingParams.make({"logit_bias": bad})


def test_a_grammar_allows_what_it_says_and_ends() -> None:
    tokenizer = Tokenizer.load(d2moe.builtin_model())
    grammars = Grammars(tokenizer, 4096, [0])
    grammar = grammars.make("regex", "(cat|dog)s?")
    texts = {tokenizer.decode([int(i)]) for i in np.flatnonzero(grammar.allowed())}
    assert texts and all("cats".startswith(t) or "dogs".startswith(t) for t in texts)
    for token in tokenizer.encode("dog", add_special=False):
        grammar.advance(token)
    after = {int(i) for i in np.flatnonzero(grammar.allowed())}
    assert after == {0, *tokenizer.encode("s", add_special=False)} and not grammar.complete
    grammar.advance(0)
    assert grammar.complete
    with pytest.raises(RequestError, match="the grammar failed"):
        grammars.make("regex", "a").advance(tokenizer.encode("b", add_special=False)[0])
    for kind, source in (("lark", "start: missing"), ("json_schema", {"type": "nonsense"}), ("regex", "(")):
        with pytest.raises(RequestError, match=f"the {kind} cannot be used"):
            grammars.make(kind, source)  # type: ignore[arg-type]


@pytest.mark.parametrize("tags", [[], ["<tool_call>"], ["<tool_call>", "</tool_call>"]])
def test_demanded_calls_work_with_tags_as_tokens_and_as_text(tags: list[str]) -> None:
    """Models that call tools have <tool_call> as a token of its own, not marked special."""
    from tokenizers import AddedToken

    tokenizer = Tokenizer.load(d2moe.builtin_model())
    tokenizer.backend.add_tokens([AddedToken(tag, special=False) for tag in tags])
    tools = [{"type": "function", "function": {"name": name}} for name in ("clock", "weather")]
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user"}], "tools": tools, "tool_choice": "required"})
    source = forced(body, body.tools or [], tokenizer.is_token)
    grammar = Grammars(tokenizer, 4096 + len(tags), [0]).make("lark", source)
    one = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    tokens = tokenizer.encode(f"{one}\n{one}", add_special=False)
    assert [4096 + i in tokens for i in range(len(tags))] == [True] * len(tags)
    for token in tokens:
        assert grammar.allowed()[token], tokenizer.decode([token])
        grammar.advance(token)
    assert grammar.allowed()[0], "it may end here"
    assert len(ToolReader({"clock"}, True).push(tokenizer.decode(tokens), last=True)[1]) == 2


def test_widths_of_dials() -> None:
    wishes = ((None, None), (3.0, None), (None, "fast"), (None, "balanced"), (None, "best"))
    assert [width_of(bits, quality, 5, routed=False) for bits, quality in wishes] == [5, 3, 3, 3, 5]
    assert [width_of(bits, quality, 2.2, routed=True) for bits, quality in wishes] == [2.2, 3, 2.5, 3, 5]
    with pytest.raises(ConfigError, match="give one of the two"):
        width_of(3, "fast", 4, routed=True)


def test_loopback_names() -> None:
    assert all(is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.1.2.3"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""))
    assert names_for("0.0.0.0", ["a"]) is None and {"localhost", "llm.example"} <= set(names_for("::1", ["LLM.example"]) or ())
