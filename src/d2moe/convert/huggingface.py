"""Hugging Face checkpoints: config.json, a tokenizer, and safetensors in one file or in shards with an index.

`Checkpoint.open` looks at every header and finds a place for every tensor the model needs before any weight is read;
reading gives float32 pieces of bounded size that are checked for NaN, infinity and range.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container.files import parse_json, read_small, shown
from d2moe.container.layout import PROJECTIONS, MatrixLayout, Tensors
from d2moe.container.safetensors_header import SafetensorsFile, as_float32
from d2moe.errors import CheckpointError
from d2moe.models import SourceNames, family, shape_from_config
from d2moe.models.config import Source
from d2moe.types import MAX_BITS, ModelShape

F32 = npt.NDArray[np.float32]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32")
MAX_JSON_BYTES = 1 << 28
MAX_WEIGHT = float(np.finfo(np.float32).max) / 2
"""Largest magnitude of a quantised weight: a group's range, up to twice that, must be finite in float32."""
PIECE_BYTES = 8 << 20
"""Float32 bytes of a piece of a large tensor."""
SAMPLES, SAMPLE_BYTES = 64, 4096

# Buffers that old versions of transformers saved; computed from the config today.
IGNORABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# The tokenizer's own files and what people need beside them; tokenizer.json must be there.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)


def target_shape(canonical: str, source: Source) -> tuple[int, ...]:
    """Shape in the container: that of the source, but [n] for a linear layer with one output, [1, n]."""
    shape = source.shape
    return shape[1:] if len(shape) == 2 and shape[0] == 1 and canonical.endswith(".mix") else shape


def dense_tensors(sources: Mapping[str, Source], group: int, bits: Mapping[str, int] | None = None) -> Tensors:
    """What the dense file of a model with these tensors holds, in file order: of each quantised matrix the arrays of all eight bits, or of
    as many as `bits` says."""
    out: Tensors = {}
    for name, source in sources.items():
        if source.quantized:
            out |= MatrixLayout(source.shape[0], source.shape[1], group, (bits or {}).get(name, MAX_BITS)).tensors(name)
        else:
            out[name] = ("F32", target_shape(name, source))
    return out


@dataclass(frozen=True)
class Place:
    """A tensor and the file it is in."""

    file: SafetensorsFile
    name: str

    def __str__(self) -> str:
        return f"{self.file.path}: tensor {shown(self.name)}"

    @property
    def dtype(self) -> str:
        return self.file.entries[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape


class Checkpoint:
    """An opened checkpoint; use `with`, or close it. Every tensor the model needs is there, with the right shape."""

    def __init__(self, path: Path, config: bytes, shape: ModelShape, names: SourceNames, shards: list[SafetensorsFile]):
        self.path, self.config_bytes, self.shape, self.names = path, config, shape, names
        self._shards = shards
        self._listing = path / SINGLE
        self._where: dict[str, SafetensorsFile] = {}
        self.dense: dict[str, Place] = {}
        self._fused: dict[int, tuple[Place, Place]] = {}
        self._separate: dict[tuple[int, int], tuple[Place, Place, Place]] = {}

    @classmethod
    def open(cls, path: str | Path, ignore_config_keys: Collection[str] = ()) -> Checkpoint:
        """Open the folder `path`. Raises ConfigError for the config, CheckpointError for everything else."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "no such folder"
            raise CheckpointError(f"{path}: {what}; give a .gguf file, or the folder of config.json and {SINGLE}")
        where = path / "config.json"
        config = read_small(where, MAX_JSON_BYTES, CheckpointError, "is this the folder of a Hugging Face checkpoint?")
        table = parse_json(config, str(where), CheckpointError, "download it again")
        shape = shape_from_config(table, str(where), ignore_config_keys)
        _check_tokenizer(path)
        files, index = _weight_files(path)
        checkpoint = cls(path, config, shape, family(shape.model_type).source_names(shape), [])
        try:
            checkpoint._shards = _open_shards(path, files, index)
            checkpoint._locate(index)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    # --- finding ---

    def _locate(self, index: dict[str, str] | None) -> None:
        self._listing = self.path / (SINGLE if index is None else INDEX)
        by_file = {shard.path.name: shard for shard in self._shards}
        if index is None:
            self._where = {name: shard for shard in self._shards for name in shard.entries}
        else:
            for name, file in index.items():
                if name not in by_file[file].entries:
                    raise CheckpointError(
                        f"{self.path / INDEX}: says that tensor {shown(name)} is in {shown(file)}, which has no such "
                        "tensor; index and shards are of different checkpoints, download them again"
                    )
                self._where[name] = by_file[file]
        used = self._locate_dense()
        for layer in self.shape.moe_layers:
            used |= self._locate_experts(layer)
        self._refuse_leftovers(used)

    def _missing(self, name: str, what: str) -> CheckpointError:
        hint = "is the checkpoint complete, and is config.json its own?"
        if what == "head":
            hint = "is tie_word_embeddings missing in config.json? " + hint
        return CheckpointError(f"{self._listing}: has no tensor {shown(name)}, needed for {what}; {hint}")

    def _place(self, name: str, expected: tuple[int, ...]) -> Place:
        place = Place(self._where[name], name)
        if place.dtype not in DTYPES:
            raise CheckpointError(
                f"{place} has dtype {place.dtype}, expected {', '.join(DTYPES)}; a quantised checkpoint cannot be "
                "converted, use the original one"
            )
        if place.shape != expected:
            raise CheckpointError(
                f"{place} has shape {list(place.shape)}, expected {list(expected)} from config.json; are both of the "
                "same model?"
            )
        return place

    def _locate_dense(self) -> set[str]:
        used = set()
        for canonical, source in self.names.dense.items():
            if not source.names:
                continue
            found = next((name for name in source.names if name in self._where), None)
            if found is None:
                raise self._missing(source.names[0], canonical)
            self.dense[canonical] = self._place(found, source.shape)
            used.add(found)
        return used

    def _locate_experts(self, layer: int) -> set[str]:
        inner, hidden, experts = self.shape.expert_inner, self.shape.hidden, self.shape.experts
        for gate_up, down in self.names.fused(layer):
            if gate_up in self._where or down in self._where:
                for name in (gate_up, down):
                    if name not in self._where:
                        raise self._missing(name, f"the experts of layer {layer}")
                first = self._place(gate_up, (experts, 2 * inner, hidden))
                self._fused[layer] = (first, self._place(down, (experts, hidden, inner)))
                return {gate_up, down}
        used = set()
        for e in range(experts):
            candidates = self.names.expert(layer, e)
            # The spelling that is there, or most of it, so that an error names what lacks of it.
            gate, up, down = max(candidates, key=lambda names: sum(name in self._where for name in names))
            for name in (gate, up, down):
                if name not in self._where:
                    raise self._missing(name, f"layer {layer} expert {e}")
            places = [self._place(name, (inner, hidden)) for name in (gate, up)]
            self._separate[layer, e] = (places[0], places[1], self._place(down, (hidden, inner)))
            used |= {gate, up, down}
        return used

    def _refuse_leftovers(self, used: set[str]) -> None:
        if self.shape.tied_embeddings and "lm_head.weight" in self._where:
            self._compare_head()
            used = used | {"lm_head.weight"}
        for shard in self._shards:
            for name in shard.entries:
                if (name not in used or self._where[name] is not shard) and not IGNORABLE.fullmatch(name):
                    raise CheckpointError(
                        f"{shard.path}: tensor {shown(name)} is not part of the {self.shape.model_type} model that "
                        "config.json describes; leaving it out could change it: check that config.json is its own"
                    )

    def _compare_head(self) -> None:
        head = self._place("lm_head.weight", (self.shape.vocab, self.shape.hidden))
        for a, b in zip(self._pieces(self.dense["embed"]), self._pieces(head), strict=True):
            if not np.array_equal(a, b):
                raise CheckpointError(
                    f"{head} differs from the embedding, but config.json ties them; set tie_word_embeddings to false "
                    "if the head is meant"
                )

    # --- reading ---

    def read_dense(self, canonical: str) -> F32:
        """A small dense tensor as float32 of its `target_shape`, checked to be finite."""
        if not self.names.dense[canonical].names:
            return np.zeros(self.target_shape(canonical), np.float32)
        place = self.dense[canonical]
        values = place.file.read_float32(place.name)
        check_values(values, place, float(np.finfo(np.float32).max))
        return values.reshape(self.target_shape(canonical))

    def linear_pieces(self, canonical: str, multiple: int) -> Iterator[F32]:
        """A matrix from top to bottom, float32 [rows, cols] each; rows a multiple of `multiple` but for the last."""
        place, row = self.dense[canonical], 0
        for piece in self._pieces(place, multiple):
            check_values(piece, place, MAX_WEIGHT, (row,))
            row += len(piece)
            yield piece

    def _pieces(self, place: Place, multiple: int = 1) -> Iterator[F32]:
        rows, cols = place.shape
        step = max(PIECE_BYTES // (4 * cols) // multiple, 1) * multiple
        for row in range(0, rows, step):
            yield as_float32(place.file.read_rows(place.name, row, min(row + step, rows)), place.dtype)

    def read_expert(self, layer: int, index: int) -> Iterator[tuple[str, F32]]:
        """("gate", float32 [inner, hidden]), ("up", the same), ("down", [hidden, inner]) of one expert, one by one."""
        if layer not in self._fused:
            for projection, place in zip(PROJECTIONS, self._separate[layer, index], strict=True):
                values = place.file.read_float32(place.name)
                check_values(values, place, MAX_WEIGHT)
                yield projection, values
            return
        both, down = self._fused[layer]
        raw, inner = both.file.read_index(both.name, index), self.shape.expert_inner
        for projection, row in (("gate", 0), ("up", inner)):
            values = as_float32(raw[row : row + inner], both.dtype)
            check_values(values, both, MAX_WEIGHT, (index, row))
            yield projection, values
        del raw
        values = as_float32(down.file.read_index(down.name, index), down.dtype)
        check_values(values, down, MAX_WEIGHT, (index, 0))
        yield "down", values

    # --- facts ---

    def weights(self, canonical: str) -> int:
        """Number of weights of a dense tensor, none if it is not in the checkpoint."""
        source = self.names.dense[canonical]
        return math.prod(source.shape) if source.names else 0

    def target_shape(self, canonical: str) -> tuple[int, ...]:
        """Shape of a float tensor in the container."""
        return target_shape(canonical, self.names.dense[canonical])

    def companions(self) -> dict[str, bytes]:
        """The small files that go along byte for byte, config.json first."""
        out = {"config.json": self.config_bytes}
        for name in COMPANIONS:
            if (self.path / name).is_file():
                out[name] = read_small(self.path / name, MAX_JSON_BYTES, CheckpointError, "it should be a small file")
        return out

    def facts(self) -> dict[str, Any]:
        """Provenance, and what tells this checkpoint from another: a hash of config and samples of the files."""
        dtypes = sorted({entry.dtype for shard in self._shards for entry in shard.entries.values()})
        digest = hashlib.sha256(self.config_bytes)
        for shard in self._shards:
            digest.update(f"\n{shard.path.name} ".encode())
            sample(shard.path, digest.update)
        return {
            "name": self.path.resolve().name,
            "model_type": self.shape.model_type,
            "dtype": ", ".join(dtypes),
            "files": {shard.path.name: shard.path.stat().st_size for shard in self._shards},
            "fingerprint": digest.hexdigest(),
        }

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _check_tokenizer(path: Path) -> None:
    where = path / "tokenizer.json"
    make = (
        'make it with transformers: python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{path}').save_pretrained('{path}')\""
    )
    text = read_small(where, MAX_JSON_BYTES, CheckpointError, make)
    if "model" not in parse_json(text, str(where), CheckpointError, make):
        raise CheckpointError(
            f'{where}: has no "model", expected a tokenizer as the tokenizers library saves it; {make}'
        )


def _weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index {tensor: file} if there is one; one file wins over an index, as in
    transformers."""
    if (path / SINGLE).exists():
        return [SINGLE], None
    where = path / INDEX
    if not where.exists():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
        if any(name.endswith((".bin", ".pt", ".pth")) for name in others):
            raise CheckpointError(
                f"{path}: has {others[0]} and no {SINGLE}; pickled weights are not read, save the model again with "
                "save_pretrained of a current transformers, which writes safetensors"
            )
        found = f"found {', '.join(others[:3])}" if others else "found no weights at all"
        raise CheckpointError(f"{path}: {found}, expected {SINGLE} or {INDEX}; download the checkpoint again")
    text = read_small(where, MAX_JSON_BYTES, CheckpointError, "download it again")
    table = parse_json(text, str(where), CheckpointError, "download it again").get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{where}: has no weight_map that names tensors and their files; download it again")
    for name, file in table.items():
        # Nothing but the name of a file beside the index: it must not lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{where}: places tensor {shown(name)} in {shown(file)}, expected the name of a .safetensors file in "
                "the same folder"
            )
    return sorted(set(table.values())), table


def _open_shards(path: Path, files: list[str], index: dict[str, str] | None) -> list[SafetensorsFile]:
    shards: list[SafetensorsFile] = []
    try:
        for file in files:
            if index is not None and not (path / file).exists():
                mine = [name for name, place in index.items() if place == file]
                raise CheckpointError(
                    f"{path / file}: no such file; {INDEX} places {len(mine)} tensors in it, {shown(mine[0])} the "
                    "first; download the missing file"
                )
            shards.append(SafetensorsFile(path / file))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def check_values(values: F32, place: object, limit: float, at: tuple[int, ...] = ()) -> None:
    """Refuse NaN, infinity and magnitudes above `limit`; `place` names the tensor, `at` is where `values` begin in it."""
    if values.size == 0 or (values.min() >= -limit and values.max() <= limit):  # NaN fails both
        return
    wrong = np.argwhere(~(np.abs(values) <= limit))[0]
    found = float(values[tuple(wrong)])
    # `at` ends with the row that `values` begin with; what is before it are leading dimensions.
    first = [int(i) for i in wrong]
    if at:
        first = [*at[:-1], at[-1] + first[0], *first[1:]]
    if math.isfinite(found):
        raise CheckpointError(
            f"{place} has {found:g} at {first}, expected at most {limit:.4g}, so that ranges fit float32; "
            "is the checkpoint damaged?"
        )
    raise CheckpointError(f"{place} has {found} at {first}, expected finite weights; is the checkpoint damaged?")


def sample(path: Path, update: Callable[[bytes], None]) -> None:
    """Feed a hash with the size of a file, its start, and pieces spread over it: not a proof, but any other training
    of the same model differs there."""
    n_bytes = path.stat().st_size
    update(str(n_bytes).encode())
    with path.open("rb", buffering=0) as file:
        for i in range(SAMPLES):
            update(os.pread(file.fileno(), SAMPLE_BYTES, max(n_bytes - SAMPLE_BYTES, 0) * i // (SAMPLES - 1)))
