"""The budget of a loaded engine goes down and up; memory comes back, and nothing shows in the logits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import d2moe
from d2moe.errors import MemoryBudgetError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

RUN = """
import sys
import numpy as np
import d2moe
from d2moe.runtime.memory import resident_bytes
model = d2moe.load(bits=8, context=256)
engine = model.engine
model.generate(np.random.default_rng().integers(1, 4000, 200).tolist(), max_tokens=1)
held = engine.ledger.used_bytes
assert held > 8e6, held
least = engine.budget.fixed + engine.container.record.record_bytes
before = resident_bytes()
engine.set_memory(least)
fell = before - resident_bytes()
print(held, engine.ledger.used_bytes, fell)
assert engine.ledger.used_bytes <= engine.container.record.record_bytes
assert fell > 0.9 * (held - engine.ledger.used_bytes), (held, fell)
"""


def test_resident_memory_falls_at_once():
    out = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr


def test_down_and_up_does_not_show():
    rng = np.random.default_rng()
    tokens = rng.integers(0, 4096, 120).astype(np.int32)
    with Engine.load(d2moe.builtin_model(), EngineConfig(context=256)) as engine:
        expected = engine.step([Chunk(engine.new_sequence(), tokens, 4, "all")])
    with Engine.load(d2moe.builtin_model(), EngineConfig(context=256)) as engine:
        whole, record, sequence = engine.budget, engine.container.record.record_bytes, engine.new_sequence()
        found = []
        for part in np.split(tokens, np.arange(10, 120, 10)):
            found.append(engine.step([Chunk(sequence, part, 4, "all")]))
            engine.set_memory(whole.fixed + int(rng.integers(record, 30 * record)))
            assert engine.ledger.used_bytes <= engine.budget.experts <= engine.budget.memory - whole.fixed
        assert np.array_equal(np.concatenate(found), expected)
        engine.set_memory(whole.memory + 10**9)
        assert engine.budget.experts == whole.experts, "more than all experts is of no use"
        with pytest.raises(MemoryBudgetError, match="least that would do is"):
            engine.set_memory(whole.fixed + record - 1)
        assert engine.budget.memory == whole.memory + 10**9
