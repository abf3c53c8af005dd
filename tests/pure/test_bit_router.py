"""bit_router.safetensors: written into a container that stays whole, read back, and refused when it is not what it should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from containers import make

from d2moe.container import BitRouter, Container, bit_router, read_router, write_router
from d2moe.container.verify import verify
from d2moe.errors import ContainerError, StorageError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.sampling import SamplingParams

NAME = bit_router.NAME


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container.open(make(tmp_path / "tiny.d2moe"))


def router_for(container: Container, weight: bool = True) -> BitRouter:
    rng = np.random.default_rng()
    layers, experts, hidden = len(container.moe_layers), container.experts, container.record.hidden
    planes = np.sort(rng.normal(size=(layers, experts, 6)).astype(np.float32))[..., ::-1].copy()
    powers, extra = (rng.normal(size=s).astype(np.float32) for s in ((layers, 2), (layers, experts, hidden)))
    dial = np.array([[2.5, 1], [3, 0], [4, -2]], np.float32)
    return BitRouter(planes, powers, extra if weight else None, dial, planes[..., 0] + 1 if weight else None)


@pytest.mark.parametrize("weight", [True, False])
def test_what_is_written_is_read_and_verified(container: Container, weight: bool) -> None:
    before = {p.name: p.read_bytes() for p in container.path.rglob("*") if p.is_file()}
    assert read_router(container) is None
    router = router_for(container, weight)
    for about in ({"method": "one"}, {"method": "two"}):  # the second replaces the first
        write_router(container.path, router, about)
        found = read_router(Container.open(container.path))
        assert found is not None and set(found.tensors) == set(router.tensors)
        assert all(np.array_equal(found.tensors[name], tensor) for name, tensor in router.tensors.items())
        report = verify(container.path)
        assert not report.problems and not report.unlisted
    assert [found.price(b) for b in (2, 2.75, 3.5, 8)] == [1, 0.5, -1, -2]
    write_router(container.path, None, {})
    after = {p.name: p.read_bytes() for p in container.path.rglob("*") if p.is_file()}
    assert after == before and read_router(Container.open(container.path)) is None


def test_a_write_that_breaks_off_leaves_a_whole_container(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = router_for(container), router_for(container)
    real, calls, stop = bit_router._replace, 0, 0

    def breaks(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(bit_router, "_replace", breaks)
    for breaking in (1, 2, 3):
        stop = 0
        write_router(container.path, old, {})
        calls, stop = 0, breaking
        with pytest.raises(StorageError, match="No space left"):
            write_router(container.path, new, {})
        opened = Container.open(container.path)
        assert not verify(opened).problems
        found = read_router(opened)
        assert (found is not None) == (breaking == 1)


def test_damage_is_refused_by_name(container: Container) -> None:
    router = router_for(container)
    write_router(container.path, router, {})
    file = container.path / NAME
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ContainerError, match=r"SHA-256.*route train"):
        read_router(Container.open(container.path))
    assert any(NAME in problem for problem in verify(container.path).problems)
    file.write_bytes(good[:-4])
    with pytest.raises(ContainerError, match=NAME):
        Container.open(container.path)
    file.unlink()
    assert read_router(Container.open(container.path)) is None  # it is optional


def test_numbers_that_are_no_router_are_refused(container: Container) -> None:
    good = router_for(container, weight=False)
    for bad, message in (
        (replace(good, planes=good.planes[..., ::-1]), "worth more than the one before"),
        (replace(good, base=good.planes[..., 0] - 1), "a third bit is worth more"),
        (replace(good, powers=good.powers * np.float32(np.nan)), "powers has numbers that are not finite"),
        (replace(good, dial=good.dial[::-1].copy()), "ascending widths"),
    ):
        with pytest.raises(ContainerError, match=message):
            write_router(container.path, bad, {})
    for bad in (replace(good, planes=good.planes[:, :-1]), replace(good, powers=good.powers[:, :1])):
        write_router(container.path, bad, {})
        with pytest.raises(ContainerError, match=r"expected F32 \["):
            read_router(Container.open(container.path))


def test_the_manifest_keeps_what_it_does_not_know(container: Container) -> None:
    path = container.path / "d2moe.json"
    table = json.loads(path.read_text()) | {"optional": {"someone": "else"}}
    path.write_text(json.dumps(table))
    write_router(container.path, router_for(container), {"method": "x"})
    after = json.loads(path.read_text())
    assert after["optional"] == {"someone": "else"} and after["files"][NAME]["about"] == {"method": "x"}


def test_names_of_widths() -> None:
    assert SamplingParams(quality="fast").average_bits == EngineConfig.from_options(quality="fast").bits == 2.5
    assert SamplingParams(bits=2.7).average_bits == 2.7 and SamplingParams().average_bits is None
    for make_it in (SamplingParams, EngineConfig.from_options):
        with pytest.raises(Exception, match="give one of the two"):
            make_it(quality="fast", bits=3)
        with pytest.raises(Exception, match="fast, balanced, best"):
            make_it(quality="good")
        with pytest.raises(Exception, match="from 2 to 8"):
            make_it(bits=9.5)


def test_dense_weights_have_their_widths_by_kind():
    names = ("layers.0.attn.q", "layers.11.attn.k", "layers.2.attn.v", "layers.2.attn.o", "head", "embed", "layers.1.shared.gate")
    for bits, own, tied in (
        (2, [4, 4, 5, 4, 5, 8, 5], 5),
        (3.4, [4, 4, 5, 4, 5, 8, 5], 5),
        (3.5, [5, 5, 6, 5, 6, 8, 6], 6),
        (5, [6, 6, 7, 6, 7, 8, 7], 7),
        (5.5, [8] * 7, 8),
        (8, [8] * 7, 8),
    ):
        config = EngineConfig(bits=bits)
        assert [config.dense_widths(own_embedding=True).of(n) for n in names] == own
        assert [config.dense_widths(own_embedding=False).of(n) for n in names] == [tied] * 7
        assert [EngineConfig(bits=bits, dense_bits=3).dense_widths(own_embedding=True).of(n) for n in names] == [3] * 7
        routed = [config.dense_widths(own_embedding=False, routed=True).of(n) for n in names]
        assert routed == [EngineConfig(bits=min(bits + 1, 8)).dense_widths(own_embedding=False).of(n) for n in names]
    assert str(EngineConfig(bits=3).dense_widths(True)) == "5 bits (q, k, o 4; embed 8)"
    assert str(EngineConfig(bits=3).dense_widths(False)) == "5 bits"
