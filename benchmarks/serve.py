"""The server under load, beside the engine alone: needs the extra serve, and httpx.

    python benchmarks/serve.py load --minutes 10              random clients, some of whom go away; every text and the memory are checked
    python benchmarks/serve.py speed --folder /tmp            1 answer and 16 at once, experts in memory and streamed at half
    python benchmarks/serve.py gaps --folder /tmp             time between tokens while long prompts arrive
    python benchmarks/serve.py overhead --folder /tmp         streamed over HTTP beside the engine in one process
    python benchmarks/serve.py static                         the page and other routes that need no engine, by wrk

`--folder` holds models of random weights (12 layers of 64 experts, 1.3 GB), made on the spot; without it the built-in model is
used, whose steps are so short that the server shows more than with any model of use. Each command ends with one JSON line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from machine import Group, group_of
from serve_bounds import SHAPES, bodies, bounds

import d2moe
from d2moe.convert.synthetic import synthesise
from d2moe.runtime.config import parse_bytes

FOLDER = click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the model is made and kept.")


def model_in(folder: Path | None, kind: str = "olmoe") -> Path:
    if folder is None:
        return d2moe.builtin_model()
    path = folder / f"served-{kind}.d2moe"
    if not path.exists():
        click.echo(f"making {path} …", err=True)
        synthesise(path, SHAPES[kind], d2moe.builtin_model() / "tokenizer.json")
    return path


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


@main.command()
@FOLDER
@click.option("--shape", "kind", type=click.Choice(list(SHAPES)), default="olmoe", show_default=True, help="Of the model in --folder.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--tokens", default=60, show_default=True)
@click.option("--count", default=16, show_default=True, help="Answers at once.")
@click.option("--bound-only", is_flag=True, help="Only what bytes allow; speeds need a quiet machine.")
def speed(folder: Path | None, kind: str, rounds: int, tokens: int, count: int, bound_only: bool) -> None:
    """One answer and many at once, experts in memory and streamed at half, beside what the bytes of the same run allow."""
    path = model_in(folder, kind)
    with d2moe.load(path, context=512, max_sequences=count) as model:
        half = int(model.engine.ledger.prefix_bytes[4] * model.engine.ledger.layers * model.engine.ledger.experts // 2)
        out: dict[str, Any] = {"shape": kind, **bounds(model, count, tokens, half)}
    most = out["in memory"]["bound"], out["streamed"]["bound"]
    click.echo(f"by bytes at most {most[0]:.2f} times in memory, {most[1]:.2f} streamed", err=True)
    for name, options in (("in memory", ()), ("streamed", ("--expert-memory", str(half)))):
        if bound_only:
            break
        with server(path, "--context", "512", "--max-sequences", str(count), *options) as (url, _):
            together(url, count, 40, 0)  # the first fills the slots
            pairs = [[together(url, some, tokens, 1 + r) for some in (1, count)] for r in range(rounds)]
        one, many = (float(np.median([p[i] for p in pairs])) for i in range(2))
        out[name] |= {"one": one, "many": many, "ratio": many / one}
        click.echo(f"{name}: {one:.1f} tokens/s alone, {many:.1f} of {count} together, {many / one:.2f} times", err=True)
    print(json.dumps(out))


def together(url: str, count: int, tokens: int, seed: int) -> float:
    """Tokens a second of `count` answers at once, from the first token of the last to begin to the end of the first to end."""
    with ThreadPoolExecutor(count) as pool:
        all_times = list(pool.map(lambda body: arrivals(url, body), bodies(count, tokens, seed)))
    begin, end = max(t[0] for t in all_times), min(t[-1] for t in all_times)
    return sum(begin < at <= end for times in all_times for at in times) / (end - begin)


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
        together(url, 16, 40, 0)  # the first fills the slots
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": [7] * 800, "max_tokens": 1}, timeout=600)
        out = {name: asyncio.run(run(url, with_prompts)) for name, with_prompts in (("answers_alone", False), ("with_prompts", True))}
    print(json.dumps(out))


@main.command()
@FOLDER
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=100, show_default=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A model of yours instead.")
def overhead(folder: Path | None, rounds: int, tokens: int, model: Path | None) -> None:
    """One answer streamed over HTTP beside the same one from the engine in this process."""
    path = model or model_in(folder)
    body = {"prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 1.0, "seed": 1}
    outside: list[float] = []
    loop_us: list[float] = []

    def served(url: str, pid: int) -> float:
        before, cpu = figure(httpx.get(f"{url}/metrics").text, "d2moe_engine_seconds_total"), thread_ns(pid)
        begin = time.perf_counter()
        times = arrivals(url, body)
        loop_us.append((thread_ns(pid) - cpu) / 1000 / len(times))
        steps_s = figure(httpx.get(f"{url}/metrics").text, "d2moe_engine_seconds_total") - before
        outside.append(1 - steps_s / (times[-1] - begin))
        return (len(times) - 1) / (times[-1] - times[0])

    def alone(beside: Any) -> float:
        values = {k: v for k, v in body.items() if k != "prompt"}
        beside.generate(body["prompt"], ignore_eos=True, **values)
        return float(beside.last.generation_tokens_per_s)

    with d2moe.load(path, context=512) as beside, server(path, "--context", "512") as (url, process):
        alone(beside), served(url, process.pid)
        pairs = [(alone(beside), served(url, process.pid)) for _ in range(rounds)]
    engine, http = (float(np.median([p[i] for p in pairs])) for i in range(2))
    shares = sorted(1 - h / e for e, h in pairs)
    spread = {"overhead": shares[len(shares) // 2], "low": shares[0], "high": shares[-1]}
    # Of the whole time from request to last token, what the engine's steps did not take: drawing, sending, waiting for a CPU.
    more = {"outside_steps": float(np.median(outside[1:])), "event_loop_us_a_token": float(np.median(loop_us[1:]))}
    print(json.dumps({"engine": engine, "served": http, **spread, **more}))


def arrivals(url: str, body: dict[str, Any]) -> list[float]:
    """When the pieces of a streamed completion came, by a client that does nothing but look at the clock: httpx takes more of the
    CPU for a piece than the server does, and there they share one."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps({"model": "m", "stream": True, "ignore_eos": True, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    times: list[float] = []
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        last = b""
        while b"[DONE]" not in last:
            got = connection.recv(65536)
            if not got:
                raise RuntimeError(f"the stream broke off: {last!r}")
            times += [time.perf_counter()] * got.count(b"data: {")
            last = (last + got)[-200:]
    return times


def thread_ns(pid: int) -> int:
    """CPU time of a process' main thread, which runs the server's event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])


@main.command()
@click.option("--seconds", default=5, show_default=True, help="For each route.")
@click.option("--connections", default=32, show_default=True)
@click.option("--beside", default=2, show_default=True, help="Answers that are written meanwhile, in a second round.")
def static(seconds: int, connections: int, beside: int) -> None:
    """The routes that need no engine, by wrk (Debian: apt-get install wrk); what is not a 200 is an error."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; apt-get install wrk")
    out: dict[str, Any] = {}
    with server(d2moe.builtin_model(), "--context", "1024") as (url, _):
        for name, answers in (("idle", 0), ("beside answers", beside)):
            with writing(url, answers) as tokens:
                out[name] = {path: wrk(url + path, seconds, connections) for path in ROUTES}
            if answers:
                out["tokens_beside_per_s"] = tokens() / (seconds * len(ROUTES))
    print(json.dumps(out))
    wrong = {path: found for part in ("idle", "beside answers") for path, found in out[part].items() if found["errors"]}
    if wrong:
        raise SystemExit(f"not every answer was a 200: {wrong}")


ROUTES = ("/", "/page/page.js", "/page/page.css", "/page/icon.svg", "/health", "/v1/models", "/openapi.json", "/metrics")


def wrk(url: str, seconds: int, connections: int) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}

    def one(pattern: str) -> re.Match[str]:
        found = re.search(pattern, text)
        if not found:
            raise SystemExit(f"wrk says nothing of {pattern}: {text}")
        return found

    rate, slow = float(one(r"Requests/sec:\s+([\d.]+)")[1]), one(r"99%\s+([\d.]+)(us|ms|s)")
    wrong = re.findall(r"Non-2xx or 3xx responses: (\d+)|connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return {"per_s": rate, "p99_ms": float(slow[1]) * units[slow[2]], "errors": sum(int(n) for row in wrong for n in row if n)}


@contextlib.contextmanager
def writing(url: str, answers: int) -> Iterator[Callable[[], int]]:
    """`answers` streams that go on and on; the function says how many tokens came."""
    counts, stop = [0] * answers, threading.Event()

    def write(index: int) -> None:
        while not stop.is_set():
            counts[index] += len(arrivals(url, {"prompt": [index + 1], "max_tokens": 50, "seed": index}))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(answers)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(counts)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
