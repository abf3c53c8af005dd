"""Conversion with calibration text: the activations are transformers' own, less is lost, and runs resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, tiny_checkpoint
from test_convert import Counting, tree
from transformers import AutoModelForCausalLM

from d2moe import cli
from d2moe.container import Container
from d2moe.container.inspect import measured_losses
from d2moe.container.trim import Cut, Trimmer
from d2moe.container.verify import verify
from d2moe.convert.activations import Activations, Routed, squares
from d2moe.convert.balance import Balanced
from d2moe.convert.calibrated import inner_factors
from d2moe.convert.calibration import Calibration
from d2moe.convert.float_model import last_states
from d2moe.convert.pipeline import convert
from d2moe.convert.source import open_source
from d2moe.errors import ConfigError, ContainerError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk


@pytest.fixture
def text(tmp_path: Path) -> Path:
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    words = np.random.default_rng(seed).integers(32, 127, 6000, dtype=np.uint8)
    (tmp_path / "text.txt").write_bytes(words.tobytes())
    return tmp_path / "text.txt"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("balance", [False, True])
def test_activations_are_those_of_transformers(family: str, balance: bool, tmp_path: Path) -> None:
    """Residual stream before the final norm, through attention, shared and routed experts of all layers."""
    tiny_checkpoint(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng().integers(0, 256, (3, 24)).astype(np.int32)
    with open_source(tmp_path) as opened, torch.no_grad():
        source = Balanced(opened) if balance else opened
        last = last_states(source, tokens)
        head = np.concatenate(list(source.linear_pieces("embed" if opened.shape.tied_embeddings else "head", 1)))
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(last @ head.T - expected).max() < 2e-3 * np.abs(expected).max()


def test_experts_that_few_tokens_chose_see_the_nearest_others(tmp_path: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path)
    with open_source(tmp_path) as source:
        activations = Activations(source, np.random.default_rng().integers(0, 256, (2, 16)).astype(np.int32))
        activations.attend(0)
        h = activations.normed(0)
        importance = activations.importance()
        logits = h @ source.read_dense("layers.0.router").T
        routed = Routed(activations, 0, h, least=20)
        expert = int(routed.tokens.argmin())
        parts = dict(source.read_expert(0, expert))
        hessians = routed.pass_on(expert, **parts)
        assert hessians
        found = hessians[0]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = (np.argsort(-p, axis=-1)[:, : source.shape.top_k] == expert).any(-1)
        assert routed.tokens[expert] == chosen.sum() < 20
        if source.shape.norm_top_k:
            p /= np.sort(p, axis=-1)[:, -source.shape.top_k :].sum(-1, keepdims=True)
        seen = sorted(range(len(h)), key=lambda i: (not chosen[i], -p[i, expert]))[:20]
        expected = squares(h[seen], p[seen, expert] ** 2 * importance[seen])
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_an_expert_that_sees_many_tokens_sees_them_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one expert of a dense model does: what all of them take at once would be more than the model."""
    tiny_checkpoint("llama", tmp_path)
    tokens = np.random.default_rng().integers(0, 256, (2, 30)).astype(np.int32)
    found = []
    with open_source(tmp_path) as source:
        parts = dict(source.read_expert(0, 0))
        for chunk in (1 << 26, 4 * source.shape.expert_inner * 7):
            activations = Activations(source, tokens)
            activations.attend(0)
            routed = Routed(activations, 0, activations.normed(0), least=1)
            assert routed.tokens.tolist() == [60]
            monkeypatch.setattr("d2moe.convert.activations.CHUNK_BYTES", chunk)
            hessians = routed.pass_on(0, **parts)
            assert hessians
            found.append((*hessians, activations.x))
    for whole, pieces in zip(*found, strict=True):
        assert np.allclose(whole, pieces, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_channels_are_scaled_by_what_they_carry() -> None:
    """A channel's share of the outputs sets the size of its column; how it fell in the source does not matter."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    inner = rng.normal(size=(500, 40)).astype(np.float32) * np.exp(rng.normal(size=40)).astype(np.float32)
    down = rng.normal(size=(30, 40)).astype(np.float32)
    scaled = down * inner_factors(squares(inner), down)
    carried = np.sqrt((inner**2).sum(0) * (down**2).mean(0))
    norms = np.sqrt((scaled**2).mean(0))
    assert np.allclose(norms / norms.mean(), carried**0.25 / (carried**0.25).mean(), rtol=1e-4)
    other = np.exp(rng.normal(size=40)).astype(np.float32)
    again = (down * other) * inner_factors(squares(inner / other), down * other)
    assert np.allclose(again / np.linalg.norm(again), scaled / np.linalg.norm(scaled), rtol=1e-4, atol=1e-7)
    dead = np.where(np.arange(40) == 7, np.float32(0), inner)
    assert inner_factors(squares(dead), down)[7] == 1


def test_a_scaled_block_does_the_same(tmp_path: Path) -> None:
    tiny_checkpoint("qwen2_moe", tmp_path)
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    with open_source(tmp_path) as opened:
        source = Balanced(opened)
        stem = next(n for n in opened.names.dense if n.endswith("shared.down")).removesuffix(".down")
        h = rng.normal(size=(20, opened.shape.hidden)).astype(np.float32)
        found = []
        for turn in range(2):
            gate, up, down = (np.concatenate(list(source.linear_pieces(f"{stem}.{part}", 1))) for part in ("gate", "up", "down"))
            found.append((down, (h @ gate.T) * (h @ up.T) @ down.T))
            if not turn:
                by = np.exp(rng.normal(size=len(up))).astype(np.float32)
                source.scale_block(stem, by)
    assert np.allclose(found[1][0], found[0][0] * by, rtol=1e-5)
    assert np.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4 * np.abs(found[0][1]).max())


def divergence(model: Path, expected: torch.Tensor, tokens: np.ndarray, bits: int) -> float:
    """Mean KL divergence of an engine's next tokens from float log-probabilities."""
    engine = Engine.load(model, EngineConfig(bits=bits, dense_bits=8, memory_bytes=10**9))
    try:
        rows = torch.from_numpy(engine.step([Chunk(engine.new_sequence(), tokens, bits, "all")]))
    finally:
        engine.close()
    return float((expected.exp() * (expected - torch.log_softmax(rows.double(), -1))).sum(-1).mean())


def test_less_is_lost_than_by_rounding_to_the_nearest(tmp_path: Path, text: Path) -> None:
    """On the text's own kind of tokens, at the widths that count most; random weights have little to gain."""
    src = tmp_path / "src"
    tiny_checkpoint("qwen3_moe", src)
    convert(src, tmp_path / "range")
    convert(src, tmp_path / "descent", calibration=Calibration((text,), 4096))
    assert Container.open(tmp_path / "descent").manifest.quantizer["name"] == "descent"
    tokens = np.random.default_rng().integers(32, 127, 250).astype(np.int32)
    reference = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.from_numpy(tokens).long()[None]).logits[0].double(), -1)
    for bits in (2, 3):
        lost = [divergence(tmp_path / name, expected, tokens, bits) for name in ("descent", "range")]
        print(bits, lost)
        assert lost[0] < lost[1]


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "llama"])
def test_interrupted_runs_resume_to_the_same_bytes(family: str, tmp_path: Path, text: Path) -> None:
    src, calibration = tmp_path / "src", Calibration((text,), 1024)
    tiny_checkpoint(family, src, num_hidden_layers=2)
    convert(src, tmp_path / "whole", calibration=calibration)
    for stop in (2, 20 if family != "llama" else 8, 3):  # before the first layer, within experts, in the layer after
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "dst", calibration=calibration, progress=Counting(stop))
    with pytest.raises(ContainerError, match=r"was begun with other facts: quantizer\.calibration\.sha256"):
        text.write_bytes(text.read_bytes()[::-1])
        convert(src, tmp_path / "dst", calibration=calibration)
    text.write_bytes(text.read_bytes()[::-1])
    counting = Counting()
    convert(src, tmp_path / "dst", calibration=calibration, progress=counting)
    assert counting.done == counting.total
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")


def test_losses_are_kept(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    tiny_checkpoint("mixtral", src)
    container = Container.open(convert(src, tmp_path / "dst", calibration=Calibration((text,), 1024)))
    for layer in container.moe_layers:
        losses = container.read_dense(f"optional.losses.{layer}")
        assert losses.shape == (container.experts, 3, 6)
        assert (losses > 0).all() and (np.diff(losses, axis=-1) < 0).mean() > 0.9
        assert container.read_dense(f"optional.tokens.{layer}").sum() == 1024 * 2
    measured = measured_losses(container)
    assert measured is not None and measured[0] == (2, 3, 4, 5, 6, 8)
    tokens, losses = (container.read_dense(f"optional.{name}.0") for name in ("tokens", "losses"))
    assert np.allclose(measured[1][0], (losses * tokens[:, None, None]).sum(0) / tokens.sum())
    assert cli.main(["inspect", str(container.path), "--losses"]) == 0
    shown = capsys.readouterr().out
    assert "layer 0 gate" in shown and f"{100 * measured[1][0][2, 0]:.3g} %" in shown
    convert(src, tmp_path / "range")
    assert cli.main(["inspect", str(tmp_path / "range"), "--losses"]) == 1
    assert "converted without calibration text" in capsys.readouterr().err


def cut(full: Path, dst: Path, kept: list[int], dense_bits: int) -> Container:
    """A copy whose experts have `kept` bits in turn."""
    trimmer = Trimmer(full, uniform=True, dense_bits=dense_bits)
    widths = np.resize(kept, trimmer.container.kept.shape)
    return Container.open(trimmer.write(Cut(widths, trimmer.to_bits(8).dense), dst))


def test_rounding_for_the_bits_that_are_kept_loses_less_there(tmp_path: Path, text: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path / "hf")
    calibration = Calibration((text,), 2000)
    full = convert(tmp_path / "hf", tmp_path / "full", calibration=calibration, threads=1)
    small = cut(full, tmp_path / "small", [3, 4, 2, 7, 8], 5)
    made = Container.open(convert(tmp_path / "hf", tmp_path / "made", calibration=calibration, widths_of=small.path, threads=1))
    assert verify(made).problems == ()
    assert np.array_equal(made.kept, small.kept)
    assert {n: layout.bits for n, layout in made.nested.items()} == {n: layout.bits for n, layout in small.nested.items()}
    widths = [int(bits) for bits in made.manifest.quantizer["targets"]["experts"]]
    for layer, kept in zip(made.moe_layers, made.kept, strict=True):
        before, after = (c.read_dense(f"optional.losses.{layer}").astype(np.float64).sum(1) for c in (small, made))
        for expert, bits in enumerate(kept.tolist()):
            at = widths.index(min(b for b in widths if b >= bits))
            if bits in widths:
                assert after[expert, at] < before[expert, at], (layer, expert, bits)
            assert (after[expert, at:] == after[expert, at]).all()  # there is nothing beyond
    whole = Container.open(convert(tmp_path / "hf", tmp_path / "whole", calibration=calibration, widths_of=full, threads=1))
    lost = [sum(float(c.read_dense(f"optional.losses.{la}")[..., -1].sum()) for la in c.moe_layers) for c in (Container.open(full), whole)]
    assert (whole.kept == 8).all() and lost[1] < lost[0]


def test_widths_of_something_else_are_refused(tmp_path: Path, text: Path) -> None:
    for family in ("olmoe", "mixtral"):
        tiny_checkpoint(family, tmp_path / family)
    other = convert(tmp_path / "mixtral", tmp_path / "other", threads=1)
    calibration = Calibration((text,), 500)
    with pytest.raises(ConfigError, match="give a model that was converted from it and trimmed"):
        convert(tmp_path / "olmoe", tmp_path / "x", calibration=calibration, widths_of=other)
    with pytest.raises(ConfigError, match="give calibration text, or trim the model"):
        convert(tmp_path / "olmoe", tmp_path / "x", widths_of=other)
    assert cli.main(["convert", str(tmp_path / "olmoe"), str(tmp_path / "x"), "--widths-of", str(other)]) == 2
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"too short", r"has 9 tokens, calibration needs at least \d+; give a longer text"), (None, "cannot be read as calibration text")],
)
def test_calibration_text_that_is_of_no_use(content: bytes | None, message: str, tmp_path: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path / "src")
    file = tmp_path / "short.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", calibration=Calibration((file,)))
    assert not list(tmp_path.glob("dst*"))
