"""Manifests and headers: what is wrong in them is refused, what later versions may add is skipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import EXPERTS, LAYERS, RECORD, Edit, edited, nested

from d2moe.container import PROJECTIONS, SEGMENTS, Container, pack_record
from d2moe.container.layout import expert_file, expert_tensor
from d2moe.container.manifest import dump_manifest, parse_manifest, seal_of
from d2moe.container.safetensors_header import build_header
from d2moe.errors import ContainerError
from d2moe.types import WIDTHS


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
        (lambda m: m.update(kept=[8]), "kept is"),
        (lambda m: m.update(kept={"0": [8, 8, 8]}), r"kept is of the layers \['0'\], expected \['0', '2'\]"),
        (lambda m: m.update(kept={"2": [8] * 3, "0": [8] * 3}), r"kept is of the layers \['2', '0'\]"),
        (lambda m: m.update(kept={"0": [8] * 3, "2": [8] * 4}), "kept of layer 2 has 4 numbers, expected one for each of 3 experts"),
        (lambda m: m.update(kept={"0": [8] * 3, "2": [8, 1, 8]}), "kept of layer 2 expert 1 is 1, expected a whole number from 2 to 8"),
        (lambda m: m.update(kept={"0": [8] * 3, "2": [8, True, 8]}), "kept of layer 2 expert 1 is True"),
        (lambda m: m.update(kept={"0": [8] * 3, "2": [8, 5, 8]}), r"experts/layer-002.safetensors: has 21 tensors, expected 18"),
        (lambda m: m.update(rotation=96), "rotation is 96, expected a power of two from 32 on"),
        (lambda m: m.update(rotation=16), "rotation is 16, expected a power of two from 32 on"),
        (lambda m: m.update(rotation="64"), "rotation is '64', expected a whole number"),
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
