"""Speed and memory of llama.cpp on one GGUF file, through the low-level functions of llama-cpp-python.

    PEER/bin/python benchmarks/peer_llama.py olmoe-Q4_0.gguf --no-repack --repeats 3 --context 4096

Runs with the peer's interpreter, which needs `llama-cpp-python`, `numpy` and `click`. What is measured, all after a warm-up:

    prompts      tokens/s of one llama_decode per length, logits of the last token alone, from an empty cache
    generation   tokens/s of one llama_decode with logits per token after a 128-token prompt; the tokens are drawn beforehand,
                 so sampling costs nothing here
    --context    generation again after so many tokens, and how long those took, with keys and values in f16 and in q8_0
    memory       the peak resident set, and what of the last one is anonymous; mapped pages of the file are in the former

`--repack` is llama_model_params.use_extra_bufts: with it (llama.cpp's default) matrices whose type has interleaved kernels are
copied into them at loading. `--mmap` is load_mode: with it (the default too) the rest is used where the file is mapped.
`--quiet 0.05` measures each figure again, up to `--tries` times, while other processes take more than that share of the CPUs
(its threads spin while waiting for each other, so a busy neighbour costs a multiple); "others" in the output is what was left.
`--routing` also asks which experts successive tokens chose, to show that random weights route evenly.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import llama_cpp as lib
import numpy as np
from llama_cpp._ggml import libggml

KINDS = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}
BATCH = 512


class Log:
    """Takes llama.cpp's log; keeps it for errors and for the buffers it tells about."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._callback = lib.llama_log_callback(lambda _, text, __: self.lines.append(text.decode(errors="replace")))
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def buffers(self) -> dict[str, float]:
        """MiB of weights by buffer: CPU_REPACK are the repacked ones, CPU_Mapped the file as it is."""
        found = re.findall(r"(\S+) model buffer size\s*=\s*([\d.]+) MiB", "".join(self.lines))
        return {name: float(size) for name, size in found}


class Session:
    """A context of a model: one sequence, fed in order."""

    def __init__(self, model: Any, tokens: int, threads: int, kv: str = "f16", watch: Any = None) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KINDS[kv]
        if watch is not None:
            params.cb_eval = watch
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise click.ClickException(f"llama.cpp made no context of {tokens} tokens in {kv}")
        self.memory = lib.llama_get_memory(self.context)

    def feed(self, tokens: np.ndarray) -> float:
        """Decode in batches, wait for the last token's logits; returns seconds."""
        ids = (lib.llama_token * len(tokens))(*tokens.tolist())
        start = time.perf_counter()
        for first in range(0, len(tokens), BATCH):
            n = min(BATCH, len(tokens) - first)
            at = ctypes.cast(ctypes.byref(ids, first * ctypes.sizeof(lib.llama_token)), lib.llama_token_p)
            if status := lib.llama_decode(self.context, lib.llama_batch_get_one(at, n)):
                raise click.ClickException(f"llama_decode answered {status}")
        if not np.isfinite(lib.llama_get_logits_ith(self.context, -1)[0]):
            raise click.ClickException("the logits are not finite")
        return time.perf_counter() - start

    def generate(self, tokens: np.ndarray) -> float:
        """One decode per token; returns seconds."""
        start = time.perf_counter()
        for at in range(len(tokens)):
            self.feed(tokens[at : at + 1])
        return time.perf_counter() - start

    def cut(self, length: int = 0) -> None:
        """Forget everything from position `length` on."""
        if not lib.llama_memory_seq_rm(self.memory, 0, length, -1):
            raise click.ClickException(f"llama.cpp cannot cut the sequence at {length}")

    def close(self) -> None:
        lib.llama_free(self.context)


@contextmanager
def session(*args: Any, **more: Any) -> Iterator[Session]:
    opened = Session(*args, **more)
    try:
        yield opened
    finally:
        opened.close()


def load(path: Path, repack: bool, mmap: bool) -> Any:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repack
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise click.ClickException(f"llama.cpp does not load {path}")
    return model


def resident() -> dict[str, int]:
    """Peak and present resident bytes, and the anonymous part of the present ones."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    keys = {"peak_bytes": "VmHWM", "resident_bytes": "VmRSS", "anonymous_bytes": "RssAnon"}
    return {name: int(status[key].split()[0]) * 1024 for name, key in keys.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


@dataclass
class Quiet:
    """Measures again while others take more than `share` of the CPUs, `tries` times at most; keeps the least disturbed."""

    share: float
    tries: int
    others: list[float] = field(default_factory=list)

    @staticmethod
    def others_s() -> float:
        """CPU seconds of the machine that are not this process's; what its host took away counts too."""
        user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()

    def __call__(self, measure: Callable[[], float]) -> float:
        found: list[tuple[float, float]] = []
        while len(found) < self.tries and (not found or found[-1][0] > self.share):
            start, others = time.perf_counter(), self.others_s()
            value = measure()
            others = (self.others_s() - others) / ((time.perf_counter() - start) * (os.cpu_count() or 1))
            found.append((max(0.0, others), value))
        others, value = min(found)
        self.others.append(others)
        return value


def watcher(chose: Callable[[int, tuple[int, ...]], None], top_k: int) -> Any:
    """A callback of the graph: `chose(layer, experts)` as soon as a layer has chosen, for tokens that are fed alone."""
    libggml.ggml_get_name.restype, libggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    libggml.ggml_get_data.restype, libggml.ggml_get_data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libggml.ggml_nelements.restype, libggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]

    def note(tensor: int, ask: bool, _: int) -> bool:
        name = libggml.ggml_get_name(tensor)  # asked of every node, so nothing is done that need not be
        if not name.startswith(b"ffn_moe_topk"):
            return not ask
        if not ask and libggml.ggml_nelements(tensor) == top_k:
            ids = (ctypes.c_int32 * top_k).from_address(libggml.ggml_get_data(tensor))
            chose(int(name.rpartition(b"-")[2]), tuple(ids))
        return True

    return lib.ggml_backend_sched_eval_callback(note)


def metadata(model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(64)
    return buffer.value.decode() if lib.llama_model_meta_val_str(model, key.encode(), buffer, 64) >= 0 else ""


def chosen_of(model: Any) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token takes."""
    arch = metadata(model, "general.architecture")
    experts, top_k = (int(metadata(model, f"{arch}.expert_{name}") or 0) for name in ("count", "used_count"))
    return experts, top_k


def routing(model: Any, tokens: np.ndarray, threads: int) -> dict[str, float]:
    """How often a token chooses an expert that the one before it chose, and how many experts are used at all."""
    experts, top_k = chosen_of(model)
    chosen: dict[int, list[frozenset[int]]] = {}
    watch = watcher(lambda layer, ids: chosen.setdefault(layer, []).append(frozenset(ids)), top_k)
    with session(model, len(tokens), threads, watch=watch) as one:
        one.generate(tokens)
    again = [len(a & b) / top_k for sets in chosen.values() for a, b in itertools.pairwise(sets)]
    used = [len(frozenset().union(*sets)) / experts for sets in chosen.values()]
    return {
        "layers": len(chosen),
        "same_expert_share": round(statistics.fmean(again), 4),
        "by_chance": round(top_k / experts, 4),
        "experts_used_share": round(statistics.fmean(used), 4),
        "tokens": len(tokens),
    }


def whole_numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as e:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 512,64") from e


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--repack/--no-repack", default=True, show_default=True, help="use_extra_bufts.")
@click.option("--mmap/--no-mmap", default=True, show_default=True, help="load_mode.")
@click.option("--prompts", callback=whole_numbers, default="512,64", show_default=True, help="Prompt lengths.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Before generating.")
@click.option("--generate", type=click.IntRange(1), default=64, show_default=True)
@click.option("--context", type=click.IntRange(1), help="Also generate after so many tokens.")
@click.option("--kv", type=click.Choice(list(KINDS)), multiple=True, default=list(KINDS), help="For --context.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the tokens; every repeat adds one.")
@click.option("--quiet", default=1.0, show_default=True, help="Measure again if others take more of the CPUs, as 0.05.")
@click.option("--tries", type=click.IntRange(1), default=10, show_default=True, help="At most, for --quiet.")
@click.option("--routing", "with_routing", is_flag=True, help="Also tell how evenly experts are chosen.")
def main(path: Path, threads: int, repack: bool, mmap: bool, prompts: list[int], prompt_tokens: int, generate: int,
         context: int | None, kv: tuple[str, ...], repeats: int, seed: int, quiet: float, tries: int,
         with_routing: bool) -> None:  # fmt: skip
    """Measure the model PATH. Prints one JSON line."""
    log = Log()
    lib.llama_backend_init()
    start = time.perf_counter()
    model = load(path, repack, mmap)
    load_s = time.perf_counter() - start
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def drawn(index: int) -> Callable[[int], np.ndarray]:
        rng = np.random.default_rng(seed + index)
        return lambda n: rng.integers(0, vocab, n)

    prompt_speed: dict[int, list[float]] = {n: [] for n in prompts}
    generation: list[float] = []
    calm = Quiet(quiet, tries)
    with session(model, max(*prompts, prompt_tokens + generate), threads) as one:

        def prompt(tokens: np.ndarray) -> float:
            one.cut()
            return len(tokens) / one.feed(tokens)

        def answer(tokens: np.ndarray) -> float:
            one.cut(prompt_tokens)
            return len(tokens) / one.generate(tokens)

        for index in range(repeats + 1):  # the first one warms up
            draw, again = drawn(index), calm if index else Quiet(1, 1)
            for n in prompts:
                prompt_speed[n].append(again(partial(prompt, draw(n))))
            prompt(draw(prompt_tokens))
            generation.append(again(partial(answer, draw(generate))))
            if index == 0:
                for measured in (generation, *prompt_speed.values()):
                    measured.clear()
    memory = resident()
    line: dict[str, object] = {
        "benchmark": "peer_llama",
        "model": path.name,
        "file_bytes": path.stat().st_size,
        "repack": repack,
        "mmap": mmap,
        "threads": threads,
        "repeats": repeats,
        "generation_tokens_per_s": spread(generation),
        "prompt_tokens_per_s": {str(n): spread(v) for n, v in prompt_speed.items()},
        "others": spread(calm.others),
        **memory,
        "load_s": round(load_s, 2),
        "model_mib_by_buffer": log.buffers(),
    }
    if context:
        line["depth"] = {kind: at_depth(model, context, generate, repeats, threads, kind, drawn, calm) for kind in kv}
        line["depth_peak_bytes"] = resident()["peak_bytes"]
    if with_routing:
        line["routing"] = routing(model, drawn(repeats + 1)(64), threads)
    line |= {"version": lib.__version__, "system": lib.llama_print_system_info().decode().strip()}
    lib.llama_model_free(model)
    print(json.dumps(line))


def at_depth(
    model: Any, depth: int, generate: int, repeats: int, threads: int, kv: str, drawn: Callable[[int], Any], calm: Quiet
) -> dict[str, object]:
    """Generation after `depth` tokens, each repeat from there again."""
    with session(model, depth + generate, threads, kv=kv) as one:
        filled = one.feed(drawn(0)(depth))

        def answer(tokens: np.ndarray) -> float:
            one.cut(depth)
            return len(tokens) / one.generate(tokens)

        answer(drawn(0)(generate))  # warms up
        speed = [calm(partial(answer, drawn(index + 1)(generate))) for index in range(repeats)]
    return {
        "tokens": depth,
        "generation_tokens_per_s": spread(speed),
        "fill_tokens_per_s": round(depth / filled, 3),
    }


if __name__ == "__main__":
    main()
