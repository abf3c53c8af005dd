"""`bench --plot`: the curve is what the engine counts, and what is missing is said before anything is measured."""

from __future__ import annotations

import builtins
import json
import math

import numpy as np
import pytest

import d2moe
from d2moe import cli
from d2moe.evaluate.curve import Point, draw
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.runtime.tokenizer import Tokenizer

SHORT = ("--uniform", "--prompt-tokens", "10", "--generate", "20")
TEXT = "Once upon a time there was a little dog who lived in a big house near the sea. " * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_curve_is_drawn(tmp_path, text, capsys):
    pytest.importorskip("matplotlib", reason="drawing is NOT TESTED: matplotlib is missing")
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        file = tmp_path / f"curve.{suffix}"
        code = cli.main(["bench", "builtin", "--plot", str(file), "--text", text, "--bits", "3", *SHORT])
        out, err = capsys.readouterr()
        assert code == 0 and file.read_bytes().startswith(magic), err
    points = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [p["share"] for p in points] == [0.25, 0.35, 0.5, 0.75, 1.0]
    reads = [p["read_bytes_per_token"] for p in points]
    assert reads == sorted(reads, reverse=True) and reads[0] > reads[-1]
    tokens = Tokenizer.load(d2moe.builtin_model()).encode(TEXT)[:31]
    with Engine.load(d2moe.builtin_model(), EngineConfig(context=64, bits=3, uniform=True)) as engine:
        rows = engine.step([Chunk(engine.new_sequence(), tokens[:-1], 3, "all", uniform=True)])[10:].astype(np.float64)
    nll = np.mean(np.log(np.exp(rows).sum(1)) - rows[np.arange(20), tokens[11:]])
    assert all(p["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4) for p in points)


def test_what_cannot_be_drawn_is_said_first(tmp_path, text, capsys, monkeypatch):
    def refused(*arguments):
        code = cli.main(["bench", "builtin", *arguments])
        return code, capsys.readouterr().err

    code, err = refused("--plot", "x.png")
    assert code == 2 and "give a --text" in err
    code, err = refused("--plot", "x.png", "--text", text, "--memory", "1GB")
    assert code == 2 and "--memory says nothing to --plot" in err
    if pytest.importorskip("matplotlib", reason="drawing is NOT TESTED: matplotlib is missing"):
        code, err = refused("--plot", str(tmp_path / "x.docx"), "--text", text)
        assert code == 1 and "ends in one of" in err
        code, err = refused("--plot", str(tmp_path / "no" / "x.png"), "--text", text)
        assert code == 1 and "there is no folder" in err
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, err = refused("--plot", "x.png", "--text", text)
    assert code == 1 and "pip install 'd2moe[plot]'" in err


def test_a_full_disk_is_one_sentence(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing is NOT TESTED: matplotlib is missing")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(d2moe.errors.ConfigError, match=r"x\.png cannot be written"):
        draw([Point(3, 3, 0.5, 10**9, 10**8, 5.0, 1e6, 0.5, 40.0)], tmp_path / "x.png", "title")
