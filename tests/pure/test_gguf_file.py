"""GGUF headers as gguf's own reader reads them, rows as it decodes them; files that are cut or damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_blocks import random_blocks
from gguf_models import KINDS, write

from d2moe.convert.gguf_file import GgufFile
from d2moe.convert.gguf_source import GgufModel
from d2moe.errors import CheckpointError, D2MoeError

RNG = np.random.default_rng()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    write(path, "qwen3moe", RNG)
    return path.read_bytes()


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


def test_header_is_that_of_the_reference_reader(tmp_path: Path) -> None:
    """Every value type, strings that are not ASCII, tensors of one to four dimensions, an alignment of its own."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_custom_alignment(64)
    for name, value in {
        "uint8": 200,
        "int8": -3,
        "uint16": 60000,
        "int16": -300,
        "uint32": 1 << 31,
        "int32": -9,
    }.items():
        getattr(writer, f"add_{name}")(f"k.{name}", value)
    writer.add_uint64("k.u64", 1 << 60)
    writer.add_int64("k.i64", -(1 << 60))
    writer.add_float32("k.f32", 1e-5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.str", "naïve 東京 🙂")
    for name, array in {
        "str": ["ä", "", "b" * 3000],
        "int": [1, -2],
        "float": [0.5, 1e-5],
        "bool": [True, False],
    }.items():
        writer.add_array(f"k.array.{name}", array)
    for n_dims in range(1, 5):
        size = tuple(int(n) for n in RNG.integers(1, 5, n_dims))
        writer.add_tensor(f"t{n_dims}", RNG.normal(size=size).astype(np.float32))
    writer.add_tensor("q", random_blocks(RNG, Kind.Q6_K, 3, 5, 512), raw_dtype=Kind.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference = gguf.GGUFReader(path)
    with GgufFile(path) as file:
        keys = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(keys)
        for key, wanted in keys.items():
            found = file.metadata[key]
            if isinstance(found, np.ndarray):
                found = found.tolist()
            assert found == wanted or np.float32(found) == np.float32(wanted), key
        assert file.metadata["k.f32"] == 1e-5 and file.metadata["k.f64"] == 0.1
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for wanted in reference.tensors:
            tensor = file.tensors[wanted.name]
            assert (tensor.kind, tensor.offset, tensor.n_bytes) == (
                wanted.tensor_type,
                wanted.data_offset,
                wanted.n_bytes,
            )
            assert tensor.shape == tuple(int(n) for n in reversed(wanted.shape))
            values = gguf.quants.dequantize(wanted.data, wanted.tensor_type).reshape(-1, tensor.shape[-1])
            assert np.array_equal(file.read_rows(tensor, 0, tensor.n_rows), values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_what_gguf_decodes(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows are asked for, and however many are decoded at a time."""
    monkeypatch.setattr("d2moe.convert.gguf_file.PIECE_BYTES", 7 * 512 * 4)
    raw = random_blocks(RNG, kind, 4, 10, 512)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "olmoe")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = gguf.quants.dequantize(raw, kind).reshape(40, 512)
    with GgufFile(tmp_path / "m.gguf") as file:
        for _ in range(10):
            start, stop = sorted(RNG.integers(0, 41, 2))
            rows = file.read_rows(file.tensors["x"], start, stop)
            assert rows.dtype == np.float32 and np.array_equal(rows, whole[start:stop])


def test_a_file_that_is_cut_is_refused(tiny: bytes, tmp_path: Path) -> None:
    """Wherever: inside the header, or inside the weights."""
    cuts = {*range(30), *(int(n) for n in RNG.integers(30, len(tiny), 60)), len(tiny) - 4000}
    for cut in cuts:
        with pytest.raises(CheckpointError, match="is the download complete"):
            opened(tmp_path / "m.gguf", tiny[:cut])


def test_a_damaged_header_never_does_worse_than_an_error(tiny: bytes, tmp_path: Path) -> None:
    """Bytes of the header replaced: it opens, or one of our errors says why not."""
    header = tiny.index(b"output_norm.weight") + 2000
    refused = 0
    for _ in range(300):
        data = bytearray(tiny)
        for at in RNG.integers(0, header, int(RNG.integers(1, 4))):
            data[at] = RNG.choice([0, 1, 0x7F, 0xFF, int(RNG.integers(256))])
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            GgufModel.open(tmp_path / "m.gguf").close()
        except D2MoeError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > 100


def header(n_tensors: int, keys: bytes = b"", n_keys: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys) + keys


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, kind: int, *shape: int, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BAD: dict[str, tuple[bytes, str]] = {
    "another format": (b"PK\x03\x04" + bytes(100), "begins with b'PK"),
    "version 1": (header(0, version=1) + bytes(9), "has GGUF version 1, supported are 2 and 3"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "absurd counts": (header(1 << 50), "1,125,899,906,842,624 tensors"),
    "absurd array": (header(0, string(b"k") + struct.pack("<IIQ", 9, 5, 1 << 60), 1), "ends inside the value of 'k'"),
    "absurd list": (header(0, string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60), 1), "more than the file has room for"),
    "array of arrays": (header(0, string(b"k") + struct.pack("<IIQ", 9, 9, 1), 1), "has type 9"),
    "unknown value": (header(0, string(b"k") + struct.pack("<I", 77), 1), "has type 77"),
    "not UTF-8": (header(0, string(b"\xff\xfe") + struct.pack("<IB", 0, 0), 1), "a key is not UTF-8"),
    "key twice": (header(0, 2 * (string(b"k") + struct.pack("<IB", 0, 0)), 2), "key 'k' is there twice"),
    "tensor twice": (header(2) + 2 * tensor(b"x", 0, 2) + bytes(64), "tensor 'x' is there twice"),
    "alignment": (header(0, string(b"general.alignment") + struct.pack("<II", 4, 3), 1), "expected a power of two"),
    "no dimension": (header(1) + tensor(b"x", 0) + bytes(64), "has 0 dimensions"),
    "empty": (header(1) + tensor(b"x", 0, 4, 0) + bytes(64), "has shape"),
    "unknown type": (header(1) + tensor(b"x", 999, 4) + bytes(64), "type 999, which this version of the gguf package"),
    "part of a block": (header(1) + tensor(b"x", int(Kind.Q4_K), 300) + bytes(999), "expected a multiple of 256"),
    "outside": (header(1) + tensor(b"x", 0, 4, offset=1 << 40) + bytes(64), "ends at byte 1,099,511,627"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_rules_are_named(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "m.gguf", data)
    assert message in str(caught.value) and str(tmp_path / "m.gguf") in str(caught.value)


def test_neither_file_nor_regular(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"give the \.gguf file"):
            GgufFile(path)


def test_nan_and_infinity_are_found_with_their_place(tmp_path: Path) -> None:
    embed: np.ndarray[Any, Any] = RNG.normal(size=(48, 256)).astype(np.float32)
    embed[37, 5] = np.nan
    gate: np.ndarray[Any, Any] = RNG.normal(size=(6, 256, 256)).astype(np.float32)
    gate[3, 17, 2] = np.inf
    norm = np.full(256, np.inf, np.float32)
    given = {"token_embd.weight": embed, "blk.1.ffn_gate_exps.weight": gate, "output_norm.weight": norm}
    write(tmp_path / "m.gguf", "qwen3moe", RNG, tensors=given)
    with GgufModel.open(tmp_path / "m.gguf") as model:
        with pytest.raises(CheckpointError, match=r"'token_embd.weight' has nan at \[37, 5\]"):
            list(model.linear_pieces("embed", 16))
        with pytest.raises(CheckpointError, match=r"'blk.1.ffn_gate_exps.weight' has inf at \[3, 17, 2\]"):
            list(model.read_expert(1, 3))
        with pytest.raises(CheckpointError, match=r"'output_norm.weight' has inf at \[0\]"):
            model.read_dense("final_norm")
