"""Dense matrices at every width: the values, the bytes that are read, the memory they go to; records and matrices with fewer bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import EXPERTS, FACTS, LAYERS, RECORD, contents, dense_tensor, nested, packed, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from d2moe import planes
from d2moe.container import Container, ContainerWriter, MatrixLayout, NestedMatrix
from d2moe.container.files import aligned_empty
from d2moe.container.inspect import describe
from d2moe.container.layout import ARRAYS
from d2moe.container.verify import verify
from d2moe.errors import ConfigError, ContainerError, StorageError
from d2moe.types import BASE_BITS, MAX_BITS, WIDTHS, DenseWidths

GROUP = RECORD.group
MATRICES = {"embed": (90, 64), "head": (33, 100), "layers.0.attn.q": (16, 32)}
"""Rows and columns; `head` is padded both ways and has an odd number of blocks."""
FLOATS = {"final_norm": (7,), "layers.0.attn.q_bias": (16,), "layers.0.router": (EXPERTS, 64)}


def weights(name: str) -> planes.F32:
    return np.random.default_rng(len(name)).normal(size=MATRICES[name]).astype(np.float32)


Kept = dict[int, tuple[int, ...]]


def make(path: Path, kept: Kept | None = None, dense_bits: int = 8) -> Path:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (rows, cols) in MATRICES.items():
        shapes |= MatrixLayout(rows, cols, GROUP, dense_bits).tensors(name)
    shapes |= {name: ("F32", shape) for name, shape in FLOATS.items()}
    with ContainerWriter(path, **(FACTS | {"dense": shapes}), kept=kept) as writer:
        for name in MATRICES:
            writer.add_nested(name, packed(*planes.quantize(weights(name), GROUP), dense_bits))
        for name, shape in FLOATS.items():
            writer.add_dense(name, np.full(shape, 0.5, np.float32))
        for layer in LAYERS:
            for expert in range(EXPERTS):
                writer.add_expert(layer, expert, nested(layer, expert, writer.width(layer, expert)))
        return writer.finish()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container.open(make(tmp_path_factory.mktemp("made") / "nested.d2moe"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every (offset, bytes) that is read of a file from here on."""
    real, seen = os.preadv, list[tuple[int, int]]()

    def preadv(fd: int, buffers: Sequence[Any], offset: int) -> int:
        n = real(fd, buffers, offset)
        seen.append((offset, n))
        return n

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", MATRICES)
def test_a_dense_matrix_has_the_values_of_its_width(sample: Container, name: str, bits: int) -> None:
    matrix = sample.read_nested(name, bits)
    assert matrix.bits == bits
    expected = planes.dequantize(*planes.quantize(weights(name), GROUP), bits, *MATRICES[name])
    found = planes.dequantize(*unpacked(matrix), bits, *MATRICES[name])
    assert np.array_equal(found, expected)
    layout = sample.nested[name]
    for kind, array in matrix.arrays.items():
        assert array.shape == layout.array(kind)[1]
        assert array.ctypes.data % 64 == 0 and array.flags.carray


def test_widths_nest(sample: Container) -> None:
    """Fewer bits are the same arrays without the last planes."""
    full = sample.read_nested("head", 8).arrays
    for bits in WIDTHS:
        arrays = sample.read_nested("head", bits).arrays
        assert tuple(arrays) == ARRAYS[: bits + 1]
        assert all(np.array_equal(array, full[kind]) for kind, array in arrays.items())


@pytest.mark.parametrize("bits", WIDTHS)
def test_dense_bytes_is_what_is_read_and_what_an_arena_must_hold(
    sample: Container, bits: int, reads: list[tuple[int, int]]
) -> None:
    widths = DenseWidths(bits, {"embed": BASE_BITS + MAX_BITS - bits})
    arena, used, asked = aligned_empty(sample.dense_bytes(widths)), 0, 0

    def allocate(n_bytes: int) -> planes.U8:
        nonlocal used, asked
        assert n_bytes % 64 == 0
        used, asked = used + n_bytes, asked + 1
        piece: planes.U8 = arena[used - n_bytes : used]
        assert len(piece) == n_bytes
        return piece

    matrices = {name: sample.read_nested(name, widths.of(name), allocate) for name in sample.nested}
    assert asked == len(MATRICES)  # once for each matrix
    for name in sample.floats:
        used += -(-sample.read_dense(name).nbytes // 64) * 64
    assert used == sample.dense_bytes(widths) == len(arena)
    # The bytes of the file are the same, but for the rounding to 64 in memory.
    pieces = len(MATRICES) + len(FLOATS)
    assert 0 <= used - sum(n for _, n in reads) < 64 * pieces
    # All arrays are views of the arena, whatever came after them.
    start, end = arena.ctypes.data, arena.ctypes.data + len(arena)
    for name, matrix in matrices.items():
        expected = planes.prefix(planes.quantize(weights(name), GROUP)[0], widths.of(name))
        assert np.array_equal(unpacked(matrix)[0], expected)
        assert all(start <= a.ctypes.data and a.ctypes.data + a.nbytes <= end for a in matrix.arrays.values())


def test_an_embedding_that_is_not_the_head_gets_all_bits(sample: Container) -> None:
    for width in describe(sample).widths:
        found = width.dense_widths
        assert found == DenseWidths.beside(width.bits, own_embedding=True) and found.of("embed") == MAX_BITS
        assert width.default_dense_bytes == sample.dense_bytes(found)


def test_a_width_reads_one_run_of_the_file(sample: Container, reads: list[tuple[int, int]]) -> None:
    """What a width needs of a matrix lies together: rows, affine, base and the planes, the higher bits last."""
    for bits in WIDTHS:
        reads.clear()
        sample.read_nested("embed", bits)
        at = sample.dense["embed.rows"].offset
        for offset, n in sorted(reads):
            assert offset == at
            at += n
        assert at == sample.dense[f"embed.{ARRAYS[bits]}"].offset + sample.dense[f"embed.{ARRAYS[bits]}"].n_bytes


def test_what_was_read_is_not_in_the_page_cache_too(sample: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    real, dropped = os.posix_fadvise, list[tuple[int, int]]()

    def advise(fd: int, offset: int, n_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, offset + n_bytes))
        real(fd, offset, n_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    sample.read_nested("head", 3)
    entries = [sample.dense[f"head.{kind}"] for kind in ARRAYS[:4]]
    for entry in entries:
        # Whole pages, as the system keeps a page of which only a part is given up.
        assert any(a <= entry.offset and entry.offset + entry.n_bytes <= b for a, b in dropped)
    assert all(a % os.sysconf("SC_PAGESIZE") == b % os.sysconf("SC_PAGESIZE") == 0 for a, b in dropped)

    def refused(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    assert sample.read_nested("head", 3).bits == 3  # advice only


def test_memory_that_does_not_fit_is_refused(sample: Container) -> None:
    n_bytes = sample.nested["head"].memory_bytes(4)
    frozen = aligned_empty(n_bytes)
    frozen.flags.writeable = False
    for memory in (aligned_empty(n_bytes - 1), aligned_empty(4 * n_bytes).view(np.float32), frozen):
        with pytest.raises(ConfigError, match=rf"allocate\({n_bytes}\) gave .*expected writable uint8 \[{n_bytes}\]"):
            sample.read_nested("head", 4, lambda n, memory=memory: memory)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="not at a multiple of 64"):
        sample.read_nested("head", 4, lambda n: aligned_empty(n + 1)[1:])


def test_a_file_cut_while_in_use(tmp_path: Path) -> None:
    container = Container.open(make(tmp_path / "x.d2moe"))
    with (container.path / "dense.safetensors").open("r+b") as file:
        file.truncate(container.dense["head.plane3"].offset + 1)
    assert container.read_nested("head", 2).bits == 2
    with pytest.raises(StorageError, match=r"dense.safetensors: ends at byte .*cut while in use"):
        container.read_nested("head", 3)
    (container.path / "dense.safetensors").unlink()
    with pytest.raises(ContainerError, match=r"dense.safetensors: no such file"):
        container.read_nested("head", 2)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 100), st.integers(1, 300), st.sampled_from(WIDTHS))
def test_arrays_come_and_go(rows: int, cols: int, bits: int) -> None:
    codes, affine, scale = planes.quantize(np.full((rows, cols), 0.25, np.float32), GROUP)
    matrix = packed(codes, affine, scale, bits)
    again = NestedMatrix.of(dict(reversed(matrix.arrays.items())))
    assert again.bits == bits and tuple(again.arrays) == tuple(matrix.arrays)
    assert all(a is b for a, b in zip(again.arrays.values(), matrix.arrays.values(), strict=True))
    assert {k: ("F32" if a.dtype == np.float32 else "U8", a.shape) for k, a in matrix.arrays.items()} == {
        k: MatrixLayout(rows, cols, GROUP).array(k) for k in matrix.arrays
    }


# Fewer bits


def drawn(seed: int) -> Kept:
    rng = np.random.default_rng(seed)
    return {layer: tuple(rng.integers(2, 9, EXPERTS).tolist()) for layer in LAYERS}


SEEDS = st.integers(0, 1 << 30)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from(WIDTHS))
def test_records_have_the_bits_that_are_kept(
    tmp_path_factory: pytest.TempPathFactory, sample: Container, seed: int, dense_bits: int
) -> None:
    kept, path = drawn(seed), tmp_path_factory.mktemp("made") / "narrow.d2moe"
    narrow = Container.open(make(path, kept, dense_bits))
    assert verify(narrow).problems == ()
    assert narrow.kept.tolist() == [list(kept[layer]) for layer in LAYERS] and narrow.most_bits == narrow.kept.max()
    for name in MATRICES:
        found, full = narrow.read_nested(name, 8), sample.read_nested(name, dense_bits)
        assert found.bits == dense_bits == narrow.nested[name].bits
        for kind, array in found.arrays.items():
            assert np.array_equal(array, full.arrays[kind])
    for layer in LAYERS:
        at = narrow.expert_offset(layer, 0)
        for expert, bits in enumerate(kept[layer]):
            assert narrow.width(layer, expert) == bits and narrow.width(layer, expert, 3) == min(bits, 3)
            assert narrow.expert_offset(layer, expert) == at
            assert np.array_equal(narrow.read_record(layer, expert, bits), sample.read_record(layer, expert, bits))
            if bits < 8:
                with pytest.raises(ConfigError, match=f"layer {layer} expert {expert} has {bits} bits, {bits + 1} were asked for"):
                    narrow.read_expert(layer, expert, bits + 1)
            at += RECORD.prefix_bytes(bits)
        assert at == narrow.expert_path(layer).stat().st_size
    assert narrow.experts_bytes() == sum(RECORD.prefix_bytes(b) for row in kept.values() for b in row)
    assert narrow.experts_bytes(4) == sum(RECORD.prefix_bytes(min(b, 4)) for row in kept.values() for b in row)
    saved = sample.experts_bytes() - narrow.experts_bytes() + sample.dense_bytes(DenseWidths(8)) - narrow.dense_bytes(DenseWidths(8))
    sizes = [sum(p.stat().st_size for p in c.path.rglob("*.safetensors")) for c in (sample, narrow)]
    assert abs(sizes[0] - sizes[1] - saved) <= 4096 * (1 + len(LAYERS))  # headers are shorter, too


def test_a_model_that_keeps_all_bits_is_written_as_ever(tmp_path: Path, sample: Container) -> None:
    assert "kept" not in (sample.path / "d2moe.json").read_text()
    assert contents(make(tmp_path / "x", dict.fromkeys(LAYERS, (8,) * EXPERTS))) == contents(sample.path)


def test_widths_that_are_stored(sample: Container, tmp_path: Path) -> None:
    five = Container.open(make(tmp_path / "five", None, 5))
    for c, asked, found in [
        (sample, DenseWidths(6, {"q": 5, "embed": 8}), DenseWidths(6, {"q": 5, "embed": 8})),
        (five, DenseWidths(6, {"q": 4, "embed": 8}), DenseWidths(5, {"q": 4})),
        (five, DenseWidths(3), DenseWidths(3)),
    ]:
        assert c.stored_widths(asked) == found
        assert c.dense_bytes(asked) == c.dense_bytes(found)


def test_a_run_that_keeps_fewer_bits_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    kept = drawn(int(np.random.default_rng().integers(1 << 30)))

    def run(writer: ContainerWriter, experts: int) -> None:
        assert not writer.is_nested_done("embed")
        whole = {kind: dense_tensor(f"embed.{kind}") for kind in ARRAYS}
        writer.add_nested("embed", NestedMatrix.of(whole))
        assert writer.is_nested_done("embed")
        for expert in range(experts):
            writer.add_expert(0, expert, nested(0, expert, kept[0][expert]))

    def rest(writer: ContainerWriter) -> None:
        for name in ("final_norm", "layers.0.router", "layers.2.router"):
            writer.add_dense(name, dense_tensor(name))
        for layer in LAYERS:
            for expert in sorted(set(range(EXPERTS)) - writer.done_experts(layer)):
                writer.add_expert(layer, expert, nested(layer, expert, kept[layer][expert]))
        writer.finish()

    with ContainerWriter(tmp_path / "whole", **FACTS, kept=kept) as writer:
        run(writer, EXPERTS)
        rest(writer)
    with ContainerWriter(tmp_path / "x", **FACTS, kept=kept) as writer:
        run(writer, 1)
    with pytest.raises(ContainerError, match="was begun with other facts: kept"):
        ContainerWriter(tmp_path / "x", **FACTS)
    with ContainerWriter(tmp_path / "x", **FACTS, kept=kept) as writer:
        assert writer.is_nested_done("embed") and writer.done_experts(0) == {0}
        rest(writer)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert verify(tmp_path / "x").problems == ()


def test_records_of_other_widths_are_refused(tmp_path: Path) -> None:
    kept = dict.fromkeys(LAYERS, (3, 2, 8))
    with ContainerWriter(tmp_path / "x", **FACTS, kept=kept) as writer:
        with pytest.raises(ContainerError, match="'embed' has 3 bits, expected 8"):
            writer.add_nested("embed", packed(*planes.quantize(weights("embed"), GROUP), 3))
        with pytest.raises(ContainerError, match="gate has 8 bits, the record is written with 3"):
            writer.add_expert(0, 0, nested(0, 0))
        with pytest.raises(ContainerError, match=r"a record is uint8 \[4096\]"):
            writer.add_record(0, 1, np.zeros(RECORD.record_bytes, np.uint8))
    with pytest.raises(ConfigError, match="from 2 to 8"):
        ContainerWriter(tmp_path / "y", **FACTS, kept=dict.fromkeys(LAYERS, (3, 9, 8)))
    with pytest.raises(ContainerError, match="kept of layer 2 has 2 numbers, expected one for each of 3 experts"):
        ContainerWriter(tmp_path / "y", **FACTS, kept={0: (8, 8, 8), 2: (8, 7)})
