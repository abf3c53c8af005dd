"""Source checkpoints read without the safetensors library: the same numbers, whole, in rows, one expert at a time."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from d2moe.container.safetensors_header import SafetensorsFile, as_float32, build_header
from d2moe.errors import CheckpointError, ContainerError, StorageError

RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    "f32": RNG.normal(size=(5, 7)).astype(np.float32),
    "f16": RNG.normal(size=(3, 4, 5)).astype(np.float16),
    "i64": np.arange(6, dtype=np.int64).reshape(2, 3),
    "u32": np.arange(4, dtype=np.uint32),
    "u8": np.arange(9, dtype=np.uint8),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def raw(path: Path, table: object, data: bytes = b"", length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_the_library_wrote(path: Path) -> None:
    with SafetensorsFile(path) as f:
        assert f.metadata == {"format": "pt"} and set(f.entries) == set(TENSORS)
        for name, expected in TENSORS.items():
            found = f.read(name)
            assert found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)
            assert found.ctypes.data % 64 == 0 or not found.size
        assert np.array_equal(f.read_rows("f32", 1, 4), TENSORS["f32"][1:4])
        assert f.read_rows("f32", 5, 5).shape == (0, 7)
        assert np.array_equal(f.read_index("f16", 2), TENSORS["f16"][2])
        assert f.read_float32("f16").dtype == np.float32
        assert np.array_equal(f.read_float32("f16"), TENSORS["f16"].astype(np.float32))


def test_bfloat16_is_exact(tmp_path: Path) -> None:
    wide = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    wide.reshape(-1)[:4] = [np.inf, -0.0, 1e-40, 3.0e38]
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16)
    header, _ = build_header({"experts": ("BF16", (2, 3, 8))})
    (tmp_path / "b.safetensors").write_bytes(header + bits.tobytes())
    with SafetensorsFile(tmp_path / "b.safetensors") as f:
        one = f.read_index("experts", 1)
        assert one.dtype == np.uint16 and np.array_equal(one, bits[1])
        back = f.read_float32("experts")
        assert np.array_equal(back.view(np.uint32), bits.astype(np.uint32) << 16)


def test_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    """A sparse file of 8 GB: what is asked for is read, nothing else."""
    header, entries = build_header({"experts": ("F16", (64, 8192, 8192))})
    path = tmp_path / "big.safetensors"
    with path.open("wb") as f:
        f.write(header)
        try:
            f.truncate(len(header) + entries["experts"].n_bytes)
        except OSError:
            pytest.skip("no sparse files here")
        f.seek(len(header) + 63 * 8192 * 8192 * 2)
        f.write(np.array([1.5], np.float16).tobytes())
    with SafetensorsFile(path) as file:
        rows = file.read_rows("experts", 63, 64)
        assert rows.shape == (1, 8192, 8192) and rows[0, 0, 0] == 1.5


def test_what_is_asked_for_must_be_there(path: Path) -> None:
    with SafetensorsFile(path) as f:
        with pytest.raises(CheckpointError, match=r"x.safetensors: has no tensor 'lm_head.weight'"):
            f.read("lm_head.weight")
        for start, stop in ((0, 6), (-1, 2), (3, 2)):
            with pytest.raises(CheckpointError, match=r"'f32' \[5, 7\] has no rows"):
                f.read_rows("f32", start, stop)
        with pytest.raises(CheckpointError, match="has no rows"):
            f.read_index("scalar", 0)
    with pytest.raises(CheckpointError, match="dtype I64, expected BF16, F16 or F32; is the checkpoint quantised"):
        as_float32(TENSORS["i64"], "I64")


def facts(**change: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | change


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": facts(dtype="Q4")}, "'a' has dtype 'Q4', expected one of"),
        ({"a": facts(dtype=["U8"])}, "dtype"),
        ({"a": facts(shape=[-4])}, "shape"),
        ({"a": facts(shape=[4.0])}, "shape"),
        ({"a": facts(shape=[True])}, "shape"),
        ({"a": facts(shape=[1] * 9)}, "expected at most 8 sizes"),
        ({"a": facts(shape=[5])}, "has 4 bytes, its shape needs 5"),
        ({"a": facts(data_offsets=[4, 0])}, r"expected \[begin, end\]"),
        ({"a": facts(data_offsets=[0, 4, 8])}, r"expected \[begin, end\]"),
        ({"a": facts(shape=[9], data_offsets=[0, 9])}, "ends at byte 9 of the data, the file has 4"),
        ({"a": facts(shape=[3], data_offsets=[0, 3])}, "has 4 bytes of data, the header says 3"),
        ({"a": facts(shape=[3], data_offsets=[1, 4])}, "leaves a hole before it"),
        ({"a": facts(), "b": facts(shape=[2], data_offsets=[2, 4])}, "'b' at byte 2 overlaps 'a', expected 4"),
        ({"a": facts(extra=1)}, "expected dtype, shape and data_offsets"),
        ({"a": 3}, "expected dtype, shape and data_offsets"),
        ({"a": facts(), "__metadata__": {"x": 1}}, "__metadata__ must map strings to strings"),
        ({"a": facts(), "__metadata__": 5}, "__metadata__"),
        ([], r"header begins with b'\['"),
        (b' {"a": 1}', "header begins with"),
        (b'{"a": {}, "a": {}}', "key 'a' is there twice"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, "nested too deeply|expected dtype"),
    ],
)
def test_headers_that_break_a_rule(tmp_path: Path, table: object, message: str) -> None:
    path = raw(tmp_path / "x.safetensors", table, bytes(4))
    with pytest.raises(CheckpointError, match=message) as e:
        SafetensorsFile(path)
    assert str(path) in str(e.value)
    with pytest.raises(ContainerError):  # the caller chooses whose fault it is
        SafetensorsFile(path, ContainerError)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 5), struct.pack("<Q", 1 << 63)])
def test_files_without_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x.safetensors: (has \d bytes|the header claims)"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; is the checkpoint complete"):
        SafetensorsFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe")


def test_a_file_cut_while_open(path: Path) -> None:
    with SafetensorsFile(path) as f:
        entry = f.entry("f32")
        with path.open("r+b") as g:
            g.truncate(entry.offset + 1)
        with pytest.raises(StorageError, match="was the file cut while in use"):
            f.read("f32")


def test_headers_are_reproducible_and_aligned() -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"b": ("U8", (3,)), "a": ("F32", ())}
    header, entries = build_header(tensors)
    assert header == build_header(dict(tensors))[0] and len(header) % 4096 == 0
    assert list(entries) == ["b", "a"] and entries["a"].offset == len(header) + 3
