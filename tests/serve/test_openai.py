"""The official client, unchanged, against the server; texts are those of the model without a server."""

from __future__ import annotations

import concurrent.futures
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from serving import serving
from tool_templates import FORMS, OLMOE

from d2moe.runtime.generate import Model
from d2moe.serve import schema

STORY = "Once upon a time, there was a"
ASK: Any = [{"role": "user", "content": "Tell me of a dog."}]
PROMPT = "user: Tell me of a dog.\nassistant:"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
pytestmark = pytest.mark.usefixtures("idle")


def complete(client: OpenAI, **values: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": STORY, "temperature": 0, "max_tokens": 12, **values})


def chat(client: OpenAI, **values: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 12, **values})


def test_models(client: OpenAI, alone: Model) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny" and client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here, only 'tiny'"):
        complete(client, model="gpt-4")


@pytest.mark.parametrize("bits", [2, 2.7, 3, 8])
def test_a_completion_is_the_models_own(client: OpenAI, alone: Model, bits: float) -> None:
    rng = np.random.default_rng()
    values = {"temperature": 0.9, "top_p": 0.9, "seed": int(rng.integers(1000)), "max_tokens": 20}
    expected = alone.generate(STORY, bits=bits, ignore_eos=True, **values)
    done = complete(client, extra_body={"bits": float(bits), "ignore_eos": True}, **values)
    assert done.choices[0].text == expected.text and done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(expected.prompt_tokens), 20)
    assert done.usage.model_extra == {"bits": pytest.approx(expected.stats.bits)}
    body = {"bits": bits, "ignore_eos": True}
    streamed = complete(client, stream=True, stream_options={"include_usage": True}, extra_body=body, **values)
    *chunks, last = list(streamed)
    assert "".join(c.choices[0].text for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 20 and not last.choices
    fast, best = (complete(client, extra_body={"quality": name}).usage.model_extra["bits"] for name in ("fast", "best"))
    assert 2 < fast < 3 < best < 7


def test_chat(client: OpenAI, alone: Model) -> None:
    expected = alone.generate(alone.tokenizer.encode(PROMPT, add_special=False), max_tokens=12, temperature=0).text
    done = chat(client)
    assert done.choices[0].message.content == expected and done.choices[0].message.role == "assistant"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of a dog."}]}]
    assert chat(client, messages=parts, max_tokens=openai.omit, max_completion_tokens=12).choices == done.choices
    with client.chat.completions.stream(model="tiny", messages=ASK, temperature=0, stop=expected[8:12]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected[: expected.find(expected[8:12])]
    follow = [*ASK, done.choices[0].message, {"role": "user", "content": "And then?"}]
    assert chat(client, messages=follow, max_tokens=3).usage.prompt_tokens > done.usage.prompt_tokens


def test_n_seeds_stop_and_several_prompts(client: OpenAI, alone: Model) -> None:
    values = {"temperature": 1.0, "seed": 11, "max_tokens": 10}
    done = complete(client, n=3, prompt=[STORY, "The dog"], **values)
    expected = [alone.generate(p, **{**values, "seed": 11 + i}).text for p in (STORY, "The dog") for i in range(3)]
    assert [c.text for c in done.choices] == expected and [c.index for c in done.choices] == list(range(6))
    texts = [""] * 3
    for chunk in chat(client, n=3, stream=True, **values):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.message.content for c in chat(client, n=3, **values).choices] and len(set(texts)) == 3
    tokens = alone.tokenizer.encode(STORY)
    assert complete(client, prompt=tokens, **values).choices[0].text == expected[0]
    stopped = complete(client, stop=["Lily", "zzz"], max_tokens=40)
    assert "Lily" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
    free = {complete(client, temperature=1.0).choices[0].text for _ in range(4)}
    assert len(free) > 1, "without a seed each answer is a fresh one"


def test_penalties_and_bias(client: OpenAI, alone: Model) -> None:
    token = alone.tokenizer.encode(" dog")[0]
    biased = complete(client, logit_bias={str(token): 100}, max_tokens=6)
    assert biased.choices[0].text == " dog" * 6
    varied = complete(client, logit_bias={str(token): 12}, frequency_penalty=2, presence_penalty=2, max_tokens=20)
    expected = alone.generate(STORY, logit_bias={token: 12}, frequency_penalty=2, presence_penalty=2, max_tokens=20, temperature=0)
    assert varied.choices[0].text == expected.text and 1 <= varied.choices[0].text.count("dog") < 12
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 4096, the vocabulary has 0 to 4095"):
        complete(client, logit_bias={"4096": 1})


def test_logprobs(client: OpenAI, alone: Model) -> None:
    expected = alone.generate(STORY, logprobs=3, max_tokens=5, temperature=0)
    assert expected.logprobs is not None
    echoed = complete(client, echo=True, logprobs=3, max_tokens=5).choices[0]
    got = echoed.logprobs
    assert echoed.text == STORY + expected.text and "".join(got.tokens) == echoed.text
    assert got.token_logprobs[0] is None and got.token_logprobs[-5:] == [s.logprob for s in expected.logprobs]
    assert all(len(top) == 3 for top in got.top_logprobs[1:])
    assert [echoed.text[at:].startswith(t) for at, t in zip(got.text_offset, got.tokens, strict=True)] == [True] * len(got.tokens)
    only = complete(client, prompt=echoed.text, echo=True, logprobs=3, max_tokens=0).choices[0]
    assert only.text == echoed.text and only.logprobs.token_logprobs == pytest.approx(got.token_logprobs)
    streamed = list(complete(client, echo=True, logprobs=3, max_tokens=5, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == echoed.text
    assert [o for c in streamed for o in c.choices[0].logprobs.text_offset] == got.text_offset
    said = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(t.token for t in said.logprobs.content) == said.message.content
    assert all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 2 for t in said.logprobs.content)


def test_answers_follow_schemas_and_grammars(client: OpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 3, "maximum": 9}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    for temperature in (0, 1.3):
        done = chat(client, response_format=form, temperature=temperature, max_tokens=200).choices[0]
        value = json.loads(done.message.content)
        assert done.finish_reason == "stop" and set(value) == {"name", "age"} and 3 <= value["age"] <= 9
    free = chat(client, response_format={"type": "json_object"}, max_tokens=100).choices[0]
    assert free.message.content.startswith("{") and (free.finish_reason == "length" or json.loads(free.message.content))
    assert complete(client, extra_body={"regex": "[0-9]{3}-[0-9]{2}"}).choices[0].text.replace("-", "").isdigit()
    sum_ = complete(client, extra_body={"grammar": 'start: n ("+" n){2}\nn: /[1-9]/'}).choices[0]
    assert len(sum_.text) == 5 and sum_.text[1::2] == "++" and sum_.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="the lark cannot be used"):
        complete(client, extra_body={"grammar": "start: ((("})
    with pytest.raises(openai.BadRequestError, match="not several"):
        complete(client, extra_body={"grammar": 'start: "a"', "regex": "a"})


def test_tools(client: OpenAI, server: SimpleNamespace) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        done = chat(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=100).choices[0]
        (call,) = done.message.tool_calls
        value = json.loads(call.function.arguments)
        assert done.finish_reason == "tool_calls" and done.message.content is None
        assert call.function.name == "weather" and value["town"] in ("Oslo", "Rome") and 1 <= value["days"] <= 9
    values: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    with client.chat.completions.stream(model="tiny", messages=ASK, temperature=0, **values) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(streamed.function.arguments) == value
    answered: Any = [*ASK, done.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert chat(client, messages=answered, tools=[TOOL]).choices[0].message.content
    shown = server.service.model.tokenizer.chat_text([{"role": "user", "content": "x"}], tools=[TOOL])
    assert '"name": "weather"' in shown
    with pytest.raises(openai.BadRequestError, match="tool_choice names 'snow', the tools are weather"):
        chat(client, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "snow"}})


@pytest.mark.parametrize("name", list(FORMS))
def test_tools_in_each_form_of_the_families(name: str) -> None:
    """Demanded and streamed calls of each form, through the official client, and their result given back."""
    with serving(template=FORMS[name]) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        values: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120}
        done = chat(client, **values).choices[0]
        assert done.finish_reason == "tool_calls" and done.message.content is None
        (call,) = done.message.tool_calls
        value = json.loads(call.function.arguments)
        assert call.function.name == "weather" and value["town"] in ("Oslo", "Rome") and 1 <= value["days"] <= 9
        with client.chat.completions.stream(model="tiny", messages=ASK, temperature=0, **values) as stream:
            final = stream.get_final_completion().choices[0]
        (streamed,) = final.message.tool_calls or []
        assert json.loads(streamed.function.arguments) == value and final.finish_reason == "tool_calls"
        answered: Any = [*ASK, done.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}, *ASK]
        assert chat(client, messages=answered, tools=[TOOL], max_tokens=4).choices[0].message.content
        assert chat(client, tools=[TOOL], tool_choice="none", max_tokens=4).choices[0].message.content


def test_a_template_without_tools_refuses_them() -> None:
    with serving(template=OLMOE) as server, OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="does not show how tools are called"):
            chat(client, tools=[TOOL])
        assert chat(client).choices[0].message.content


def test_many_at_once_are_each_as_alone(client: OpenAI, alone: Model) -> None:
    rng = np.random.default_rng()
    wishes = []
    for _ in range(24):
        prompt = rng.integers(1, 4096, int(rng.integers(1, 120))).tolist()
        wishes.append((prompt, int(rng.choice([2, 3, 4, 8])), int(rng.integers(99)), int(rng.integers(1, 30))))
    expected = [alone.generate(p, bits=b, seed=s, max_tokens=m, temperature=0.8).text for p, b, s, m in wishes]

    def ask(wish: tuple[list[int], int, int, int]) -> str:
        p, b, s, m = wish
        values = {"prompt": p, "seed": s, "max_tokens": m, "temperature": 0.8, "extra_body": {"bits": b}}
        if s % 2:
            return "".join(c.choices[0].text for c in complete(client, stream=True, **values))
        return str(complete(client, **values).choices[0].text)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, wishes)) == expected


def test_answers_are_as_described(server: SimpleNamespace) -> None:
    """What is sent fits the models that the interface's description is made of, with nothing missing or more."""

    def strictly(model: Any, path: str, **values: Any) -> None:
        body = server.http.post(path, json={"model": "tiny", "max_tokens": 20, "temperature": 0, **values}).json()
        assert model.model_validate(body).model_dump(exclude_unset=True) == body

    strictly(schema.CompletionAnswer, "/v1/completions", prompt=STORY, echo=True, logprobs=2)
    strictly(schema.ChatAnswer, "/v1/chat/completions", messages=ASK, logprobs=True, top_logprobs=1)
    strictly(schema.ChatAnswer, "/v1/chat/completions", messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
