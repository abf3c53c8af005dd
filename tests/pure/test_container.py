"""Containers: what is written is read back, opens with the safetensors library, and is refused where it is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from d2moe import planes
from d2moe.container import PROJECTIONS, SEGMENTS, Container, ContainerWriter, NestedMatrix, RecordLayout, pack_record
from d2moe.container.layout import ARRAYS, expert_file, expert_tensor
from d2moe.container.manifest import dump_manifest, parse_manifest, seal_of
from d2moe.container.safetensors_header import build_header
from d2moe.errors import ConfigError, ContainerError, D2MoeError, StorageError
from d2moe.types import WIDTHS

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


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "tiny.d2moe")


@pytest.fixture
def copy(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample, tmp_path / "tiny.d2moe"))


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


# The manifest

Edit = Callable[[dict[str, Any]], object]


def edited(path: Path, edit: Edit) -> None:
    """Change the manifest and seal it again, as another writer would have."""
    table = json.loads((path / "d2moe.json").read_text())
    edit(table)
    table["seal"] = "0" * 64
    text = json.dumps(table, indent=1).encode()
    (path / "d2moe.json").write_bytes(text.replace(b"0" * 64, seal_of(text)[1].encode(), 1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=3), "made by a newer d2moe, upgrade"),
        (lambda m: m.update(version=1), "version is 1, this d2moe reads 2; convert the model again"),
        (lambda m: m.update(version=True), "version is True, expected 2"),
        (lambda m: m.update(format="gguf"), "not a d2moe container"),
        (lambda m: m.update(codebook=[]), "unknown key 'codebook'"),
        (lambda m: m.pop("experts"), "lacks the key 'experts'"),
        (lambda m: m.update(group=48), "group is 48, expected a multiple of 32"),
        (lambda m: m.update(experts=0), "experts is 0, expected a whole number from 1"),
        (lambda m: m.update(experts=2), r"router' is F32 \[3, 64\], expected F32 \[2, 64\]"),
        (lambda m: m.update(hidden=64.0), "hidden is 64.0"),
        (lambda m: m.update(layers=[2, 0]), "expected ascending"),
        (lambda m: m.update(layers=[]), "expected ascending numbers, at least one"),
        (lambda m: m["segments"][0].update(bytes=5000), "segment base has 5,000 bytes, expected a multiple of 4,096"),
        (lambda m: m["source"].update(name="\ud800"), "surrogates not allowed|not UTF-8"),
        (lambda m: m.update(layers=[0, 1]), "layer-002.safetensors is not known to this d2moe and not optional"),
        (lambda m: m.update(hidden=96), "bytes of segment base is 4096, expected a whole number from 8,192"),
        (lambda m: m["segments"].pop(), "segments are"),
        (lambda m: m["segments"].append({"name": "outliers", "bytes": 4096}), "not optional; a newer d2moe made it"),
        (
            lambda m: m["segments"][2]["parts"].append({"kind": "codebook", "offset": 0, "bytes": 1}),
            "'codebook'.*newer",
        ),
        (lambda m: m["segments"][1].update(bytes=8192), "expected one size"),
        (lambda m: m["segments"][0]["parts"][0].update(offset=True), "part 0 of segment base"),
        (lambda m: m["files"].pop("config.json"), "files lacks config.json"),
        (lambda m: m["files"]["dense.safetensors"].update(optional=True), "dense.safetensors cannot be optional"),
        (lambda m: m["files"]["config.json"].update(sha256="x"), "sha256 of config.json"),
        (lambda m: m["files"].update({"../../x": {"bytes": 1, "sha256": "0" * 64}}), "plain name inside"),
        (lambda m: m["files"].update({"codebooks.safetensors": {"bytes": 1}}), "newer d2moe made it"),
        (lambda m: m.update(source=[]), "source is"),
    ],
)
def test_a_wrong_manifest_is_refused(copy: Path, edit: Edit, message: str) -> None:
    edited(copy, edit)
    with pytest.raises(ContainerError, match=message) as e:
        Container.open(copy)
    assert str(copy) in str(e.value)


def reheaded(path: Path, edit: Edit, extra: bytes = b"", align: int = 4096) -> None:
    """Change the header of layer 2's file, and the file's size in the manifest."""
    file = path / expert_file(2)
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + n])
    edit(table)
    text = json.dumps(table).encode()
    text = text.ljust(-(-(8 + len(text)) // align) * align - 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :] + extra)
    edited(path, lambda m: m["files"][expert_file(2)].update(bytes=file.stat().st_size))


def test_expert_files_hold_the_records_and_nothing_else(copy: Path) -> None:
    reheaded(copy, lambda h: None)
    Container.open(copy)
    reheaded(copy, lambda h: None, align=64)
    with pytest.raises(
        ContainerError, match=r"layer-002.safetensors: records begin at byte [\d,]+, expected a multiple"
    ):
        Container.open(copy)
    size = EXPERTS * RECORD.record_bytes
    reheaded(copy, lambda h: h.update(more={"dtype": "U8", "shape": [4], "data_offsets": [size, size + 4]}), b"more")
    with pytest.raises(ContainerError, match="has 22 tensors, expected 21 for 3 experts"):
        Container.open(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda h: h.update({expert_tensor(2, 1, "plane9"): h.pop(expert_tensor(2, 1, "plane5"))}),
            "plane5 is missing",
        ),
        (lambda h: h[expert_tensor(2, 1, "plane5")].update(dtype="I8"), r"plane5 is I8 \[4096\] at byte"),
        (lambda h: h[expert_tensor(2, 1, "plane5")].update(shape=[64, 64]), r"plane5 is U8 \[64, 64\]"),
    ],
)
def test_a_segment_that_is_not_where_it_belongs(copy: Path, edit: Edit, message: str) -> None:
    reheaded(copy, edit)
    with pytest.raises(ContainerError, match=f"layer 2 expert 1 {message}"):
        Container.open(copy)


def test_segments_of_two_experts_may_not_change_places(copy: Path) -> None:
    def swap(h: dict[str, Any]) -> None:
        a, b = expert_tensor(2, 0, "plane5"), expert_tensor(2, 1, "plane5")
        h[a], h[b] = h[b], h[a]

    reheaded(copy, swap)
    with pytest.raises(ContainerError, match=r"layer 2 expert 0 plane5 is U8 \[4096\] at byte [\d,]+, expected"):
        Container.open(copy)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"nonsense", b'{"format": "d2moe", "format": "d2moe"}', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000],
)
def test_a_manifest_that_is_no_json_object(copy: Path, text: bytes) -> None:
    (copy / "d2moe.json").write_bytes(text)
    with pytest.raises(ContainerError, match=r"d2moe.json: "):
        Container.open(copy)


def test_notes_may_hold_anything(copy: Path) -> None:
    edited(copy, lambda m: m["source"].update(anything={"nested": [1, 2]}) or m["quantizer"].update(x=None))
    assert Container.open(copy).manifest.source["anything"] == {"nested": [1, 2]}


def test_the_manifest_text_and_its_facts_agree(sample: Path) -> None:
    text = (sample / "d2moe.json").read_bytes()
    assert dump_manifest(parse_manifest(text, "d2moe.json")) == text
    found, right = seal_of(text)
    assert found == right and seal_of(text.replace(b"olmoe", b"xlmoe").replace(b"tiny", b"tine"))[1] != found


# What later versions may add


def test_optional_files_and_notes_are_skipped(copy: Path) -> None:
    edited(copy, lambda m: m["files"].update({"bit_router.safetensors": {"bytes": 8, "optional": True, "rank": 4}}))
    Container.open(copy)  # it need not be there
    edited(copy, lambda m: m.update(optional={"bit_router": {"file": "bit_router.safetensors"}}))
    Container.open(copy)
    (copy / "bit_router.safetensors").write_bytes(b"1234567")
    with pytest.raises(ContainerError, match="has 7 bytes, the manifest says 8"):
        Container.open(copy)


def test_optional_parts_and_segments_are_skipped(copy: Path) -> None:
    """Per-width corrections inside the segments, a side-band after the records: an old reader finds what it knows."""
    roomy = dataclasses.replace(RECORD, base_spare_bytes=4096, plane_spare_bytes=4096)
    for layer in LAYERS:
        sizes = {s: roomy.segment_bytes(s) for s in SEGMENTS}
        tensors = {expert_tensor(layer, e, s): ("U8", (n,)) for e in range(EXPERTS) for s, n in sizes.items()}
        tensors |= {expert_tensor(layer, e, "outliers"): ("U8", (512,)) for e in range(EXPERTS)}
        data = build_header(tensors)[0]
        for expert in range(EXPERTS):
            old = pack_record(RECORD, nested(layer, expert)).tobytes()
            cuts = [old[i : i + 4096] for i in range(0, len(old), 4096)]  # every segment of this size is one page
            data += b"".join(cut + b"\xaa" * 4096 for cut in cuts)
        (copy / expert_file(layer)).write_bytes(data + bytes(512 * EXPERTS))

    def edit(m: dict[str, Any]) -> None:
        for segment in m["segments"]:
            segment["bytes"] += 4096
            part = {"kind": "scale_correction", "projection": "gate", "offset": 4096, "bytes": 64, "optional": True}
            segment["parts"].append(part)
        m["segments"].append({"name": "outliers", "bytes": 512, "optional": True, "format": "sparse"})
        for layer in LAYERS:
            m["files"][expert_file(layer)]["bytes"] = (copy / expert_file(layer)).stat().st_size

    edited(copy, edit)
    container = Container.open(copy)
    assert container.record == roomy and container.manifest.optional_segments == {"outliers": 512}
    for bits in WIDTHS:
        found, right = container.read_expert(2, 1, bits), nested(2, 1)
        for name in PROJECTIONS:
            for kind, array in found[name].arrays.items():
                assert np.array_equal(array, right[name].arrays[kind])


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
        ({f"x.{k}": SHAPES[f"embed.{k}"] for k in ARRAYS if k != "plane8"}, "'x.rows' has no 'x.plane8' beside it"),
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
