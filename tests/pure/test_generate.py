"""Model: one answer from start to end on a toy language model, with every way an answer can end or be refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from d2moe.errors import ConfigError, RequestError
from d2moe.runtime.generate import Model
from d2moe.runtime.request import Completion, Piece, StopText
from d2moe.runtime.sampling import SamplingParams
from d2moe.runtime.streamer import Counters
from d2moe.runtime.tokenizer import Tokenizer

END = 256


def bytes_backend() -> Backend:
    """Token i below 256 is byte i; END ends."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in ByteLevel
    names = {b: chr(b) for b in plain}
    names |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in plain)}
    backend = Backend(models.BPE({names[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return backend


class ToySequence:
    def __init__(self, engine: ToyEngine):
        self.engine, self.tokens = engine, [0] * 0

    @property
    def length(self) -> int:
        return len(self.tokens)

    def free(self) -> None:
        self.engine.live -= 1


class ToyEngine:
    """Logits depend on the last two tokens and the width; or the answer is `script`, byte for byte, then END."""

    def __init__(self, script: bytes | None = None, context: int = 64, eos: tuple[int, ...] = (END,)):
        self.shape: Any = SimpleNamespace(vocab=257, eos_ids=eos, model_type="toy", context=context)
        self.context, self.script = context, script
        self.config = SimpleNamespace(bits=4, uniform=False, memory_bytes=None)
        self.counters = Counters()
        self.live, self.closed, self.steps = 0, False, 0
        rng = np.random.default_rng(7)
        self.a, self.b = (rng.standard_normal((257, 257)).astype(np.float32) for _ in range(2))

    def new_sequence(self) -> ToySequence:
        self.live += 1
        return ToySequence(self)

    def dial(self, bits: float, uniform: bool = False) -> None:
        if bits not in (2, 3, 4):
            raise RequestError(f"toy.d2moe has no width of {bits} bits, choose one of 2, 3, 4")

    def row(self, tokens: Sequence[int], prompt: int, bits: float) -> np.ndarray:
        if self.script is not None:
            done = len(tokens) - prompt
            row = np.zeros(257, np.float32)
            row[self.script[done] if done < len(self.script) else END] = 50
            return row
        before = tokens[-2] if len(tokens) > 1 else 0
        return (self.a[tokens[-1]] + self.b[before]) * np.float32(bits / 4)

    def step(self, chunks: list[Any]) -> np.ndarray:
        self.steps += 1
        rows = []
        for chunk in chunks:
            sequence = chunk.sequence
            first = not sequence.tokens
            if first:
                sequence.prompt = len(chunk.tokens)
            for token in chunk.tokens:
                assert len(sequence.tokens) < self.context, "fed beyond the context"
                sequence.tokens.append(int(token))
                if chunk.logits == "all":
                    rows.append(self.row(sequence.tokens, sequence.prompt, chunk.bits))
            if chunk.logits == "last":
                rows.append(self.row(sequence.tokens, sequence.prompt, chunk.bits))
            c = self.counters
            n = len(chunk.tokens)
            c.tokens, c.uses, c.use_bits, c.read_bytes = (
                c.tokens + n,
                c.uses + n,
                c.use_bits + n * chunk.bits,
                c.read_bytes + 100 * n,
            )
            c.wanted_bytes, c.missing_bytes = c.wanted_bytes + 2 * n, c.missing_bytes + n
        return np.stack(rows) if rows else np.empty((0, 257), np.float32)

    def describe(self) -> dict[str, Any]:
        return {"direct": False}

    def close(self) -> None:
        self.closed = True


def model(script: bytes | str | None = None, generation_config: dict[str, Any] | None = None, **engine: Any) -> Model:
    script = script.encode() if isinstance(script, str) else script
    return Model(ToyEngine(script, **engine), Tokenizer(bytes_backend(), where="toy.d2moe"), generation_config)


def test_an_answer_ends_at_an_end_token() -> None:
    m = model("hi 你")
    done = m.generate("abc")
    assert isinstance(done, Completion)
    assert (done.text, done.finish_reason, done.prompt_tokens) == ("hi 你", "eos", [97, 98, 99])
    assert done.tokens == [*"hi 你".encode(), END] and done.logprobs is None
    assert done.stats.generated_tokens == 7 and done.stats.prompt_tokens == 3 and done.stats.bits == 4.0
    assert done.stats.hit_rate == 0.5 and done.stats.read_bytes == 100 * 9
    assert m.engine.live == 0  # type: ignore[attr-defined]


def test_max_tokens_and_the_context_end_it_too() -> None:
    assert model("x" * 99).generate("abc", max_tokens=5).text == "xxxxx"
    full = model("x" * 99, context=10).generate("abc", max_tokens=None)
    assert (full.finish_reason, len(full.tokens)) == ("length", 8)  # 3 + 7 fed, one more drawn
    exact = model("x" * 99, context=3).generate("abc")
    assert (exact.finish_reason, exact.text) == ("length", "x")


def test_half_a_character_at_the_end_is_flushed() -> None:
    assert model("你").generate("a", max_tokens=2).text == "\ufffd"


def test_ignore_eos_goes_on() -> None:
    done = model("hi").generate("a", max_tokens=6, ignore_eos=True)
    assert (done.text, done.finish_reason, done.tokens[2:]) == ("hi", "length", [END] * 4)


def test_end_tokens_come_from_both_configs_and_else_from_the_tokenizer() -> None:
    m = model("ab", {"eos_token_id": [98, 300]})
    assert m.eos_ids == {END, 98, 300}
    assert (m.generate("a").text, m.generate("a").finish_reason) == ("a", "eos")
    bare = Model(ToyEngine(b"ab", eos=()), Tokenizer(bytes_backend(), {"eos_token": "<|end|>"}))
    assert bare.eos_ids == {END} and bare.generate("a").text == "ab"


@pytest.mark.parametrize("stop", ["wor", "o w", ["zzz", "ld", "rld"], " world"])
def test_a_stop_text_is_cut_and_never_leaks(stop: Any) -> None:
    m = model("hello world again")
    pieces = list(m.stream("a", stop=stop))
    text = "".join(p.text for p in pieces)
    expected = min(
        "hello world again".find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in "hello world again"
    )
    if stop == ["zzz", "ld", "rld"]:
        expected = len("hello wo")  # both end at the same letter; the longer one begins first
    assert text == "hello world again"[:expected]
    assert pieces[-1].finish_reason == "stop" and all(p.finish_reason is None for p in pieces[:-1])
    assert m.generate("a", stop=stop).text == text


def test_text_held_for_a_stop_that_does_not_come_is_given_back() -> None:
    pieces = list(model("aab").stream("x", stop=["aaa", "abc"]))
    assert "".join(p.text for p in pieces) == "aab"
    assert pieces[-1].finish_reason == "eos" and pieces[-1].text == "ab"
    assert model("ab").generate("x", stop=["abc"], max_tokens=2).text == "ab"


def test_stop_text_does_not_depend_on_the_cut() -> None:
    text, stops = "xxabababcyy", ["abc", "babab", "q"]
    results = set()
    for size in (1, 2, 3, 5, len(text)):
        held, out = StopText(stops), ""
        for i in range(0, len(text), size):
            piece, found = held.push(text[i : i + size])
            out += piece
            if found:
                break
        results.add(out)
    assert results == {"xxa"}


def test_stream_gives_one_piece_per_token_and_joins_to_generate() -> None:
    m = model()
    pieces = list(m.stream("abc", temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=2))
    done = m.generate("abc", temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=2)
    assert all(isinstance(p, Piece) for p in pieces)
    assert [p.token for p in pieces] == done.tokens and "".join(p.text for p in pieces) == done.text
    assert [p.logprob for p in pieces] == done.logprobs
    assert done.logprobs is not None and all(len(p.top) == 2 and p.logprob <= p.top[0][1] for p in done.logprobs)
    assert m.last is not None and m.last.generated_tokens == 20


def test_the_same_seed_the_same_answer_and_bits_matter() -> None:
    m = model()
    one = m.generate("abc", temperature=1.0, max_tokens=20).tokens
    assert m.generate("abc", temperature=1.0, max_tokens=20).tokens == one
    assert m.generate("abc", temperature=1.0, max_tokens=20, seed=3).tokens != one
    assert m.generate([97, 98, 99], temperature=1.0, max_tokens=20).tokens == one
    assert m.generate("abc", temperature=1.0, max_tokens=20, bits=2).stats.bits == 2.0


def test_defaults_come_from_generation_config_if_it_samples() -> None:
    config = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 3, "top_k": None}
    assert model("", config).params(top_p=0.5) == SamplingParams(temperature=0.8, top_p=0.5)
    assert model("", {**config, "do_sample": False}).params() == SamplingParams()
    assert model("", {"do_sample": True}).params().temperature == 1.0
    greedy = model("hi", config).generate("a", SamplingParams(max_tokens=1))
    assert greedy.text == "h"


def test_requests_that_cannot_be_served() -> None:
    m = model("hi", context=8)
    for prompt, message in [
        ("", "prompt is empty"), ([], "prompt is empty"), ("123456789", "has 9 tokens, the context holds 8"),
        ([1, 257], "token 257, the vocabulary has 0 to 256"), ([-1], "token -1"),
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=message):
            m.stream(prompt)  # refused at the call, not at the first piece
    with pytest.raises(RequestError, match=r"toy\.d2moe has no width of 8 bits, choose one of 2, 3, 4"):
        m.generate("a", bits=8)
    with pytest.raises(ConfigError, match="did you mean 'max_tokens'"):
        m.generate("a", max_token=3)
    with pytest.raises(RequestError, match="not both"):
        m.generate("a", SamplingParams(), seed=1)
    with pytest.raises(RequestError, match="no chat template"):
        m.chat([{"role": "user", "content": "x"}])
    assert m.engine.live == 0 and m.engine.steps == 0  # type: ignore[attr-defined]


def test_leaving_early_or_an_interrupt_frees_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("hello")
    engine: Any = m.engine
    stream = m.stream("a")
    next(stream)
    assert engine.live == 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.live == 0

    real, calls = engine.step, []

    def interrupted(chunks: list[Any]) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(chunks)  # type: ignore[no-any-return]

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        m.generate("a")
    assert engine.live == 0
    monkeypatch.undo()
    assert m.generate("a").text == "hello"


def test_chat_renders_the_template_and_answers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(bytes_backend(), template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with Model(ToyEngine(b"ok"), tokenizer) as m:
        done = m.chat([{"role": "user", "content": "q"}])
        assert (done.text, bytes(done.prompt_tokens)) == ("ok", b"[q]")
        assert "".join(p.text for p in m.stream_chat([{"role": "user", "content": "q"}], max_tokens=1)) == "o"
    assert m.engine.closed  # type: ignore[attr-defined]
