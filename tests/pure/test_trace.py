"""Trace files, made-up traces and the simulator's own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import d2moe
from d2moe import cli
from d2moe.errors import ConfigError, MemoryBudgetError, TraceError
from d2moe.policy import POLICIES, hebf
from d2moe.policy.ledger import HALF_LIFE, LAST_CALL, Ledger
from d2moe.policy.policy import make, policy_class
from d2moe.policy.trace import ARRAYS, NO_FORECAST, Meta, Recorder, Trace
from d2moe.simulate.device import Device, parse_rates
from d2moe.simulate.facts import model_facts
from d2moe.simulate.simulate import SimulatedExperts, simulate
from d2moe.simulate.synthetic import Statistics, synthetic_trace
from d2moe.types import DenseWidths

META = Meta(layers=5, experts=32, top_k=4, base_bytes=8192, plane_bytes=4096, ends_with_moe=True, model="made up")
ALL_BYTES = 5 * 32 * (8192 + 2 * 4096)
DEVICE = Device("fixed", 1e8, 1e-5, 1e-4, {2: (1e-5, 1e-6), 4: (3e-5, 2e-6)}, (1e-3, 1e-4), 5e-5)


@pytest.fixture
def seed() -> int:
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return seed


def test_a_file_gives_back_what_was_recorded(tmp_path, seed):
    rng = np.random.default_rng(seed)
    recorder, expected = Recorder(META, ahead=2), []
    for tokens, wanted in ((7, 0), (3, 3), (1, 1), (5, 2)):
        rows = np.sort(rng.choice(tokens, wanted, replace=False)).astype(np.int32)
        recorder.begin(np.arange(tokens), np.zeros(tokens, int), rows)
        calls = []
        for layer in range(5):
            seen = wanted if layer == 4 else tokens
            if seen:
                bits = rng.integers(2, 9, (seen, 4)).astype(np.int32)
                calls.append((layer, rng.integers(0, 32, (seen, 4)), bits, rng.random((seen, 4)).astype(np.float32)))
                recorder.call(*calls[-1][1:], rng.integers(0, 32, (seen, 2, 4)))
        recorder.end()
        expected.append((tokens, rows, calls))
    recorder.begin(np.arange(2), np.zeros(2, int), np.arange(2))  # broken off: not part of it
    recorder.trace().save(tmp_path / "t.npz")
    found = Trace.load(tmp_path / "t.npz")
    assert found.meta == META and found.tokens == 16
    for step, (tokens, rows, calls) in zip(found, expected, strict=True):
        assert step.tokens == tokens and np.array_equal(step.rows, rows)
        assert len(step.calls) == len(calls)
        for call, (layer, ids, bits, gates) in zip(step.calls, calls, strict=True):
            assert call.layer == layer and np.array_equal(call.ids, ids) and np.array_equal(call.gates, gates)
            assert np.array_equal(call.bits, bits)


def test_damaged_files_are_refused(tmp_path, seed):
    trace = synthetic_trace(META, tokens=4, prompt_tokens=3, seed=seed)
    path = tmp_path / "t.npz"
    for name in ARRAYS:
        arrays = dict(trace.arrays)
        arrays[name] = arrays[name][:-1]
        Trace(META, arrays).save(path)
        with pytest.raises(TraceError, match="record it again"):
            Trace.load(path)
    far = trace.arrays["ids"].copy()
    far[0, 0] = 32
    Trace(META, trace.arrays | {"ids": far}).save(path)
    with pytest.raises(TraceError, match="expert 32 is named and there are 32"):
        Trace.load(path)
    far = trace.arrays["forecast"].copy()
    far[0, 0, 0] = 32
    Trace(META, trace.arrays | {"forecast": far}).save(path)
    with pytest.raises(TraceError, match="a forecast names an expert that is not one of 32"):
        Trace.load(path)
    path.write_bytes(b"no trace")
    with pytest.raises(TraceError, match=r"t.npz is not a trace"):
        Trace.load(path)
    with pytest.raises(TraceError, match="no such file"):
        Trace.load(tmp_path / "absent.npz")
    with pytest.raises(TraceError, match="5 layers x 32 experts, 4 a token, and m has 5 x 64"):
        trace.check(5, 64, 4, "m")


def test_made_up_traces_have_the_statistics_asked_for(seed):
    for again in (0.3, 0.48, 0.7):
        statistics = Statistics(zipf=0.8, again=again)
        trace = synthetic_trace(META, tokens=300, prompt_tokens=5, sequences=2, seed=seed, statistics=statistics)
        same, chance = trace.overlap()
        assert trace.problem() is None and chance == 4 / 32
        assert abs(same - again) < 0.05, same
    first = next(c for c in list(trace)[-1].calls if c.layer == 0)
    assert all(len(set(ids)) == 4 for ids in first.ids.tolist()), "a router names an expert once"
    counts = np.sort(np.bincount(trace.arrays["ids"].reshape(-1), minlength=32))
    assert counts[-1] > counts[0]


def test_the_forecast_is_right_as_often_as_asked_for(seed):
    trace = synthetic_trace(META, tokens=200, seed=seed, statistics=Statistics(recall=0.6))
    right = total = 0
    for step in trace:
        for call, later in zip(step.calls[:-1], step.calls[1:], strict=True):
            right += len(np.intersect1d(call.forecast[0, 0], later.ids[0]))
            total += 4
    assert abs(right / total - 0.6) < 0.06


def test_with_everything_in_memory_a_step_is_its_arithmetic(seed):
    trace = synthetic_trace(META, tokens=50, prompt_tokens=200, seed=seed)
    result = simulate(trace, DEVICE, ALL_BYTES)
    # All experts came with the prompt, or at their first use.
    silent = 1 / (DEVICE.dense_seconds(1) + 5 * 4 * DEVICE.expert_seconds(4, 1))
    assert result.tokens_per_s == pytest.approx(silent, rel=0.15)
    assert result.total.read_bytes <= ALL_BYTES and result.hit_rate > 0.9


def test_below_one_expert_is_refused_and_one_expert_does(seed):
    trace = synthetic_trace(META, tokens=5, prompt_tokens=3, seed=seed)
    with pytest.raises(MemoryBudgetError, match="does not hold one expert of 4 bits"):
        simulate(trace, DEVICE, 16383)
    result = simulate(trace, DEVICE, 16384)
    assert result.hit_rate == 0 and result.bytes_per_token == 5 * 4 * 16384
    # One disk, nothing to overlap but the last expert's arithmetic.
    assert 1 / result.tokens_per_s > 5 * 4 * 16384 / 1e8


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_replays_within_its_budget_and_gives_the_same_again(policy, seed):
    trace = synthetic_trace(META, tokens=40, prompt_tokens=20, sequences=3, seed=seed)
    learn = trace if policy_class(policy).learns else None
    results = [simulate(trace, DEVICE, int(share * ALL_BYTES), policy=policy, learn=learn) for share in (0.02, 0.3, 0.3)]
    for result in results:
        result.total.decide_seconds = 0.0  # real time, the only thing that is
    assert results[1] == results[2]
    assert results[0].total.read_bytes >= results[1].total.read_bytes
    assert 0 <= results[1].hit_rate <= 1


def test_what_was_read_ahead_gives_way_where_memory_is_short():
    """Eight experts fit, four of a later layer are pinned, and this layer wants eight: its plan evicts the pinned ones."""
    ledger = Ledger(5, 32, 8192, 4096, 8 * 16384)
    policy = make("hobbit", ledger, 8)
    first, bits = np.arange(2, dtype=np.int32)[None], np.full((1, 8), 4, np.int32)
    policy.plan(0, first, bits[:, :2])
    forecast = np.full((1, 3, 8), NO_FORECAST, np.int32)
    forecast[0, 0, :4] = np.arange(10, 14)
    ahead = policy.prefetch(0, forecast, 4)
    assert ahead is not None and sorted(ahead.read[:, 1]) == [10, 11, 12, 13]
    assert (ledger.width[1, 10:14] == 4).all() and len(policy.pinned) == 4
    plan = policy.plan(2, np.arange(8, dtype=np.int32)[None], bits)
    assert (ledger.width[2, :8] == 4).all() and ledger.used_bytes == 8 * 16384
    assert {(1, e) for e in range(10, 14)} <= {(la, e) for la, e, _ in plan.waves[0].evict.tolist()}


def test_belady_reads_least(seed):
    """Among policies that compute everything at full width and evict whole experts, no other reads less."""
    trace = synthetic_trace(META, tokens=150, seed=seed)
    read = {p: simulate(trace, DEVICE, ALL_BYTES // 3, policy=p).total.read_bytes for p in ("belady", "lru", "lfu", "hebf", "on-demand")}
    assert read["belady"] == min(read.values()) and read["on-demand"] == max(read.values()), read


def test_devices(tmp_path):
    assert parse_rates("io=1.2GB,memory=30GB/s") == (1.2e9, 30e9) and parse_rates("laptop.json") is None
    DEVICE.save(tmp_path / "d" / "x.json")
    assert Device.load(tmp_path / "d" / "x.json") == DEVICE
    assert DEVICE.expert_seconds(3, 11) == pytest.approx((1e-5 + 3e-5) / 2 + 10 * 1.5e-6)
    assert DEVICE.expert_seconds(8, 1) == 3e-5
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match=r"x.json is not a device profile"):
        Device.load(tmp_path / "x.json")


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_trace_and_simulate_on_the_command_line(run, tmp_path, monkeypatch):
    path = str(tmp_path / "t.npz")
    code, out, _ = run("trace", "builtin", "--synthetic", "--tokens", "20", "--prompt-tokens", "8", "--sequences", "2", "--out", path)
    assert code == 0 and "22 steps, 56 tokens, 4 layers" in out and "by chance 12 %" in out
    device = ("--device", "io=1GB,memory=20GB", "--model", "builtin")
    code, out, err = run("simulate", path, *device, "--memory", "40%", "--memory", "2MB", "--policy", "lru", "--policy", "hebf")
    assert code == 0 and out.count("hebf") == out.count("lru") == 2, (out, err)
    code, out, _ = run("simulate", path, *device, "--memory", "40%", "--policy", "lfu", "--json")
    line = json.loads(out)
    m = Trace.load(path).meta
    assert line["memory_bytes"] == int(0.4 * 4 * 16 * (m.base_bytes + 2 * m.plane_bytes))
    same = model_facts(d2moe.builtin_model()).device(device[1], DenseWidths(5))
    found = simulate(Trace.load(path), same, line["memory_bytes"], policy="lfu")
    assert line["hit_rate"] == found.hit_rate and line["tokens_per_s"] == found.tokens_per_s
    for arguments, message in (
        (("simulate", path, "--device", "nothing.json"), "expected a profile's file, or two bandwidths"),
        (("simulate", path, "--device", "io=fast,memory=1GB", "--model", "builtin"), "device is 'fast'"),
        (("simulate", path, *device, "--memory", "0%"), "memory is '0%'"),
        (("simulate", path, *device, "--memory", "10kB"), "does not hold one expert"),
        (("simulate", path, *device, "--learn", path, "--policy", "lru"), "lru learns nothing beforehand"),
        (("simulate", __file__, *device), "is not a trace"),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and message in err and "Traceback" not in err, err
    assert run("simulate", path, "--device", "io=1GB,memory=1GB")[0] == 2
    assert run("simulate", path)[0] == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert 'run "d2moe profile builtin"' in run("simulate", path, "--model", "builtin")[2]
    assert run("trace", "builtin", "--out", path)[0] == 2


def test_plan_needs_no_model_but_its_config(run, tmp_path, monkeypatch):
    monkeypatch.setattr("d2moe.runtime.memory.resident_bytes", lambda: 50_000_000)
    config = Path(d2moe.builtin_model()) / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    rows = []
    for model in (str(tmp_path / "config.json"), "builtin"):
        code, out, err = run(
            "plan", model, "--device", "io=1GB,memory=20GB", "--memory", "90MB", "--bits", "2", "--bits", "8", "--context", "256", "--json"
        )
        assert code == 0, err
        rows.append([json.loads(line) for line in out.splitlines()])
    assert rows[0] == rows[1], "the shape says all"
    narrow, wide = rows[0]
    assert narrow["tokens_per_s"] > wide["tokens_per_s"] and narrow["bits"] == 2
    code, out, _ = run("plan", "builtin", "--device", "io=1GB,memory=20GB", "--memory", "90MB", "--context", "256", "--target", "1")
    assert code == 0 and "1 tokens/s with the least loss: 8 bits in 90.0 MB" in out
    code, out, _ = run("plan", "builtin", "--device", "io=1GB,memory=20GB", "--memory", "90MB", "--context", "256", "--target", "1e9")
    assert code == 0 and "nothing of this reaches" in out
    code, _, err = run("plan", str(tmp_path / "absent"), "--device", "io=1GB,memory=20GB")
    assert code == 1 and "no such model" in err


def test_what_planes_are_worth_does_not_depend_on_when_the_ledger_is_asked(seed):
    rng = np.random.default_rng(seed)
    layers, experts = (int(n) for n in rng.integers(2, 12, 2))
    at_once, by_and_by = (Ledger(layers, experts, 50, 10, 10**6) for _ in range(2))
    for ledger in (at_once, by_and_by):
        for layer, expert in np.ndindex(layers, experts):
            ledger.grow(layer, expert, 8)
    for _ in range(rng.integers(1, 40)):
        first = int(rng.integers(layers - 1))
        size = (int(rng.integers(1, layers - first)), int(rng.integers(1, 5)), 2)
        ids, bits = rng.integers(0, experts, size, np.int32), rng.choice([0, 2, 3, 4, 8], size).astype(np.int32)
        at_once.touch(first, ids, bits)
        by_and_by.touch(first, ids, bits)
        by_and_by.heat()
    n_bytes = 10**6 - at_once.used_bytes + int(rng.integers(1, at_once.used_bytes // 2))
    assert np.array_equal(at_once.heat(), by_and_by.heat())
    assert at_once.make_room(n_bytes, 0, set()) == by_and_by.make_room(n_bytes, 0, set())


@pytest.mark.parametrize("dense", [False, True])
def test_the_least_valuable_plane_goes_first(seed, dense):
    """`make_room` against a search through all planes for each eviction, and demands against their definition."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k = (6, 1, 1) if dense else (3, 8, 2)
    ledger = Ledger(layers, experts, 50, 10, 100 * layers)
    ledger.takes_turns = dense
    demand, seen, worth = np.zeros((layers, experts, 7)), np.zeros(layers), np.zeros((layers, experts, 7))
    for call in range(300):
        layer, tokens = call % layers, int(rng.integers(1, 4))
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
        bits = rng.integers(2, 9, ids.shape).astype(np.int32)
        ledger.touch(layer, ids[None].copy(), bits[None].copy())
        wanted = np.array([[((ids == e) & (bits >= b)).sum() for b in range(2, 9)] for e in range(experts)])
        demand[layer] = demand[layer] * 2 ** (-1 / HALF_LIFE) + wanted
        seen[layer] = seen[layer] * 2 ** (-1 / HALF_LIFE) + tokens
        worth[layer] = demand[layer] / seen[layer] + LAST_CALL * wanted / tokens
        pinned, width = set(ids.reshape(-1).tolist()), ledger.width.copy()
        found = ledger.make_room(short := int(rng.integers(0, 150)), layer, pinned)
        expected: dict[tuple[int, int], int] = {}
        while ledger.prefix_bytes[width].sum() + short > ledger.limit_bytes:
            planes = [
                (worth[la, e, b - 2] + (1e-6 * ((layer - la) % layers) if dense else 0), la, -e, -b)
                for la, e in np.argwhere(width > 0).tolist() for b in range(2, width[la, e] + 1) if la != layer or e not in pinned
            ]  # fmt: skip
            if not planes:
                break
            _, la, e, b = min(planes)
            width[la, -e] = expected[la, -e] = -b - 1 if b < -2 else 0
        if found is None:
            assert ledger.prefix_bytes[width].sum() + short > ledger.limit_bytes
        else:
            assert found == expected and np.array_equal(ledger.width, width)
            assert ledger.used_bytes == ledger.prefix_bytes[ledger.width].sum() <= ledger.limit_bytes - short
            room = ledger.limit_bytes - ledger.used_bytes
            for e in pinned:
                most = int(bits[ids == e].max())
                if ledger.prefix_bytes[most] - ledger.prefix_bytes[ledger.width[layer, e]] <= room:
                    ledger.grow(layer, e, most)
                    room = ledger.limit_bytes - ledger.used_bytes


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_compiled_plan_is_the_definition(seed, share):
    """Waves, residency and errors of `hebf.plan` and `hebf.define` over calls of all kinds, some of which fit in waves only."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k = int(rng.integers(1, 6)), int(rng.integers(4, 40)), int(rng.integers(1, 5))
    both = [Ledger(layers, experts, 50, 10, max(100, int(share * 110 * layers * experts))) for _ in range(2)]
    turns = bool(rng.integers(2))
    waves = refused = 0
    for ledger in both:
        ledger.takes_turns = turns
    for _ in range(200):
        layer, tokens = int(rng.integers(layers)), int(rng.choice([1, 1, 2, 5, 20]))
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
        bits = rng.choice([0, 2, 3, 4, 8] if rng.integers(2) else [4], ids.shape).astype(np.int32)
        asked = np.where(bits > 0, 4, 0).astype(np.int32) if rng.integers(2) else None
        if rng.integers(4) == 0:  # calls that went by, and a budget that moves
            limit = int(rng.integers(50, 110 * layers * experts)) if rng.integers(2) else both[0].limit_bytes
            for ledger in both:
                ledger.touch(layer, ids[None], bits[None])
                ledger.limit_bytes = limit
                ledger.make_room(0, 0, set())
        plans = []
        for ledger, way in zip(both, (hebf.define, hebf.plan), strict=True):
            try:
                plans.append(way(ledger, layer, ids, bits, asked))
            except MemoryBudgetError as error:
                plans.append(str(error))
        expected, found = plans
        if isinstance(expected, str):
            assert found == expected
            refused += 1
            continue
        assert len(found.waves) == len(expected.waves) and found.missing_bytes == expected.missing_bytes
        for one, other in zip(found.waves, expected.waves, strict=True):
            assert one.read_bytes == other.read_bytes
            for name in ("evict", "read", "experts"):
                a, b = getattr(one, name), getattr(other, name)
                assert a.dtype == b.dtype == np.int32 and np.array_equal(a, b), name
        waves = max(waves, len(found.waves))
        assert np.array_equal(both[0].width, both[1].width) and both[0].used_bytes == both[1].used_bytes
        assert both[0].used_bytes == both[0].prefix_bytes[both[0].width].sum() <= both[0].limit_bytes
    print("most waves", waves, "refused", refused)
    assert np.array_equal(both[0].heat(), both[1].heat())


@pytest.mark.parametrize("statistics", [Statistics(), Statistics(zipf=0.3), Statistics(again=0.3)])
def test_hebf_is_as_good_as_recency_and_frequency_alone(seed, statistics):
    """Whether a trace is ruled by popularity or by what the last token chose."""
    trace = synthetic_trace(META, tokens=150, seed=seed, statistics=statistics)
    for share in (0.25, 0.5):
        hits = {name: simulate(trace, DEVICE, int(share * ALL_BYTES), policy=name).hit_rate for name in ("hebf", "lru", "lfu")}
        assert hits["hebf"] > max(hits["lru"], hits["lfu"]) - 0.05, hits


def test_reads_in_flight_share_the_device():
    """Three reads at once, two in flight: the first two arrive together, the third after them; one alone pays the latency."""
    device = Device("fixed", 1e6, 0.0, 0.5, {2: (0.1, 0.1)}, (0.0, 0.0), 0.0, facts={"chosen": {"read_depth": 2}})
    experts = SimulatedExperts(device, Ledger(1, 4, 1_000_000, 500_000, 10**9))
    experts.read(np.array([[0, 0, 2], [0, 1, 2], [0, 2, 2]], np.int32))
    experts.compute(0, [(0, 2, 1), (1, 2, 1), (2, 2, 1)])
    # Two of a second each at half the rate until 2.5, 0.1 each of arithmetic beside the third's second, until 3.5; then its own 0.1.
    assert experts.now == pytest.approx(3.6) and experts.stall_s == pytest.approx(2.5 + 0.8)
    experts.read(np.array([[0, 0, 3]], np.int32))
    experts.compute(0, [(0, 2, 1)])
    assert experts.now == pytest.approx(3.6 + 0.5 + 0.5 + 0.1)
