"""d2moe beside llama.cpp on one machine: models of the same true shape with random weights, everything in memory.

    python benchmarks/versus.py --folder /tmp --peer-python PEER/bin/python --shape olmoe --rounds 3

PEER is a virtual environment of its own with `llama-cpp-python` built for the machine, `gguf`, `numpy` and `click`:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36 gguf numpy click

Makes what is missing in the folder (OLMoE's shape: 7 GB ours, 11 GB the peer's). A round runs every setting once, each as a
fresh process (ours reads its experts from storage in the first of at least three repeats, which the median leaves
out): the peer's types with and without repacking (see peer_llama.py), ours at each width. The order turns by one
each round. Every peer process finds its file in the page cache; ours reads past it and has a budget for all experts.
The ratios are of each round: our generation at 3 and 4 bits to the fastest of all 4-bit settings of the peer, at 2 bits to
the fastest of Q2_K; our prompts to the fastest of all its settings. The peer's fastest is chosen anew in each round and
for each figure. Its tokens are drawn beforehand, while ours are sampled within the time measured. Its threads spin while
they wait for each other, so another busy process costs it a multiple: measure on a quiet machine, or with --quiet 0.05.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import d2moe
from d2moe.container import Container
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise
from d2moe.types import DenseWidths

HERE = Path(__file__).parent
PROMPTS = (512, 64)
FIGURES = ("generation", *(f"prompt {n}" for n in PROMPTS))
BESIDE_EXPERTS = 0.7e9
"""Our budget beyond dense weights and experts: the process, keys and values, the buffers of a prompt."""


@dataclass
class Setting:
    """What is measured: name, commands of one round, and per figure the values of all rounds."""

    name: str
    bits: int
    peer: str = ""  # its type; empty for ours
    file: Path = Path()
    commands: dict[str, list[str]] = field(default_factory=dict)
    found: dict[str, list[float]] = field(default_factory=dict)


def tell(text: str) -> None:
    click.echo(text, err=True)


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object in the last line of a program's output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def warm(path: Path) -> None:
    """Read a file so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def busy_s() -> float:
    """CPU seconds that this machine has spent on anything, time that its host took away included."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peers(
    folder: Path, python: str, shape: str, layers: int | None, types: list[str], tokenizer: Path, options: list[str]
) -> list[Setting]:
    found = []
    for kind in types:
        path = folder / f"{shape}{f'-{layers}' if layers else ''}-{kind}.gguf"
        command = [python, str(HERE / "peer_llama.py"), str(path), *options]
        for repack in ("repack", "no-repack"):
            one = Setting(f"{kind} {repack}", int(kind[1]), kind, path, {"": [*command, f"--{repack}"]})
            found.append(one)
    make = [python, str(HERE / "peer_models.py"), "--shape", shape, "--tokenizer", str(tokenizer)]
    make += ["--layers", str(layers)] if layers else []
    for one in found:
        one.commands["make"] = [*make, "--type", one.peer, str(one.file)]
    return found


def ours(
    path: Path, widths: list[int], memory: str | None, options: list[str], generate: int, depth: int
) -> list[Setting]:
    settings = [Setting(f"ours {bits} bits", bits, file=path) for bits in widths]
    for one in settings:
        base = [sys.executable, "-m", "d2moe", "bench", str(path), "--bits", str(one.bits), *options]

        def command(prompt: int, generated: int, base: list[str] = base, bits: int = one.bits) -> list[str]:
            context = max(max(PROMPTS) + 64, prompt + generated)
            budget = memory or f"{whole_budget(path, bits, context) / 1e6:.0f}MB"
            how = ["--memory", budget, "--context", str(context), "--prompt-tokens", str(prompt)]
            return [*base, *how, "--generate", str(generated)]

        one.commands = {"generation": command(128, generate)} | {f"prompt {n}": command(n, 2) for n in PROMPTS}
        if depth:
            one.commands[f"at {depth}"] = command(depth, generate)
    return settings


def whole_budget(path: Path, bits: int, context: int) -> float:
    """Bytes for everything at this width: dense weights (at 8 bits, the most), all experts, keys and values, the rest."""
    container = Container.open(path)
    config = container.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    experts = len(container.moe_layers) * container.experts * container.record.prefix_bytes(bits)
    cache = config["num_hidden_layers"] * context * width * 2 * 2
    return float(container.dense_bytes(DenseWidths(8)) + 1.02 * experts + cache + BESIDE_EXPERTS)


def measure(one: Setting, depth: int) -> dict[str, float]:
    """The figures of one run of a setting, and "others": the share of all CPUs that went elsewhere meanwhile."""
    wall, own, busy = time.perf_counter(), own_s(), busy_s()
    found: dict[str, float] = {}
    if one.peer:
        line = run(one.commands[""])
        found["generation"] = line["generation_tokens_per_s"]["median"]
        found |= {f"prompt {n}": line["prompt_tokens_per_s"][str(n)]["median"] for n in PROMPTS}
        found |= {"peak": line["peak_bytes"], "anonymous": line["anonymous_bytes"]}
        for kind, deep in line.get("depth", {}).items():
            found[f"at {depth} {kind}"] = deep["generation_tokens_per_s"]["median"]
    else:
        lines = {figure: run(command) for figure, command in one.commands.items()}
        for figure, line in lines.items():
            kind = "prompt" if figure.startswith("prompt") else "generation"
            found[figure] = line[f"{kind}_tokens_per_s"]
        found["peak"] = max(lines[f]["peak_bytes"] for f in FIGURES)
        found |= {k: lines["generation"][k] for k in ("hit_rate", "roofline") if lines["generation"][k] is not None}
    wall, own, busy = time.perf_counter() - wall, own_s() - own, busy_s() - busy
    return found | {"others": max(0.0, busy - own) / (wall * (os.cpu_count() or 1))}


def quietest(one: Setting, depth: int, quiet: float, tries: int) -> dict[str, float]:
    """`measure`, again while others took more than the share `quiet`; the least disturbed one if none was quiet."""
    found: list[dict[str, float]] = []
    while len(found) < tries and (not found or found[-1]["others"] > quiet):
        if one.peer:
            warm(one.file)
        found.append(measure(one, depth))
        figures = ", ".join(f"{figure} {found[-1][figure]:.1f}" for figure in FIGURES)
        tell(f"    {figures}, others {found[-1]['others']:.0%}")
    return min(found, key=lambda f: f["others"])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def ratios(settings: list[Setting], round_index: int) -> dict[tuple[str, str], float]:
    """Our figure over the peer's best comparable one, by our setting and figure."""
    found = {}
    for one in settings:
        for figure in FIGURES if not one.peer else ():
            width = 2 if one.bits == 2 else 4
            comparable = [p for p in settings if p.peer and (figure != "generation" or p.bits == width)]
            best = max((p.found[figure][round_index] for p in comparable), default=0.0)
            if best:
                found[one.name, figure] = one.found[figure][round_index] / best
    return found


def report(settings: list[Setting], per_round: list[dict[tuple[str, str], float]]) -> dict[str, Any]:
    """Print the tables; returns the medians and spreads."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    extra = [f for f in dict.fromkeys(f for one in settings for f in one.found) if f.startswith("at ")]
    figures = [*FIGURES, *extra]
    table = Table(title="tokens/s, memory in GB: median (low to high) of the rounds", title_justify="left")
    for head in ("setting", *figures, "peak", "anonymous", "roofline", "CPU of others"):
        table.add_column(head, justify="left" if head == "setting" else "right")

    def cell(one: Setting, figure: str, digits: int = 1, scale: float = 1) -> str:
        if figure not in one.found:
            return ""
        s = {k: v * scale for k, v in spread(one.found[figure]).items()}
        return f"{s['median']:.{digits}f} ({s['low']:.{digits}f} to {s['high']:.{digits}f})"

    for one in settings:
        memory = [cell(one, f, 2, 1e-9).split(" ")[0] for f in ("peak", "anonymous")]
        shares = [cell(one, f, 2).split(" ")[0] for f in ("roofline", "others")]
        table.add_row(one.name, *(cell(one, f) for f in figures), *memory, *shares)
    console.print(table)
    keys = per_round[0]
    compared = {key: [found[key] for found in per_round] for key in keys}
    if compared:
        table = Table(title="ours / the peer's best comparable setting: median, then each round", title_justify="left")
        for head in ("setting", "figure", "ratio", "rounds"):
            table.add_column(head, justify="right" if head == "ratio" else "left")
        for (name, figure), values in compared.items():
            table.add_row(name, figure, f"{statistics.median(values):.2f}", " ".join(f"{v:.2f}" for v in values))
        console.print(table)
    return {
        "settings": {one.name: {f: spread(v) for f, v in one.found.items()} for one in settings},
        "ratios": {f"{name}, {figure}": spread(v) for (name, figure), v in compared.items()},
    }


def words(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    return [part for part in value.split(",") if part]


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="For models."
)
@click.option(
    "--peer-python", required=True, type=click.Path(exists=True, dir_okay=False), help="Interpreter that has llama-cpp-python and gguf."
)
@click.option("--shape", type=click.Choice(["olmoe", "qwen3-30b"]), default="olmoe", show_default=True)
@click.option("--ours", "container", type=click.Path(path_type=Path, exists=True), help="Our model of that shape.")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers, for trying out.")
@click.option("--types", callback=words, default="Q4_0,Q4_K_M,Q2_K", show_default=True, help="The peer's.")
@click.option("--bits", callback=words, default="2,3,4", show_default=True, help="Our widths.")
@click.option(
    "--only", multiple=True, help='Only settings whose name has this, as "ours" or "Q4_0 repack"; repeatable.'
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(3), default=3, show_default=True, help="Within a process; its median counts."
)
@click.option("--generate", type=click.IntRange(2), default=64, show_default=True)
@click.option("--depth", type=click.IntRange(0), default=0, help="Also generate after so many tokens.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default=True)
@click.option("--memory", help="Our budget [default: enough for all experts at the width].")
@click.option("--dense-bits", type=int, help="Width of our dense weights, passed on to d2moe bench.")
@click.option("--quiet", default=1.0, show_default=True, help="Measure again if others take more of the CPUs, as 0.05.")
@click.option("--tries", type=click.IntRange(1), default=5, show_default=True, help="At most, for --quiet.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="tokenizer.json [default: built in].")
def main(folder: Path, peer_python: str, shape: str, container: Path | None, layers: int | None, types: list[str],
         bits: list[str], only: tuple[str, ...], rounds: int, repeats: int, generate: int, depth: int, threads: int,
         memory: str | None, dense_bits: int | None, tokenizer: Path | None, quiet: float, tries: int) -> None:  # fmt: skip
    """Measure both in turns. Prints tables, then one JSON line."""
    tokenizer = tokenizer or d2moe.builtin_model() / "tokenizer.json"
    both = ["--threads", str(threads), "--repeats", str(repeats)]
    deep = ["--context", str(depth)] if depth else []
    settings = peers(folder, peer_python, shape, layers, types, tokenizer, [*both, *deep, "--generate", str(generate)])

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    settings = [one for one in settings if wanted(one.name)]
    for one in settings:
        if not one.file.exists():
            tell(f"making {one.file} …")
            run(one.commands["make"])
    if any(wanted(f"ours {b} bits") for b in bits):
        path = container or folder / f"{shape}-shape-{layers or 16}.d2moe"
        if not path.exists():
            if shape != "olmoe":
                raise click.UsageError(f"give our model of the shape {shape} with --ours")
            tell(f"making {path} …")
            synthesise(path, OLMOE_1B_7B | {"num_hidden_layers": layers or 16}, tokenizer)
        own = [*both, "--dense-bits", str(dense_bits)] if dense_bits else both
        settings += [o for o in ours(path, list(map(int, bits)), memory, own, generate, depth) if wanted(o.name)]
    if not settings:
        raise click.UsageError("no setting is left to measure")
    per_round = []
    for index in range(rounds):
        for one in [*settings[index % len(settings) :], *settings[: index % len(settings)]]:
            tell(f"round {index + 1} of {rounds}, {one.name}")
            for figure, value in quietest(one, depth, quiet, tries).items():
                one.found.setdefault(figure, []).append(value)
        per_round.append(ratios(settings, index))
    line: dict[str, Any] = {
        "benchmark": "versus",
        "shape": shape,
        "layers": layers,
        "rounds": rounds,
        "repeats": repeats,
    }
    line |= {"threads": threads, "generate": generate, "depth": depth, "dense_bits": dense_bits, "quiet": quiet}
    found = report(settings, per_round)
    print(json.dumps({**line, **found}))


if __name__ == "__main__":
    main()
