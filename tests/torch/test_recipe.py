"""The training recipe: its experts are transformers', a stopped run goes on as if it had not been, and its export loads everywhere."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2moe.convert.pipeline import convert
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = "--layers 2 --hidden 64 --inner 64 --heads 2 --experts 8 --top 3 --context 32 --batch 2 --rate 3e-3 --device cpu"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setattr(signal, "signal", lambda number, act: None)  # a run takes Ctrl-C over
    for name in ("train", "text", "experts"):
        sys.modules.pop(name, None)
    train = importlib.import_module("train")
    monkeypatch.setattr(train, "prepare_cpu", lambda: None)  # it would keep the memory of all other tests, too
    return train


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Text, tokenizer and sizes of a tiny run."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    words = [bytes(w).decode() for w in np.random.default_rng(seed).integers(97, 123, (60, 5), dtype=np.uint8)]
    draw = np.random.default_rng(seed + 1)
    documents = [" ".join(draw.choice(words, 60)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    return ["--text", str(tmp_path / "text.txt"), "--tokenizer", str(tmp_path), *SMALL.split()]


@pytest.mark.parametrize("sharp", [0.5, 8.0])  # 8: some experts get no token at all
def test_experts_are_those_of_transformers(recipe: ModuleType, given: list[str], sharp: float) -> None:
    model = recipe.model_of(recipe.arguments([*given, "--out", "x", "--tokens", "1"]), 320)
    block, found = model.model.layers[0].mlp, []
    with torch.no_grad():
        block.gate.weight.copy_(torch.randn_like(block.gate.weight) * sharp)
    x = torch.randn(1, 50, 64)
    toward = torch.randn(1, 50, 64)
    for how in ("eager", "fast"):
        model.config._experts_implementation = how
        block.zero_grad()
        h = x.clone().requires_grad_()
        out = block(h)
        (out * toward).sum().backward()
        weights = (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
        found.append([out.detach(), h.grad, *(w.grad.clone() for w in weights)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_files_that_are_not_there_are_named(
    recipe: ModuleType, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, name in (("--text", "absent.txt"), ("--tokenizer", "absent")):
        wrong = [*given]
        wrong[wrong.index(option) + 1] = str(tmp_path / name)
        with pytest.raises(SystemExit):
            recipe.arguments([*wrong, "--out", str(tmp_path / "run"), "--tokens", "1"])
        assert f"{tmp_path / name}" in capsys.readouterr().err


def test_windows_come_once_each(recipe: ModuleType) -> None:
    text = importlib.import_module("text")
    tokens = np.arange(1000, dtype=np.uint16)
    firsts = [int(row[0]) for step in range(20) for row in text.batch(tokens, step, 3, 33, 5)]
    assert sorted(firsts[:30]) == [33 * i for i in range(30)]
    assert sorted(firsts[30:60]) == sorted(firsts[:30])
    assert firsts[30:60] != firsts[:30]
    assert firsts[:30] != [int(row[0]) for step in range(10) for row in text.batch(tokens, step, 3, 33, 6)]
    row = text.batch(tokens, 4, 3, 33, 5)[1]
    assert row.tolist() == list(range(row[0], row[0] + 34))


def test_balance_is_one_where_all_are_equal(recipe: ModuleType) -> None:
    logits = torch.eye(8).repeat(4, 1) * 0.01
    assert float(recipe.balance_loss((logits,), 1)) == pytest.approx(1, abs=1e-3)
    assert float(recipe.balance_loss((torch.eye(8)[:1].repeat(9, 1) * 20,), 1)) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("precision", ["--bf16", "--no-bf16"])
def test_a_stopped_run_goes_on_the_same(
    recipe: ModuleType, given: list[str], tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        given = [*given, precision, "--tokens", str(12 * 64)]
        assert recipe.main([*given, "--out", str(tmp_path / "whole")]) == 0

        stopped = recipe.Run(recipe.arguments([*given, "--out", str(tmp_path / "parts")]))
        stop = recipe.Stop()
        step, losses = stopped.make_step, []

        def five_then_stop() -> float:
            losses.append(step())
            stop.asked = len(losses) == 5
            return losses[-1]

        stopped.make_step = five_then_stop
        recipe.train(stopped, stop)
        assert stopped.step == 5
        assert recipe.main([*given, "--out", str(tmp_path / "parts")]) == 0
        assert "from step 5" in capsys.readouterr().out
        whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for name in whole:
            assert torch.equal(whole[name], parts[name]), name
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(SystemExit, match="--top 3, not 2"):
        recipe.main([*given, "--top", "2", "--out", str(tmp_path / "parts")])


def test_it_learns_and_what_it_exports_loads(recipe: ModuleType, given: list[str], tmp_path: Path) -> None:
    args = recipe.arguments([*given, "--out", str(tmp_path / "out"), "--tokens", str(150 * 64)])
    before = recipe.Run(args).held_out_loss()
    assert recipe.main([*given, "--out", str(tmp_path / "out"), "--tokens", str(150 * 64)]) == 0
    run, folder = recipe.Run(args), tmp_path / "out" / "model"
    assert run.step == 150
    assert run.held_out_loss() < before - 1.5  # nats; from about 6 to 3

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == "olmoe"
    ids = run.held_out[:24].astype(np.int64)
    rounded = {n: v.to(torch.bfloat16).float() for n, v in run.model.state_dict().items()}
    run.model.load_state_dict(rounded)
    with torch.no_grad():
        expected = run.model(torch.from_numpy(ids[None])).logits[0]
        torch.testing.assert_close(model(torch.from_numpy(ids[None])).logits[0], expected, rtol=1e-3, atol=1e-3)
    assert AutoTokenizer.from_pretrained(folder).decode([0]) == "<|endoftext|>"

    convert(folder, tmp_path / "m.d2moe")
    with Engine.load(tmp_path / "m.d2moe", EngineConfig(bits=8, kernels="reference-float")) as engine:
        logits = engine.step([Chunk(engine.new_sequence(), ids.tolist(), 8, "all")])
    # The mean, since a router at a near tie may choose otherwise at 8 bits.
    wrong = float(np.abs(np.array(logits) - expected.numpy()).mean())
    assert wrong < 0.03 * float(expected.std()), wrong
