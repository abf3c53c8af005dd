"""Policies on the real engine, and the simulator beside it: the same trace gives the same reads and hits."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from rows import alike

import d2moe
from d2moe.cli.shared import announce, open_model
from d2moe.container import Container
from d2moe.convert.synthetic import synthesise
from d2moe.errors import ConfigError
from d2moe.evaluate import profile as profiling
from d2moe.policy import POLICIES
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.simulate.device import Device
from d2moe.simulate.simulate import simulate

MODEL = d2moe.builtin_model()
DEVICE = Device("fixed", 1e9, 1e-5, 1e-4, {4: (1e-5, 1e-6)}, (1e-3, 1e-5), 1e-4)
ONLINE = [name for name in POLICIES if name != "belady"]


@pytest.fixture(scope="module")
def tokens():
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return np.random.default_rng(seed).integers(0, 4096, 150).astype(np.int32)


def play(tokens, record=False, **options):
    """Two sequences: prompts, then 40 steps together, more than the notes that a ledger keeps unread. Logits, counters, trace."""
    with Engine.load(MODEL, EngineConfig(context=256, max_sequences=2, **options)) as engine:
        recorder = engine.record() if record else None
        a, b = engine.new_sequence(), engine.new_sequence()
        rows = [engine.step([Chunk(a, tokens[:50], 4, "all"), Chunk(b, tokens[50:60], 3, "none")])]
        for i in range(60, 140):
            one, other = Chunk(a, tokens[i : i + 1], 4, "last"), Chunk(b, tokens[i : i + 1], 3, "last")
            rows.append(engine.step([one, other] if i % 3 else [one]))
        return np.concatenate(rows), engine.counters.snapshot(), recorder and recorder.trace()


@pytest.fixture(scope="module")
def played(tokens):
    return play(tokens, record=True, expert_memory_bytes=2_000_000)


@pytest.mark.parametrize("policy", [p for p in ONLINE if p != "preload"])
def test_simulator_and_engine_agree_to_the_byte(policy, tokens, played):
    for memory in (300_000, 1_500_000):
        _, found, trace = play(tokens, record=True, expert_memory_bytes=memory, policy=policy)
        # A policy that changes widths or experts changes what later layers see, so its own trace is replayed.
        if policy not in CHANGES_LOGITS:
            assert np.array_equal(trace.arrays["ids"], played[2].arrays["ids"])
        expected = simulate(trace, DEVICE, memory, policy=policy).total
        for name in ("read_bytes", "reads", "wanted_bytes", "missing_bytes", "uses", "use_bits", "forecast", "forecast_right"):
            assert getattr(found, name) == getattr(expected, name), (memory, name)
        assert found.hit_rate == expected.hit_rate


CHANGES_LOGITS = ("resident-first", "edgemoe", "hobbit", "adapmoe", "priority")


@pytest.mark.parametrize("policy", [p for p in ONLINE if p not in CHANGES_LOGITS])
def test_policies_that_only_move_bytes_do_not_show(policy, tokens, played):
    assert np.array_equal(play(tokens, expert_memory_bytes=900_000, policy=policy)[0], played[0])


def test_recording_changes_nothing(tokens, played):
    logits, counters, _ = play(tokens, expert_memory_bytes=2_000_000)
    assert np.array_equal(logits, played[0])
    for name in ("read_bytes", "reads", "missing_bytes", "wanted_bytes"):
        assert getattr(counters, name) == getattr(played[1], name)


def test_choices_left_out_and_narrowed_give_the_same_on_the_twin(tokens):
    """AdapMoE leaves experts out and priority narrows them: compiled core and NumPy twin agree."""
    for policy in ("adapmoe", "priority"):
        rows, first = [], []
        for kernels in ("native", "reference"):
            with Engine.load(MODEL, EngineConfig(context=256, policy=policy, kernels=kernels)) as engine:
                recorder = engine.record(2)
                rows.append(engine.step([Chunk(engine.new_sequence(), tokens[:40], 4, "all")]))
                first.append(next(iter(recorder.trace())).calls[0].forecast)
                assert engine.counters.average_bits != 4.0 or engine.counters.uses < 40 * 2 * 4
        assert np.mean(np.sort(first[0]) == np.sort(first[1])) > 0.97, "what later routers say to the first layer's input"
        assert alike(*rows)


def test_a_policy_that_needs_the_future_or_does_not_exist():
    with pytest.raises(ConfigError, match="simulation only"):
        Engine.load(MODEL, EngineConfig(policy="belady"))
    with pytest.raises(ConfigError, match="policy is 'mru', expected one of hebf"):
        EngineConfig(policy="mru")


def test_a_profile_is_kept_and_used(tmp_path, monkeypatch, capsys):
    """What is measured is kept, found again by the same model and device only, and chosen from when a model is opened."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profiling, "MEASURE_S", 0.001)
    monkeypatch.setattr(profiling, "memory_bandwidth", lambda threads: 1e10)
    assert profiling.known_profile(Container.open(MODEL)) is None
    with Engine.load(MODEL, EngineConfig(context=256, expert_memory_bytes=3_000_000)) as engine:
        found = profiling.profile(engine, list(range(1, 100)))
    for bits, (first, more) in found.expert_s.items():
        assert 0 < first < 0.1 and 0 <= more < 0.1, bits
    assert found.read_bytes_per_s > 1e6 and found.dense_s[0] > 0 and found.decide_s > 0
    sizes = {int(size) for size in found.facts["reads"]["page cache"]}
    record = Container.open(MODEL).record
    assert sizes == {record.plane_bytes, *(record.prefix_bytes(b) for b in (2, 4, 8))}
    assert found.facts["preload"]["gain"] > 0 and 0 < found.facts["preload"]["right"] < 1
    gain, least = found.facts["preload"]["gain"], found.facts["preload"]["least_gain"]
    assert found.facts["chosen"]["policy"] == ("preload" if gain >= profiling.PRELOAD_FROM and least > 1 else "hebf")
    found.facts["chosen"] |= {"policy": "preload", "direct": False, "read_depth": 3, "why": "for this test"}
    found.save(profiling.profile_path(Container.open(MODEL)))
    assert profiling.known_profile(Container.open(MODEL)) == found
    assert profiling.known_profile(Container.open(MODEL), threads=1000) is None, "another number of threads is another profile"
    with contextlib.closing(open_model(MODEL, {"context": 64})) as model:
        about = model.engine.describe()
        announce(model)
    assert (about["direct"], about["read_depth"], about["policy"]) == (False, 3, "preload")
    assert "3 in flight (for this test)" in capsys.readouterr().err


def test_the_timeline_says_what_the_counters_say(tokens, tmp_path):
    """Every read, all arithmetic and all waits are in it, with times inside their steps."""
    path = tmp_path / "timeline.json"
    _, counters, _ = play(tokens, expert_memory_bytes=700_000, policy="hobbit", timeline=str(path))
    slices = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
    steps = [e for e in slices if e["tid"] == 1]
    assert len(steps) == counters.steps and sum(e["args"]["tokens"] for e in steps) == counters.tokens
    record, sizes = Container.open(MODEL).record, 0
    reads = [e for e in slices if e["tid"] >= 10]
    for event in reads:
        planes = event["args"]["planes"]
        sizes += sum(record.base_bytes if p == "base" else record.plane_bytes for p in planes)
        assert event["name"].startswith(f"layer {event['args']['layer']} expert {event['args']['expert']}: {planes[0]}")
    # The last prefetches may still be on their way.
    assert counters.reads - 8 <= len(reads) <= counters.reads and 0.97 * counters.read_bytes <= sizes <= counters.read_bytes
    waits = sum(e["dur"] for e in slices if e["tid"] == 3 and e["name"].startswith("wait")) / 1e6
    arithmetic = sum(e["dur"] for e in slices if e["tid"] == 3 and not e["name"].startswith("wait")) / 1e6
    assert waits == pytest.approx(counters.stall_seconds, rel=1e-3)
    assert arithmetic == pytest.approx(counters.compute_seconds, rel=1e-3)
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in steps]
    for event in slices:
        if event["tid"] in (2, 3):
            assert any(begin - 1 <= event["ts"] and event["ts"] + event["dur"] <= end + 1 for begin, end in spans)
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        Engine.load(MODEL, EngineConfig(context=64, timeline=str(tmp_path / "no" / "x.json")))
    with pytest.raises(ConfigError, match="the NumPy twin has no timeline"):
        Engine.load(MODEL, EngineConfig(context=64, kernels="reference", timeline=str(path)))


DENSE = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}  # fmt: skip


def test_a_dense_model_keeps_what_fits(tokens, tmp_path):
    """Its blocks take turns, so the one used last is wanted last: by recency nothing would ever be found in memory."""
    model = synthesise(tmp_path / "dense", DENSE, MODEL / "tokenizer.json")
    record = Container.open(model).record
    memory = 5 * record.prefix_bytes(4)
    hits, rows = {}, {}
    for policy in ("hebf", "lru"):
        with Engine.load(model, EngineConfig(expert_memory_bytes=memory, policy=policy, context=256)) as engine:
            recorder, sequence = engine.record(), engine.new_sequence()
            steps = [tokens[:20], *np.split(tokens[20:60], 40)]
            rows[policy] = np.concatenate([engine.step([Chunk(sequence, part, 4, "last")]) for part in steps])
            found, trace = engine.counters.snapshot(), recorder.trace()
        expected = simulate(trace, DEVICE, memory, policy=policy).total
        assert (found.read_bytes, found.hit_rate) == (expected.read_bytes, expected.hit_rate)
        hits[policy] = found.hit_rate
    best = simulate(trace, DEVICE, memory, policy="belady").total.hit_rate
    assert hits["lru"] == 0 and best - 0.06 < hits["hebf"] and best > 0.3
    assert np.array_equal(rows["hebf"], rows["lru"])


def test_resident_first_reads_less_and_uses_what_is_there(tokens):
    """Every miss of a light choice is its base at most, and what is resident is never computed narrower."""
    found = {}
    for policy in ("hebf", "resident-first"):
        with Engine.load(MODEL, EngineConfig(context=256, expert_memory_bytes=2_000_000, policy=policy, uniform=True)) as engine:
            sequence = engine.new_sequence()
            real, seen = engine.policy.choose, []

            def choose(layer, ids, bits, gates, real=real, seen=seen, engine=engine):
                have = engine.ledger.width[layer, ids].copy()
                chosen, left = real(layer, ids, bits, gates)
                seen.append((have, bits.copy(), np.asarray(chosen).copy(), gates.copy()))
                return chosen, left

            engine.policy.choose = choose
            for i, token in enumerate(tokens[:100]):
                engine.step([Chunk(sequence, [token], 6 if i % 5 == 0 else 4, "last", uniform=True)])
            found[policy] = engine.counters.read_bytes
    assert found["resident-first"] < 0.85 * found["hebf"], found
    wider = 0
    for have, asked, chosen, gates in seen:
        assert (chosen >= have).all() and (chosen >= 2).all() and (chosen <= np.maximum(have, asked)).all()
        heavy = gates == gates.max(1, keepdims=True)
        assert (chosen[heavy] >= asked[heavy]).all()
        share = np.sort(gates / gates.sum(1, keepdims=True), 1)[:, ::-1]
        light = (gates == gates.min(1, keepdims=True)) & (share[:, :1] >= 0.5)
        assert (chosen[light] == np.maximum(have[light], 2)).all()
        wider += int((chosen > asked).sum())
    assert wider, "planes beyond the width asked for were there and were used"


def test_a_copy_per_width_is_read_for_each_width(tokens):
    """What nesting saves: a layer call that wants an expert at 2 and at 4 bits reads both copies; the answer is the same."""
    found, rows = {}, {}
    for policy in ("on-demand", "copies"):
        with Engine.load(MODEL, EngineConfig(context=256, max_sequences=3, expert_memory_bytes=900_000, policy=policy)) as engine:
            recorder, sequences = engine.record(0), [engine.new_sequence() for _ in range(3)]
            parts = [tokens[40 * n : 40 * n + 30] for n in range(3)]
            chunks = [[Chunk(s, part[i : i + 1], 2 + n, "last", True) for n, (s, part) in enumerate(zip(sequences, parts, strict=True))]
                      for i in range(30)]  # fmt: skip
            rows[policy] = np.concatenate([engine.step(step) for step in chunks])
            found[policy], ledger = engine.counters.read_bytes, engine.ledger
    assert np.array_equal(rows["on-demand"], rows["copies"])
    nested = copies = 0
    for step in recorder.trace():
        for call in step.calls:
            for expert in np.unique(call.ids):
                wanted = np.unique(call.bits[call.ids == expert])
                nested += int(ledger.prefix_bytes[wanted.max()])
                copies += int(ledger.prefix_bytes[wanted].sum())
    assert found == {"on-demand": nested, "copies": copies} and copies > nested


def test_preloading_waits_and_does_not_show(tokens, played):
    """Bases come ahead in idle time: nothing shows in the answers, and guesses are counted."""
    rows, found, trace = play(tokens, record=True, expert_memory_bytes=1_500_000, policy="preload")
    assert np.array_equal(rows, played[0])
    assert found.forecast > 100 and 0.3 < found.forecast_right / found.forecast < 1
    _, plain, _ = play(tokens, expert_memory_bytes=1_500_000)
    assert found.read_bytes != plain.read_bytes, "something was read ahead"
    # A device that is never idle before a demand takes every guess back or makes it part of the demand; one that always is reads them all.
    devices = [Device("d", rate, 0, 0, DEVICE.expert_s, DEVICE.dense_s, 0) for rate in (1e7, 1e12)]
    busy, idle = (simulate(trace, device, 1_500_000, policy="preload").total for device in devices)
    assert busy.read_bytes < 0.98 * idle.read_bytes  # 0.93 to 0.955 over 25 seeds
