"""Small containers of random weights, and manifests that were changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe import planes
from d2moe.container import PROJECTIONS, ContainerWriter, NestedMatrix, RecordLayout
from d2moe.container.manifest import seal_of

GROUP, LAYERS, EXPERTS = 32, (0, 2), 3
RECORD = RecordLayout(hidden=64, inner=48, group=GROUP)
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.rows": ("F32", (6, 16)),
    "embed.affine": ("U8", (6, 2, 2, 16)),
    "embed.base": ("U8", (6, 2, 2, 64)),
    **{f"embed.plane{bit}": ("U8", (6, 2, 1, 64)) for bit in range(3, 9)},
    "final_norm": ("F32", (64,)),
    "layers.0.router": ("F32", (EXPERTS, 64)),
    "layers.2.router": ("F32", (EXPERTS, 64)),
}
FILES = {
    "config.json": b'{"model_type": "olmoe", "num_experts_per_tok": 2}',
    "tokenizer.json": b'{"version": "1.0"}',
    "generation_config.json": b'{"eos_token_id": 7}',
}
FACTS: dict[str, Any] = {
    "record": RECORD,
    "layers": LAYERS,
    "experts": EXPERTS,
    "dense": SHAPES,
    "files": FILES,
    "source": {"name": "random/tiny", "sha256": "ab"},
    "quantizer": {"name": "joint-clip", "group": GROUP},
}
TYPES: dict[str, type[np.generic]] = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}


def dense_tensor(name: str) -> npt.NDArray[Any]:
    dtype, shape = SHAPES[name]
    rng = np.random.default_rng(sum(name.encode()))
    return (
        rng.integers(0, 256, shape).astype(TYPES[dtype])
        if dtype == "U8"
        else rng.normal(size=shape).astype(TYPES[dtype])
    )


def expert_codes(layer: int, expert: int, projection: str) -> tuple[planes.U8, planes.U8, planes.F32]:
    """Random codes and scales in the order of `planes.quantize`."""
    m = RECORD.matrix(projection)
    return random_codes([layer, expert, PROJECTIONS.index(projection)], m.tiles * 16, m.groups)


def random_codes(seed: list[int], rows: int, groups: int) -> tuple[planes.U8, planes.U8, planes.F32]:
    rng = np.random.default_rng(seed)
    affine = rng.integers(0, 256, (rows, groups, 2)).astype(np.uint8)
    scale = rng.random(rows, np.float32)
    return rng.integers(0, 256, (rows, groups * GROUP)).astype(np.uint8), affine, scale


def packed(codes: planes.U8, affine: planes.U8, scale: planes.F32, bits: int = 8) -> NestedMatrix:
    order = planes.tile(codes, GROUP)
    further = [planes.pack_plane(order, bit) for bit in range(3, bits + 1)]
    return NestedMatrix(scale.reshape(-1, 16), planes.tile_affine(affine), planes.pack_base(order), further)


def unpacked(matrix: NestedMatrix) -> tuple[planes.U8, planes.U8, planes.F32]:
    codes = planes.untile(planes.unpack(matrix.base, matrix.planes))
    return codes, planes.untile_affine(matrix.affine), matrix.row_scale.reshape(-1)


def nested(layer: int, expert: int, bits: int = 8) -> dict[str, NestedMatrix]:
    return {projection: packed(*expert_codes(layer, expert, projection), bits) for projection in PROJECTIONS}


def fill(writer: ContainerWriter) -> None:
    """Write what is not done yet, as a converter does."""
    for name in SHAPES:
        if not writer.is_dense_done(name):
            writer.add_dense(name, dense_tensor(name))
    for layer in LAYERS:
        for expert in sorted(set(range(EXPERTS)) - writer.done_experts(layer)):
            writer.add_expert(layer, expert, nested(layer, expert))


def make(path: Path) -> Path:
    with ContainerWriter(path, **FACTS) as writer:
        fill(writer)
        return writer.finish()


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


Edit = Callable[[dict[str, Any]], object]


def edited(path: Path, edit: Edit) -> None:
    """Change the manifest and seal it again, as another writer would have."""
    table = json.loads((path / "d2moe.json").read_text())
    edit(table)
    table["seal"] = "0" * 64
    text = json.dumps(table, indent=1).encode()
    (path / "d2moe.json").write_bytes(text.replace(b"0" * 64, seal_of(text)[1].encode(), 1))
