"""One model in memory: step() feeds tokens of any sequences and answers logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container import Container, read_router
from d2moe.errors import ConfigError, MemoryBudgetError, RequestError
from d2moe.kernels import reference
from d2moe.models import shape_from_config
from d2moe.models.layers import Decoder, DenseOptions
from d2moe.policy import policy
from d2moe.policy.ledger import Ledger
from d2moe.policy.trace import Meta, Recorder, Trace
from d2moe.runtime import memory
from d2moe.runtime.config import EngineConfig, show_bytes
from d2moe.runtime.kv import BLOCK_TOKENS, Pages, Sequence
from d2moe.runtime.request import Chunk
from d2moe.runtime.streamer import Counters, Streamer
from d2moe.runtime.timeline import Timeline
from d2moe.types import BASE_BITS, MAX_BITS, check_dial

F32 = npt.NDArray[np.float32]
DEFAULT_CONTEXT = 4096
DIALS_KEPT = 256


class Engine:
    """Use `Engine.load`. Not thread-safe: one step at a time."""

    def __init__(self, container: Container, config: EngineConfig, progress: Callable[[int, int], None] | None = None):
        where = str(container.path)
        self.container, self.config = container, config
        ignored = container.manifest.source.get("ignored_config_keys", [])
        self.shape = shape = shape_from_config(container.config, f"{where}/config.json", ignored)
        self.context = config.context or min(shape.context, DEFAULT_CONTEXT)
        if self.context > shape.context:
            raise ConfigError(f"{where}: a context of {self.context} tokens is more than the {shape.context} the model was made for")
        threads = config.threads or memory.usable_cpus()
        record, layers = container.record, container.moe_layers
        self.router = read_router(container)  # before the budget is split, which counts what the process holds by then
        self._dials: dict[tuple[float, bool], tuple[int, int, float]] = {}
        try:
            least, most, _ = self.dial(config.bits, config.uniform)
        except RequestError as error:
            raise ConfigError(str(error)) from None
        self.dense_widths = container.stored_widths(config.dense_widths(not shape.tied_embeddings, routed=least < most))
        self.budget = memory.split(
            config,
            shape,
            group=record.group,
            dense=container.dense_bytes(self.dense_widths),
            all_experts=container.experts_bytes(),
            one_expert=record.prefix_bytes(container.most_bits),
            context=self.context,
            threads=threads,
            where=where,
        )
        memory.check_allowed(self.budget.fixed + self.budget.experts, where)
        chunk = self.budget.chunk_tokens
        scratch = memory.scratch_bytes(shape, record.group, chunk, self.context, threads)
        backend: Any = reference
        if config.kernels.startswith("reference"):
            activations = "float" if config.kernels == "reference-float" else "int8"
            self.runtime: Any = reference.Runtime(activations=activations)
        else:
            from d2moe.kernels import native as backend  # the compiled part is loaded only where it runs

            try:
                self.runtime = backend.Runtime(threads, None if config.kernels == "native" else config.kernels, scratch)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(str(error)) from None
        blocks = memory.kv_blocks(config, self.context)
        self.kv = backend.KvCache(config.kv, shape.layers, blocks, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        self.pages = Pages(blocks, self.context)
        self._backend = backend
        self.experts = self.new_experts(config.direct, config.read_depth)
        self.experts.set_limit(self.budget.experts)
        self.ledger = Ledger(len(layers), container.experts, record.base_bytes, record.plane_bytes, self.budget.experts, container.kept)
        self.counters = Counters()
        self._learn = Trace.load(config.learn) if config.learn else None
        self.policy = policy.make(config.policy, self.ledger, shape.top_k, learn=self._learn)
        self.epoch = 0
        """Grows when a text's keys and values may from now on be others than before."""
        self._streamer = Streamer(self.experts, self.ledger, self.counters, backend.StorageFailure, self.policy)
        report = (lambda index: progress(index + 1, shape.layers)) if progress else None
        dense = DenseOptions(self.dense_widths, record.group, record.rotation, memory.Arena(self.budget.dense).take)
        widths = [self.router.layer(index) for index in range(len(layers))] if self.router else []
        self.decoder = Decoder(backend, self.runtime, shape, container, dense, chunk, self.kv, self.experts, report, widths)
        self._pause()
        self.timeline = Timeline(config.timeline, self.experts) if config.timeline else None
        self._streamer.timeline = self.timeline

    @classmethod
    def load(
        cls, path: str | Path, config: EngineConfig | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Engine:
        """Open a container and bring its dense weights into memory; experts come when tokens ask for them.

        `progress(layers done, layers)` is called while dense weights are read. Raises ContainerError, ConfigError, and
        MemoryBudgetError before anything large is loaded.
        """
        return cls(Container.open(path), config or EngineConfig(), progress)

    def new_experts(self, direct: bool, depth: int) -> Any:
        """Slots and reader of the model's experts, empty; the engine has one of them, measuring reads takes others."""
        container, record, shape = self.container, self.container.record, self.shape
        return self._backend.Experts(
            self.runtime,
            layers=len(container.moe_layers),
            experts=container.experts,
            hidden=shape.hidden,
            inner=shape.expert_inner,
            group=record.group,
            base_bytes=record.base_bytes,
            plane_bytes=record.plane_bytes,
            paths=[str(container.expert_path(layer)) for layer in container.moe_layers],
            offsets=container.offsets,
            kept=container.kept,
            direct=direct,
            depth=depth,
            rotation=record.rotation,
        )

    def record(self, ahead: int = 3) -> Recorder:
        """Record the routing of all steps from now on, with forecasts of `ahead` layers; `trace()` of the answer gives it."""
        shape, record = self.shape, self.container.record
        last = shape.moe_layers[-1] == shape.layers - 1
        facts = (record.base_bytes, record.plane_bytes, last, self.container.path.name)
        recorder = Recorder(Meta(len(shape.moe_layers), shape.experts, shape.top_k, *facts), ahead)
        self._streamer.recorder = recorder
        self._pause()
        return recorder

    def stop_recording(self) -> None:
        self._streamer.recorder = None
        self._pause()

    def _pause(self) -> None:
        """Where the core comes back to Python."""
        if hasattr(self.decoder.program, "plan_by"):
            self.decoder.program.plan_by(self.ledger.core if self.policy.in_core else None)
        self.decoder.program.pause("decide" if self.policy.decides else "watch" if self._streamer.recorder else "missing")

    def new_sequence(self) -> Sequence:
        return Sequence(self.pages)

    @property
    def least_bytes(self) -> int:
        """Of the whole process, as long as the model stays loaded: one expert must have room."""
        return self.budget.fixed + self.container.record.prefix_bytes(self.container.most_bits)

    def set_memory(self, n_bytes: int) -> None:
        """Change the budget of the whole process between two steps; what experts hold beyond it goes back at once, the least
        valuable planes first.

        Only the experts' share changes; it is all that is left then, whatever `expert_memory_bytes` was. MemoryBudgetError, and no
        change, if it would not hold one expert or is more than a cgroup allows.
        """
        least = self.least_bytes
        if n_bytes < least:
            raise MemoryBudgetError(
                f"{self.container.path.name}: a memory of {show_bytes(n_bytes)} is too small; the least that would do is "
                f"{show_bytes(least)} as long as the model stays loaded"
            )
        experts = min(n_bytes - self.budget.fixed, self.container.experts_bytes())
        memory.check_allowed(self.budget.fixed + experts, self.container.path.name)
        self.ledger.limit_bytes = experts
        freed = self.ledger.make_room(0, 0, set()) or {}
        if freed:
            self.experts.evict(np.array([(layer, expert, bits) for (layer, expert), bits in freed.items()], np.int32))
        self.experts.set_limit(experts)
        self.budget = replace(self.budget, memory=n_bytes, experts=experts)

    def set_policy(self, name: str) -> None:
        """Change the policy between two steps; what is in memory stays, and the new one learns from the trace that the engine was
        given, if it is one that learns.

        ConfigError, and no change, for a name that does not exist or a policy that needs the future.
        """
        self._streamer.hear(self.decoder)
        kind, old = policy.policy_class(name), self.policy
        rank, turns = self.ledger.rank, self.ledger.takes_turns
        self.ledger.rank = None
        try:
            self.policy = policy.make(name, self.ledger, self.shape.top_k, learn=self._learn if kind.learns else None)
        except ConfigError:
            self.ledger.rank, self.ledger.takes_turns = rank, turns
            raise
        self.config = replace(self.config, policy=name)
        self._streamer.follow(self.policy)
        self._pause()
        if any(type(p).choose is not policy.Policy.choose for p in (old, self.policy)):
            self.epoch += 1

    def dial(self, bits: float, uniform: bool = False) -> tuple[int, int, float]:
        """Least and most width and the price of a plane at which tokens take `bits` on average.

        RequestError for a number outside 2 to 8, or one that is not whole where there is no width router to average.
        """
        found = self._dials.get((bits, uniform))
        if found is None:
            try:
                check_dial(bits)
            except ConfigError as error:
                raise RequestError(str(error)) from None
            whole = bits == int(bits)
            if not whole and (uniform or self.router is None):
                why = "one plain width for all was asked for" if uniform else "the model has no width router"
                how = "" if uniform else f'; train one with "d2moe route train {self.container.path} --text FILE"'
                raise RequestError(f"bits is {bits:g}, expected a whole number, since {why}{how}")
            plain = uniform or self.router is None or bits == MAX_BITS or (bits == BASE_BITS and self.router.base is None)
            if plain or self.router is None:
                found = int(bits), int(bits), 0.0
            else:
                found = BASE_BITS, MAX_BITS, self.router.price(bits)
            if len(self._dials) >= DIALS_KEPT:
                self._dials.clear()
            self._dials[bits, uniform] = found
        return found

    def step(self, chunks: list[Chunk]) -> F32:
        """Append each chunk's tokens to its sequence; logits float32 [rows, vocab] of the rows asked for, in order.

        Prompts longer than the engine's chunk are fed in pieces; the result does not depend on the cut. Raises
        RequestError before anything is computed, StorageError if a read fails (the sequences keep their length then).
        """
        begin = time.perf_counter()
        plans = [self._checked(c) for c in chunks]
        if len(chunks) > 1 and len({id(c.sequence) for c in chunks}) < len(chunks):
            raise RequestError("a sequence stands twice in one step; join its tokens into one chunk")
        lengths = [c.sequence.length for c in chunks]
        outputs: list[F32] = []
        try:
            for c, tokens in zip(chunks, plans, strict=True):
                c.sequence.reserve(len(tokens))
            if sum(map(len, plans)) <= self.decoder.max_tokens:
                outputs.append(self._pass([(c, t, c.logits) for c, t in zip(chunks, plans, strict=True)]))
            else:
                for c, tokens in zip(chunks, plans, strict=True):
                    for at in range(0, len(tokens), self.decoder.max_tokens):
                        piece = tokens[at : at + self.decoder.max_tokens]
                        final = at + len(piece) == len(tokens)
                        outputs.append(self._pass([(c, piece, c.logits if final or c.logits == "all" else "none")]))
        except BaseException:  # Ctrl-C, too: the engine must be as before the step
            self.decoder.program.abandon()
            self._streamer.abandon()
            for c, length in zip(chunks, lengths, strict=True):
                c.sequence.length = length
            raise
        counters = self.counters
        counters.steps += 1
        counters.step_seconds += time.perf_counter() - begin
        if self.timeline is not None:
            self.timeline.step(begin, sum(map(len, plans)))
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _checked(self, chunk: Chunk) -> list[int]:
        ids: list[int] = chunk.tokens if type(chunk.tokens) is list else np.atleast_1d(np.asarray(chunk.tokens, np.int32)).tolist()
        if not ids or isinstance(ids[0], list):
            raise RequestError("a chunk needs at least one token")
        if min(ids) < 0 or max(ids) >= self.shape.vocab:
            raise RequestError(f"token ids run from 0 to {self.shape.vocab - 1}, found {min(ids)} to {max(ids)}")
        self.dial(chunk.bits, chunk.uniform)
        return ids

    def _pass(self, items: list[tuple[Chunk, list[int], str]]) -> F32:
        """One forward pass over at most max_tokens tokens."""
        decoder = self.decoder
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wished: list[int] = []
        for index, (chunk, tokens, wish) in enumerate(items):
            at, length = len(positions), chunk.sequence.length
            ids += tokens
            positions += range(length, length + len(tokens))
            sequences += [index] * len(tokens)
            end = len(positions)
            decoder.least[at:end], decoder.most[at:end], decoder.price[at:end] = self.dial(chunk.bits, chunk.uniform)
            wished += range(at, end) if wish == "all" else (end - 1,) if wish == "last" else ()
        tables = items[0][0].sequence.table[None] if len(items) == 1 else np.stack([c.sequence.table for c, _, _ in items])
        fed, rows = np.array((ids, positions, sequences), np.int32), np.array(wished, np.int32)
        recorder = self._streamer.recorder
        if recorder is not None:
            recorder.begin(fed[1], fed[2], rows)
        logits = np.empty((len(rows), self.shape.vocab), np.float32)
        decoder.start(fed, tables, rows, logits)
        self._streamer.run(decoder)
        if recorder is not None:
            recorder.end()
        self._count(items)
        return logits

    def heat(self) -> npt.NDArray[np.float64]:
        """float64 [MoE layers, experts]: how much each expert was wanted lately, see `Ledger.heat`."""
        self._streamer.hear(self.decoder)
        return self.ledger.heat()

    def _count(self, items: list[tuple[Chunk, list[int], str]]) -> None:
        """What each chunk's tokens took, and all steps so far."""
        c = self.counters
        taken, c.read_bytes, c.reads, stall, compute, c.width_uses, planes = self.decoder.program.counts
        c.stall_seconds, c.compute_seconds, c.planes_wanted = stall / 1e9, compute / 1e9, planes
        base, more = self.ledger.prefix[BASE_BITS : BASE_BITS + 2]
        c.wanted_bytes = planes[BASE_BITS] * base + sum(planes[BASE_BITS + 1 :]) * (more - base)
        for (chunk, tokens, _), (uses, bits) in zip(items, taken, strict=True):
            sequence = chunk.sequence
            c.uses += uses
            c.use_bits += bits
            sequence.uses += uses
            sequence.use_bits += bits
            sequence.length += len(tokens)
            c.tokens += len(tokens)

    def describe(self) -> dict[str, Any]:
        """Facts for reports: kernel table, threads, storage path, how the budget is split (bytes)."""
        return {
            "kernels": self.runtime.table,
            "policy": self.policy.name,
            "dense_bits": self.dense_widths.bits,
            "dense_widths": dict(self.dense_widths.others),
            "width_router": self.router is not None,
            "kv": self.config.kv,
            "threads": self.runtime.threads,
            "direct": bool(self.experts.direct),
            "read_depth": int(self.experts.depth),
            "context": self.context,
            "budget": self.budget.as_dict(),
        }

    def close(self) -> None:
        """Give everything back; the engine cannot be used afterwards."""
        if (timeline := self.__dict__.pop("timeline", None)) is not None:
            timeline.close()
        self.__dict__.pop("decoder", None)
        self.__dict__.pop("_streamer", None)
        self.__dict__.pop("experts", None)
        self.__dict__.pop("kv", None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
