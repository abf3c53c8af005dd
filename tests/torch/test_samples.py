"""Conversion without a text: the model writes it, the same way every time, and what it brings is like a text's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import END, tiny_checkpoint
from safetensors.torch import load_file, save_file
from test_convert import Counting, tree

from d2moe import cli
from d2moe.container import Container
from d2moe.convert import samples
from d2moe.convert.calibration import Calibration, facts
from d2moe.convert.job import Silent
from d2moe.convert.pipeline import convert
from d2moe.convert.samples import OwnSamples, Samples
from d2moe.convert.source import open_source
from d2moe.errors import CheckpointError, ContainerError
from d2moe.kernels.native import draw
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WINDOW", 24)
    monkeypatch.setattr(samples, "BATCH", 3)


def test_windows_are_drawn_from_the_model(tmp_path: Path) -> None:
    """Each window alone: what the engine makes of its beginning, and its own random numbers, give the next token."""
    tiny_checkpoint("olmoe", tmp_path / "src")
    plain = convert(tmp_path / "src", tmp_path / "plain")
    found = Samples(tmp_path / "dst", {}).windows(
        OwnSamples(24 * 7 + 5), lambda path: convert(tmp_path / "src", path), 2, Silent()
    )
    assert found.shape == (7, 24) and (found[:, 0] == END).all()
    assert len({row.tobytes() for row in found}) == 7
    engine = Engine.load(plain, EngineConfig(bits=8, memory_bytes=4 * 10**9))  # the process holds what other tests left, too
    try:
        for index in range(7):
            logits = engine.step([Chunk(sequence := engine.new_sequence(), found[index], 8, "all", True)])
            chance = np.random.default_rng(index).random(24)
            drawn = [draw(row, 1.0, 0, 1.0, 0.0, chance[place]) for place, row in enumerate(logits[:-1], 1)]
            assert drawn == found[index, 1:].tolist()
            sequence.free()
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_interrupted_runs_resume_to_the_same_bytes(family: str, tmp_path: Path) -> None:
    src, wanted = tmp_path / "src", OwnSamples(24 * 4)
    tiny_checkpoint(family, src, num_hidden_layers=2)
    plain, whole = Counting(), Counting()
    convert(src, tmp_path / "plain", progress=plain)
    made = Container.open(convert(src, tmp_path / "whole", calibration=wanted, progress=whole))
    assert made.manifest.quantizer["calibration"]["windows"] == [4, 24]
    pieces = len(plain.texts)
    assert len(whole.texts) == 2 * pieces + 2 * 23
    folder = tmp_path / "dst.samples"
    for stop, left in ((2, "model-*.partial"), (pieces, "model-*[0-9a-f]"), (9, "tokens-*.npy"), (30, "tokens-*.npy")):
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            convert(src, tmp_path / "dst", calibration=wanted, progress=Counting(stop))
        assert list(folder.glob(left)), (stop, sorted(folder.iterdir()))
    with pytest.raises(KeyboardInterrupt):  # all is written: the model that wrote it is gone
        convert(src, tmp_path / "dst", calibration=wanted, progress=Counting(8))
    assert [p.suffix for p in folder.iterdir()] == [".npy"]
    convert(src, tmp_path / "dst", calibration=wanted)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    assert not list(tmp_path.glob("*.samples")) and not list(tmp_path.glob("*.partial"))


def test_the_command(tmp_path: Path) -> None:
    """Of its own text alone, and with half of a given one."""
    src, text = tmp_path / "src", tmp_path / "text"
    tiny_checkpoint("mixtral", src)
    text.write_text("abcdefgh" * 200)
    found = {}
    for name, options in (("own", []), ("both", ["--calibration", str(text)])):
        options += ["--self-calibration", "--calibration-tokens", str(6 * 24)]
        assert cli.main(["convert", str(src), str(tmp_path / name), *options]) == 0
        found[name] = Container.open(tmp_path / name).manifest.quantizer["calibration"]
    assert found["own"]["windows"] == found["both"]["windows"] == [6, 24]
    given = Calibration((text,), 3 * 24, 24)
    with open_source(src) as source:
        windows = given.windows(source)
    own = Samples(tmp_path / "again", {}).windows(OwnSamples(3 * 24), lambda path: convert(src, path), 2, Silent())
    assert found["both"]["sha256"] == facts(np.concatenate([windows, own]))["sha256"]
    with pytest.raises(ContainerError, match="is there already"):
        convert(src, tmp_path / "own", calibration=OwnSamples(60))


def test_nothing_is_left_of_weights_that_cannot_be_read(tmp_path: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path / "src")
    file = tmp_path / "src" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(CheckpointError):
        convert(tmp_path / "src", tmp_path / "dst", calibration=OwnSamples(60))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
