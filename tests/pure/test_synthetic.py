"""Containers with random weights: right shapes and spreads, sparse where asked, the same bytes again, little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import contents

from d2moe import planes
from d2moe.container import PROJECTIONS, Container, ContainerWriter, NestedMatrix
from d2moe.container.verify import verify
from d2moe.convert.synthetic import MIXING, OLMOE_1B_7B, PIECE_WEIGHTS, QWEN3_30B_A3B, synthesise
from d2moe.models import family, shape_from_config

SMALL: dict[str, Any] = QWEN3_30B_A3B | {
    "vocab_size": 1000,
    "hidden_size": 192,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
}
"""Awkward sizes: rows that are no multiple of 16, columns that are none of 64."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text('{"model": {}}')
    return path


def values(matrix: NestedMatrix, bits: int, rows: int, cols: int) -> planes.F32:
    codes = planes.untile(planes.unpack(matrix.base, matrix.planes))
    scales = planes.untile_affine(matrix.affine), matrix.row_scale.reshape(-1)
    return planes.dequantize(codes, *scales, bits, rows, cols)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_have_the_spread_of_a_model(tmp_path: Path, tokenizer: Path, bits: int) -> None:
    container = Container.open(synthesise(tmp_path / "x", SMALL, tokenizer, bits=bits))
    assert verify(container).problems == ()
    shape = shape_from_config(container.config, "x")
    sources = family(shape.model_type).source_names(shape).dense
    assert {n for n, s in sources.items() if s.quantized} == set(container.nested)
    assert {n: s.shape for n, s in sources.items() if not s.quantized} == {
        n: e.shape for n, e in container.floats.items()
    }
    # A code cut to b bits is uniform over 2**b values, so it spreads a little less than a uniform variable.
    share = (1 - 4.0**-bits) ** 0.5
    for name in ("embed", "head", "layers.1.attn.o"):
        w = values(container.read_nested(name, 8), 8, *sources[name].shape)  # whole, however wide the experts are
        expected = {"embed": 1.0, "head": 192**-0.5, "layers.1.attn.o": MIXING * 192**-0.5}[name]
        assert w.std() == pytest.approx(expected, rel=0.02) and abs(w.mean()) < 0.02 * expected
    for projection, matrix in container.read_expert(1, 3, bits).items():
        layout = container.record.matrix(projection)
        w = values(matrix, bits, layout.rows, layout.cols)
        assert w.std() == pytest.approx(layout.cols**-0.5 * share, rel=0.04)


def test_padding_is_zero(tmp_path: Path, tokenizer: Path) -> None:
    container = Container.open(synthesise(tmp_path / "x", SMALL, tokenizer))
    matrices = [(m, container.record.matrix(p)) for p, m in container.read_expert(0, 0, 8).items()]
    assert [(m.rows, m.cols) for _, m in matrices] == [(40, 192), (40, 192), (192, 40)]
    for matrix, layout in matrices:
        codes = planes.untile(planes.unpack(matrix.base, matrix.planes))
        assert not codes[layout.rows :].any() and not codes[:, layout.cols :].any()
        assert codes[: layout.rows, : layout.cols].mean() == pytest.approx(127.5, abs=5)
        assert not planes.untile_affine(matrix.affine)[layout.rows :].any()
        assert not matrix.row_scale.reshape(-1)[layout.rows :].any() and matrix.row_scale.any()


def test_experts_have_the_width_that_was_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    wide = Container.open(synthesise(tmp_path / "wide", SMALL, tokenizer, bits=8))
    narrow = Container.open(synthesise(tmp_path / "narrow", SMALL, tokenizer, bits=4))
    assert narrow.manifest.quantizer["bits"] == 4 and (narrow.kept == 4).all() and verify(narrow).problems == ()
    assert narrow.experts_bytes() == wide.experts_bytes(4) < wide.experts_bytes()
    assert narrow.read_record(1, 5, 4).any()


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [3, 20, 45])
def test_the_same_arguments_give_the_same_bytes_also_when_resumed(
    tmp_path: Path, tokenizer: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(synthesise(tmp_path / "whole", SMALL, tokenizer, bits=3, seed=5))
    real, calls = ContainerWriter._note, 0

    def note(self: ContainerWriter, line: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop
        real(self, line)

    monkeypatch.setattr(ContainerWriter, "_note", note)
    with pytest.raises(Stop):
        synthesise(tmp_path / "x", SMALL, tokenizer, bits=3, seed=5)
    monkeypatch.undo()
    assert not (tmp_path / "x").exists()
    assert contents(synthesise(tmp_path / "x", SMALL, tokenizer, bits=3, seed=5)) == whole
    assert contents(synthesise(tmp_path / "other", SMALL, tokenizer, bits=3, seed=6)) != whole


def test_little_memory_is_used(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of a matrix and a few records, whatever the vocabulary."""
    monkeypatch.setattr("d2moe.convert.synthetic.PIECE_WEIGHTS", 1 << 20)
    peaks = []
    for vocab in (8_000, 64_000):
        tracemalloc.start()
        synthesise(tmp_path / str(vocab), SMALL | {"vocab_size": vocab}, tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20) < 16 << 20, peaks
    assert PIECE_WEIGHTS < 1 << 26


def test_shared_and_dense_blocks_too(tmp_path: Path, tokenizer: Path) -> None:
    config = {
        "model_type": "qwen2_moe", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160,
        "moe_intermediate_size": 72, "shared_expert_intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "mlp_only_layers": [0], "eos_token_id": 0, "max_position_embeddings": 512,
    }  # fmt: skip
    container = Container.open(synthesise(tmp_path / "x", config, tokenizer))
    assert container.moe_layers == (1,) and container.read_dense("layers.1.shared.mix").shape == (96,)
    assert container.nested["layers.0.mlp.down"].groups == 2 and verify(container).problems == ()


def test_the_shapes_are_those_of_the_models() -> None:
    olmoe, qwen = shape_from_config(dict(OLMOE_1B_7B), "olmoe"), shape_from_config(dict(QWEN3_30B_A3B), "qwen")
    for shape, billions in ((olmoe, 6.9), (qwen, 30.5)):
        experts = len(shape.moe_layers) * shape.experts * len(PROJECTIONS) * shape.hidden * shape.expert_inner
        sources = family(shape.model_type).source_names(shape).dense
        dense = sum(int(np.prod(source.shape)) for source in sources.values())
        assert (experts + dense) / 1e9 == pytest.approx(billions, abs=0.05)
    assert (qwen.layers, qwen.experts, qwen.top_k, qwen.norm_top_k, qwen.tied_embeddings) == (48, 128, 8, True, False)
