"""The simulator beside the engine: speed, hit rate and bytes of the same tokens, on a device profiled in the same minutes.

    python benchmarks/simulated.py --folder /tmp --rounds 3          7 GB of disk, 5 GB of memory

The model has OLMoE-1B-7B's shape and random weights; its tokens are stream.py's, decoded at 4 bits. In a round the device is
profiled, then a fresh engine with empty slots decodes at each budget, and the simulator replays the trace with the profile of the
round. Bytes wanted, missing and read must be the same to the last one; the command fails if they are not. Ratios of speed are of one
round. Where they are off, the parts of a token tell which figure of the profile it is: milliseconds stalled, in the experts'
arithmetic, deciding, and all else. "disk of the run" is the simulator with the profile's read rate corrected by how plain reads
between the engine's tokens compare with plain reads around the profile: a shared disk is not the same one a minute later.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from limited import FOLDER, LAYERS, OUT, Pace, a_model, cell, table_of, watched, write
from own_limited import Disk
from stream import text

from d2moe.container import Container
from d2moe.evaluate.profile import profile, profile_tokens
from d2moe.policy.trace import Trace
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.runtime.streamer import Counters
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.simulate.device import Device
from d2moe.simulate.simulate import simulate

BITS = 4
EXACT = ("read_bytes", "wanted_bytes", "missing_bytes", "reads", "plans", "tokens")
NAMES = ("engine", "simulator", "disk of the run")
PARTS = ("stall", "experts", "deciding", "else")


def config(size: int, **more: Any) -> EngineConfig:
    return EngineConfig(expert_memory_bytes=size, bits=BITS, uniform=True, context=512, **more)


def decode(engine: Engine, fed: Any, prompt: int) -> tuple[Counters, float | None]:
    """Feed a prompt, then token by token; what the latter took, and the disk's rate meanwhile."""
    sequence = engine.new_sequence()
    engine.step([Chunk(sequence, fed[:prompt], BITS, "last", True)])
    begin = before = engine.counters.snapshot()
    disk = Disk(engine.container)
    for token in fed[prompt:]:
        engine.step([Chunk(sequence, [token], BITS, "last", True)])
        used, before = engine.counters - before, engine.counters.snapshot()
        disk.add(used.step_seconds, used.read_bytes)
    disk.add(0.0, 0, last=True)
    return engine.counters.snapshot() - begin, disk.rate


def first_step(trace: Trace) -> Trace:
    """The prompt of a trace."""
    a, m = trace.arrays, trace.meta
    tokens, wanted = int(a["tokens"][0]), int(a["wanted"][0])
    calls = tokens * (m.layers - m.ends_with_moe) + wanted * m.ends_with_moe
    ends = {"tokens": 1, "wanted": 1, "rows": wanted, "position": tokens, "sequence": tokens}
    return Trace(m, {name: array[: ends.get(name, calls)] for name, array in a.items()})


def simulated(trace: Trace, device: Device, size: int) -> Counters:
    """Counters of the steps after the prompt; deciding takes what the profile says, not what this process took."""
    found = simulate(trace, device, size).total - simulate(first_step(trace), device, size).total
    found.decide_seconds = found.plans * device.decide_s
    return found


def parts(used: Counters) -> dict[str, float]:
    """Milliseconds of a token."""
    spent = (used.stall_seconds, used.compute_seconds, used.decide_seconds)
    return {name: 1e3 * s / used.tokens for name, s in zip(PARTS, (*spent, used.step_seconds - sum(spent)), strict=True)}


@click.command(help=__doc__)
@FOLDER
@LAYERS
@OUT
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--share", "shares", multiple=True, type=float, default=(25, 35, 50, 75), show_default=True, help="Of the experts, %.")
@click.option("--prompt", default=64, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Decoded in each run.")
@click.option("--again", default=0.35, show_default=True, help="Chance that a token is the one before.")
def main(folder: Path, layers: int, out: Path | None, rounds: int, shares: tuple[float, ...], prompt: int, tokens: int,
         again: float) -> None:  # fmt: skip
    path = a_model(folder, layers)
    container = Container.open(path)
    everything = len(container.moe_layers) * container.experts * container.record.prefix_bytes(BITS)
    fed = text(1, prompt + tokens, again, seed=1)[0]
    words = profile_tokens(Tokenizer.load(path).encode)
    with Engine.load(path, config(everything)) as engine:
        recorder = engine.record(0)
        decode(engine, fed, prompt)
        trace = recorder.trace()
    same, chance = trace.overlap()
    lines: list[dict[str, Any]] = []
    pace = Pace(rounds * (1 + len(shares)))
    for index in range(rounds):
        pace.tell(f"round {index + 1}, profile")
        with Engine.load(path, config(everything)) as engine:
            rates = [Disk(container).rate]
            device = profile(engine, words)
            rates.append(Disk(container).rate)
        chosen = {k: device.facts["chosen"][k] for k in ("direct", "read_depth")}
        for share in shares:
            pace.tell(f"round {index + 1}, {share:g} %")
            size, found = int(everything * share / 100), {}

            def measure(size: int = size, found: dict[str, Counters] = found, chosen: dict[str, Any] = chosen) -> dict[str, Any]:
                with Engine.load(path, config(size, **chosen)) as engine:
                    found["engine"], rate = decode(engine, fed, prompt)
                return {"disk_bytes_per_s": rate}

            line = watched(measure)
            found["simulator"] = simulated(trace, device, size)
            if line["disk_bytes_per_s"] and None not in rates:
                # As far as the disk has become faster or slower since the profile was taken, if all of it shows.
                now = device.read_bytes_per_s * line["disk_bytes_per_s"] / statistics.fmean(rates)
                found["disk of the run"] = simulated(trace, replace(device, read_bytes_per_s=now), size)
            for key in EXACT:
                a, b = (getattr(found[name], key) for name in ("engine", "simulator"))
                if a != b:
                    raise click.ClickException(f"{share:g} %: {key} is {a:,} in the engine and {b:,} in the simulator, expected the same")
            line |= {"benchmark": "simulated", "layers": layers, "round": index, "share": share, "experts_again": same, "chance": chance}
            for name, used in found.items():
                line[name] = {
                    "tokens_per_s": used.tokens / used.step_seconds,
                    "hit_rate": used.hit_rate,
                    "bytes_per_token": used.read_bytes / used.tokens,
                    "ms": parts(used),
                }
                line[name]["ratio"] = line[name]["tokens_per_s"] / line["engine"]["tokens_per_s"]
            line["device"] = {
                "read_bytes_per_s": device.read_bytes_per_s, "read_each_s": device.read_each_s, "read_latency_s": device.read_latency_s,
                "dense_s": device.dense_s, "expert_s": device.expert_s[BITS], "decide_s": device.decide_s, **chosen,
            }  # fmt: skip
            lines.append(line)
            click.echo(f"    simulator {line['simulator']['ratio'] - 1:+.1%}, others {line['others']:.0%}", err=True)
    rows = []
    for share in shares:
        mine = [line for line in lines if line["share"] == share]
        for name in [name for name in NAMES if name in mine[0]]:
            of = [line[name] for line in mine]
            row = [f"{share:g} %", name, cell([o["tokens_per_s"] for o in of], around=True), cell([o["hit_rate"] for o in of[:1]], 1, 100)]
            row += [cell([o["bytes_per_token"] for o in of[:1]], 1, 1e-6), *(cell([o["ms"][part] for o in of], 1) for part in PARTS)]
            row += [cell([o["ratio"] for o in of], around=True), cell([line["others"] for line in mine], 0, 100)]
            rows.append(row)
    heads = ("slots", "", "tokens/s", "hit, %", "MB/token", *(f"{part}, ms" for part in PARTS), "ratio", "others, %")
    title = f"medians of the rounds, speed with low and high; {same:.0%} of a token's experts come again, by chance {chance:.0%}"
    table_of(title, heads, rows)
    write(out, lines)


if __name__ == "__main__":
    sys.exit(main())
