"""GGUF files as a source: the reading interface of `huggingface.Checkpoint` on llama.cpp's names and order of rows.

Opening finds a place for every tensor before any weight is read. Reading decodes only the rows of the piece or of the
expert that is asked for, to exactly what gguf's `dequantize` gives for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from d2moe.container.files import parse_json, read_small, shown
from d2moe.container.layout import PROJECTIONS
from d2moe.convert.gguf_config import AGAIN, Metadata, config_from
from d2moe.convert.gguf_file import GgufFile, GgufTensor, can_decode
from d2moe.convert.gguf_tokenizer import BESIDE, NORMAL, Vocabulary, tokenizer_files, tokenizer_settings
from d2moe.convert.huggingface import (
    COMPANIONS,
    MAX_JSON_BYTES,
    MAX_WEIGHT,
    PIECE_BYTES,
    check_values,
    sample,
    target_shape,
)
from d2moe.errors import CheckpointError
from d2moe.models import SourceNames, family, shape_from_config
from d2moe.types import ModelShape

F32 = npt.NDArray[np.float32]

ROPE = "rope_freqs.weight"
GLOBAL = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
IN_LAYER = {
    "attn_norm": "attn_norm.weight",
    "attn.q": "attn_q.weight",
    "attn.k": "attn_k.weight",
    "attn.v": "attn_v.weight",
    "attn.o": "attn_output.weight",
    "attn.q_bias": "attn_q.bias",
    "attn.k_bias": "attn_k.bias",
    "attn.v_bias": "attn_v.bias",
    "attn.o_bias": "attn_output.bias",
    "attn.q_norm": "attn_q_norm.weight",
    "attn.k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "router": "ffn_gate_inp.weight",
    "shared.gate": "ffn_gate_shexp.weight",
    "shared.up": "ffn_up_shexp.weight",
    "shared.down": "ffn_down_shexp.weight",
    "shared.mix": "ffn_gate_inp_shexp.weight",
}
"""Canonical name of a dense tensor → its name in the file, after "blk.N." where it is of a layer."""
SPELLINGS = {
    r"\.attn_[qkv]\.": ("blk.{layer}.attn_qkv.weight", "query, key and value are fused; make it without --fuse-qkv"),
    r"_exps\.": ("blk.{layer}.ffn_gate_up_exps.weight", "gate and up are fused; make it without --fuse-gate-up-exps"),
    r"_exps\.weight": ("blk.{layer}.ffn_gate.0.weight", f"one tensor per expert is of an old llama.cpp; {AGAIN}"),
}
"""Other ways to store what is missing: (pattern of the missing name, a name that gives it away, what to do)."""


def file_name(canonical: str) -> str:
    """Name in the file of a dense tensor."""
    if canonical in GLOBAL:
        return GLOBAL[canonical]
    _, layer, part = canonical.split(".", 2)
    return f"blk.{layer}.{IN_LAYER[part]}"


class GgufModel:
    """An opened GGUF file; use `with`, or close it. Every tensor the model needs is there, with the right shape."""

    def __init__(self, path: Path, file: GgufFile, config: dict[str, Any], shape: ModelShape, names: SourceNames):
        self.path, self.file, self.shape, self.names = path, file, shape, names
        self.config_bytes = json.dumps(config, indent=2).encode()
        # llama.cpp's own rotary embedding turns neighbouring rows; its converter orders the rows of q and k for that.
        self._is_interleaved = file.metadata["general.architecture"] == "llama"
        self.dense: dict[str, GgufTensor] = {}
        self._experts: dict[int, tuple[GgufTensor, GgufTensor, GgufTensor]] = {}
        self._companions: dict[str, bytes] = {}

    @classmethod
    def open(cls, path: str | Path, ignore_config_keys: Collection[str] = ()) -> GgufModel:
        """Open the file `path`. Raises ConfigError for the model's metadata, CheckpointError for everything else."""
        path = Path(path)
        file = GgufFile(path)
        try:
            metadata = Metadata(file.metadata, str(path), ignore_config_keys)
            rope = file.tensors.get(ROPE)
            divisors = file.read_rows(rope, 0, 1)[0] if rope is not None and rope.kind.name == "F32" else None
            config = config_from(metadata, {name: tensor.shape for name, tensor in file.tensors.items()}, divisors)
            shape = shape_from_config(config, f"{path}: the config made of its metadata", ignore_config_keys)
            model = cls(path, file, config, shape, family(shape.model_type).source_names(shape))
            model._locate()
            model._companions = _tokenizer(path, file.metadata, shape.vocab)
        except BaseException:
            file.close()
            raise
        return model

    # --- finding ---

    def _locate(self) -> None:
        stored = {name: source for name, source in self.names.dense.items() if source.names}
        self.dense = {name: self._find(file_name(name), source.shape) for name, source in stored.items()}
        inner, hidden, experts = self.shape.expert_inner, self.shape.hidden, self.shape.experts
        sizes = {"gate": (experts, inner, hidden), "up": (experts, inner, hidden), "down": (experts, hidden, inner)}
        last = "" if self.names.is_dense else "_exps"
        for layer in self.shape.moe_layers:
            gate, up, down = (self._find(f"blk.{layer}.ffn_{name}{last}.weight", sizes[name]) for name in PROJECTIONS)
            self._experts[layer] = (gate, up, down)
        used = {tensor.name for tensor in self.dense.values()}
        used |= {tensor.name for three in self._experts.values() for tensor in three}
        if self.shape.rope.kind == "llama3":
            used.add(ROPE)
        for name in self.file.tensors:
            if name not in used:
                what = "scales the rotary frequencies, which is" if name.endswith(ROPE) else "is"
                raise CheckpointError(
                    f"{self.path}: tensor {shown(name)} {what} not part of the {self.shape.model_type} model that the "
                    "metadata describes; leaving it out could change it, so this file cannot be converted"
                )

    def _find(self, name: str, expected: tuple[int, ...]) -> GgufTensor:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise self._missing(name)
        # The converter drops dimensions of one: a gate with a single output is stored as a vector.
        sizes = [n for n in tensor.shape if n != 1], [n for n in expected if n != 1]
        if sizes[0] != sizes[1] or tensor.shape[-1] != expected[-1]:
            raise CheckpointError(
                f"{self.file.where(tensor)} has shape {list(tensor.shape)}, expected {list(expected)} from the metadata; "
                f"is the file damaged? {AGAIN}"
            )
        if not can_decode(tensor.kind):
            raise CheckpointError(
                f"{self.file.where(tensor)} has type {tensor.kind.name}, which the gguf package cannot decode; take a "
                "file of another quantisation, such as Q8_0 or Q6_K, or convert the original checkpoint"
            )
        return tensor

    def _missing(self, name: str) -> CheckpointError:
        layer = name.split(".")[1]
        hint = f"is the file complete? {AGAIN}"
        for pattern, (other, advice) in SPELLINGS.items():
            if re.search(pattern, name) and other.format(layer=layer) in self.file.tensors:
                hint = advice
        return CheckpointError(
            f"{self.path}: has no tensor {shown(name)}, needed for this {self.shape.model_type} model; {hint}"
        )

    # --- reading ---

    def read_dense(self, canonical: str) -> F32:
        """A small dense tensor as float32 of its `target_shape`, checked to be finite."""
        if not self.names.dense[canonical].names:
            return np.zeros(self.target_shape(canonical), np.float32)
        tensor = self.dense[canonical]
        values = self.file.read_rows(tensor, 0, tensor.n_rows).reshape(tensor.shape)
        check_values(values, self.file.where(tensor), float(np.finfo(np.float32).max))
        if self._is_interleaved and canonical.endswith((".attn.q_bias", ".attn.k_bias")):
            values = _halves_apart(values.reshape(-1, 1), self.shape.head_dim)
        return values.reshape(self.target_shape(canonical))

    def linear_pieces(self, canonical: str, multiple: int) -> Iterator[F32]:
        """A matrix from top to bottom, float32 [rows, cols] each; rows a multiple of `multiple` but for the last."""
        tensor = self.dense[canonical]
        rows, cols = self.names.dense[canonical].shape
        is_interleaved = self._is_interleaved and canonical.endswith((".attn.q", ".attn.k"))
        unit = math.lcm(multiple, self.shape.head_dim) if is_interleaved else multiple
        step = max(PIECE_BYTES // (4 * cols) // unit, 1) * unit
        for row in range(0, rows, step):
            piece = self.file.read_rows(tensor, row, min(row + step, rows))
            check_values(piece, self.file.where(tensor), MAX_WEIGHT, (row,))
            yield _halves_apart(piece, self.shape.head_dim) if is_interleaved else piece

    def read_expert(self, layer: int, index: int) -> Iterator[tuple[str, F32]]:
        """("gate", float32 [inner, hidden]), ("up", the same), ("down", [hidden, inner]) of one expert, one by one."""
        for projection, tensor in zip(PROJECTIONS, self._experts[layer], strict=True):
            rows = self.shape.hidden if projection == "down" else self.shape.expert_inner
            values = self.file.read_rows(tensor, index * rows, (index + 1) * rows)
            check_values(values, self.file.where(tensor), MAX_WEIGHT, (index, 0))
            yield projection, values

    # --- facts ---

    def weights(self, canonical: str) -> int:
        """Number of weights of a dense tensor, none if it is not in the file."""
        source = self.names.dense[canonical]
        return math.prod(source.shape) if source.names else 0

    def target_shape(self, canonical: str) -> tuple[int, ...]:
        """Shape of a float tensor in the container."""
        return target_shape(canonical, self.names.dense[canonical])

    def companions(self) -> dict[str, bytes]:
        """The config.json made of the metadata, and the tokenizer's files: those beside the file, or made of it too."""
        return {"config.json": self.config_bytes, **self._companions}

    def facts(self) -> dict[str, Any]:
        """Provenance, and what tells this file from another: a hash of its config and samples of it."""
        digest = hashlib.sha256(self.config_bytes)
        sample(self.path, digest.update)
        return {
            "name": self.path.resolve().stem,
            "model_type": self.shape.model_type,
            "dtype": ", ".join(sorted({tensor.kind.name for tensor in self.file.tensors.values()})),
            "files": {self.path.name: self.file.n_bytes},
            "fingerprint": digest.hexdigest(),
        }

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _halves_apart(rows: F32, head_dim: int) -> F32:
    """Rows of whole heads from llama.cpp's order, pair by pair, to that of the config: all first halves, all second."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _tokenizer(path: Path, metadata: Mapping[str, Any], size: int) -> dict[str, bytes]:
    """The files of the tokenizer. A tokenizer.json beside the file is the model's own, and so is what lies with it."""
    beside = path.parent / "tokenizer.json"
    if not beside.is_file():
        return tokenizer_files(metadata, str(path), size)
    found = {
        name: read_small(path.parent / name, MAX_JSON_BYTES, CheckpointError, "it should be a small file")
        for name in COMPANIONS
        if (path.parent / name).is_file()
    }
    advice = f"get it again, or remove it so that a tokenizer is made of {path.name}"
    parse_json(found["tokenizer.json"], str(beside), CheckpointError, advice)
    try:
        backend = Tokenizer.from_str(found["tokenizer.json"].decode())
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{beside}: is not a tokenizer the tokenizers library can read ({error}); {advice}"
        ) from None
    if "tokenizer.ggml.tokens" in metadata:
        for text, index in Vocabulary(metadata, str(path), size).ids(NORMAL).items():
            other = backend.token_to_id(text)
            # The embedding may have more rows than the tokenizer tokens; what names those have is no matter.
            if other != index and not (other is None and index >= backend.get_vocab_size()):
                raise CheckpointError(
                    f"{beside}: has token {shown(text)} as {'none' if other is None else other}, {path.name} as {index}; "
                    f"they are of different models: remove it, or {BESIDE}"
                )
        found.setdefault("tokenizer_config.json", tokenizer_settings(metadata, str(path), size))
    return found
