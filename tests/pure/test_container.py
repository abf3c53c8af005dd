"""Containers: what is written is read back, opens with the safetensors library, and is refused where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from containers import (
    EXPERTS,
    FACTS,
    FILES,
    LAYERS,
    RECORD,
    SHAPES,
    TYPES,
    contents,
    dense_tensor,
    expert_codes,
    fill,
    nested,
    unpacked,
)
from safetensors import safe_open

from d2moe import planes
from d2moe.container import PROJECTIONS, SEGMENTS, Container, ContainerWriter, NestedMatrix, pack_record
from d2moe.container.layout import ARRAYS, expert_file, expert_tensor
from d2moe.errors import ConfigError, ContainerError, D2MoeError, StorageError
from d2moe.types import WIDTHS


def test_what_was_written_is_read_back(sample: Path) -> None:
    container = Container.open(sample)
    assert container.path == sample and container.record == RECORD
    assert container.moe_layers == LAYERS and container.experts == EXPERTS
    assert container.config["model_type"] == "olmoe" and container.generation_config == {"eos_token_id": 7}
    assert (sample / "config.json").read_bytes() == FILES["config.json"]
    for name in SHAPES:
        found = container.read_dense(name)
        assert found.ctypes.data % 64 == 0 and found.flags.writeable
        assert found.dtype == dense_tensor(name).dtype and np.array_equal(found, dense_tensor(name))
    for layer in LAYERS:
        for expert in range(EXPERTS):
            for bits in WIDTHS:
                for projection, matrix in container.read_expert(layer, expert, bits).items():
                    expected, affine, scale = expert_codes(layer, expert, projection)
                    codes, *scales = unpacked(matrix)
                    assert matrix.bits == bits
                    assert np.array_equal(codes, planes.prefix(expected, bits))
                    assert np.array_equal(scales[0], affine) and np.array_equal(scales[1], scale)


def test_the_base_segment_is_codes_then_row_scales_then_affine(sample: Path) -> None:
    """The order that the compiled executor takes for granted, spelled out: no gaps, gate, up, down in each."""
    record = Container.open(sample).read_record(2, 1, 2).tobytes()
    parts = nested(2, 1)
    expected = b"".join(parts[p].base.tobytes() for p in PROJECTIONS)
    expected += b"".join(parts[p].row_scale.tobytes() for p in PROJECTIONS)
    expected += b"".join(parts[p].affine.tobytes() for p in PROJECTIONS)
    assert record == expected.ljust(4096, b"\0")


def test_records_are_aligned_prefixes(sample: Path) -> None:
    container = Container.open(sample)
    data = container.expert_path(2).read_bytes()
    for expert in range(EXPERTS):
        at = container.expert_offset(2, expert)
        record = pack_record(RECORD, nested(2, expert)).tobytes()
        assert at % 4096 == 0 and data[at : at + RECORD.record_bytes] == record
        for bits in WIDTHS:
            found = container.read_record(2, expert, bits)
            assert found.ctypes.data % 4096 == 0 and found.tobytes() == record[: RECORD.prefix_bytes(bits)]
    assert container.expert_offset(2, EXPERTS - 1) + RECORD.record_bytes == len(data)


def test_every_weight_file_opens_with_the_safetensors_library(sample: Path) -> None:
    for layer in LAYERS:
        with safe_open(sample / expert_file(layer), "np") as f:
            names = {expert_tensor(layer, e, s) for e in range(EXPERTS) for s in SEGMENTS}
            assert set(f.keys()) == names
            joined = b"".join(f.get_tensor(expert_tensor(layer, 1, s)).tobytes() for s in SEGMENTS)
            assert joined == pack_record(RECORD, nested(layer, 1)).tobytes()
    with safe_open(sample / "dense.safetensors", "np") as f:
        assert set(f.keys()) == set(SHAPES)
        assert all(np.array_equal(f.get_tensor(name), dense_tensor(name)) for name in SHAPES)
    with safe_open(sample / "checksums.safetensors", "np") as f:
        assert f.get_tensor("experts.2").shape == (EXPERTS, 7)


def test_the_same_input_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    with ContainerWriter(tmp_path / "again.d2moe", **FACTS) as writer:
        for layer in reversed(LAYERS):  # whatever the order
            for expert in reversed(range(EXPERTS)):
                writer.add_expert(layer, expert, nested(layer, expert))
        fill(writer)
        writer.finish()
    assert contents(tmp_path / "again.d2moe") == contents(sample)
    assert not (tmp_path / "again.d2moe.partial").exists()


def test_large_tensors_come_in_pieces(sample: Path, tmp_path: Path) -> None:
    with ContainerWriter(tmp_path / "pieces.d2moe", **FACTS) as writer:
        whole = NestedMatrix.of({kind: dense_tensor(f"embed.{kind}") for kind in ARRAYS})
        writer.add_dense("embed.base", whole.base[:4])
        for first in (0, 2, 4):  # from the start again, and nine tensors in turn
            piece = NestedMatrix.of({kind: array[first : first + 2] for kind, array in whole.arrays.items()})
            writer.add_nested("embed", piece, first)
            assert writer.is_dense_done("embed.base") == writer.is_nested_done("embed") == (first == 4)
        with pytest.raises(ContainerError, match="out of order"):
            writer.add_dense("final_norm", dense_tensor("final_norm")[8:], 8)
        fill(writer)
        writer.finish()
    assert contents(tmp_path / "pieces.d2moe") == contents(sample)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda w: w.add_dense("nothing", np.zeros(3)), "'nothing' was not announced"),
        (lambda w: w.add_dense("final_norm", np.zeros(64)), r"float64 \[64\], announced was float32 \[64\]"),
        (lambda w: w.add_dense("final_norm", np.zeros(65, np.float32)), r"announced was float32 \[64\]"),
        (lambda w: w.add_expert(1, 0, nested(0, 0)), "no place for layer 1 expert 0"),
        (lambda w: w.add_expert(0, EXPERTS, nested(0, 0)), "no place for layer 0 expert 3"),
        (lambda w: w.add_record(0, 0, np.zeros(5, np.uint8)), r"a record is uint8 \[28672\]"),
        (lambda w: w.add_expert(0, 0, {"gate": nested(0, 0)["gate"]}), "expected gate, up, down"),
        (lambda w: w.add_expert(0, 0, nested(0, 0) | {"up": nested(0, 0)["down"]}), "up codes of base"),
        (lambda w: w.add_nested("embed", nested(0, 0, 4)["gate"]), "'embed' has 4 bits, expected 8"),
        (lambda w: w.add_nested("embed", nested(0, 0)["gate"], 4), r"'embed.rows' from row 4 is float32 \[3, 16\]"),
        (lambda w: w.finish(), "'embed.rows', 'embed.affine', 'embed.base' and 15 more not written yet"),
    ],
)
def test_the_writer_refuses(tmp_path: Path, action: Callable[[ContainerWriter], object], message: str) -> None:
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer, pytest.raises(ContainerError, match=message):
        action(writer)
    assert not (tmp_path / "x.d2moe").exists()


def test_narrow_experts_are_not_written(tmp_path: Path) -> None:
    with (
        ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer,
        pytest.raises(ContainerError, match="gate has 4 bits, the record is written with 8"),
    ):
        writer.add_expert(0, 0, nested(0, 0, 4))


def test_a_destination_that_exists_is_refused(copy: Path, tmp_path: Path) -> None:
    before = contents(copy)
    with pytest.raises(ContainerError, match="is there already"):
        ContainerWriter(copy, **FACTS)
    assert contents(copy) == before and not (tmp_path / "tiny.d2moe.partial").exists()
    with pytest.raises(StorageError, match=r"no such folder to make x\.d2moe in"):
        ContainerWriter(tmp_path / "nowhere" / "x.d2moe", **FACTS)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(ContainerError, match=r"holds \['thesis.tex'\] but no journal"):
        ContainerWriter(tmp_path / "mine", **FACTS)
    assert (tmp_path / "mine.partial" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b/c", ".hidden", "d2moe.json", "extra.safetensors", "a b"])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContainerError):
        ContainerWriter(tmp_path / "x.d2moe", **(FACTS | {"files": FILES | {name: b"1"}}))
    assert list(tmp_path.iterdir()) == []


def test_carried_files_may_be_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    facts = FACTS | {"files": {"config.json": tmp_path / "config.json"}}
    with ContainerWriter(tmp_path / "x.d2moe", **facts) as writer:
        fill(writer)
        writer.finish()
    assert Container.open(tmp_path / "x.d2moe").generation_config == {}
    with pytest.raises(D2MoeError, match=r"tokenizer.json: no such file"):
        ContainerWriter(
            tmp_path / "y", **(FACTS | {"files": facts["files"] | {"tokenizer.json": tmp_path / "tokenizer.json"}})
        )


# Opening what is not a whole container


def test_folders_that_are_no_container(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="no such folder"):
        Container.open(tmp_path / "absent")
    with pytest.raises(ContainerError, match="is a file, expected the folder"):
        Container.open(copy / "config.json")
    (copy / "d2moe.json").unlink()
    with pytest.raises(ContainerError, match=r'has no d2moe.json.*"d2moe convert'):
        Container.open(copy)
    with ContainerWriter(tmp_path / "half.d2moe", **FACTS):
        pass
    with pytest.raises(ContainerError, match=r"unfinished conversion; run the same"):
        Container.open(tmp_path / "half.d2moe.partial")
    with pytest.raises(ContainerError, match=r"half.d2moe.partial is unfinished"):
        Container.open(tmp_path / "half.d2moe")
    with pytest.raises(ContainerError, match="no such folder"):
        Container.open("null\0byte")


@pytest.mark.parametrize(
    "name", ["config.json", "dense.safetensors", "experts/layer-002.safetensors", "tokenizer.json"]
)
def test_a_missing_or_cut_file_is_named(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(ContainerError, match=rf"{name}: has {len(data) - 1:,} bytes, the manifest says {len(data):,}"):
        Container.open(copy)
    (copy / name).unlink()
    with pytest.raises(ContainerError, match=rf"{name}: no such file"):
        Container.open(copy)
    (copy / name).mkdir()
    with pytest.raises(D2MoeError, match=name):
        Container.open(copy)


def test_unknown_experts_and_tensors(sample: Path) -> None:
    container = Container.open(sample)
    with pytest.raises(ConfigError, match=r"layer 1 has no experts, expected one of \(0, 2\)"):
        container.expert_path(1)
    with pytest.raises(ConfigError, match="no expert 3, expected 0 to 2"):
        container.read_expert(0, 3, 4)
    with pytest.raises(ConfigError, match="from 2 to 8"):
        container.read_expert(0, 0, 9)
    with pytest.raises(ContainerError, match=r"has no matrix 'head', which config.json calls for"):
        container.read_nested("head", 8)
    with pytest.raises(ContainerError, match=r"has no tensor 'head_bias', which config.json calls for"):
        container.read_dense("head_bias")
    with pytest.raises(ConfigError, match="from 2 to 8"):
        container.read_nested("embed", 1)
    assert container.has("final_norm") and container.has("embed")
    assert not container.has("head") and not container.has("embed.base") and not container.has("embed.q_bias")


def test_dense_tensors_must_fit_each_other(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, tuple[str, tuple[int, ...]]], str]] = [
        ({"embed.base": ("U8", (6, 2, 4, 64))}, r"'embed.base' is U8 \[6, 2, 4, 64\], expected U8 \[6, 2, 2, 64\]"),
        ({"embed.base": ("U8", ())}, r"'embed.rows' is F32 \[6, 16\], expected F32 \[1, 16\]"),
        ({"embed.base": ("U8", (0, 2, 2, 64))}, r"'embed.rows' is F32 \[6, 16\], expected F32 \[1, 16\]"),
        ({"embed.rows": ("F32", (6, 8))}, r"'embed.rows' is F32 \[6, 8\], expected F32 \[6, 16\]"),
        ({"embed.rows": ("F16", (6, 16))}, r"'embed.rows' is F16"),
        ({"embed.affine": ("U8", (6, 3, 2, 16))}, r"'embed.affine' is U8 \[6, 3, 2, 16\], expected U8 \[6, 2, 2, 16\]"),
        ({"embed.plane6": ("U8", (6, 2, 2, 64))}, r"'embed.plane6' is U8 \[6, 2, 2, 64\], expected U8 \[6, 2, 1, 64\]"),
        ({"final_norm": ("F16", (64,))}, r"'final_norm' is F16 \[64\], expected F32"),
        ({"layers.0.router": ("F32", (EXPERTS + 1, 64))}, r"expected F32 \[3, 64\]"),
        ({"x.affine": ("U8", (6, 2, 2, 16))}, "'x.affine' has no 'x.rows' beside it"),
        ({f"x.{k}": SHAPES[f"embed.{k}"] for k in ARRAYS if k != "plane5"}, "'x.rows' has no 'x.plane5' beside it"),
        ({"x.codes": ("U8", (6, 2, 8, 64))}, "'x.codes' is U8"),
    ]
    for i, (change, message) in enumerate(wrong):
        shapes = SHAPES | change
        with ContainerWriter(tmp_path / f"{i}.d2moe", **(FACTS | {"dense": shapes})) as writer:
            for name, (dtype, shape) in shapes.items():
                writer.add_dense(name, np.zeros(shape, TYPES[dtype]))
            fill(writer)
            writer.finish()
        with pytest.raises(ContainerError, match=message):
            Container.open(tmp_path / f"{i}.d2moe")
