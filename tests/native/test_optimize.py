"""`plan --optimize`: widths by the router's own rule, the widest that reach a target, and a router from measured losses that runs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import d2moe
from d2moe import cli
from d2moe.container import Container, read_router, write_router
from d2moe.errors import ConfigError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.simulate.device import Device
from d2moe.simulate.optimize import from_losses, loss, optimise, widths

MODEL = d2moe.builtin_model()
DEVICE = Device("fixed", 1e8, 1e-5, 1e-4, {2: (1e-5, 1e-6), 8: (4e-5, 3e-6)}, (1e-3, 1e-5), 1e-4)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """The built-in model with a width router that looks at gates alone, which is what a trace holds."""
    path = tmp_path_factory.mktemp("gated") / "copy.d2moe"
    shutil.copytree(MODEL, path)
    write_router(path, None, {})
    write_router(path, from_losses(Container.open(path), record(path, 4)[0]), {"method": "losses"})
    return path


def record(path, bits):
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    tokens = np.random.default_rng(seed).integers(0, 4096, 100).astype(np.int32)
    with Engine.load(path, EngineConfig(context=256, bits=bits)) as engine:
        recorder, sequence = engine.record(0), engine.new_sequence()
        engine.step([Chunk(sequence, tokens[:30], bits, "last")])
        for token in tokens[30:]:
            engine.step([Chunk(sequence, [token], bits, "last")])
        return recorder.trace(), engine.counters.average_bits


@pytest.mark.parametrize("bits", [2, 2.6, 3.3, 8])
def test_widths_are_those_of_the_engine(gated, bits):
    trace, _ = record(gated, bits)
    found = widths(trace, read_router(Container.open(gated)), bits)
    assert np.mean(found == trace.arrays["bits"]) > 0.998  # a value within rounding of its price


def test_the_widest_that_reaches_the_target(gated):
    trace, _ = record(gated, 4)
    router = read_router(Container.open(gated))
    everything = optimise(trace, router, DEVICE, 4_000_000)
    assert [o.bits for o in everything] == [8, 8] and everything[0].loss == 0
    for limits in ({"tokens_per_s": 1.1 * everything[0].tokens_per_s}, {"bytes_per_token": everything[0].bytes_per_token / 2}):
        routed, plain = optimise(trace, router, DEVICE, 4_000_000, **limits)
        for found in (routed, plain):
            assert found.tokens_per_s >= limits.get("tokens_per_s", 0) and found.bytes_per_token <= limits.get("bytes_per_token", 1e18)
            assert 2 <= found.bits < 8
        assert routed.loss < plain.loss, "the same target at less loss than one width for all"
    assert optimise(trace, router, DEVICE, 4_000_000, tokens_per_s=1e9) == (None, None)
    # Of all ways to spend as many bits none loses less.
    bits = widths(trace, router, 3.0)
    assert loss(trace, router, bits) < loss(trace, router, np.random.default_rng().permuted(bits, axis=1))


def test_a_router_from_measured_losses_runs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "copy.d2moe"
    shutil.copytree(MODEL, path)
    write_router(path, None, {})
    trace, _ = record(path, 4)
    trace.save(tmp_path / "trace.npz")
    command = ["plan", str(path), "--device", "io=0.05GB,memory=20GB", "--memory", "90MB", "--context", "256", "--optimize"]
    monkeypatch.setattr("d2moe.runtime.memory.resident_bytes", lambda: 70_000_000)
    assert cli.main([*command, "--target-bytes", "300kB", "--trace", str(tmp_path / "trace.npz"), "--write", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["routed"]
    assert found["bytes_per_token"] <= 300_000
    _, average = record(path, 3.5)
    assert abs(average - 3.5) < 0.15
    assert cli.main([*command, "--target", "1", "--trace", str(tmp_path / "trace.npz"), "--write"]) == 1
    assert "route remove" in capsys.readouterr().err
    assert cli.main([*command, "--target", "1"]) == 2 and cli.main([*command[:-1], "--target-bytes", "1MB"]) == 2
    container = Container.open(path)
    container.manifest.quantizer.pop("targets")
    with pytest.raises(ConfigError, match="neither measured losses nor a width router"):
        from_losses(container, trace)
