"""Zero-shot tasks through lm-evaluation-harness, and JSON that no grammar forces, at 8 bits and at dials of the width router.

    python benchmarks/tasks.py MODEL --data ../shared/data/tasks --limit 200
    python benchmarks/tasks.py MODEL --data ../shared/data/tasks --tasks json

Needs lm-eval (pip install lm-eval). Data: arc_easy.jsonl, boolq.jsonl, lambada_openai.jsonl, piqa.jsonl, winogrande.jsonl and
hellaswag_val_full.txt (llama.cpp's form) in --data; prompts are those of the harness's own tasks. Every setting is the engine as a user
gets it: `8` is uniform INT8, `6.5` is a dial between the paper's V2 widths of 5 to 8, `3` between its V1 widths of 2 to 4. One JSON line
for each setting and task; a table at the end, accuracy ± its standard error in per cent, and how far each answer differs from that at 8
bits in units of the standard error of the difference over the same items.

json: lines of JSON follow lines of JSON in the prompt, 40 prompts greedily and at temperature 0.7; counted is what json.loads takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import d2moe
from d2moe.runtime.request import Chunk

TASKS: dict[str, dict[str, Any]] = {
    "lambada": {"file": "lambada_openai.jsonl", "doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}"},
    "piqa": {"file": "piqa.jsonl", "doc_to_text": "{{query}}Answer:"},
    "arc_easy": {"file": "arc_easy.jsonl", "doc_to_text": "{{query}}\nAnswer:"},
    "hellaswag": {"file": "hellaswag_val_full.txt", "doc_to_text": "{{query}}"},
    "boolq": {"file": "boolq.jsonl", "doc_to_text": "{{query}}?\nAnswer:"},
    "winogrande": {
        "file": "winogrande.jsonl",
        "doc_to_text": "{{gold}}",
        "doc_to_choice": "{{context_options}}",
        "doc_to_target": "{{continuation}}",
    },
}
KINDS = (*TASKS, "json")
"""Everything but lambada and winogrande has choices and the index of the right one."""


def hellaswag(path: Path, folder: Path) -> Path:
    """Six lines an item, context, index of the right ending, four endings, as JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    out = folder / "hellaswag.jsonl"
    items = [{"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]} for i in range(0, len(lines) - 5, 6)]
    out.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return out


def harness_task(name: str, data: Path, folder: Path) -> Any:
    """The task in the harness, on the file in `data`."""
    from lm_eval.api.task import ConfigurableTask

    config = dict(TASKS[name])
    path = data / config.pop("file")
    if name == "hellaswag":
        path = hellaswag(path, folder)
    config |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}, "test_split": "test"}
    if name == "lambada":
        config |= {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]}
    else:
        config = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"} | config
        config |= {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    return ConfigurableTask(config=config)


def language_model(model: d2moe.Model, progress: str) -> Any:
    """The engine as the harness wants it."""
    from lm_eval.api.model import TemplateLM

    class EngineLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return min(model.eos_ids) if model.eos_ids else 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return list(model.tokenizer.encode(string, add_special=bool(add_special_tokens)))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            out = []
            for number, (_, context, answer) in enumerate(requests):
                out.append(loglikelihood(model, context, answer))
                if number % 20 == 0:
                    print(f"{progress}: {number} of {len(requests)}    ", end="\r", file=sys.stderr)
            return out

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("no task here asks for it; use d2moe eval perplexity")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("no task here asks for it")

    return EngineLM()


def loglikelihood(model: d2moe.Model, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
    """(nats of `answer` after `context`, whether it is the greedy one); the end of a context that is too long counts."""
    engine: Any = model.engine
    tokens = [*context, *answer][-(engine.context + 1) :]
    inputs, answer = tokens[:-1], answer[-len(tokens[1:]) :]
    sequence, rows, config = engine.new_sequence(), [], engine.config
    try:
        for start in range(0, len(inputs), engine.decoder.max_tokens):
            part = inputs[start : start + engine.decoder.max_tokens]
            rows.append(engine.step([Chunk(sequence, part, config.bits, "all", config.uniform)]).copy())
    finally:
        sequence.free()
    logits = np.concatenate(rows)[-len(answer) :].astype(np.float64)
    targets = np.asarray(answer)
    logits -= logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(-1))
    return float(picked.sum()), bool((logits.argmax(-1) == targets).all())


def run_tasks(model: d2moe.Model, names: Sequence[str], data: Path, limit: int | None, setting: str) -> dict[str, list[float]]:
    """Whether each item was right, by task."""
    from lm_eval.evaluator import evaluate

    with tempfile.TemporaryDirectory() as folder:
        tasks = [harness_task(name, data, Path(folder)) for name in names]
        found = evaluate(
            lm=language_model(model, setting),
            task_dict=dict(zip(names, tasks, strict=True)),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: [float(sample["acc"]) for sample in found["samples"][name]] for name in names}


NAMES = ["Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy", "Tim", "Sue"]
THINGS = ["ball", "cat", "dog", "car", "doll", "boat", "cake", "book", "hat", "kite"]


def run_json(model: d2moe.Model, setting: str) -> dict[str, list[float]]:
    """Whether each answer is JSON."""
    right: dict[str, list[float]] = {}
    for temperature in (0.0, 0.7):
        rng, made = random.Random(0), right.setdefault(f"json, temperature {temperature:g}", [])
        for number in range(40):
            lines = [json.dumps({"name": rng.choice(NAMES), "age": rng.randint(2, 9), "likes": rng.choice(THINGS)}) for _ in range(4)]
            prompt = "\n".join(lines) + '\n{"name":'
            answer = model.generate(prompt, temperature=temperature, seed=number, max_tokens=48, stop=("\n",)).text
            try:
                made.append(float(isinstance(json.loads('{"name":' + answer), dict)))
            except ValueError:
                made.append(0.0)
            if number == 0:
                print(f"{setting}, temperature {temperature:g}: {answer!r}", file=sys.stderr)
    return right


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def cell(values: Sequence[float], base: Sequence[float]) -> str:
    """Accuracy ± standard error, and the difference from `base` in standard errors of the paired differences."""
    text = f"{100 * statistics.mean(values):.1f} ± {100 * error(values):.1f}"
    differences = [a - b for a, b in zip(values, base, strict=True)]
    spread = error(differences)
    return text + (f" ({statistics.mean(differences) / spread:+.1f})" if spread > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--dials", nargs="+", type=float, default=[6.5, 3.0], help="beside uniform 8 bits [default: 6.5 3]")
    parser.add_argument("--limit", type=int, help="items of each task [default: all]")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for setting, bits, uniform in [("uniform 8", 8.0, True), *((f"dial {bits:g}", bits, False) for bits in options.dials)]:
        with d2moe.load(options.model, bits=bits, uniform=uniform, threads=options.threads) as model:
            chosen = [name for name in options.tasks if name != "json"]
            mine = run_tasks(model, chosen, options.data, options.limit, setting) if chosen else {}
            if "json" in options.tasks:
                mine |= run_json(model, setting)
            average = model.engine.counters.average_bits
        for name, values in mine.items():
            row = {"setting": setting, "task": name, "items": len(values), "accuracy": statistics.mean(values), "stderr": error(values)}
            print(json.dumps(row | {"average_bits": average}), file=sys.stderr)
            found.setdefault(name, {})[setting] = values
    settings = list(next(iter(found.values())))
    print("| task (items) | " + " | ".join(settings) + " |")
    print("|---" * (len(settings) + 1) + "|")
    for name, row in found.items():
        print(f"| {name} ({len(row[settings[0]]):,}) | " + " | ".join(cell(row[s], row[settings[0]]) for s in settings) + " |")


if __name__ == "__main__":
    main()
