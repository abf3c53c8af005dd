"""verify names the damaged piece, whichever byte of whichever file is wrong; inspect's numbers add up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from containers import EXPERTS, LAYERS, RECORD, SHAPES, contents, dense_tensor

from d2moe.container import SEGMENTS, Container
from d2moe.container.inspect import describe
from d2moe.container.layout import expert_file
from d2moe.container.verify import verify
from d2moe.errors import ContainerError
from d2moe.types import WIDTHS, DenseWidths


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_container(sample: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(sample, lambda done, total: seen.append((done, total)))
    files = [p for p in sample.rglob("*") if p.is_file()]
    assert report.problems == report.unlisted == report.unchecked == ()
    assert report.files == len(files) and report.n_bytes == sum(p.stat().st_size for p in files)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("segment", SEGMENTS)
def test_every_segment_is_named(copy: Path, layer: int, expert: int, segment: str) -> None:
    container = Container.open(copy)
    number = SEGMENTS.index(segment)
    record = container.record
    start = container.expert_offset(layer, expert) + (record.prefix_bytes(number + 1) if number else 0)
    for at in (start, start + record.segment_bytes(segment) - 1):  # the last one is padding
        flip(copy / expert_file(layer), at)
        (problem,) = verify(copy).problems
        assert problem.startswith(f"{copy}: layer {layer} expert {expert} {segment} is damaged (bytes {start:,} to ")
        assert "CRC-32 is" in problem and problem.endswith("copy it again, or convert the model again")
        flip(copy / expert_file(layer), at)
    assert verify(copy).problems == ()


@pytest.mark.parametrize("name", SHAPES)
def test_every_dense_tensor_is_named(copy: Path, name: str) -> None:
    entry = Container.open(copy).dense[name]
    flip(copy / "dense.safetensors", entry.offset + entry.n_bytes - 1, 7)
    (problem,) = verify(copy).problems
    assert f"tensor {name} is damaged" in problem


def test_any_flipped_byte_is_found(copy: Path) -> None:
    """Every file, bytes all over it: refused at open, or named by verify."""
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        n_bytes = path.stat().st_size
        name = path.relative_to(copy).as_posix()
        for at in sorted(
            {0, 1, 7, 8, 9, n_bytes // 2, n_bytes - 1, *range(0, n_bytes, max(1, n_bytes // 23))} & set(range(n_bytes))
        ):
            flip(path, at)
            try:
                problems = verify(copy).problems
            except ContainerError as e:
                problems = (str(e),)
            flip(path, at)
            assert problems, (name, at)
            # A digit of a size in the manifest makes a good file look wrong; the message names both.
            named = (name, "layer", "header", "the manifest says")
            assert any(word in " ".join(problems) for word in named), problems
    assert verify(copy).problems == ()


def test_several_damages_are_all_reported(copy: Path) -> None:
    flip(copy / expert_file(0), -1)
    flip(copy / expert_file(2), -1)
    flip(copy / "tokenizer.json", 3)
    problems = verify(copy).problems
    assert len(problems) == 3 and "tokenizer.json is damaged: SHA-256" in problems[0]


def test_damaged_checksums_are_not_blamed_on_the_weights(copy: Path) -> None:
    flip(copy / "checksums.safetensors", -1)
    report = verify(copy)
    assert len(report.problems) == 1 and "checksums.safetensors is damaged" in report.problems[0]
    assert "dense.safetensors" in report.unchecked


def test_a_changed_note_breaks_the_seal(copy: Path) -> None:
    path = copy / "d2moe.json"
    path.write_bytes(path.read_bytes().replace(b"random/tiny", b"rondom/tiny"))
    (problem,) = verify(copy).problems
    assert "d2moe.json was changed: its seal" in problem


def test_strangers_are_listed_and_not_complained_of(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    report = verify(copy)
    assert report.problems == () and report.unlisted == ("README.md",)


def test_the_description_adds_up(sample: Path) -> None:
    container = Container.open(sample)
    d = describe(container)
    json.dumps(dataclasses.asdict(d))
    assert d.total_bytes + (sample / "d2moe.json").stat().st_size == sum(len(b) for b in contents(sample).values())
    assert d.model_type == "olmoe" and d.experts_per_token == 2 and d.expert_weights == 6 * 3 * 64 * 48
    assert [w.bits for w in d.widths] == list(WIDTHS)
    for w in d.widths:
        assert w.expert_bytes == RECORD.prefix_bytes(w.bits) and w.all_experts_bytes == 6 * w.expert_bytes
        assert w.token_bytes == 2 * 2 * w.expert_bytes
        assert w.bits_per_weight == pytest.approx(8 * w.expert_bytes / (3 * 64 * 48))
    assert d.expert_bytes == d.widths[-1].all_experts_bytes
    assert [w.dense_bytes for w in d.widths] == [container.dense_bytes(DenseWidths(bits)) for bits in WIDTHS]
    assert [str(w.dense_widths) for w in d.widths[1:3]] == ["5 bits", "6 bits"], "its head is the embedding"
    assert all(w.default_dense_bytes == container.dense_bytes(w.dense_widths) for w in d.widths)
    assert d.widths[-1].dense_bytes == sum(t.n_bytes for t in d.dense) == sum(dense_tensor(n).nbytes for n in SHAPES)
    assert d.least_bytes == d.widths[0].dense_bytes + 2 * RECORD.base_bytes
