"""What happened when, as a Chrome trace (JSON array of complete events) for ui.perfetto.dev or chrome://tracing.

Tracks: steps, decisions, each reader thread's reads, the experts' arithmetic and the waits in between. The core notes its events while
a step runs; they are written after it, so that a run that is broken off leaves all steps before.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

from d2moe.errors import ConfigError
from d2moe.policy.plan import Plan
from d2moe.types import BASE_BITS

READ, COMPUTE, WAIT, PLAN = 0, 1, 2, 3
STEPS, DECISIONS, EXPERTS, READERS = 1, 2, 3, 10
"""Track numbers; reader threads follow READERS."""


class Timeline:
    """Writes to `path` until `close`, or until the disk is full, which is a warning. ConfigError where it cannot be written from the
    start or the back end keeps no log."""

    def __init__(self, path: str | Path, experts: Any):
        if not hasattr(experts, "log"):
            raise ConfigError("the NumPy twin has no timeline; use another of the kernels")
        try:
            self._file = Path(path).open("w")  # noqa: SIM115 - open until close()
        except OSError as error:
            raise ConfigError(f"timeline {path} cannot be written: {error.strerror}") from None
        self._path, self._experts = path, experts
        self._decisions: list[dict[str, Any]] = []
        self._lanes: set[int] = set()
        experts.log(True)
        self._file.write("[\n")
        for track, name in ((STEPS, "steps"), (DECISIONS, "deciding"), (EXPERTS, "experts: arithmetic and waits")):
            self._name(track, name)

    def decision(self, begin_s: float, layer: int, plan: Plan) -> None:
        """A layer call was decided on, from `begin_s` of the performance counter until now."""
        self._decide(layer, begin_s * 1e9, time.perf_counter() * 1e9, len(plan.waves), plan.missing_bytes)

    def _decide(self, layer: int, begin_ns: float, end_ns: float, waves: int, missing_bytes: int) -> None:
        facts = {"waves": waves, "missing_bytes": missing_bytes}
        self._decisions.append(_slice(DECISIONS, f"layer {layer}", begin_ns, end_ns, **facts))

    def step(self, begin_s: float, tokens: int) -> None:
        """A step is over: write its events."""
        events = [_slice(STEPS, f"{tokens} tokens", begin_s * 1e9, time.perf_counter() * 1e9, tokens=tokens)]
        rows = self._experts.take_events().tolist()
        for (kind, layer, begin, end), same in groupby(rows, key=lambda r: (r[0], r[1], r[6], r[7])):
            group = list(same)
            if kind == WAIT:
                events.append(_slice(EXPERTS, f"wait, layer {layer}", begin, end))
            elif kind == PLAN:
                for _, _, waves, missing_bytes, *_ in group:
                    self._decide(layer, begin, end, waves, missing_bytes)
            elif kind == COMPUTE:
                what = ", ".join(f"{expert} at {bits}" for _, _, expert, _, bits, *_ in group)
                events.append(_slice(EXPERTS, f"layer {layer}: {what} bits", begin, end, experts=[r[2] for r in group]))
            else:
                events += [self._read(row) for row in group]
        events += self._decisions
        self._decisions.clear()
        try:
            self._file.writelines(json.dumps(event) + ",\n" for event in events)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The run is worth more than its timeline."""
        warnings.warn(f"timeline {self._path} cannot be written: {error.strerror}; the run goes on without", stacklevel=2)
        self._experts.log(False)
        with contextlib.suppress(OSError):  # what is still buffered
            self._file.close()
        self._file = Path(os.devnull).open("w")  # noqa: SIM115

    def _read(self, row: list[int]) -> dict[str, Any]:
        _, layer, expert, have, bits, lane, begin, end = row
        if lane not in self._lanes:
            self._lanes.add(lane)
            self._name(READERS + lane, f"reader {lane}")
        planes = ["base"] * (have < BASE_BITS) + [f"bit {b}" for b in range(max(have, BASE_BITS) + 1, bits + 1)]
        name = f"layer {layer} expert {expert}: {' '.join(planes)}"
        return _slice(READERS + lane, name, begin, end, layer=layer, expert=expert, planes=planes)

    def _name(self, track: int, name: str) -> None:
        event = {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": name}}
        self._file.write(json.dumps(event) + ",\n")

    def close(self) -> None:
        self._experts.log(False)
        end = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "d2moe"}}
        try:
            self._file.write(json.dumps(end) + "\n]\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)
        self._file.close()


def _slice(track: int, name: str, begin_ns: float, end_ns: float, **facts: Any) -> dict[str, Any]:
    """A complete event; times are microseconds."""
    return {"ph": "X", "name": name, "pid": 1, "tid": track, "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3, "args": facts}
