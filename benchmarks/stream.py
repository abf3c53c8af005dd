"""Decoding from storage by policy and budget, on a model of OLMoE-1B-7B's shape with random weights, side by side.

    python benchmarks/stream.py --folder /tmp                       7 GB of disk, up to 4 GB of memory
    python benchmarks/stream.py --folder /tmp --policy hebf --policy lru --share 50 --batch 1 --batch 4 --rounds 3
    python benchmarks/stream.py --folder /tmp --ablation --batch 8           the paper's steps, one after the other

Each run is a fresh engine with empty slots and reads past the page cache; policies take turns within a budget, and speeds are medians
over --rounds. All of them are fed the same tokens. Random weights route by the token, so experts that come again as real models' do are
made by repeating tokens (--again) out of a Zipf vocabulary; the share of experts that come again, and chance, are printed with the
results. Ends with one JSON line per run.

The ablation goes from loading on demand at 4 bits to router widths, nested experts instead of a copy per width, HEBF's order and
the budget that keeps planes, beside all in memory and EdgeMoE, with the paper's own gains. Its width router is made for the model: a
plane is worth gate² / 4^bits, priced on the tokens' own gates.
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
from d2moe.container import Container, read_router, write_router
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise
from d2moe.evaluate.bench import storage_bandwidth
from d2moe.policy import POLICIES
from d2moe.policy.on_demand import OnDemand
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.simulate.optimize import priced

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


class HottestFirst(OnDemand):
    """Loading on demand, what most tokens want first."""

    name = "on-demand, hottest first"
    hottest_first = True


DIAL = 3.0  # a float goes through the router, a whole number is one width for all
ABLATION = (
    ("all in memory, 8 bits", "hebf", 8, 2.0, ""),
    ("all in memory, 4 bits", "hebf", 4, 1.0, ""),
    ("EdgeMoE, 4 bits", "edgemoe", 4, 0.0, ""),
    ("on demand, 8 bits", "on-demand", 8, 0.0, ""),
    ("on demand, 4 bits", "on-demand", 4, 0.0, ""),
    ("+ router widths, a copy each", "copies", DIAL, 0.0, ""),
    ("+ nesting", "on-demand", DIAL, 0.0, "1.91-4.95 over copies"),
    ("+ HEBF", "hottest-first", DIAL, 0.0, "1.11-1.21"),
    ("+ budget", "hebf", DIAL, 0.0, "1.06-1.21; over EdgeMoE 1.06-1.39, over on demand 1.42-3.37"),
)
"""Name, policy, width, share of the experts' 4-bit size (0: as asked for), and the paper's gain over the step before."""


def give_router(path: Path, fed: Any, prompt: int) -> None:
    """A width router for a model of random weights, which has no losses to measure."""
    with Engine.load(path, EngineConfig(bits=2, context=512, max_sequences=len(fed), uniform=True)) as engine:
        recorder = engine.record(0)
        engine.step([Chunk(engine.new_sequence(), row[: prompt + 8], 2, "last", True) for row in fed])
        trace = recorder.trace()
    shape = (len(Container.open(path).moe_layers), Container.open(path).experts, 6)
    write_router(path, priced(np.broadcast_to(-np.log(4.0) * np.arange(3, 9), shape).copy(), trace), {"method": "made up"})


def run(path: Path, policy: str, memory: int, bits: float, fed: Any, prompt: int) -> dict[str, Any]:
    """Decode `fed` [batch, tokens] after its first `prompt` tokens; what it took."""
    config = EngineConfig(expert_memory_bytes=memory, bits=bits, context=512, policy=policy, max_sequences=len(fed))
    uniform = isinstance(bits, int)
    with Engine.load(path, config) as engine:
        recorder = engine.record(0)
        sequences = [engine.new_sequence() for _ in fed]
        begin = time.perf_counter()
        engine.step([Chunk(s, row[:prompt], bits, "last", uniform) for s, row in zip(sequences, fed, strict=True)])
        prompt_s = time.perf_counter() - begin
        before, spans = engine.counters.snapshot(), []
        for t in range(prompt, fed.shape[1]):
            begin = time.perf_counter()
            engine.step([Chunk(s, row[t : t + 1], bits, "last", uniform) for s, row in zip(sequences, fed, strict=True)])
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


def alternated(
    path: Path, container: Container, steps: list[Any], fed: Any, prompt: int, rounds: int, share: float | None = None
) -> list[dict[str, Any]]:
    """Run (name, policy, bits, bytes for experts, the paper's gain) in turns; a line each, the speed the median of its rounds."""
    kept: list[list[dict[str, Any]]] = [[] for _ in steps]
    disk = storage_bandwidth(container, 4)
    for _ in range(rounds):
        for lines, (_, policy, bits, memory, _) in zip(kept, steps, strict=True):
            lines.append(run(path, policy, memory, bits, fed, prompt))
    found = []
    for lines, (name, _, _, _, gain) in zip(kept, steps, strict=True):
        speeds = [line["tokens_per_s"] for line in lines]
        line = lines[0] | {"name": name, "share": share, "disk_bytes_per_s": disk, "paper": gain, "tokens_per_s_of_rounds": speeds}
        line["tokens_per_s"] = statistics.median(speeds)
        line["gain"] = line["tokens_per_s"] / found[-1]["tokens_per_s"] if found else 1.0
        found.append(line)
        paper = f"; gain over the line before {line['gain']:.2f}, paper {gain}" if gain else ""
        click.echo(
            f"batch {len(fed):2} {line['expert_memory_bytes'] / 1e6:5.0f} MB {name:28} {line['tokens_per_s']:6.2f} tokens/s  "
            f"{line['hit_rate']:5.1%} hit  {line['average_bits']:.2f} bits  {line['read_bytes_per_token'] / 1e6:6.1f} MB/token  "
            f"{line['read_bytes_per_s'] / 1e9:.2f} GB/s of {(disk or 0) / 1e9:.2f}  deciding {line['decide_share']:.1%}  "
            f"experts again {line['experts_again']:.0%}, by chance {line['chance']:.0%}{paper}",
            err=True,
        )
    return found


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
@click.option("--rounds", default=1, show_default=True, help="How often each runs; speeds are medians.")
@click.option("--ablation", is_flag=True, help="The paper's ablation, at the first --share (default 50).")
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
    rounds: int,
    ablation: bool,
    out: Path | None,
) -> None:
    path = folder / f"olmoe-shape-{layers}.d2moe"
    if not path.exists():
        click.echo(f"making {path} …", err=True)
        synthesise(path, OLMOE_1B_7B | {"num_hidden_layers": layers}, d2moe.builtin_model() / "tokenizer.json")
    container = Container.open(path)
    whole = len(container.moe_layers) * container.experts * container.record.prefix_bytes(4)
    found: list[dict[str, Any]] = []
    if ablation:
        POLICIES["hottest-first"] = f"{__name__}:HottestFirst"
    for batch in batches or ((4,) if ablation else (1,)):
        fed = text(batch, prompt + tokens, again, seed=batch)
        if ablation:
            if read_router(container) is None:
                give_router(path, fed, prompt)
            all_of_it = container.record.record_bytes * len(container.moe_layers) * container.experts
            sizes = [min(all_of_it, int(whole * (share or (shares or (50,))[0] / 100))) for _, _, _, share, _ in ABLATION]
            steps = [(n, p, b, size, gain) for (n, p, b, _, gain), size in zip(ABLATION, sizes, strict=True)]
            found += alternated(path, container, steps, fed, prompt, rounds)
            continue
        for share in shares or (25, 35, 50, 75):
            size = int(whole * share / 100)
            found += alternated(path, container, [(p, p, bits, size, "") for p in policies or ONLINE], fed, prompt, rounds, share)
    lines = "".join(json.dumps(line) + "\n" for line in found)
    click.echo(lines, nl=False)
    if out is not None:
        with out.open("a") as file:
            file.write(lines)


if __name__ == "__main__":
    main()
