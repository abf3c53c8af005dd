"""`memory` is the whole process: peak resident memory on a model with more than a gigabyte of experts."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import d2moe
from d2moe.container import Container
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise

SHAPE = OLMOE_1B_7B | {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 12, "eos_token_id": 0}

RUN = """
import json, sys
import numpy as np
import d2moe
from d2moe.runtime.memory import peak_bytes
path, memory = sys.argv[1], int(sys.argv[2])
model = d2moe.load(path, memory=memory, context=512)
rng = np.random.default_rng()
tokens = rng.integers(1, 4000, 200).tolist()
model.generate(tokens, max_tokens=16, temperature=1.0, ignore_eos=True)
print(json.dumps({"peak": peak_bytes(), "hit_rate": model.engine.counters.hit_rate, **model.engine.budget.as_dict()}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "wide.d2moe"
    synthesise(path, SHAPE, d2moe.builtin_model() / "tokenizer.json")
    record = Container.open(path).record
    assert 12 * 64 * record.record_bytes > 10**9
    return path


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_peak_stays_under_the_budget(model, share):
    container = Container.open(model)
    experts = 12 * 64 * container.record.prefix_bytes(4)
    memory = int(share * experts)  # for the whole process, of what the experts alone would take
    out = subprocess.run([sys.executable, "-c", RUN, str(model), str(memory)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout.splitlines()[-1])
    print(facts)
    assert facts["peak"] <= memory, facts
    # And the budget is used, not merely respected: at least three quarters of it.
    assert facts["peak"] >= 0.75 * memory or facts["hit_rate"] > 0.9, facts


def test_too_small_a_budget_names_the_least_and_the_least_works(model):
    def run(memory):
        return subprocess.run([sys.executable, "-c", RUN, str(model), str(memory)], capture_output=True, text=True, check=False)

    refused = run(60_000_000)
    least = re.search(r"MemoryBudgetError: .*least that would do is ([\d.]+) MB", refused.stderr)
    assert refused.returncode and least, refused.stderr
    # A fresh process differs from the last one by some pages.
    memory = int((float(least[1]) + 1) * 1e6)
    out = run(memory)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1])["peak"] <= memory
    assert run(memory - 5_000_000).returncode, "five megabytes less must be refused"
