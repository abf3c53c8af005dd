"""One width gives the same bits whatever the budget, the threads, the chunks and the company."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from rows import alike

import d2moe
from d2moe.errors import ConfigError, MemoryBudgetError, RequestError, StorageError
from d2moe.kernels import native
from d2moe.runtime.config import EngineConfig, parse_bytes
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

MODEL = d2moe.builtin_model()


@pytest.fixture
def tokens():
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return np.random.default_rng(seed).integers(0, 4096, 150).astype(np.int32)


def logits(tokens, bits=4, cuts=(), **options):
    with Engine.load(MODEL, EngineConfig(context=256, **options)) as engine:
        sequence = engine.new_sequence()
        parts = np.split(tokens, cuts)
        return np.concatenate([engine.step([Chunk(sequence, p, bits, "all")]) for p in parts])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_budget_threads_and_cuts_do_not_show(tokens, bits):
    expected = logits(tokens, bits, threads=1)
    # 256 KiB holds one expert of 8 bits: below a token's working set, in waves.
    for options in (
        {"expert_memory_bytes": 262144},
        {"expert_memory_bytes": 700_000, "threads": 2},
        {"expert_memory_bytes": 4_000_000, "read_depth": 1},
        {"threads": 3, "chunk_tokens": 7},
        {"direct": False},
    ):
        assert np.array_equal(logits(tokens, bits, **options), expected), options
    assert not np.array_equal(logits(tokens, bits, dense_bits=4), expected), "the width of the dense weights must show"
    cuts = np.sort(np.random.default_rng().choice(np.arange(1, 150), 6, replace=False))
    assert np.array_equal(logits(tokens, bits, cuts), expected), cuts


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_company_does_not_show(tokens, kv):
    alone = {bits: logits(tokens[:40], bits, kv=kv) for bits in (2, 3, 8)}
    options = EngineConfig(context=256, max_sequences=3, expert_memory_bytes=900_000, kv=kv)
    with Engine.load(MODEL, options) as engine:
        sequences = {bits: engine.new_sequence() for bits in alone}
        rows = engine.step([Chunk(s, tokens[:39], bits, "last") for bits, s in sequences.items()])
        for row, bits in zip(rows, sequences, strict=True):
            assert np.array_equal(row, alone[bits][38])
        rows = engine.step([Chunk(s, tokens[39:40], bits, "last") for bits, s in sequences.items()])
        for row, bits in zip(rows, sequences, strict=True):
            assert np.array_equal(row, alone[bits][39])


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_last_layers_experts_see_only_tokens_that_are_asked_of(tokens, kernels):
    """Mixed wishes and widths in one step give the rows of steps that ask for all, and read less of the last layer."""
    same = np.array_equal if kernels == "native" else alike  # NumPy adds in an order that depends on the batch
    tokens = tokens[:60]
    expected = {bits: logits(tokens, bits, kernels=kernels) for bits in (2, 4)}
    options = EngineConfig(context=256, max_sequences=4, expert_memory_bytes=900_000, kernels=kernels)
    with Engine.load(MODEL, options) as engine:
        shape, silent, last, whole = engine.shape, *(engine.new_sequence() for _ in range(3))
        wishes = [(silent, 4, "none"), (last, 2, "last"), (whole, 4, "all")]
        rows = engine.step([Chunk(s, tokens[:50], bits, wish) for s, bits, wish in wishes])
        assert same(rows, np.concatenate([expected[2][49:50], expected[4][:50]]))
        found = engine.step([Chunk(s, tokens[50:], bits, "all") for s, bits, _ in wishes])
        assert same(found, np.concatenate([expected[bits][50:] for _, bits, _ in wishes]))
        assert engine.counters.uses == shape.top_k * (150 * (shape.layers - 1) + 51 + 30 * shape.layers)
    with Engine.load(MODEL, options) as engine:
        recorder = engine.record(0)
        engine.step([Chunk(engine.new_sequence(), tokens, 4, "none")])
        assert [call.layer for step in recorder.trace() for call in step.calls] == list(range(shape.layers - 1))
        assert engine.counters.plans == (shape.layers - 1 if kernels == "native" else engine.counters.plans)


def test_kernel_tables_give_the_same_logits(tokens):
    for options in ({}, {"kv": "q8", "dense_bits": 5}):
        expected = logits(tokens[:60], 3, kernels="scalar", **options)
        for table in native.tables():
            assert np.array_equal(logits(tokens[:60], 3, kernels=table, **options), expected), (table, options)


def test_keys_and_values_in_bytes_are_close(tokens):
    """One byte instead of two for keys and values: logits move by a few percent at most, and do move."""
    expected, found = logits(tokens, 8), logits(tokens, 8, kv="q8")
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < np.median(error) < 0.02, np.median(error)
    cuts = np.sort(np.random.default_rng().choice(np.arange(1, 150), 6, replace=False))
    assert np.array_equal(logits(tokens, 8, cuts, kv="q8", threads=1), found), cuts


def test_hits_and_bytes_are_counted(tokens):
    with Engine.load(MODEL, EngineConfig(context=256)) as engine:
        engine.step([Chunk(engine.new_sequence(), tokens, 4, uniform=True)])
        c = engine.counters.snapshot()
        assert c.read_bytes == c.missing_bytes > 0 and c.average_bits == 4
    with Engine.load(MODEL, EngineConfig(context=256, max_sequences=2)) as engine:
        for expected_reads in (True, False):
            before = engine.counters.snapshot()
            s = engine.new_sequence()
            engine.step([Chunk(s, tokens, 4)])
            s.free()
            used = engine.counters - before
            assert (used.read_bytes > 0) == expected_reads
            assert used.hit_rate == pytest.approx(1 - used.missing_bytes / used.wanted_bytes)


def test_interrupted_step_leaves_the_engine_as_before(tokens, monkeypatch):
    expected = logits(tokens, 4)
    rng = np.random.default_rng()
    options = EngineConfig(context=256, expert_memory_bytes=900_000, policy="lru")  # one that the core does not plan for
    with Engine.load(MODEL, options) as engine:
        sequence = engine.new_sequence()
        for owner, where in ((engine.decoder, "run"), (engine.decoder, "compute"), (engine._streamer, "_send")):
            real, layers_left = getattr(owner, where), list(range(int(rng.integers(1, 5))))

            def stop(*args, real=real, layers_left=layers_left):
                layers_left.pop()
                if not layers_left:
                    raise KeyboardInterrupt
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(owner, where, stop)
                with pytest.raises(KeyboardInterrupt):
                    engine.step([Chunk(sequence, tokens, 4)])
            assert sequence.length == 0
            assert np.array_equal(engine.step([Chunk(sequence, tokens, 4, "all")]), expected), where
            sequence.free()


def test_a_signal_leaves_the_engine_as_before(tokens, monkeypatch):
    """Ctrl-C while the core plans by itself."""
    expected = logits(tokens, 4)
    came, inside = [], []

    def handler(*_):
        came.append(True)
        if inside:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        with Engine.load(MODEL, EngineConfig(context=256, expert_memory_bytes=900_000)) as engine:
            real, sequence = engine.decoder.run, engine.new_sequence()

            def run():
                inside.append(True)
                try:
                    return real()
                finally:
                    inside.pop()

            monkeypatch.setattr(engine.decoder, "run", run)
            for delay in np.random.default_rng().uniform(0, 0.1, 4):
                came.clear()
                timer = threading.Timer(float(delay), signal.raise_signal, [signal.SIGINT])
                timer.start()
                with contextlib.suppress(KeyboardInterrupt):
                    while not came:
                        engine.step([Chunk(sequence, tokens, 4)])
                        sequence.free()
                timer.join()
                came.clear()
                assert sequence.length == 0
                assert np.array_equal(engine.step([Chunk(sequence, tokens, 4, "all")]), expected)
                sequence.free()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("expert_memory", [262144, 900_000, 4_000_000])
def test_what_the_plan_calls_missing_is_what_is_read(tokens, expert_memory):
    with Engine.load(MODEL, EngineConfig(context=256, expert_memory_bytes=expert_memory)) as engine:
        sequence = engine.new_sequence()
        for cut in np.split(tokens, [40, 41, 42, 90]):
            engine.step([Chunk(sequence, cut, 4)])
        assert engine.counters.read_bytes == engine.counters.missing_bytes > 0


def test_refusals(tokens, tmp_path):
    with pytest.raises(MemoryBudgetError, match="least that would do is"):
        Engine.load(MODEL, EngineConfig(memory_bytes=20_000_000))
    for text in ("12XB", "lots", "-3GB", "0", ""):
        with pytest.raises(ConfigError, match="memory"):
            parse_bytes(text)
    with pytest.raises(ConfigError, match="unknown engine option"):
        d2moe.load(MODEL, memroy="1GB")
    with Engine.load(MODEL, EngineConfig(context=64)) as engine:
        with pytest.raises(RequestError, match="do not fit the context of 64"):
            engine.step([Chunk(engine.new_sequence(), tokens, 4)])
        with pytest.raises(RequestError, match="stands twice"):
            engine.step([Chunk(twice := engine.new_sequence(), tokens[:3], 4), Chunk(twice, tokens[3:6], 4)])
        with pytest.raises(RequestError, match="from 2 to 8"):
            engine.step([Chunk(engine.new_sequence(), tokens[:3], 9)])
        with pytest.raises(RequestError, match="token ids run"):
            engine.step([Chunk(engine.new_sequence(), [5000], 4)])


def test_failed_read_is_one_clear_error_and_the_engine_lives_on(tokens, tmp_path):
    import shutil

    copy = tmp_path / "model.d2moe"
    shutil.copytree(MODEL, copy)
    file = copy / "experts" / "layer-002.safetensors"
    whole = file.read_bytes()
    with Engine.load(copy, EngineConfig(context=256)) as engine:
        with file.open("r+b") as f:
            f.truncate(len(whole) // 2 // 4096 * 4096)
        sequence = engine.new_sequence()
        with pytest.raises(StorageError, match=r"layer-002.*expert \d+.*the file ends"):
            engine.step([Chunk(sequence, tokens, 4)])
        assert sequence.length == 0
        file.write_bytes(whole)
        found = engine.step([Chunk(sequence, tokens, 4, "all")])
    assert np.array_equal(found, logits(tokens, 4))


@pytest.mark.parametrize("table", ["scalar", "avx2", "avx512", "neon", "sse9"])
def test_environment_forces_a_table(table):
    code = "import d2moe; print(d2moe.load().engine.describe()['kernels'])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"D2MOE_KERNELS": table}
    )
    if table in native.tables():
        assert out.stdout.strip() == table
    else:
        assert out.returncode and f"D2MOE_KERNELS={table}: this build or this CPU has no such kernel table" in out.stderr
