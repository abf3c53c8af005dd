"""A checkpoint becomes a container, tensor by tensor: nothing larger than a piece of a tensor or one expert is held.

Peak memory is a few experts in float32, or a piece of `huggingface.PIECE_BYTES` of a dense matrix with its codes,
whatever the size of the model. Every finished tensor and expert is in the journal of the .partial folder, so a run that
was killed goes on where it was, and gives the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2moe.container import Container, ContainerWriter, RecordLayout
from d2moe.container.manifest import GROUPS
from d2moe.convert import calibrated
from d2moe.convert.balance import SHARE, Balanced
from d2moe.convert.calibration import Calibration
from d2moe.convert.calibration import facts as calibration_facts
from d2moe.convert.huggingface import dense_tensors
from d2moe.convert.job import Job, Progress, Silent
from d2moe.convert.samples import OwnSamples, Samples
from d2moe.convert.source import ModelSource, open_source
from d2moe.errors import CheckpointError, ConfigError
from d2moe.types import GROUP


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    group: int = GROUP,
    balance: bool = True,
    rotate: bool = True,
    calibration: Calibration | OwnSamples | None = None,
    widths_of: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    ignore_config_keys: Collection[str] = (),
) -> Path:
    """Convert `src`, the folder of a Hugging Face checkpoint or a GGUF file, to the container `dst`; returns `dst`.

    `group` weights along the input share a scale; `balance` moves factors between weights that follow each other, which
    changes no output and helps the lower widths (convert/balance.py); `rotate` has the engine
    rotate what every down meets (planes.rotate), which evens its weights out; `calibration` is text by which weights are rounded with
    error feedback (convert/calibrated.py) instead of to the nearest, or has the model write it, or both (convert/samples.py, which
    keeps `dst`.samples meanwhile); `widths_of` is a container of the same model, made smaller (container/trim.py), whose every expert and
    matrix has the bits that are to be kept, and each is rounded for these; `threads` None means all CPUs this process may use.
    `dst`.partial holds an unfinished conversion; the same call resumes it. Interrupted, it raises KeyboardInterrupt with a
    message that says so. Raises ConfigError (the config, or an argument), CheckpointError (the weights or the tokenizer; then
    nothing is left behind), ContainerError (`dst` exists, or the .partial is of another conversion) and StorageError.
    """
    if isinstance(group, bool) or group not in GROUPS:
        raise ConfigError(f"group is {group!r}, expected a multiple of {GROUPS[0]} up to {GROUPS[-1]}, such as {GROUP}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ConfigError(f"threads is {threads!r}, expected a whole number of at least 1")
    if widths_of is not None and calibration is None:
        raise ConfigError("rounding to the nearest is the same for all widths: give calibration text, or trim the model that was converted")
    threads = threads or len(os.sched_getaffinity(0))
    with open_source(src, ignore_config_keys) as checkpoint:
        quantizer: dict[str, Any] = {"name": "range", "group": group, "balance": SHARE if balance else None}
        progress = progress or Silent()
        windows, samples = None, None
        if isinstance(calibration, OwnSamples):
            samples = Samples(Path(dst), {"source": checkpoint.facts(), "group": group, "balance": balance, "rotate": rotate})
            same: dict[str, Any] = {"group": group, "balance": balance, "rotate": rotate, "ignore_config_keys": ignore_config_keys}
            plainly = partial(convert, src, threads=threads, progress=progress, **same)
            windows = samples.windows(calibration, plainly, threads, progress)
            if calibration.beside is not None:
                given = replace(calibration.beside, window=windows.shape[1]).windows(checkpoint)
                windows = np.concatenate([given, windows])
        elif calibration is not None:
            windows = calibration.windows(checkpoint)
        if windows is not None:
            quantizer |= {"name": "descent", "calibration": calibration_facts(windows), **calibrated.facts()}
        rotation = rotation_of(checkpoint.shape.expert_inner) if rotate else 0
        small = None if widths_of is None else _same_model(Container.open(widths_of), checkpoint)
        writer = _writer(checkpoint, Path(dst), quantizer, rotation, ignore_config_keys, small)
        source = Balanced(checkpoint, partial(progress.advance, 0)) if balance else checkpoint
        job = Job(source, writer, group, threads, progress)
        if windows is not None:
            job = calibrated.CalibratedJob(source, writer, group, threads, progress, windows, small is not None)
        try:
            with writer:
                job.run()
                made = writer.finish()
            if samples is not None:
                samples.remove()
            return made
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{writer.partial}: stopped after {job.done:,} of {job.total:,} weights; the same command resumes"
            ) from None
        except CheckpointError:
            # These weights can never be finished: what is done of them is of no use to anyone.
            with contextlib.suppress(OSError):
                shutil.rmtree(writer.partial)
            raise


def rotation_of(inner: int) -> int:
    """The span in which an expert's inner channels are rotated: the largest power of two that divides them, 0 if that is too small."""
    span = inner & -inner
    return span if span >= GROUPS[0] else 0


def _same_model(small: Container, checkpoint: ModelSource) -> Container:
    """`small`, if it has the experts and matrices of the checkpoint; ConfigError else."""
    shape = checkpoint.shape
    found = (small.moe_layers, small.experts, small.record.hidden, small.record.inner)
    wanted = (shape.moe_layers, shape.experts, shape.hidden, shape.expert_inner)
    if found != wanted or {n for n, s in checkpoint.names.dense.items() if s.quantized} != set(small.nested):
        what = f"{len(found[0])} layers of {found[1]} experts, {found[2]} x {found[3]}"
        raise ConfigError(
            f"{small.path} has {what}, the checkpoint {len(wanted[0])} layers of {wanted[1]} experts, {wanted[2]} x {wanted[3]}; "
            "give a model that was converted from it and trimmed"
        )
    return small


def _writer(
    checkpoint: ModelSource, dst: Path, quantizer: dict[str, Any], rotation: int, ignored: Collection[str], small: Container | None
) -> ContainerWriter:
    shape, group = checkpoint.shape, quantizer["group"]
    is_calibrated = quantizer["name"] != "range"
    dense = dense_tensors(checkpoint.names.dense, group, {n: layout.bits for n, layout in small.nested.items()} if small else None)
    return ContainerWriter(
        dst,
        record=RecordLayout(shape.hidden, shape.expert_inner, group, rotation=rotation),
        layers=shape.moe_layers,
        experts=shape.experts,
        dense=dense | calibrated.loss_tensors(shape) if is_calibrated else dense,
        files=checkpoint.companions(),
        source={**checkpoint.facts(), "ignored_config_keys": sorted(set(ignored))},
        quantizer=quantizer | {"below_kept": calibrated.BELOW} if small else quantizer,
        kept=small.manifest.kept if small else None,
    )
