"""Models whose experts have fewer bits than eight, each its own number: what is computed, read, planned and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rows import alike

import d2moe
from d2moe.container import Container, ContainerWriter
from d2moe.kernels import native
from d2moe.policy import POLICIES
from d2moe.policy.ledger import Ledger
from d2moe.policy.policy import Policy
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

MODEL = d2moe.builtin_model()
WIDTHS_CHOSEN = {"edgemoe", "hobbit", "adapmoe", "priority", "resident-first"}
"""Policies whose answers are others'."""


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with random widths, all of its dense weights, and no width router."""
    whole, seed = Container.open(MODEL), int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    kept = {layer: np.random.default_rng([seed, layer]).integers(2, 9, whole.experts).tolist() for layer in whole.moe_layers}
    facts, manifest = {}, whole.manifest
    small = {n: MODEL / n for n, f in manifest.files.items() if n not in manifest.weight_files and not f.optional and "checksums" not in n}
    facts |= {"record": whole.record, "layers": whole.moe_layers, "experts": whole.experts, "files": small, "kept": kept}
    facts |= {"dense": {n: (e.dtype, e.shape) for n, e in whole.dense.items()}, "source": manifest.source, "quantizer": manifest.quantizer}
    with ContainerWriter(tmp_path_factory.mktemp("trimmed") / "x.d2moe", **facts) as writer:
        for name in whole.dense:
            writer.add_dense(name, whole.read_dense(name))
        for layer, widths in kept.items():
            for expert, bits in enumerate(widths):
                writer.add_record(layer, expert, whole.read_record(layer, expert, bits))
        return writer.finish()


@pytest.fixture
def tokens():
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return np.random.default_rng(seed).integers(0, 4096, 60).astype(np.int32)


def logits(model, tokens, bits=8, policy=None, uniform=True, **options):
    with Engine.load(model, EngineConfig(context=128, dense_bits=8, **options)) as engine:
        if policy is not None:
            engine.policy = policy(engine.ledger, engine.shape.top_k)
            engine._streamer.follow(engine.policy)
            engine._pause()
        sequence = engine.new_sequence()
        found = [engine.step([Chunk(sequence, part, bits, "all", uniform)]) for part in (tokens[:40], *np.split(tokens[40:], 20))]
        return np.concatenate(found), engine.counters


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_each_expert_is_computed_at_what_it_has(trimmed, tokens, bits):
    kept = Container.open(trimmed).kept

    class AsKept(Policy):
        decides = True

        def choose(self, layer, ids, bits, gates):
            return np.minimum(bits, kept[layer, ids]).astype(np.int32), None

    expected, counters = logits(MODEL, tokens, bits, AsKept)
    found, taken = logits(trimmed, tokens, bits)
    assert np.array_equal(found, expected)
    assert (taken.uses, taken.use_bits, taken.wanted_bytes) == (counters.uses, counters.use_bits, counters.wanted_bytes)
    assert taken.average_bits <= bits and (bits < 3 or taken.average_bits < bits)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "belady"])
def test_every_policy_runs_with_little_memory(trimmed, tokens, policy):
    expected, _ = logits(trimmed, tokens)
    found, counters = logits(trimmed, tokens, expert_memory_bytes=900_000)
    assert np.array_equal(found, expected) and counters.read_bytes > 0
    with Engine.load(trimmed, EngineConfig(context=128, dense_bits=8, expert_memory_bytes=900_000, policy=policy)) as engine:
        sequence = engine.new_sequence()
        rows = [engine.step([Chunk(sequence, part, 8, "all", True)]) for part in (tokens[:40], *np.split(tokens[40:], 20))]
        held = np.array([[engine.experts.width(la, e) for e in range(engine.ledger.experts)] for la in range(engine.ledger.layers)])
        assert (held <= engine.ledger.kept).all() and engine.ledger.used_bytes <= engine.ledger.limit_bytes
        if policy != "preload":  # whose reads that may wait are not taken back yet
            assert np.array_equal(held, engine.ledger.width)
    if policy not in WIDTHS_CHOSEN:
        assert np.array_equal(np.concatenate(rows), expected)


def test_the_twin_agrees(trimmed, tokens):
    found, counters = logits(trimmed, tokens, 6)
    twin, seen = logits(trimmed, tokens, 6, kernels="reference")
    assert alike(found, twin)
    assert counters.uses == seen.uses and abs(counters.use_bits - seen.use_bits) <= 0.02 * seen.use_bits  # a choice at a tie may differ


def test_memory_is_asked_for_what_there_is(trimmed):
    container = Container.open(trimmed)
    with Engine.load(trimmed, EngineConfig(context=128)) as engine:
        assert engine.budget.experts == container.experts_bytes() < container.record.record_bytes * container.kept.size
        engine.set_memory(engine.least_bytes)
        assert engine.budget.experts == container.record.prefix_bytes(container.most_bits)


def test_nothing_is_read_beyond_a_record(trimmed):
    container = Container.open(trimmed)
    with Engine.load(trimmed, EngineConfig(context=128)) as engine:
        moves = np.array([(la, e, 8) for la in range(engine.ledger.layers) for e in range(engine.ledger.experts)], np.int32)
        engine.experts.read(moves)
        engine.experts.abandon()
        assert engine.decoder.program.counts[1] == container.experts_bytes()
        assert [engine.experts.width(la, e) for la, e, _ in moves.tolist()] == container.kept.reshape(-1).tolist()


def test_places_of_records_are_checked(trimmed):
    with Engine.load(trimmed, EngineConfig(context=128)) as engine:
        right, record = {"offsets": engine.container.offsets, "kept": engine.container.kept}, engine.container.record
        for wrong, message in (({"kept": right["kept"] + 7}, "records have 2 to 8 bits"), ({"offsets": np.ones(3, np.int64)}, "offsets")):
            facts = right | wrong
            with pytest.raises(ValueError, match=message):
                native.Experts(
                    engine.runtime, layers=4, experts=16, hidden=256, inner=256, group=record.group, base_bytes=record.base_bytes,
                    plane_bytes=record.plane_bytes, paths=["x"] * 4, direct=False, depth=1, rotation=record.rotation, **facts,
                )  # fmt: skip


def test_the_ledger_names_what_can_be_read():
    ledger = Ledger(2, 3, 8192, 4096, 1 << 20, np.array([[2, 8, 5], [8, 8, 8]]))
    ledger.grow(0, 1, 4)
    assert ledger.lack(0, [0, 1, 2], 6) == {0: 2, 1: 6, 2: 5}
    ledger.grow(0, 0, 2)
    assert ledger.lack(0, [0, 1, 2], 4) == {2: 4}
