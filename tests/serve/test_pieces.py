"""Parts of the server by themselves: tool calls in streams of text, penalties, grammars, shared blocks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tool_templates import FORMS, OLMOE

import d2moe
from d2moe.errors import ConfigError, RequestError
from d2moe.runtime.grammar import Grammars
from d2moe.runtime.sampling import Sampler, SamplingParams
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.serve.gate import is_loopback, names_for
from d2moe.serve.schema import ChatRequest, Message, Tool, width_of
from d2moe.serve.tools import Form, ToolReader, forced, form_of, offered, plain

WEATHER = Tool.model_validate(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["town"],
                "additionalProperties": False,
            },
        },
    }
)
CLOCK = Tool.model_validate({"type": "function", "function": {"name": "clock"}})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=town>\nOslo\n</parameter>\n</function>\n</tool_call>"
LIST = '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Oslo"}, "id": "abcdefghi"}]'
JSON = '{"name": "weather", "parameters": {"town": "Oslo"}}'


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("qwen", "no call, 1 < 2", "no call, 1 < 2", 0),
        ("qwen", CALL, "", 1),
        ("qwen", f"{CALL}\n so \n", "\n so", 1),
        ("qwen", f"Let me see.\n{CALL}\n", "Let me see.", 1),
        ("qwen", f"{CALL}\n{CALL}", "", 2),
        ("qwen", "<tool_call>not JSON</tool_call> x", "<tool_call>not JSON</tool_call> x", 0),
        ("qwen", CALL.replace("weather", "other"), CALL.replace("weather", "other"), 0),
        ("qwen", "half <tool_call>{", "half <tool_call>{", 0),
        ("qwen", "half <tool_", "half <tool_", 0),
        ("qwen", '<tool_call>["weather"]</tool_call>', '<tool_call>["weather"]</tool_call>', 0),
        ("qwen-coder", XML, "", 1),
        ("qwen-coder", f"So:\n{XML}\n{XML}", "So:", 2),
        ("qwen-coder", XML.replace("weather", "other"), XML.replace("weather", "other"), 0),
        ("qwen-coder", CALL, CALL, 0),
        ("qwen-coder", XML[:-3], XML[:-3], 0),
        ("mixtral", LIST, "", 1),
        ("mixtral", f"Wait. {LIST[:-1]}, {LIST[14:]}", "Wait.", 2),
        ("mixtral", LIST[:-1], LIST[:-1], 0),
        ("mixtral", "[TOOL", "[TOOL", 0),
        ("mixtral", CALL, CALL, 0),
        ("llama", JSON, "", 1),
        ("llama", f"\n{JSON}; {JSON}", "", 2),
        ("llama", f"<|python_tag|>{JSON}", "", 1),
        ("llama", f"Look: {JSON}", f"Look: {JSON}", 0),
        ("llama", JSON.replace("weather", "other"), JSON.replace("weather", "other"), 0),
        ("llama", '{"names": 1}', '{"names": 1}', 0),
        ("llama", '{ "na', '{ "na', 0),
        ("llama", "{", "{", 0),
    ],
)
def test_tool_calls_are_cut_out_however_the_text_comes(form: str, text: str, said: str, calls: int) -> None:
    rng = np.random.default_rng()
    for size in (1, 3, len(text), *rng.integers(1, 20, 3).tolist()):
        reader, out, found = ToolReader(form_of(FORMS[form]), [WEATHER, CLOCK], several=True), "", []
        for at in range(0, len(text), size):
            piece, some = reader.push(text[at : at + size], last=at + size >= len(text))
            out, found = out + piece, found + some
        assert (out, len(found)) == (said, calls), size
        assert len({call["id"] for call in found}) == calls
        for index, call in enumerate(found):
            assert call["index"] == index and json.loads(call["function"]["arguments"]) == {"town": "Oslo"}


def test_a_reader_lets_go_of_what_cannot_be_a_call() -> None:
    """A plain answer streams token by token, JSON that is no call too."""
    cases = (("llama", '{"colour": "red"}', '{"colour'), ("mixtral", "a [TOP] b", "a [TOP"), ("qwen", "1 <tool> 2", "1 <tool>"))
    for form, text, at_once in cases:
        reader = ToolReader(form_of(FORMS[form]), [WEATHER], several=True)
        assert "".join(reader.push(c)[0] for c in at_once) == at_once
        assert at_once + "".join(reader.push(c)[0] for c in text[len(at_once) :]) == text


def test_one_call_only_if_several_are_not_wanted() -> None:
    said, calls = ToolReader(form_of(FORMS["qwen"]), [WEATHER], several=False).push(f"{CALL}{CALL}", last=True)
    assert len(calls) == 1 and said == CALL


def test_xml_values_have_their_types() -> None:
    more = "<parameter=days>\n3\n</parameter>\n<parameter=more>\n[1, 2]\n</parameter>\n</function>"
    text = XML.replace("</function>", more).replace("Oslo", "12")
    (call,) = ToolReader(form_of(FORMS["qwen-coder"]), [WEATHER], several=True).push(text, last=True)[1]
    assert json.loads(call["function"]["arguments"]) == {"town": "12", "days": 3, "more": [1, 2]}


def test_which_form_a_template_has() -> None:
    names = {name: type(form_of(template)).__name__ for name, template in FORMS.items()}
    assert names == {"qwen": "Form", "qwen-coder": "Xml", "mixtral": "List", "llama": "Json"}
    assert form_of(OLMOE) is None and form_of(None) is None and form_of("tools {{ messages }}") is None
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user"}], "tools": [WEATHER.model_dump()]})
    with pytest.raises(RequestError, match=r"does not show how tools are called \(known are .*TOOL_CALLS"):
        offered(body, OLMOE)


@pytest.mark.parametrize("name", list(FORMS))
def test_a_conversation_with_calls_reads_as_the_model_wrote_it(name: str) -> None:
    """What the template makes of a call that was read is that call, so the model sees its own words again."""
    tokenizer = Tokenizer.load(d2moe.builtin_model(), FORMS[name])
    form = form_of(FORMS[name])
    assert form is not None
    arguments = {"town": "Oslo", "days": 2}
    calls = [{"id": form.new_id(), "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}]
    messages = [
        Message.model_validate(m)
        for m in (
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "no"},
        )
    ]
    text = tokenizer.chat_text([plain(m) for m in messages], tools=[WEATHER.model_dump(exclude_none=True)])
    assert '"weather"' in text or "<name>weather</name>" in text
    said = text.split("assistant<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0] if name == "llama" else text
    if name == "mixtral":
        said = said.split("[/INST]")[1].split("</s>")[0]
    elif name.startswith("qwen"):
        said = said.split("assistant\n")[1]
    found = ToolReader(form, [WEATHER], several=True).push(said, last=True)[1]
    assert [json.loads(c["function"]["arguments"]) for c in found] == [arguments], said


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


def test_an_end_token_that_the_tokenizer_does_not_have_is_left_out() -> None:
    tokenizer = Tokenizer.load(d2moe.builtin_model())
    grammar = Grammars(tokenizer, 6000, [0, 5000]).make("regex", "a")
    for token in tokenizer.encode("a", add_special=False):
        grammar.advance(token)
    assert set(np.flatnonzero(grammar.allowed())) == {0}
    with pytest.raises(RequestError, match="no token that ends an answer"):
        Grammars(tokenizer, 6000, [5000])


DEMANDED = {
    "qwen": (
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        '\n<tool_call>\n{"name": "weather", "arguments": {"town": "a\\"b", "days": 9}}\n</tool_call>',
    ),
    "qwen-coder": (
        "<tool_call>\n<function=clock>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=weather>\n<parameter=town>\na\"b\n</parameter>\n<parameter=days>\n9\n</parameter>\n</function>\n</tool_call>",
    ),
    "mixtral": (
        '[TOOL_CALLS] [{"name": "clock", "arguments": {}}',
        ', {"name": "weather", "arguments": {"town": "a\\"b", "days": 9}}]',
    ),
    "llama": ('{"name": "weather", "parameters": {"town": "a\\"b", "days": 9}}', ""),
}
"""A call and another one, in the words that a grammar asks for."""


@pytest.mark.parametrize("special", [None, False, True])
@pytest.mark.parametrize("name", list(DEMANDED))
def test_demanded_calls_work_with_markers_as_tokens_and_as_text(name: str, special: bool | None) -> None:
    """Qwen has <tool_call> as a token of its own, not marked special; Mixtral's [TOOL_CALLS] is a special one."""
    from tokenizers import AddedToken

    tokenizer, form = Tokenizer.load(d2moe.builtin_model()), form_of(FORMS[name])
    assert form is not None
    markers = [m for m in (form.opening, form.closing) if m]
    if special is not None:
        tokenizer.backend.add_tokens([AddedToken(m, special=special) for m in markers])
        tokenizer = Tokenizer(tokenizer.backend)
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user"}], "tools": [CLOCK.model_dump(), WEATHER.model_dump()], "tool_choice": "required"}
    )
    source = forced(body, body.tools or [], form, tokenizer.token_id)
    grammar = Grammars(tokenizer, 4096 + len(markers) * (special is not None), [0]).make("lark", source)
    tokens = tokenizer.encode("".join(DEMANDED[name]), add_special=False)
    assert (4096 in tokens) == (special is not None and name != "llama")
    for token in tokens:
        assert grammar.allowed()[token], (tokenizer.decode([token]), source)
        grammar.advance(token)
    assert grammar.allowed()[0], "it may end here"
    shown = [i for m in markers if (i := tokenizer.token_id(m)) is not None]
    stream, reader = tokenizer.stream(shown=shown), ToolReader(form, body.tools or [], True)
    found = [call for token in tokens for call in reader.push(stream.push(token))[1]] + reader.push(stream.finish(), last=True)[1]
    assert [c["function"]["name"] for c in found] == (["weather"] if name == "llama" else ["clock", "weather"])
    assert json.loads(found[-1]["function"]["arguments"]) == {"town": 'a"b', "days": 9}


def test_definitions_of_parameters_are_found_from_the_root() -> None:
    town: dict[str, Any] = {"type": "object", "properties": {"in": {"$ref": "#/$defs/Town"}}, "required": ["in"]}
    town["$defs"] = {"Town": {"enum": ["Oslo", "Rome"]}}
    tools = [Tool.model_validate({"type": "function", "function": {"name": f"f{i}", "parameters": town}}) for i in range(2)]
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user"}], "tools": [t.model_dump() for t in tools], "tool_choice": "required"}
    )
    tokenizer = Tokenizer.load(d2moe.builtin_model())
    grammars = Grammars(tokenizer, 4096, [0])
    for template in FORMS.values():
        form = form_of(template)
        assert form is not None
        grammars.make("lark", forced(body, tools, form, tokenizer.token_id))
    parameters = {**town, "$defs": {"Town": {"type": "string"}}}
    other = Tool.model_validate({"type": "function", "function": {"name": "g", "parameters": parameters}})
    with pytest.raises(RequestError, match=r"two tools mean different things by .*/Town"):
        Form().schema([*tools, other])


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
