"""llama.cpp decoding from its mapped file, a token at a time; benchmarks/limited.py runs it in a control group.

    PEER/bin/python benchmarks/peer_limited.py ranges olmoe-Q4_K_M.gguf
    PEER/bin/python benchmarks/peer_limited.py decode olmoe-Q4_K_M.gguf --tokens tokens.npy --prompt 64 --seconds 12

Runs with the peer's interpreter, which needs `llama-cpp-python`, `gguf`, `numpy` and `click`. Each command prints one JSON line.
`--prefetch` makes it a rival that knows: as soon as a layer has chosen, the kernel is asked for exactly those experts, all of them
at once, before any is computed. llama.cpp has no such thing of its own. `--wait` has the graph wait until all are in memory and in
the page table, which was slower: without, what has arrived is computed meanwhile. So was reading them into a buffer.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import llama_cpp as lib
import numpy as np
from peer_llama import Log, chosen_of, load, resident, routing, session, watcher

MADV_POPULATE_READ = 22
Ranges = dict[int, list[tuple[int, int]]]
"""By layer: (offset in the file, bytes of one expert) of gate, up and down, each of which has its experts one after another."""


class Prefetch:
    """Asks for the chosen experts to be read into the page cache; with `wait` also maps them, which waits for them."""

    def __init__(self, path: Path, ranges: Ranges, threads: int, wait: bool):
        self.ranges, self.wait, self.seconds = ranges, wait, 0.0
        self.file = os.open(path, os.O_RDONLY)
        self.pool = ThreadPoolExecutor(threads)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        line = rf"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) .* {re.escape(str(path.resolve()))}$"
        self.maps = [tuple(int(x, 16) for x in m) for m in re.findall(line, Path("/proc/self/maps").read_text(), re.M)]

    def address(self, offset: int) -> int:
        for begin, end, at in self.maps:
            if at <= offset < at + end - begin:
                return int(begin + offset - at)
        raise click.ClickException(f"byte {offset} of the file is not mapped; was it loaded with --no-mmap, or repacked?")

    def __call__(self, layer: int, ids: tuple[int, ...]) -> None:
        start = time.perf_counter()
        jobs = []
        for first, size in self.ranges[layer]:
            for expert in ids:
                begin = (first + expert * size) // mmap.PAGESIZE * mmap.PAGESIZE
                jobs.append((begin, first + (expert + 1) * size - begin))
        list(self.pool.map(self._ask, jobs))
        if self.wait:
            list(self.pool.map(self._map, jobs))
        self.seconds += time.perf_counter() - start

    def _ask(self, job: tuple[int, int]) -> None:
        os.posix_fadvise(self.file, *job, os.POSIX_FADV_WILLNEED)

    def _map(self, job: tuple[int, int]) -> None:
        if self._libc.madvise(self.address(job[0]), job[1], MADV_POPULATE_READ):
            raise OSError(ctypes.get_errno(), "madvise(MADV_POPULATE_READ); it needs Linux 5.14")


def read_bytes() -> int:
    """What this process has had read from storage so far, read-ahead and faults included."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)
    assert found
    return int(found[1])


@click.group(help=__doc__)
def main() -> None:
    pass


PATH = click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@main.command("ranges")
@PATH
def show_ranges(path: Path) -> None:
    """Where each layer's experts are in the file PATH."""
    import gguf

    found: dict[str, list[tuple[int, int]]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        match = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", tensor.name)
        if match:
            found.setdefault(match[1], []).append((int(tensor.data_offset), int(tensor.n_bytes) // int(tensor.shape[2])))
    print(json.dumps(found))


@main.command()
@PATH
@click.option("--tokens", type=click.Path(path_type=Path, exists=True), required=True, help="int [tokens], of np.save.")
@click.option("--prompt", type=click.IntRange(1), default=64, show_default=True, help="Of them, fed at once.")
@click.option("--warm", type=click.IntRange(0), default=4, show_default=True, help="After them, not measured.")
@click.option("--seconds", default=12.0, show_default=True, help="Stop measuring then …")
@click.option("--least", default=6, show_default=True, help="… after at least so many tokens.")
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--repack/--no-repack", default=False, show_default=True, help="use_extra_bufts; a copy in memory of what is repacked.")
@click.option("--prefetch", type=click.Path(path_type=Path, exists=True), help="The JSON that `ranges` printed.")
@click.option("--readers", type=click.IntRange(1), default=2, show_default=True, help="Threads of --prefetch.")
@click.option("--wait", is_flag=True, help="Of --prefetch: until everything is there.")
@click.option("--routing", "with_routing", is_flag=True, help="Only tell how the tokens after the prompt are routed.")
def decode(path: Path, tokens: Path, prompt: int, warm: int, seconds: float, least: int, threads: int, repack: bool,
           prefetch: Path | None, readers: int, wait: bool, with_routing: bool) -> None:  # fmt: skip
    """Feed a prompt at once and tokens after it one by one to the model PATH."""
    log = Log()
    lib.llama_backend_init()
    model = load(path, repack, True)
    fed = np.load(tokens)
    if with_routing:
        print(json.dumps(routing(model, fed[prompt:], threads)))
        return
    bring: Any = None
    if prefetch is not None:
        bring = Prefetch(path, {int(k): v for k, v in json.loads(prefetch.read_text()).items()}, readers, wait)
    watch = watcher(bring, chosen_of(model)[1]) if bring else None
    with session(model, len(fed), threads, watch=watch) as one:
        prompt_s = one.feed(fed[:prompt])
        one.generate(fed[prompt : prompt + warm])
        before, waited, spans = read_bytes(), bring.seconds if bring else 0.0, []
        for at in range(prompt + warm, len(fed)):
            spans.append(one.feed(fed[at : at + 1]))
            if sum(spans) > seconds and len(spans) >= least:
                break
        read = read_bytes() - before
    line = {
        "spans": [round(s, 5) for s in spans],
        "prompt_s": round(prompt_s, 3),
        "read_bytes": read,
        "prefetch_share": round((bring.seconds - waited) / sum(spans), 4) if bring else None,
        "threads": threads,
        "buffers_mib": log.buffers(),
        **resident(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
