"""d2moe beside llama.cpp where neither has room for the model: the same shape, tokens and memory limit, in turns.

    python benchmarks/limited.py beside --folder /tmp/limited --peer-python PEER/bin/python --rounds 2 --out limited.jsonl
    python benchmarks/limited.py curve --folder /tmp/limited --rounds 2 --out curve.jsonl

PEER is a virtual environment as benchmarks/versus.py describes it. Models of OLMoE-1B-7B's shape with random weights are made
where they are missing: 7 GB ours, 4.2 GB a Q4_K_M GGUF file. `beside` needs root: each run is a process in a control group of the
memory controller (version 1 or 2) that counts file pages too, after the page cache was emptied, and the disk's read-ahead is changed
and put back. Close other programs: llama.cpp's threads spin while they wait for each other.

Limits are shares of the GGUF file. llama.cpp uses the file where it is mapped, without repacking, as a copy does not fit: (a) as it
comes, (b) with a read-ahead of 128 KiB, (c) with that and the chosen experts asked for at once by benchmarks/peer_limited.py's callback.
Its default, with repacking, is run once for each limit to show what becomes of it. Ours are one width of 4 bits and averages of
3 and 2.5 bits by a made-up width router (stream.py), with `--margin` less than the limit as `--memory`.

Tokens are "uniform", each its own, or "skewed": repeated ones out of a Zipf vocabulary, so that experts come again as they do in real
models. The share of experts that come again, beside chance, is printed for both engines. A run stops after `--seconds` or `--tokens`;
ratios are of one round, over the tokens that both sides of it decoded. Bytes of ours are its own counters', llama.cpp's are those
of /proc/self/io. "disk" is the rate at which ours read over that of plain direct reads, measured every second between its tokens,
whose buffers it leaves room for. "bound" is the least time, bytes read at that rate or the time not spent waiting, whichever is more,
over the time taken. "peak" is the group's, file pages included. "others" is the share of all CPUs that went to other programs meanwhile.

`curve` is speed and peak resident memory over budgets, in per cent of what the process with all experts at 4 bits takes, without a
control group. "needs" is the rate a disk must have for 90 % of the speed in memory if all its reads were hidden.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import Group, drop_caches, read_ahead, read_ahead_file
from rich import box
from rich.console import Console
from rich.table import Table
from stream import give_router, text
from versus import busy_s, own_s, peers, spread, tell
from versus import run as run_json

import d2moe
from d2moe.container import Container, read_router
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

HERE = Path(__file__).parent
PROMPT, WARM = 64, 2
LEAST = 6
"""Tokens that are measured however long they take."""
READ_AHEAD_KIB = 128
AGAIN = {"uniform": 0.0, "skewed": 0.35}
"""Routings, and the chance that a token is the one before."""


@dataclass
class Setting:
    """What is measured at one limit and routing; `bits` of ours, else llama.cpp. `found` has a line for each round."""

    name: str
    command: list[str]
    limit: int
    routing: str
    bits: float | None = None
    read_ahead_kib: int | None = None
    once: bool = False
    found: list[dict[str, Any]] = field(default_factory=list)


def tokens_of(routing: str, count: int, seed: int) -> Any:
    if AGAIN[routing]:
        return text(1, count, AGAIN[routing], seed)[0]
    return np.random.default_rng(seed).integers(10, 50000, count)


def in_group(one: Setting, extra: list[str], knob: Path | None) -> dict[str, Any]:
    """A run in a new control group with nothing in the page cache: its line, "most_bytes" and "killed" of the group."""
    drop_caches()
    group = Group(one.limit)
    try:
        with read_ahead(knob, one.read_ahead_kib):
            done = subprocess.run([*one.command, *extra], capture_output=True, text=True, check=False, preexec_fn=group.join)
        over = group.over()
    finally:
        group.path.rmdir()
    lines = done.stdout.strip().splitlines()
    if over["killed"]:
        return {"spans": [], **over}
    if done.returncode or not lines:
        raise click.ClickException(f"{' '.join(one.command)} failed with {done.returncode}:\n{done.stderr[-500:]}")
    return {**json.loads(lines[-1]), **over}


class Pace:
    """Tells what runs, and how long the rest takes by the runs so far."""

    def __init__(self, runs: int):
        self.runs, self.done, self.begin = runs, 0, time.perf_counter()

    def tell(self, what: str) -> None:
        left = (time.perf_counter() - self.begin) / self.done * (self.runs - self.done) / 60 if self.done else None
        tell(f"{self.done + 1} of {self.runs}{'' if left is None else f', {left:.0f} minutes left'}: {what}")
        self.done += 1


def speed(line: dict[str, Any]) -> float:
    return len(line["spans"]) / sum(line["spans"]) if line["spans"] else 0.0


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float | None:
    """Our speed over the peer's, on the tokens that both decoded; None where one was killed."""
    n = min(len(ours["spans"]), len(peer["spans"]))
    return sum(peer["spans"][:n]) / sum(ours["spans"][:n]) if n else None


def derived(line: dict[str, Any]) -> dict[str, Any]:
    """`line` with rates per token, and for ours with its share of the disk and of the bound."""
    if not line["spans"]:
        return line
    seconds = sum(line["spans"])
    line |= {"tokens_per_s": speed(line), "read_bytes_per_token": line["read_bytes"] / len(line["spans"])}
    line["read_bytes_per_s"] = line["read_bytes"] / seconds
    if line.get("disk_bytes_per_s"):
        reading = line["read_bytes"] / line["disk_bytes_per_s"]
        line |= {"disk_share": reading / seconds, "bound_share": max(reading, seconds - line["stall_s"]) / seconds}
    return line


def a_model(folder: Path, layers: int) -> Path:
    """Our model of the shape, with a width router."""
    path = folder / f"olmoe-shape-{layers}.d2moe"
    if not path.exists():
        tell(f"making {path} …")
        synthesise(path, OLMOE_1B_7B | {"num_hidden_layers": layers}, d2moe.builtin_model() / "tokenizer.json")
    if read_router(Container.open(path)) is None:
        give_router(path, text(4, PROMPT + 16, AGAIN["skewed"], seed=4), PROMPT)
    return path


def ours(path: Path, bits: float, memory: int, seconds: float, *more: str) -> list[str]:
    how = ["--bits", f"{bits:g}", "--memory", str(memory), "--seconds", str(seconds), "--least", str(LEAST), *more]
    return [sys.executable, str(HERE / "own_limited.py"), str(path), *how]


def named(bits: float) -> str:
    return f"ours, {bits:g} bits" if bits == 4 else f"ours, dial {bits:g}"


@contextlib.contextmanager
def kept_tokens(rounds: int, count: int, routings: list[str]) -> Iterator[dict[tuple[str, int], Path]]:
    """Files of the tokens of each routing and round."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for routing in routings:
            for index in range(rounds):
                found[routing, index] = Path(folder) / f"{routing}-{index}.npy"
                np.save(found[routing, index], tokens_of(routing, count, 1 + index))
        yield found


def turned(settings: list[Setting], index: int) -> list[Setting]:
    """The order of a round: it moves on by one each time."""
    at = index % len(settings)
    return [*settings[at:], *settings[:at]]


def watched(measure: Any) -> dict[str, Any]:
    """A run's line, with the share of all CPUs that went to others meanwhile."""
    wall, own, busy = time.perf_counter(), own_s(), busy_s()
    line: dict[str, Any] = measure()
    wall, own, busy = time.perf_counter() - wall, own_s() - own, busy_s() - busy
    return line | {"others": round(max(0.0, busy - own) / (wall * (os.cpu_count() or 1)), 3)}


def write(out: Path | None, lines: list[dict[str, Any]]) -> None:
    made = "".join(json.dumps(line) + "\n" for line in lines)
    click.echo(made, nl=False)
    if out is not None:
        with out.open("a") as file:
            file.write(made)


def cell(values: list[Any], digits: int = 2, scale: float = 1.0, around: bool = False) -> str:
    """Median of what is a number, with `around` its low and high, too."""
    known = [v * scale for v in values if v is not None]
    if not known:
        return ""
    s = spread(known)
    more = f" ({s['low']:.{digits}f} to {s['high']:.{digits}f})" if around and len(known) > 1 else ""
    return f"{s['median']:.{digits}f}{more}"


def table_of(title: str, heads: tuple[str, ...], rows: list[list[str]]) -> None:
    console = Console(highlight=False, width=None if sys.stderr.isatty() else 170, stderr=True)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number > 2 else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


FOLDER = click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True, help="For models.")
LAYERS = click.option("--layers", type=click.IntRange(1), default=16, show_default=True, help="Fewer, for trying out.")
OUT = click.option("--out", type=click.Path(path_type=Path), help="Append the JSON lines to this file.")
SHARED = (
    FOLDER,
    LAYERS,
    click.option("--rounds", type=click.IntRange(1), default=2, show_default=True),
    click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Measured at most in a run."),
    OUT,
    click.option("--routing", "routings", multiple=True, type=click.Choice(list(AGAIN)), default=list(AGAIN), show_default=True),
)


def shared(command: Any) -> Any:
    """With the options that both commands have."""
    for option in reversed(SHARED):
        command = option(command)
    return command


@click.group(help=__doc__)
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that read-ahead and groups are put back


@main.command()
@shared
@click.option(
    "--peer-python", required=True, type=click.Path(exists=True, dir_okay=False), help="Interpreter that has llama-cpp-python and gguf."
)
@click.option("--limit", "limits", multiple=True, type=float, default=(50, 35), show_default=True, help="Per cent of the GGUF file.")
@click.option("--bits", "widths", multiple=True, type=float, default=(4, 3, 2.5), show_default=True)
@click.option("--seconds", default=12.0, show_default=True, help="Measured in a run, unless all tokens take less.")
@click.option("--margin", default=8.0, show_default=True, help="MB of the limit that --memory leaves.")
@click.option("--wait", is_flag=True, help="Have llama.cpp's prefetch wait for all that it asked for.")
def beside(folder: Path, layers: int, rounds: int, tokens: int, out: Path | None, routings: tuple[str, ...], peer_python: str,
           limits: tuple[float, ...], widths: tuple[float, ...], seconds: float, margin: float, wait: bool) -> None:  # fmt: skip
    """Both engines in the same control group, in turns."""
    try:
        drop_caches()
        Group(1 << 30).path.rmdir()
    except OSError as error:
        raise click.ClickException(f"{error}: this needs root, and a control group's memory controller that can be written") from None
    knob = read_ahead_file(folder)
    if knob is None:
        tell(f"NOT MEASURED: nothing sets the read-ahead of the disk under {folder}, so (b) is left out and (c) has the system's")
    else:
        tell(f"read-ahead is {int(knob.read_text())} KiB in {knob}; should this be killed by SIGKILL, set it back by hand")
    path = a_model(folder, layers)
    only = layers if layers != 16 else None
    model = peers(folder, peer_python, "olmoe", only, ["Q4_K_M"], d2moe.builtin_model() / "tokenizer.json", [])[0]
    if not model.file.exists():
        tell(f"making {model.file} …")
        run_json(model.commands["make"])
    peer = [peer_python, str(HERE / "peer_limited.py")]
    with kept_tokens(rounds, PROMPT + WARM + tokens, list(routings)) as fed, tempfile.NamedTemporaryFile("w", suffix=".json") as ranges:
        json.dump(run_json([*peer, "ranges", str(model.file)]), ranges)
        ranges.flush()
        decode = [*peer, "decode", str(model.file), "--seconds", str(seconds), "--least", str(LEAST)]
        narrow = READ_AHEAD_KIB if knob else None
        bring = ["--prefetch", ranges.name, *(["--wait"] if wait else [])]
        settings = []
        for share in limits:
            limit = int(model.file.stat().st_size * share / 100)
            for routing in routings:
                at = (limit, routing)
                settings.append(Setting("llama.cpp, its default", [*decode, "--repack"], *at, once=True))
                settings.append(Setting("llama.cpp (a)", decode, *at))
                if narrow:
                    settings.append(Setting("llama.cpp (b) read-ahead", decode, *at, read_ahead_kib=narrow))
                settings.append(Setting("llama.cpp (c) prefetch", [*decode, *bring], *at, read_ahead_kib=narrow))
                for bits in widths:
                    command = ours(path, bits, limit - int(margin * 1e6), seconds)
                    settings.append(Setting(named(bits), command, *at, bits=bits))
        again = experts_again(path, [*peer, "decode", str(model.file)], fed, widths)
        pace = Pace(sum(rounds if not one.once else one.routing == routings[0] for one in settings))
        try:
            for index in range(rounds):
                for one in turned(settings, index):
                    if one.once and (one.found or one.routing != routings[0]):
                        continue
                    pace.tell(f"round {index + 1}, {one.limit / 1e9:.2f} GB, {one.routing}, {one.name}")
                    extra = ["--tokens", str(fed[one.routing, index]), "--prompt", str(PROMPT), "--warm", str(WARM)]
                    line = derived(watched(lambda one=one, extra=extra: in_group(one, extra, knob)))
                    one.found.append(line)
                    told = f"{line['tokens_per_s']:.2f} tokens/s over {len(line['spans'])}" if line["spans"] else "KILLED"
                    tell(f"    {told}, peak {line['most_bytes'] / 1e9:.3f} GB, others {line['others']:.0%}")
        finally:  # what was measured before an error or Ctrl-C is not lost
            report(settings, again)
            facts = {"benchmark": "limited", "layers": layers, "file_bytes": model.file.stat().st_size}
            facts["read_ahead_kib"] = int(knob.read_text()) if knob else None
            lines = [facts | {"experts_again": again}]
            for one in settings:
                kept = {"name": one.name, "limit": one.limit, "routing": one.routing, "bits": one.bits, "narrow": bool(one.read_ahead_kib)}
                lines += [facts | kept | {"round": i} | line for i, line in enumerate(one.found)]
            write(out, lines)


def experts_again(path: Path, peer: list[str], fed: dict[tuple[str, int], Path], widths: tuple[float, ...]) -> dict[str, Any]:
    """(share of a token's experts that the one before it chose, chance) of the first round's tokens, by routing and engine."""
    found: dict[str, Any] = {}
    for (routing, index), file in fed.items():
        if index == 0:
            theirs = run_json([*peer, "--tokens", str(file), "--prompt", str(PROMPT), "--routing"])
            ids = np.load(file)
            with Engine.load(path, EngineConfig(bits=widths[0], context=len(ids), uniform=widths[0] == int(widths[0]))) as engine:
                recorder, sequence = engine.record(0), engine.new_sequence()
                for token in ids[PROMPT:]:
                    engine.step([Chunk(sequence, [token], widths[0], "last", engine.config.uniform)])
                same, chance = recorder.trace().overlap()
            found[routing] = {"llama.cpp": (theirs["same_expert_share"], theirs["by_chance"]), "ours": (round(same, 4), chance)}
            told = ", ".join(f"{name} {a:.0%} (chance {b:.0%})" for name, (a, b) in found[routing].items())
            tell(f"{routing}: experts of the token before that come again: {told}")
    return found


def report(settings: list[Setting], again: dict[str, Any]) -> None:
    """The tables: what each did, then ours over each of llama.cpp's by round."""
    rows, compared = [], []
    for one in settings:
        lines = [line for line in one.found if line["spans"]]

        def of(key: str, lines: list[dict[str, Any]] = lines) -> list[Any]:
            return [line.get(key) for line in lines]

        killed = sum(line["killed"] for line in one.found)
        if not one.found:
            continue
        peak = max(line["most_bytes"] for line in one.found) / 1e9
        rows.append([
            f"{one.limit / 1e9:.2f}", one.routing, one.name, cell(of("tokens_per_s"), around=True),
            cell(of("read_bytes_per_token"), 0, 1e-6), cell(of("read_bytes_per_s"), 2, 1e-9),
            cell(of("disk_share"), 0, 100), cell(of("bound_share"), 0, 100),
            cell(of("hit_rate"), 0, 100), cell(of("average_bits")), f"{peak:.3f}", str(killed or ""), cell(of("others"), 0, 100),
        ])  # fmt: skip
        for peer in settings if one.bits is not None else ():
            if peer.bits is None and not peer.once and (peer.limit, peer.routing) == (one.limit, one.routing):
                values = [r for a, b in zip(one.found, peer.found, strict=False) if (r := ratio(a, b)) is not None]
                each = " ".join(f"{v:.2f}" for v in values)
                compared.append([f"{one.limit / 1e9:.2f}", one.routing, one.name, peer.name, cell(values, around=True), each])
    heads = ("limit, GB", "routing", "setting", "tokens/s", "MB/token", "GB/s", "disk, %", "bound, %", "hit, %", "bits", "peak, GB",
             "killed", "others, %")  # fmt: skip
    table_of("medians of the rounds, speed with low and high", heads, rows)
    table_of("ours over llama.cpp, same tokens of one round", ("limit, GB", "routing", "ours", "over", "ratio", "rounds"), compared)
    for routing, engines in again.items():
        told = ", ".join(f"{name} {a:.0%} (chance {b:.0%})" for name, (a, b) in engines.items())
        tell(f"{routing}: experts of the token before that come again: {told}")


@main.command()
@shared
@click.option("--share", "shares", multiple=True, type=float, default=(30, 40, 47, 60, 75, 90), show_default=True, help="Budgets, %.")
@click.option("--bits", "widths", multiple=True, type=float, default=(4, 3), show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="Measured in a run, unless all tokens take less.")
def curve(folder: Path, layers: int, rounds: int, tokens: int, out: Path | None, routings: tuple[str, ...], shares: tuple[float, ...],
          widths: tuple[float, ...], seconds: float) -> None:  # fmt: skip
    """Speed over peak memory, beside all experts at 4 bits in memory."""
    path = a_model(folder, layers)
    container = Container.open(path)
    all_experts = len(container.moe_layers) * container.experts * container.record.prefix_bytes(4)
    with kept_tokens(rounds, PROMPT + WARM + tokens, list(routings)) as fed:

        def measure(command: list[str], routing: str, index: int) -> dict[str, Any]:
            extra = ["--tokens", str(fed[routing, index]), "--prompt", str(PROMPT), "--warm", str(WARM)]
            line = derived(watched(lambda: run_json([*command, *extra])))
            tell(f"    {line['tokens_per_s']:.2f} tokens/s, peak {line['peak_bytes'] / 1e9:.3f} GB, others {line['others']:.0%}")
            return line

        whole = ours(path, 4, all_experts, seconds, "--experts-only")
        tell("how much all in memory takes")
        budget = measure(whole, routings[0], 0)["budget"]
        everything = budget["fixed"] + all_experts
        settings = []
        for routing in routings:
            settings.append(Setting("all in memory", whole, everything, routing, 4))
            settings += [
                Setting(named(bits), ours(path, bits, int(everything * s / 100), seconds), int(everything * s / 100), routing, bits)
                for bits in widths
                for s in shares
            ]
        pace = Pace(len(settings) * rounds)
        for index in range(rounds):
            for one in turned(settings, index):
                pace.tell(f"round {index + 1}, {one.routing}, {one.name}, {one.limit / everything:.0%} = {one.limit / 1e9:.2f} GB")
                one.found.append(measure(one.command, one.routing, index))
    rows, lines = [], []
    for one in settings:
        base = next(b for b in settings if b.routing == one.routing)
        least_memory = statistics.median(line["peak_bytes"] for line in base.found)
        for line, beside in zip(one.found, base.found, strict=True):
            line["speed_share"] = 1 / (ratio(beside, line) or 1)
            line["memory_share"] = line["peak_bytes"] / least_memory
            line["needs_bytes_per_s"] = line["read_bytes_per_token"] * 0.9 * beside["tokens_per_s"]
        keys = (("tokens_per_s", 2, 1.0), ("speed_share", 0, 100.0), ("memory_share", 0, 100.0), ("read_bytes_per_token", 0, 1e-6),
                ("disk_share", 0, 100.0), ("bound_share", 0, 100.0), ("needs_bytes_per_s", 1, 1e-9), ("hit_rate", 0, 100.0),
                ("others", 0, 100.0))  # fmt: skip
        figures = [cell([line.get(key) for line in one.found], *how, around="speed" in key) for key, *how in keys]
        rows.append([one.routing, one.name, f"{one.limit / everything:.0%}", *figures])
        facts = {"benchmark": "limited curve", "layers": layers, "all_bytes": everything, "name": one.name, "routing": one.routing}
        lines += [facts | {"limit": one.limit, "bits": one.bits, "round": i} | line for i, line in enumerate(one.found)]
    heads = ("routing", "setting", "budget", "tokens/s", "speed, %", "peak, %", "MB/token", "disk, %", "bound, %", "needs, GB/s", "hit, %",
             "others, %")  # fmt: skip
    table_of(f"beside all experts at 4 bits in memory, {everything / 1e9:.2f} GB", heads, rows)
    write(out, lines)


if __name__ == "__main__":
    main()
