"""Many requests on one engine: each gets the text it would get alone, and memory comes back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import d2moe
from d2moe.errors import BusyError, D2MoeError, StorageError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.generate import Model
from d2moe.runtime.kv import BLOCK_TOKENS
from d2moe.runtime.request import Chunk, Piece, Request
from d2moe.runtime.sampling import SamplingParams, logprob
from d2moe.runtime.scheduler import Ended, Job, Pace, Scheduler
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.runtime.worker import Worker

MODEL = d2moe.builtin_model()
TOKENIZER = Tokenizer.load(MODEL)


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.outcome: Ended | None = None
        self.done = threading.Event()

    def __call__(self, said: Piece | Ended) -> None:
        assert self.outcome is None, "nothing comes after the end"
        if isinstance(said, Ended):
            self.outcome = said
            self.done.set()
        else:
            self.pieces.append(said)

    @property
    def tokens(self) -> list[int]:
        return [p.token for p in self.pieces]


def make(engine: Engine, prompt: list[int], bits: int = 4, **values: object) -> tuple[Job, Heard]:
    heard = Heard()
    params = SamplingParams.make({"max_tokens": 12, "ignore_eos": True, **values})
    request = Request(prompt, params, TOKENIZER, vocab=engine.shape.vocab, context=engine.context, eos_ids=[0])
    return Job(request, bits, heard), heard


def words(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(1, 4096, n).tolist()


def run(scheduler: Scheduler, steps: int = 5000) -> int:
    for step in range(steps):
        if not scheduler.step():
            return step
    raise AssertionError("the jobs do not end")


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def test_each_text_is_the_same_as_alone(rng: np.random.Generator) -> None:
    """Jobs that come at any step, share beginnings, run out of cache blocks and are put back, at all widths at once."""
    shared = words(rng, 150)
    # Each of these starts in one block and grows to three.
    wishes = [(words(rng, 60), 4, {"max_tokens": 80}) for _ in range(3)]
    for _ in range(8):
        prompt = shared[: rng.integers(1, 150)] + words(rng, int(rng.integers(1, 90)))
        values = {"max_tokens": int(rng.integers(1, 40)), "seed": int(rng.integers(100))}
        values |= {"temperature": float(rng.choice([0.0, 0.7])), "top_p": 0.9, "frequency_penalty": float(rng.choice([0, 0.5]))}
        wishes.append((prompt, int(rng.choice([2, 3, 4, 8])), values))
    with Engine.load(MODEL, EngineConfig(context=320)) as engine:
        model = Model(engine, TOKENIZER)
        alone = [model.generate(p, SamplingParams.make({"ignore_eos": True, **v, "bits": b})).tokens for p, b, v in wishes]
    # Seven blocks hold one full text and a bit: jobs must take turns. A quarter of the experts fits.
    options = EngineConfig(context=320, max_sequences=6, kv_tokens=7 * BLOCK_TOKENS, chunk_tokens=64, expert_memory_bytes=3_000_000)
    with Engine.load(MODEL, options) as engine:
        scheduler = Scheduler(engine)
        jobs = [make(engine, p, b, **v) for p, b, v in wishes]
        for index, (job, _) in enumerate(jobs):
            scheduler.add(job)
            for _ in range(int(rng.integers(0, 12)) if index > 2 else 0):
                scheduler.step()
        run(scheduler)
        assert [heard.tokens for _, heard in jobs] == alone
        assert any(job.restarted for job, _ in jobs), "the cache was meant to be too small"
        assert engine.pages.available == engine.pages.blocks == 7 and not scheduler.running and not scheduler.waiting


def test_known_blocks_are_not_computed_again(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=512, max_sequences=4)) as engine:
        scheduler, prompt = Scheduler(engine), words(rng, 4 * BLOCK_TOKENS)
        first, heard = make(engine, prompt, max_tokens=80)
        scheduler.add(first)
        run(scheduler)
        before = engine.counters.tokens
        again, same = make(engine, prompt, max_tokens=80)
        scheduler.add(again)
        run(scheduler)
        # The last token's logits are needed, so its block is fed again.
        assert again.reused_tokens == 3 * BLOCK_TOKENS
        assert engine.counters.tokens - before == BLOCK_TOKENS + 79 and same.tokens == heard.tokens
        answer, _ = make(engine, prompt + heard.tokens + [5], max_tokens=1)  # what was answered is known as well
        other, _ = make(engine, prompt, bits=3, max_tokens=1)  # another width has other keys and values
        for job in (answer, other):
            scheduler.add(job)
        run(scheduler)
        assert (answer.reused_tokens, other.reused_tokens) == (5 * BLOCK_TOKENS, 0)


def test_equal_prompts_at_once_are_fed_once(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=512, max_sequences=4, chunk_tokens=96)) as engine:
        scheduler, prompt = Scheduler(engine), words(rng, 3 * BLOCK_TOKENS + 7)
        jobs = [make(engine, prompt, seed=i, temperature=1.0, max_tokens=4) for i in range(4)]
        for job, _ in jobs:
            scheduler.add(job)
        scheduler.step()
        jobs[0][0].cancelled = True  # the one the others wait for goes away in the middle
        run(scheduler)
        assert engine.counters.tokens <= 96 + len(prompt) + 3 * (7 + 4)
        assert [len(h.tokens) for _, h in jobs] == [0, 4, 4, 4] and len({tuple(h.tokens) for _, h in jobs}) == 4


def test_a_cancelled_job_gives_its_blocks_back_at_once(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=256, max_sequences=2, chunk_tokens=32)) as engine:
        scheduler = Scheduler(engine)
        jobs = [make(engine, words(rng, 200)) for _ in range(3)]
        for job, _ in jobs:
            scheduler.add(job)
        scheduler.step()
        assert len(scheduler.running) == 2 and engine.pages.available < engine.pages.blocks
        for job, _ in jobs:
            job.cancelled = True
        assert not scheduler.step()
        assert engine.pages.available == engine.pages.blocks
        assert all(h.outcome == Ended(cancelled=True) and not h.pieces for _, h in jobs)


def test_prompts_do_not_hold_up_answers_nor_each_other(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=1024, max_sequences=4)) as engine:
        scheduler = Scheduler(engine)
        scheduler.pace.tokens, scheduler.pace.note = 20, lambda *_: None  # type: ignore[method-assign]
        writer, written = make(engine, words(rng, 3), max_tokens=200)
        scheduler.add(writer)
        scheduler.step()
        (long, _), (short, brief) = make(engine, words(rng, 900)), make(engine, words(rng, 30))
        scheduler.add(long)
        scheduler.step()
        scheduler.add(short)
        for step in range(3):
            assert len(written.pieces) == 2 + step, "one token each step, whatever else there is"
            scheduler.step()
        assert long.fed == 20 + 3 * 10 and len(brief.pieces) == 1, "the short prompt does not wait for the long one"
        run(scheduler)


def test_pace_keeps_steps_with_prompts_near_those_without() -> None:
    pace = Pace(512)
    for _ in range(200):  # 10 ms alone, 1 ms for each prompt token
        pace.note(0, 4, 0.010)
        pace.note(pace.tokens, 4, 0.010 + 0.001 * pace.tokens)
    assert 0.012 < 0.010 + 0.001 * pace.tokens <= 0.0215
    for _ in range(50):  # prompts that cost next to nothing
        pace.note(pace.tokens, 4, 0.010)
    assert pace.tokens == 512


def test_a_failed_read_ends_the_job_it_concerns_and_no_other(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [words(rng, 20) for _ in range(3)]
    with Engine.load(MODEL, EngineConfig(context=256, max_sequences=3)) as engine:
        model = Model(engine, TOKENIZER)
        alone = [model.generate(p, SamplingParams(max_tokens=12, ignore_eos=True)).tokens for p in prompts]
        scheduler = Scheduler(engine)
        jobs = [make(engine, p) for p in prompts]
        step = engine.step

        def failing(chunks: list[Chunk]) -> np.ndarray:
            if len(jobs[1][1].pieces) == 4 and any(c.sequence is jobs[1][0].sequence for c in chunks):
                raise StorageError("layer 2 expert 3: the file ends")
            return step(chunks)

        monkeypatch.setattr(engine, "step", failing)
        for job, _ in jobs:
            scheduler.add(job)
        run(scheduler)
        assert [h.tokens for _, h in jobs] == [alone[0], alone[1][:4], alone[2]]
        assert isinstance(jobs[1][1].outcome.error, StorageError) and jobs[0][1].outcome == Ended()  # type: ignore[union-attr]
        assert engine.pages.available == engine.pages.blocks


def test_prompt_tokens_are_scored(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = words(rng, 130)
    with Engine.load(MODEL, EngineConfig(context=256, max_sequences=2, chunk_tokens=48)) as engine:
        sequence = engine.new_sequence()
        rows = engine.step([Chunk(sequence, prompt, 4, "all")])
        sequence.free()
        expected = [logprob(rows[i], prompt[i + 1], 2) for i in range(129)]
        monkeypatch.setattr("d2moe.runtime.scheduler.SCORED_BYTES", 4 * 4096 * 17)
        scheduler, step = Scheduler(engine), engine.step
        sizes: list[int] = []

        def watched(chunks: list[Chunk]) -> np.ndarray:
            found = step(chunks)
            sizes.append(len(found))
            return found

        monkeypatch.setattr(engine, "step", watched)
        (scored, heard), (only, silent) = (make(engine, prompt, prompt_logprobs=2, max_tokens=3) for _ in range(2))
        only.generate = False
        for job in (scored, only):
            scheduler.add(job)
        run(scheduler)
        assert max(sizes) <= 18, "17 scored rows and that of one answer"
        assert scored.request.prompt_logprobs == only.request.prompt_logprobs == expected
        assert len(heard.pieces) == 3 and not silent.pieces and silent.outcome == Ended()


def test_worker_serves_limits_cancels_and_stops(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=1024, max_sequences=2)) as engine:
        worker = Worker(engine, queue=1)
        jobs = [make(engine, words(rng, 10), max_tokens=900) for _ in range(3)]
        worker.submit([job for job, _ in jobs])
        with pytest.raises(BusyError, match="3 requests are running or waiting, of 3 that may") as busy:
            worker.submit([make(engine, words(rng, 10))[0]])
        assert 1 <= busy.value.retry_after_s <= 60
        worker.cancel([jobs[0][0]])
        assert jobs[0][1].done.wait(10) and jobs[0][1].outcome == Ended(cancelled=True)
        assert worker.call(lambda: threading.current_thread().name).result(10) == "d2moe-engine"
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 // 0).result(10)
        extra, heard = make(engine, words(rng, 10), max_tokens=5)
        worker.submit([extra])
        worker.cancel([jobs[2][0]])
        assert heard.done.wait(30) and len(heard.pieces) == 5
        begin = time.perf_counter()
        worker.close(drain_s=0.0)
        assert time.perf_counter() - begin < 5 and "stopped" in str(jobs[1][1].outcome.error)  # type: ignore[union-attr]
        with pytest.raises(D2MoeError, match="stopping"):
            worker.submit([extra])
        assert worker.live == 0 and engine.pages.available == engine.pages.blocks


def test_a_listener_that_fails_does_not_stop_the_worker(rng: np.random.Generator) -> None:
    with Engine.load(MODEL, EngineConfig(context=256)) as engine:
        worker = Worker(engine)
        broken, _ = make(engine, words(rng, 5))
        broken.listener = lambda said: 1 / 0 if isinstance(said, Piece) else None  # type: ignore[assignment]
        worker.submit([broken])
        job, heard = make(engine, words(rng, 5))
        while worker.live:
            time.sleep(0.01)
        worker.submit([job])
        assert heard.done.wait(10) and len(heard.pieces) == 12
        worker.close()
