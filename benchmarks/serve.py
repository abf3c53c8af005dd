"""The server under load, beside the engine alone: needs the extra serve, and httpx.

    python benchmarks/serve.py load --minutes 10              random clients, some of whom go away; every text and the memory are checked
    python benchmarks/serve.py speed --folder /tmp            1 answer and 16 at once, experts in memory and streamed at half
    python benchmarks/serve.py gaps --folder /tmp             time between tokens while long prompts arrive
    python benchmarks/serve.py overhead --folder /tmp         streamed over HTTP beside the engine in one process

`--folder` holds a model of random weights (12 layers of 64 experts, 1.3 GB), made on the spot; without it the built-in model is
used, whose steps are so short that the server shows more than with any model of use. Each command ends with one JSON line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

import d2moe
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise
from d2moe.runtime.config import parse_bytes

SHAPE = OLMOE_1B_7B | {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 12, "eos_token_id": 0}
FOLDER = click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the model is made and kept.")


def model_in(folder: Path | None) -> Path:
    if folder is None:
        return d2moe.builtin_model()
    path = folder / "served.d2moe"
    if not path.exists():
        click.echo(f"making {path} …", err=True)
        synthesise(path, SHAPE, d2moe.builtin_model() / "tokenizer.json")
    return path


class Group:
    """A control group of the memory controller, version 1 or 2, that holds what runs in it to `limit` bytes."""

    def __init__(self, limit: int):
        version1 = Path("/sys/fs/cgroup/memory")
        self._old = version1.is_dir()
        self.path = (version1 if self._old else Path("/sys/fs/cgroup")) / f"d2moe-benchmark-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text("0")

    def over(self) -> dict[str, int]:
        """Most bytes it held (file pages of its libraries and the model included, which go when they must) and processes killed."""
        names = ("memory.max_usage_in_bytes", "memory.oom_control") if self._old else ("memory.peak", "memory.events")
        most, kills = ((self.path / name).read_text() for name in names)
        found = re.search(r"^oom_kill (\d+)", kills, re.M)
        return {"most_bytes": int(most), "killed": int(found[1]) if found else 0}


@contextlib.contextmanager
def group_of(limit: int) -> Iterator[Group | None]:
    """A control group if this user may make one; else None, and the resident memory alone is watched."""
    try:
        group = Group(limit)
    except OSError as error:
        click.echo(f"no control group ({error}): resident memory alone is watched", err=True)
        yield None
        return
    try:
        yield group
    finally:
        group.path.rmdir()


def status_bytes(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found, name
    return int(found[1]) * 1024


@contextlib.contextmanager
def server(path: Path, *options: str, group: Group | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "d2moe", "serve", str(path), "--port", "0", "--name", "m", "--log", "off", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=group.join if group else None) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://[\d.:]+", line)
        if not found:
            raise SystemExit(line + process.stderr.read())
        click.echo(line.strip(), err=True)
        try:
            yield found[0], process
        finally:
            process.terminate()
            process.wait()


async def answer(client: httpx.AsyncClient, body: dict[str, Any], tokens: int | None = None) -> tuple[str, list[float]]:
    """Text and arrival times of the pieces of a streamed completion; hangs up after `tokens` pieces."""
    text, times = "", []
    async with client.stream("POST", "/v1/completions", json={"model": "m", "stream": True, "ignore_eos": True, **body}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {await response.aread()!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += event["choices"][0]["text"]
            times.append(time.perf_counter())
            if tokens is not None and len(times) >= tokens:
                break
    return text, times


def client_for(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))


def figure(metrics: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", metrics, re.M)
    return float(found[1]) if found else float("nan")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@FOLDER
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--memory", default="220MB", show_default=True, help="Of the whole process, and of the control group it runs in.")
@click.option("--expert-memory", default="6MB", show_default=True, help="So that experts are streamed.")
def load(folder: Path | None, minutes: float, clients: int, memory: str, expert_memory: str) -> None:
    """Clients that come at random, some of whom go away; everything that comes back is compared with the same request alone."""
    rng = np.random.default_rng()
    path = model_in(folder)
    wishes = [wish(rng, routed=folder is None) for _ in range(48)]
    with d2moe.load(path, context=1024) as model:
        expected = [model.generate(w["prompt"], ignore_eos=True, **{k: v for k, v in w.items() if k != "prompt"}).text for w in wishes]
    counts: Counter[str] = Counter()
    seconds = 60 * minutes

    async def one(client: httpx.AsyncClient, url: str, end: float, seed: int) -> None:
        mine = np.random.default_rng(seed)
        while time.monotonic() < end:
            await asyncio.sleep(float(mine.exponential(0.2)))
            index = int(mine.integers(len(wishes)))
            kind = str(mine.choice(["streamed", "whole", "cancelled", "disconnected"], p=[0.5, 0.25, 0.125, 0.125]))
            try:
                if kind == "streamed":
                    right = (await answer(client, wishes[index]))[0] == expected[index]
                elif kind == "whole":
                    right = await complete(client, wishes[index]) == expected[index]
                elif kind == "cancelled":  # after some tokens
                    right = expected[index].startswith((await answer(client, wishes[index], int(mine.integers(1, 20))))[0])
                else:  # at any time, without a word
                    right = await cut_off(url, wishes[index], float(mine.exponential(0.3)))
            except Exception as error:  # anything that goes wrong is what is being counted
                counts["failed"] += 1
                click.echo(f"failed: {error!r}", err=True)
                continue
            counts[kind] += 1
            counts["wrong"] += not right

    async def watch(process: subprocess.Popen[str], end: float) -> list[int]:
        resident = []
        begin = told = time.monotonic()
        while time.monotonic() < end:
            resident.append(status_bytes(process.pid, "VmRSS"))
            if time.monotonic() - told > 15:
                told = time.monotonic()
                click.echo(f"{dict(counts)}, {resident[-1] / 1e6:.1f} MB, {end - told:.0f} of {end - begin:.0f} s left", err=True)
            await asyncio.sleep(0.1)
        return resident

    async def run(url: str, process: subprocess.Popen[str]) -> list[int]:
        async with client_for(url) as client:
            end = time.monotonic() + seconds
            seeds = [int(s) for s in rng.integers(1 << 31, size=clients)]
            resident, *_ = await asyncio.gather(watch(process, end), *(one(client, url, end, seed) for seed in seeds))
            while (await client.get("/health")).json()["running"]:  # those that were cut off last
                await asyncio.sleep(0.1)
            return list(resident or [])

    limit = parse_bytes(memory)
    options = ("--memory", memory, "--expert-memory", expert_memory, "--context", "1024")
    with group_of(limit) as group, server(path, *options, group=group) as (url, process):
        resident = asyncio.run(run(url, process))
        most = status_bytes(process.pid, "VmHWM")
        metrics = httpx.get(f"{url}/metrics").text
        killed = group.over() if group else None
    warm = np.array(resident[len(resident) // 4 :])
    whole = counts["streamed"] + counts["whole"]
    facts = {
        **counts,
        "failed": counts["failed"],
        "wrong": counts["wrong"],
        "memory_bytes": limit,
        "most_resident_bytes": most,
        "drift": float(warm.max() / warm.min() - 1),
        "control_group": killed,
        "tokens_per_s": figure(metrics, "d2moe_tokens_total") / seconds,
        "hit_rate": figure(metrics, "d2moe_expert_hit_rate"),
        "kv_blocks_left": figure(metrics, "d2moe_kv_blocks") - figure(metrics, "d2moe_kv_blocks_free"),
    }
    print(json.dumps(facts))
    bad = [name for name in ("failed", "wrong", "kv_blocks_left") if facts[name]]
    bad += ["drift"] if facts["drift"] > 0.02 else []
    bad += ["memory"] if most > limit else []
    if bad or not whole:
        raise SystemExit(f"not as it should be: {', '.join(bad) or 'no answer was whole'}")


def wish(rng: np.random.Generator, routed: bool) -> dict[str, Any]:
    """A request whose text depends on it alone."""
    stem = np.random.default_rng(int(rng.integers(4))).integers(1, 4096, 200).tolist()  # some begin alike
    prompt = stem[: int(rng.integers(200))] + rng.integers(1, 4096, int(rng.integers(1, 250))).tolist()
    body = {"prompt": prompt, "max_tokens": int(rng.integers(1, 120)), "seed": int(rng.integers(1000))}
    bits = rng.choice([2, 2.6, 3, 3.4, 4, 8] if routed else [2, 3, 4, 8])
    return {**body, "temperature": float(rng.choice([0.0, 0.8])), "bits": float(bits)}


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text of a completion that is not streamed."""
    response = await client.post("/v1/completions", json={"model": "m", "ignore_eos": True, **body})
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    return str(response.json()["choices"][0]["text"])


async def cut_off(url: str, body: dict[str, Any], seconds: float) -> bool:
    """Asks and is gone after `seconds`, whatever was sent by then; False if that was an error."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps({"model": "m", "ignore_eos": True, "stream": seconds > 0.2, **body}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    with contextlib.suppress(asyncio.TimeoutError):
        first = await asyncio.wait_for(reader.readline(), seconds)
        if not first.startswith(b"HTTP/1.1 200"):
            return False
        await asyncio.sleep(seconds / 2)
    writer.transport.abort()
    return True


async def together(url: str, count: int, tokens: int, seed: int) -> float:
    """Tokens a second of `count` answers at once, from the first token of the last to begin to the end of the first to end."""
    rng = np.random.default_rng(seed)
    async with client_for(url) as client:
        bodies = [{"prompt": rng.integers(1, 4096, 8).tolist(), "max_tokens": tokens, "temperature": 1.0, "seed": i} for i in range(count)]
        all_times = [times for _, times in await asyncio.gather(*(answer(client, body) for body in bodies))]
    begin, end = max(t[0] for t in all_times), min(t[-1] for t in all_times)
    return sum(begin < at <= end for times in all_times for at in times) / (end - begin)


@main.command()
@FOLDER
@click.option("--rounds", default=3, show_default=True)
@click.option("--tokens", default=60, show_default=True)
def speed(folder: Path | None, rounds: int, tokens: int) -> None:
    path = model_in(folder)
    out: dict[str, Any] = {}
    with d2moe.load(path, context=512) as model:
        half = model.engine.ledger.prefix_bytes[4] * model.engine.ledger.layers * model.engine.ledger.experts // 2
    for name, options in (("in memory", ()), ("streamed", ("--expert-memory", str(half)))):
        with server(path, "--context", "512", *options) as (url, _):
            asyncio.run(together(url, 16, 40, 0))  # the first fills the slots
            pairs = [[asyncio.run(together(url, count, tokens, 1 + r)) for count in (1, 16)] for r in range(rounds)]
        one, many = (float(np.median([p[i] for p in pairs])) for i in range(2))
        out[name] = {"batch_1": one, "batch_16": many, "ratio": many / one}
        click.echo(f"{name}: {one:.1f} tokens/s alone, {many:.1f} of 16 together, {many / one:.1f} times", err=True)
    print(json.dumps(out))


@main.command()
@FOLDER
@click.option("--seconds", default=30.0, show_default=True)
@click.option("--answers", default=4, show_default=True)
def gaps(folder: Path | None, seconds: float, answers: int) -> None:
    rng = np.random.default_rng()

    async def run(url: str, with_prompts: bool) -> dict[str, float]:
        async with client_for(url) as client:
            end = time.monotonic() + seconds

            async def write(seed: int) -> list[float]:
                found: list[float] = []
                while time.monotonic() < end:
                    body = {"prompt": [seed + 1], "max_tokens": 200, "temperature": 1.0, "seed": seed}
                    _, times = await answer(client, body)
                    found += np.diff(times).tolist()
                return found

            async def prompts() -> list[float]:
                while with_prompts and time.monotonic() < end:
                    await answer(client, {"prompt": rng.integers(1, 4096, 800).tolist(), "max_tokens": 1})
                    await asyncio.sleep(float(rng.exponential(1.0)))
                return []

            rows = await asyncio.gather(*(write(i) for i in range(answers)), prompts())
            found = 1000 * np.array([gap for row in rows for gap in row])
            median, p99 = float(np.median(found)), float(np.quantile(found, 0.99))
            return {"median_ms": median, "p99_ms": p99, "ratio": p99 / median, "max_ms": float(found.max()), "tokens": len(found)}

    with server(model_in(folder), "--context", "1024") as (url, _):
        asyncio.run(together(url, 16, 40, 0))  # the first fills the slots
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": [7] * 800, "max_tokens": 1}, timeout=600)
        out = {name: asyncio.run(run(url, with_prompts)) for name, with_prompts in (("answers_alone", False), ("with_prompts", True))}
    print(json.dumps(out))


@main.command()
@FOLDER
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=100, show_default=True)
def overhead(folder: Path | None, rounds: int, tokens: int) -> None:
    path = model_in(folder)
    body = {"prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 1.0, "seed": 1}

    outside: list[float] = []

    async def served(url: str) -> float:
        async with client_for(url) as client:
            before = figure((await client.get("/metrics")).text, "d2moe_engine_seconds_total")
            begin = time.perf_counter()
            _, times = await answer(client, body)
            steps_s = figure((await client.get("/metrics")).text, "d2moe_engine_seconds_total") - before
        outside.append(1 - steps_s / (times[-1] - begin))
        return (len(times) - 1) / (times[-1] - times[0])

    def alone(model: Any) -> float:
        values = {k: v for k, v in body.items() if k != "prompt"}
        model.generate(body["prompt"], ignore_eos=True, **values)
        return float(model.last.generation_tokens_per_s)

    with d2moe.load(path, context=512) as model, server(path, "--context", "512") as (url, _):
        alone(model), asyncio.run(served(url))
        pairs = [(alone(model), asyncio.run(served(url))) for _ in range(rounds)]
    engine, http = (float(np.median([p[i] for p in pairs])) for i in range(2))
    shares = sorted(1 - h / e for e, h in pairs)
    spread = {"overhead": shares[len(shares) // 2], "low": shares[0], "high": shares[-1]}
    # Of the whole time from request to last token, what the engine's steps did not take: drawing, sending, waiting for a CPU.
    print(json.dumps({"engine": engine, "served": http, **spread, "outside_steps": float(np.median(outside[1:]))}))


if __name__ == "__main__":
    main()
