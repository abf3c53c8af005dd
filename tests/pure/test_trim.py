"""Smaller copies of a model: what is chosen, what is copied, what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import containers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d2moe
from d2moe.cli import main
from d2moe.container import Container, ContainerWriter, read_router, write_router
from d2moe.container.trim import Trimmer, allot
from d2moe.container.verify import verify
from d2moe.errors import ConfigError, ContainerError
from d2moe.types import DenseWidths

MODEL = d2moe.builtin_model()
SEEDS = st.integers(0, 1 << 30)


def folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 14))
def test_no_other_choice_of_as_many_planes_is_worth_more(seed: int, planes: int) -> None:
    rng = np.random.default_rng(seed)
    worth = -np.sort(-rng.exponential(size=(1, 3, 7)).round(1 + seed % 2), -1).astype(np.float32)  # with ties
    most = rng.integers(2, 9, (1, 3))
    kept = allot(worth, most, planes)
    assert (kept <= most).all() and (kept >= 2).all()
    assert (kept - 2).sum() == min(planes, (most - 2).sum())
    value = lambda widths: sum(float(worth[0, e, 1 : b - 1].sum()) for e, b in enumerate(widths))  # noqa: E731
    others = product(*(range(2, m + 1) for m in most[0]))
    best = max(value(w) for w in others if sum(w) == kept.sum())
    assert value(kept[0]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 2.5, 3.3, 5, 8])
def test_what_stays_is_what_was_there(tmp_path: Path, bits: float) -> None:
    whole, trimmer = Container.open(MODEL), Trimmer(MODEL)
    cut = trimmer.to_bits(bits)
    assert bits - 1 / cut.kept.size < cut.bits <= bits
    made = trimmer.write(cut, tmp_path / "small")
    small = Container.open(made)
    assert verify(small).problems == () and verify(small).unlisted == ()
    assert np.array_equal(small.kept, cut.kept)
    assert trimmer.size(cut) - 1024 <= folder_bytes(made) <= trimmer.size(cut)
    for row, layer in enumerate(small.moe_layers):
        for expert, width in enumerate(cut.kept[row].tolist()):
            assert np.array_equal(small.read_record(layer, expert, width), whole.read_record(layer, expert, width))
    for name, layout in small.nested.items():
        assert layout.bits == cut.dense.of(name)
        found, full = small.read_nested(name, 8), whole.read_nested(name, layout.bits)
        assert all(np.array_equal(array, full.arrays[kind]) for kind, array in found.arrays.items())
    router, before = read_router(small), read_router(whole)
    assert router is not None and before is not None
    assert all(np.array_equal(t, before.tensors[n]) for n, t in router.tensors.items())
    about = [json.loads((p / "d2moe.json").read_text())["files"]["bit_router.safetensors"]["about"] for p in (MODEL, made)]
    assert about[0] == about[1]


@settings(deadline=None, max_examples=15)
@given(st.integers(5_400_000, 16_000_000), st.sampled_from([None, 2, 8]))
def test_a_size_is_used_and_not_exceeded(n_bytes: int, dense_bits: int | None) -> None:
    trimmer = Trimmer(MODEL, dense_bits=dense_bits)
    if trimmer.size(trimmer.to_bits(2)) > n_bytes:
        with pytest.raises(ConfigError, match="cannot be cut to"):
            trimmer.to_size(n_bytes)
        return
    cut = trimmer.to_size(n_bytes)
    assert trimmer.size(cut) <= n_bytes
    if cut.bits < 8:
        more = trimmer.to_bits(cut.bits + 1 / cut.kept.size)
        assert more.bits > cut.bits and trimmer.size(more) > n_bytes


def test_a_size_holds_for_layers_of_one_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dense models have: their manifest grows by a list for each."""
    layers = tuple(range(40))
    monkeypatch.setattr(containers, "SHAPES", {n: s for n, s in containers.SHAPES.items() if "router" not in n})
    with ContainerWriter(tmp_path / "x", **containers.FACTS | {"layers": layers, "experts": 1, "dense": containers.SHAPES}) as writer:
        for name in containers.SHAPES:
            writer.add_dense(name, containers.dense_tensor(name))
        for layer in layers:
            writer.add_expert(layer, 0, containers.nested(layer, 0))
        writer.finish()
    trimmer = Trimmer(tmp_path / "x", uniform=True)
    cut = trimmer.to_bits(4)
    assert folder_bytes(trimmer.write(cut, tmp_path / "small")) <= trimmer.size(cut)


def test_a_smaller_copy_can_be_cut_again(tmp_path: Path) -> None:
    first = Trimmer(MODEL)
    first.write(first.to_bits(4), tmp_path / "four")
    again, direct = Trimmer(tmp_path / "four"), first.to_bits(2.7)
    cut = again.to_bits(2.7)
    assert np.array_equal(cut.kept, direct.kept)
    again.write(cut, tmp_path / "small")
    assert verify(tmp_path / "small").problems == ()
    assert again.to_bits(8).bits == 4 and again.to_size(1 << 40).bits == 4  # no more than there is


def test_all_experts_alike_needs_no_router(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "plain")
    write_router(tmp_path / "plain", None, {})
    with pytest.raises(ConfigError, match=r'has no width router, .* "d2moe route train .*", or .*--uniform'):
        Trimmer(tmp_path / "plain")
    trimmer = Trimmer(tmp_path / "plain", uniform=True)
    made = Container.open(trimmer.write(trimmer.to_bits(4), tmp_path / "four"))
    assert (made.kept == 4).all() and read_router(made) is None
    with pytest.raises(ConfigError, match=r"bits is 3.5, expected a whole number"):
        trimmer.to_bits(3.5)
    assert trimmer.to_size(trimmer.size(trimmer.to_bits(5)) + 1).bits == 5


def test_a_router_that_knows_no_worth_is_not_guessed_from(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "old")
    router = read_router(Container.open(MODEL))
    assert router is not None and router.worth is not None
    old = type(router)(router.planes, router.powers, router.weight, router.dial, router.base)
    write_router(tmp_path / "old", old, {})
    with pytest.raises(ConfigError, match="does not say what planes are worth"):
        Trimmer(tmp_path / "old")


@pytest.mark.parametrize("what", ["record", "dense"])
def test_damage_is_not_copied(tmp_path: Path, what: str) -> None:
    shutil.copytree(MODEL, tmp_path / "x")
    whole = Container.open(tmp_path / "x")
    path, at = whole.path / "dense.safetensors", whole.dense["layers.1.attn.q.base"].offset + 5
    if what == "record":
        path, at = whole.expert_path(2), whole.expert_offset(2, 7) + 99
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    trimmer = Trimmer(tmp_path / "x")
    item = "layer 2 expert 7 base" if what == "record" else "tensor layers.1.attn.q.base"
    with pytest.raises(ContainerError, match=f"{item} is damaged"):
        trimmer.write(trimmer.to_bits(3), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_interrupted_copy_goes_on(tmp_path: Path) -> None:
    trimmer = Trimmer(MODEL)
    cut, calls = trimmer.to_bits(3), []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"x.partial has what was copied; the same command goes on there"):
        trimmer.write(cut, tmp_path / "x", stop)
    assert (tmp_path / "x.partial").is_dir() and not (tmp_path / "x").exists()
    trimmer.write(cut, tmp_path / "x", lambda done, total: calls.append(done))
    trimmer.write(cut, tmp_path / "whole")
    names = sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*") if p.is_file())
    assert names and all((tmp_path / "x" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = str(tmp_path / "small.d2moe")
    assert main(["trim", "builtin", dst, "--size", "7MB", "--dry-run"]) == 0
    assert "nothing written" in capsys.readouterr().out and not Path(dst).exists()
    assert main(["trim", "builtin", dst, "--size", "7MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert folder_bytes(Path(dst)) <= found["bytes"] <= 7_000_000 and found["written"]
    assert Container.open(dst).kept.mean() == found["bits"]
    assert main(["inspect", dst]) == 0
    assert f"{found['bits']:.2f} on average" in capsys.readouterr().out
    for arguments, code, message in (
        ([dst, "--size", "7MB"], 1, "is there already"),
        ([str(tmp_path / "y")], 2, "give either --size or --bits"),
        ([str(tmp_path / "y"), "--size", "7MB", "--bits", "3"], 2, "give either --size or --bits"),
        ([str(tmp_path / "y"), "--size", "seven"], 1, "--size is 'seven', expected a number of bytes with a unit"),
        ([str(tmp_path / "y"), "--size", "1MB"], 1, "cannot be cut to 1,000,000 bytes: with 2 bits of every expert it has"),
        ([str(tmp_path / "none" / "y"), "--bits", "3"], 1, "no such folder"),
    ):
        assert main(["trim", "builtin", *arguments]) == code
        assert message in " ".join(capsys.readouterr().err.split())


def test_dense_widths_can_be_chosen(tmp_path: Path) -> None:
    trimmer = Trimmer(MODEL, dense_bits=7)
    assert trimmer.to_bits(2).dense == DenseWidths(7)
    with pytest.raises(ConfigError, match="dense_bits is 9"):
        Trimmer(MODEL, dense_bits=9)
