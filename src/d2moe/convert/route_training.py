"""`d2moe route train`: from a container and some text to its `bit_router.safetensors`, with what it is worth.

What was done is kept in MODEL.router.partial (a file beside the container) until the router is written: the same call goes on there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2moe.container import BitRouter, Container, write_router
from d2moe.convert.bit_router import (
    LEARN_BATCH,
    PRICED,
    WINDOW,
    Learner,
    Measured,
    Rule,
    Texts,
    batches,
    calibrate,
    full_width,
    measure,
    plain,
    reference_teacher,
    score,
    windows_of,
)
from d2moe.convert.torch_decoder import TorchDecoder
from d2moe.errors import ConfigError, StorageError

METHODS = ("measured", "learned")
REPORTED = (2.5, 3.0, 4.0)
KEEP_EVERY = 20
"""Steps of training after which they are kept."""

Stage = Callable[[str], Callable[[int, int], None]]
"""Called with a stage's name; answers what is called with (done, total)."""


@dataclass(frozen=True)
class Trained:
    """`router` was written, made by `method`. `table` has (name, average width, KL from the teacher in nats a token) on the windows
    that were held back; `teacher` says what that was."""

    router: BitRouter
    method: str
    table: list[tuple[str, float, float]]
    teacher: str
    tokens: int


def train(
    path: Path,
    texts: Texts,
    *,
    reference: str | Path | None = None,
    method: str = "measured",
    tokens: int = 16384,
    steps: int = 300,
    threads: int | None = None,
    stage: Stage = lambda name: lambda done, total: None,
) -> Trained:
    """Make a width router for the container at `path` from tokenised `texts`, and write it into the container.

    `tokens` of the texts are measured on, a quarter of them held back for the report. `learned` trains for `steps` batches of
    LEARN_BATCH windows, from all of the texts but what is held back; its router is written only if it is better there than the
    measured one. The teacher is the checkpoint in `reference`, else the container at 8 bits. Interrupted, it leaves PATH.router.partial
    and raises KeyboardInterrupt that says so.
    Raises ConfigError, RequestError (too little text), CheckpointError (the reference), StorageError (nothing can be written).
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    container = Container.open(path)
    if threads is not None:
        torch.set_num_threads(threads)
    decoder = TorchDecoder(container)
    windows, held, more = windows_of(texts, tokens, steps * LEARN_BATCH if method == "learned" else 0)
    seal = hashlib.sha256(container.path.joinpath("checksums.safetensors").read_bytes()).hexdigest()
    kept = _Kept(path, {"seal": seal, "text": _digest(windows), "version": "2"})
    try:
        if "measured" not in kept.state:
            found = measure(decoder, windows, stage("measuring"))
            kept.put(measured=[getattr(found, field.name) for field in fields(found)])
        measured = Measured(*kept.state["measured"])
        candidates = {"measured": measured.rule()}
        teacher: Callable[[Tensor], Tensor] = lambda part: full_width(decoder, part)  # noqa: E731
        if reference is not None:
            teacher = reference_teacher(reference, decoder.shape.vocab)
        dials = {"measured": calibrate(decoder, candidates["measured"], windows, stage("calibrating"))}
        if method == "learned":
            start = candidates["measured"].router(dials["measured"])
            learner = Learner(decoder, candidates["measured"], (start.price(PRICED[1]), start.price(PRICED[0])), steps)
            course = [_digest(more), steps, str(reference)]
            candidates[method] = _learn(learner, more, teacher, kept, course, stage("training"))
            dials[method] = calibrate(decoder, candidates[method], windows, stage("calibrating again"))
        worth = measured.worth(windows.numel())
        routers = {name: rule.router(dials[name], worth) for name, rule in candidates.items()}
        table, best = _compare(decoder, candidates, routers, held, teacher, stage("comparing"))
    except KeyboardInterrupt:
        if not kept.state:
            raise
        raise KeyboardInterrupt(f"{kept.path} has what was done; the same command goes on there") from None
    about = {"method": best, "tokens": windows.numel(), "window": WINDOW}
    write_router(path, routers[best], about)
    kept.path.unlink(missing_ok=True)
    return Trained(routers[best], best, table, "8 bits" if reference is None else Path(reference).name, held.numel())


def _learn(
    learner: Learner,
    windows: Tensor,
    teacher: Callable[[Tensor], Tensor],
    kept: _Kept,
    course: list[Any],
    progress: Callable[[int, int], None],
) -> Rule:
    """Train to the end, from where the same `course` was left."""
    if kept.state.get("course") == course:
        learner.state = kept.state["learner"]
    while learner.done < learner.steps:
        progress(learner.done, learner.steps)
        learner.step(windows, teacher)
        if learner.done % KEEP_EVERY == 0 or learner.done == learner.steps:
            kept.put(learner=learner.state, course=course)
    return learner.rule


def _compare(
    decoder: TorchDecoder,
    candidates: dict[str, Rule],
    routers: dict[str, BitRouter],
    held: Tensor,
    teacher: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None],
) -> tuple[list[tuple[str, float, float]], str]:
    """The table of the report, and the candidate with the lower sum of log KL over the averages reported."""
    answers = [teacher(part) for part in batches(held)]
    table: list[tuple[str, float, float]] = []
    total = 2 + len(REPORTED) * len(candidates)
    for bits in (3, 4):
        table.append((f"uniform {bits}", *score(decoder, held, answers, plain(bits))))
        progress(len(table), total)
    sums = dict.fromkeys(candidates, 0.0)
    for average in REPORTED:
        for name, rule in candidates.items():
            price = routers[name].price(average)
            width, kl = score(decoder, held, answers, rule.at(price))
            table.append((f"{name} {average:g}", width, kl))
            # Along the curve a bit is worth a factor of about 3.5 in KL, so that averages that differ can be compared.
            sums[name] += float(torch.tensor(kl).log()) + 1.25 * width
            progress(len(table), total)
    return table, min(sums, key=lambda name: sums[name])


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


class _Kept:
    """What an interrupted training has done so far, if `key`, what it was done with, is the same."""

    def __init__(self, path: Path, key: dict[str, str]):
        self.path, self._key = path.with_name(path.name + ".router.partial"), key
        self.state: dict[str, Any] = {}
        try:
            found = torch.load(self.path, weights_only=True)
            self.state = found["state"] if found["key"] == self._key else {}
        except FileNotFoundError:
            pass
        except Exception:  # a file cut short is as good as none; torch raises nearly anything
            self.state = {}

    def put(self, **values: Any) -> None:
        """Keep these, whole or not at all."""
        self.state |= values
        draft = self.path.with_name(self.path.name + ".new")
        try:
            torch.save({"key": self._key, "state": self.state}, draft)
            draft.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"{self.path}: cannot be written: {error}; give a copy of the model in a folder you may change") from None
