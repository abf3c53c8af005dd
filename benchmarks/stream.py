"""Decoding from storage by policy and budget, on a model of OLMoE-1B-7B's shape with random weights, side by side.

    python benchmarks/stream.py --folder /tmp                       7 GB of disk, up to 4 GB of memory
    python benchmarks/stream.py --folder /tmp --policy hebf --policy lru --share 50 --batch 1 --batch 4

Each run is a fresh engine with empty slots and reads past the page cache; policies take turns within a budget. All of them
are fed the same tokens. Random weights route by the token, so experts that come again as real models' do are made by
repeating tokens (--again) out of a Zipf vocabulary; the share of experts that come again, and chance, are printed with the
results. Ends with one JSON line per run.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import d2moe
from d2moe.container import Container
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise
from d2moe.evaluate.bench import storage_bandwidth
from d2moe.policy import POLICIES
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

ONLINE = [name for name in POLICIES if name != "belady"]
VOCABULARY = 4000


def text(batch: int, tokens: int, again: float, seed: int) -> Any:
    """int [batch, tokens]: each token is the one before with probability `again`, else a Zipf draw."""
    rng = np.random.default_rng(seed)
    words = rng.permutation(np.arange(10, 10 + VOCABULARY))
    drawn = words[np.minimum(rng.zipf(1.2, (batch, tokens)) - 1, VOCABULARY - 1)]
    keep = rng.random((batch, tokens)) < again
    for t in range(1, tokens):
        drawn[:, t] = np.where(keep[:, t], drawn[:, t - 1], drawn[:, t])
    return drawn


def run(path: Path, policy: str, memory: int, bits: int, fed: Any, prompt: int) -> dict[str, Any]:
    """Decode `fed` [batch, tokens] after its first `prompt` tokens; what it took."""
    config = EngineConfig(expert_memory_bytes=memory, bits=bits, context=512, policy=policy, max_sequences=len(fed))
    with Engine.load(path, config) as engine:
        recorder = engine.record(0)
        sequences = [engine.new_sequence() for _ in fed]
        begin = time.perf_counter()
        engine.step([Chunk(s, row[:prompt], bits, "last") for s, row in zip(sequences, fed, strict=True)])
        prompt_s = time.perf_counter() - begin
        before, spans = engine.counters.snapshot(), []
        for t in range(prompt, fed.shape[1]):
            begin = time.perf_counter()
            engine.step([Chunk(s, row[t : t + 1], bits, "last") for s, row in zip(sequences, fed, strict=True)])
            spans.append(time.perf_counter() - begin)
        used = engine.counters.snapshot() - before
        same, chance = recorder.trace().overlap()
        seconds = sum(spans)
        return {
            "policy": policy,
            "batch": len(fed),
            "expert_memory_bytes": memory,
            "bits": bits,
            "tokens_per_s": len(fed) / statistics.median(spans),
            "mean_tokens_per_s": len(fed) * len(spans) / seconds,
            "prompt_s": prompt_s,
            "hit_rate": used.hit_rate,
            "average_bits": used.average_bits,
            "read_bytes_per_token": used.read_bytes / len(spans) / len(fed),
            "read_bytes_per_s": used.read_bytes / seconds,
            "stall_share": used.stall_seconds / seconds,
            "decide_share": used.decide_seconds / seconds,
            "forecast_right": used.forecast_right / used.forecast if used.forecast else None,
            "experts_again": same,
            "chance": chance,
        }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True, help="Where the model is made and kept.")
@click.option("--layers", default=16, show_default=True, help="Layers of the model; OLMoE has 16.")
@click.option("--bits", default=4, show_default=True)
@click.option("--policy", "policies", multiple=True, type=click.Choice(ONLINE), help="Default: all.")
@click.option("--share", "shares", multiple=True, type=float, help="Of the experts' 4-bit size in percent; default 25, 35, 50, 75.")
@click.option("--batch", "batches", multiple=True, type=int, help="Sequences at once; default 1.")
@click.option("--prompt", default=16, show_default=True, help="Tokens of each sequence's prompt.")
@click.option("--tokens", default=32, show_default=True, help="Steps measured.")
@click.option("--again", default=0.35, show_default=True, help="Chance that a token is the one before.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the JSON lines to this file.")
def main(
    folder: Path,
    layers: int,
    bits: int,
    policies: tuple[str, ...],
    shares: tuple[float, ...],
    batches: tuple[int, ...],
    prompt: int,
    tokens: int,
    again: float,
    out: Path | None,
) -> None:
    path = folder / f"olmoe-shape-{layers}.d2moe"
    if not path.exists():
        click.echo(f"making {path} …", err=True)
        synthesise(path, OLMOE_1B_7B | {"num_hidden_layers": layers}, d2moe.builtin_model() / "tokenizer.json")
    container = Container.open(path)
    whole = len(container.moe_layers) * container.experts * container.record.prefix_bytes(4)
    found = []
    for batch in batches or (1,):
        fed = text(batch, prompt + tokens, again, seed=batch)
        for share in shares or (25, 35, 50, 75):
            disk = storage_bandwidth(container, bits)
            for policy in policies or ONLINE:
                line = run(path, policy, int(whole * share / 100), bits, fed, prompt)
                line |= {"share": share, "disk_bytes_per_s": disk}
                found.append(line)
                click.echo(
                    f"batch {batch:2} {share:3.0f} % {policy:10} {line['tokens_per_s']:6.2f} tokens/s  {line['hit_rate']:5.1%} hit  "
                    f"{line['average_bits']:.2f} bits  {line['read_bytes_per_token'] / 1e6:6.1f} MB/token  "
                    f"{line['read_bytes_per_s'] / 1e9:.2f} GB/s of {(disk or 0) / 1e9:.2f}  deciding {line['decide_share']:.1%}  "
                    f"experts again {line['experts_again']:.0%}, by chance {line['chance']:.0%}",
                    err=True,
                )
    lines = "".join(json.dumps(line) + "\n" for line in found)
    click.echo(lines, nl=False)
    if out is not None:
        with out.open("a") as file:
            file.write(lines)


if __name__ == "__main__":
    main()
