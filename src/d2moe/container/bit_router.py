"""`bit_router.safetensors`: what further bits of an expert are worth to a token, and which price gives which average.

An optional file of a container (docs/format.md, section 8); docs/routing.md says what the numbers mean. Its tensors, all F32:

    planes  [layers, experts, 6]       logarithm of the value of planes 3 to 8, not ascending; layers with experts only
    powers  [layers, 2]                of the gate and of the residual's mean square
    base    [layers, experts]          logarithm of the value of each of the first two bits; absent, no expert is left out
    weight  [layers, experts, hidden]  meets the normed input; may be absent
    dial    [n, 2]                     average width, ascending, and the price that gives it, the logarithm of a value
    worth   [layers, experts, 7]       nats of KL divergence a token that the first two bits and each plane saved, on average over
                                       the text it was measured on; what `d2moe trim` goes by; may be absent
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import parse_json, read_small, sync_folder
from d2moe.container.manifest import MANIFEST, MAX_SMALL_BYTES, parse_manifest, reseal
from d2moe.container.reader import ADVICE, Container
from d2moe.container.safetensors_header import DTYPES, build_header, parse_header
from d2moe.errors import ContainerError, StorageError
from d2moe.types import BASE_BITS, MAX_BITS

F32 = npt.NDArray[np.float32]

NAME = "bit_router.safetensors"
MAX_BYTES = 1 << 30
RETRAIN = 'train it again with "d2moe route train"'


@dataclass(frozen=True)
class BitRouter:
    """A width router; shapes in the module's docstring."""

    planes: F32
    powers: F32
    weight: F32 | None
    dial: F32
    base: F32 | None = None
    worth: F32 | None = None

    def price(self, bits: float) -> float:
        """The price at which tokens take `bits` on average, by straight lines between the points of the table."""
        return float(np.interp(bits, self.dial[:, 0], self.dial[:, 1]))

    def layer(self, index: int) -> dict[str, Any]:
        """What a back end's `WidthRouter` takes for a layer, counted among those with experts."""
        gate_power, norm_power = self.powers[index].tolist()
        weight = None if self.weight is None else self.weight[index]
        base = None if self.base is None else self.base[index]
        return {"planes": self.planes[index], "weight": weight, "base": base, "gate_power": gate_power, "norm_power": norm_power}

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def tensors(self) -> dict[str, F32]:
        all_of_it = {"planes": self.planes, "powers": self.powers, "weight": self.weight, "dial": self.dial, "base": self.base}
        all_of_it["worth"] = self.worth
        return {name: tensor for name, tensor in all_of_it.items() if tensor is not None}


def read_router(container: Container) -> BitRouter | None:
    """The container's width router, None if it has none; ContainerError if it is damaged or of another model."""
    facts, path = container.manifest.files.get(NAME), container.path / NAME
    if facts is None or not path.exists():
        return None
    data = read_small(path, MAX_BYTES, ContainerError, RETRAIN)
    if facts.sha256 is not None and hashlib.sha256(data).hexdigest() != facts.sha256:
        raise ContainerError(f"{path}: is damaged, its SHA-256 is not what the manifest says; {RETRAIN}")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ContainerError(f"{path}: has {len(data)} bytes, its header claims {size:,}; {RETRAIN}")
    entries = parse_header(data[8 : 8 + size], len(data), str(path), ContainerError).entries
    layers, experts = len(container.moe_layers), container.experts
    points = entries["dial"].shape[0] if "dial" in entries and entries["dial"].shape else 0
    shapes = {"planes": (layers, experts, MAX_BITS - BASE_BITS), "powers": (layers, 2), "dial": (max(points, 2), 2)}
    optional = {"weight": (layers, experts, container.record.hidden), "base": (layers, experts)}
    optional["worth"] = (layers, experts, MAX_BITS - BASE_BITS + 1)
    shapes |= {name: shape for name, shape in optional.items() if name in entries}
    found: dict[str, F32] = {}
    for name, shape in shapes.items():
        e = entries.get(name)
        if e is None or e.dtype != "F32" or e.shape != shape:
            what = f"{e.dtype} {list(e.shape)}" if e else "missing"
            raise ContainerError(f"{path}: tensor {name} is {what}, expected F32 {list(shape)}; {RETRAIN}")
        found[name] = np.frombuffer(data, DTYPES["F32"], e.n_bytes // 4, e.offset).reshape(shape)
    router = BitRouter(found["planes"], found["powers"], found.get("weight"), found["dial"], found.get("base"), found.get("worth"))
    check(router, str(path))
    return router


def check(router: BitRouter, where: str) -> None:
    """ContainerError for numbers that are no width router."""
    for name, tensor in router.tensors.items():
        if not np.isfinite(tensor).all():
            raise ContainerError(f"{where}: {name} has numbers that are not finite; {RETRAIN}")
    if (np.diff(router.planes, axis=-1) > 0).any():
        raise ContainerError(f"{where}: a plane of planes is worth more than the one before it; {RETRAIN}")
    if router.base is not None and (router.base < router.planes[..., 0]).any():
        raise ContainerError(f"{where}: a third bit is worth more than each of the first two; {RETRAIN}")
    if (np.diff(router.dial[:, 0]) <= 0).any() or (np.diff(router.dial[:, 1]) > 0).any():
        raise ContainerError(f"{where}: dial is {router.dial[:3].tolist()} …, expected ascending widths and falling prices; {RETRAIN}")


def write_router(path: Path, router: BitRouter | None, about: dict[str, Any]) -> None:
    """Give the container at `path` this width router, or take the one it has (None). `about` says how it was made.

    Whenever this is interrupted, the container is whole: first the manifest lets go of an old router, then the file is written,
    then the manifest names it. StorageError if the folder cannot be written.
    """
    manifest = path / MANIFEST
    table = parse_json(read_small(manifest, MAX_SMALL_BYTES, ContainerError, ADVICE), str(manifest), ContainerError, ADVICE)
    try:
        if table["files"].pop(NAME, None) is not None:
            _replace(manifest, _checked(table, manifest))
        if router is None:
            with contextlib.suppress(FileNotFoundError):
                (path / NAME).unlink()
            return
        check(router, str(path / NAME))
        tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in router.tensors.items()}
        header, _ = build_header({name: ("F32", tensor.shape) for name, tensor in tensors.items()})
        data = header + b"".join(tensor.tobytes() for tensor in tensors.values())
        _replace(path / NAME, data)
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "optional": True, "about": about}
        table["files"][NAME] = facts
        _replace(manifest, _checked(table, manifest))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}; give a copy of the model that you may change") from None


def _checked(table: dict[str, Any], manifest: Path) -> bytes:
    """The manifest's text, sealed again, which this version would read."""
    text = reseal((json.dumps(table, indent=1, allow_nan=False) + "\n").encode())
    parse_manifest(text, str(manifest))
    return text


def _replace(path: Path, data: bytes) -> None:
    """The whole new file or the whole old one, whatever happens."""
    draft = path.with_name(path.name + ".new")
    try:
        with draft.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)
