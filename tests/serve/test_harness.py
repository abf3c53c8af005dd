"""Other people's clients and fuzzers against the server: pip install 'd2moe[harness]', in an environment of its own if you like."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import NAME, serving

import d2moe
from d2moe.runtime.generate import Model
from d2moe.runtime.request import Chunk
from d2moe.serve.service import Limits

TASK = """
task: pets
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
QUESTIONS = [
    ("Once upon a time, there was a little", [" girl", " named", " of the quickly"]),
    ("The dog was very", [" happy.", " seven."]),
    ("Lily saw a big", [" tree in the park", " was", " cat"]),
    ("Tom and his mom went to the", [" park.", " park", " eats"]),
]


def needs(module: str) -> Any:
    why = f"{module} against the server is NOT TESTED: pip install 'd2moe[harness]'"
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=why)


def scored(model: Model, context: str, answer: str) -> tuple[float, bool]:
    """Log-probability of `answer` after `context`, and whether the model would have written it, straight from the engine."""
    before = model.tokenizer.encode(context, add_special=False)
    tokens = model.tokenizer.encode(context + answer, add_special=False)
    engine: Any = model.engine
    sequence = engine.new_sequence()
    logits = engine.step([Chunk(sequence, tokens, engine.config.bits, "all")]).astype(np.float64)
    sequence.free()
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = range(len(before) - 1, len(tokens) - 1)
    return sum(logits[row, tokens[row + 1]] for row in rows), all(logits[row].argmax() == tokens[row + 1] for row in rows)


@needs("lm_eval")
def test_lm_evaluation_harness_finds_the_engines_own_likelihoods(tmp_path: Path, server: SimpleNamespace, alone: Model) -> None:
    data = tmp_path / "pets.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": c, "answer": 0}) + "\n" for q, c in QUESTIONS))
    (tmp_path / "pets.yaml").write_text(TASK % data)
    facts = f"model={NAME},base_url={server.url}/v1/completions,tokenizer={d2moe.builtin_model()},num_concurrent=4,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", facts, "--include_path", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--tasks", "pets", "--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True, text=True, check=False, timeout=500, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_pets*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question, choices = QUESTIONS[sample["doc_id"]]
        for (said,), choice in zip(sample["resps"], choices, strict=True):
            value, greedy = scored(alone, question, choice)
            assert float(said[0]) == pytest.approx(value, abs=1e-4), (question, choice)
            assert str(said[1]) == str(greedy), (question, choice)


@needs("schemathesis")
def test_no_request_that_its_description_allows_or_forbids_breaks_it() -> None:
    """schemathesis makes requests up from /openapi.json, right and wrong ones; none may be a server error."""
    program = Path(sys.executable).parent / "schemathesis"
    seed = int(np.random.default_rng().integers(1 << 31))
    with serving(Limits(tokens=8, queue=256)) as server:
        command = [str(program), "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--seed", str(seed)]
        done = subprocess.run(
            [*command, "--max-examples", os.environ.get("EXAMPLES", "25"), "--request-timeout", "60"],
            capture_output=True, text=True, check=False, timeout=580,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert re.search(r"[1-9]\d* generated", done.stdout), done.stdout[-2000:]
        assert server.http.get("/health").json()["status"] == "ok"
        assert server.service.engine.pages.available == server.service.engine.pages.blocks
