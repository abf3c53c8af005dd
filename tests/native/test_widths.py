"""The width router: what it grants, that nothing but the token decides it, and that plain widths are what they were."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import d2moe
from d2moe import cli
from d2moe.container import BitRouter, Container, read_router, write_router
from d2moe.errors import ConfigError, RequestError
from d2moe.kernels import native
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

LAYERS, EXPERTS, HIDDEN = 4, 16, 256


def random_router(rng, weight=True, base=True):
    """Values around e^0, so that prices from 1.5 to -6 give averages between 2 and 8; with `base`, 0 bits here and there."""
    planes = np.sort(rng.normal(0, 1.5, (LAYERS, EXPERTS, 6)), -1)[..., ::-1]
    powers = np.stack([rng.uniform(0.5, 2.5, LAYERS), rng.uniform(-1, 0.5, LAYERS)], 1)
    dial = np.stack([np.linspace(2.1, 7.9, 9), np.linspace(1.5, -6, 9)], 1)
    arrays = planes, powers, rng.normal(0, 0.05, (LAYERS, EXPERTS, HIDDEN)) if weight else None, dial
    arrays = *arrays, planes[..., 0] + rng.exponential(0.5, (LAYERS, EXPERTS)) if base else None
    return BitRouter(*(None if a is None else np.ascontiguousarray(a, np.float32) for a in arrays))


@pytest.fixture(params=[(True, True), (False, True), (False, False)], ids=["hidden", "gate only", "two bits at least"])
def routed(request, rng, tmp_path):
    """(folder of the built-in model with a random width router, the router)."""
    path = tmp_path / "routed.d2moe"
    shutil.copytree(d2moe.builtin_model(), path)
    router = random_router(rng, *request.param)
    write_router(path, router, {"method": "random"})
    return path, router


def tokens_of(rng, n=120):
    return rng.integers(0, 4096, n).astype(np.int32)


def fed(path, tokens, bits, cuts=(), uniform=False, **options):
    """Logits of all tokens, their experts and widths [layers, tokens, top_k], and the counters."""
    with Engine.load(path, EngineConfig(context=256, dense_bits=5, **options)) as engine:
        sequence, rows, ids, wide = engine.new_sequence(), [], [], []
        for part in np.split(tokens, cuts):
            for at in range(0, len(part), engine.decoder.max_tokens):
                piece = part[at : at + engine.decoder.max_tokens]
                rows.append(engine.step([Chunk(sequence, piece, bits, "all", uniform)]))
                ids.append(engine.decoder.ids[:, : len(piece)].copy())
                wide.append(engine.decoder.bits[:, : len(piece)].copy())
        wide = np.concatenate(wide, 1)
        assert engine.counters.average_bits == pytest.approx(wide.mean()) == sequence.average_bits
        assert engine.counters.width_uses == tuple(np.bincount(wide.ravel(), minlength=9))
        return np.concatenate(rows), np.concatenate(ids, 1), wide


@pytest.mark.parametrize("bits", [2.3, 3, 5.7])
def test_nothing_but_the_tokens_decides_the_widths(routed, rng, bits):
    path, router = routed
    tokens = tokens_of(rng)
    expected, _, wide = fed(path, tokens, bits, threads=1)
    assert len(np.unique(wide)) > 1, "a router that never varies tests nothing"
    assert (wide == 0).any() == (router.base is not None) and not (wide == 1).any()
    for options in (
        {"expert_memory_bytes": 262144},
        {"expert_memory_bytes": 900_000, "threads": 3, "direct": False},
        {"chunk_tokens": 7, "threads": 2},
        *({"kernels": table} for table in native.tables()),
    ):
        found, _, also = fed(path, tokens, bits, **options)
        assert np.array_equal(also, wide) and np.array_equal(found, expected), options
    cuts = np.sort(rng.choice(np.arange(1, len(tokens)), 5, replace=False))
    assert np.array_equal(fed(path, tokens, bits, cuts)[0], expected), cuts


def test_company_with_other_dials_does_not_show(routed, rng):
    path, _ = routed
    tokens = tokens_of(rng, 40)
    wishes = [(2.4, False), (3, True), (3, False), (6.1, False)]
    alone = [fed(path, tokens, bits, uniform=uniform) for bits, uniform in wishes]
    options = EngineConfig(context=256, dense_bits=5, max_sequences=4, expert_memory_bytes=900_000)
    with Engine.load(path, options) as engine:
        sequences = [engine.new_sequence() for _ in wishes]
        for part in (tokens[:39], tokens[39:]):
            rows = engine.step([Chunk(s, part, bits, "last", u) for s, (bits, u) in zip(sequences, wishes, strict=True)])
        for row, (logits, _, _) in zip(rows, alone, strict=True):
            assert np.array_equal(row, logits[-1])
        # The last layer saw tokens 38 and 39 only.
        for sequence, (_, _, wide) in zip(sequences, alone, strict=True):
            seen = np.concatenate([wide[:-1].ravel(), wide[-1, 38:].ravel()])
            assert sequence.uses == seen.size and sequence.use_bits == seen.sum()
        assert engine.counters.use_bits == sum(s.use_bits for s in sequences)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_plain_width_is_what_it_was_without_a_router(routed, rng, bits):
    path, router = routed
    tokens = tokens_of(rng, 50)
    expected, _, wide = fed(d2moe.builtin_model(), tokens, bits, uniform=True)
    found, _, also = fed(path, tokens, bits, uniform=True)
    assert np.array_equal(found, expected) and (wide == bits).all() and (also == bits).all()
    if bits == 8 or (bits == 2 and router.base is None):  # the ends of the dial
        assert np.array_equal(fed(path, tokens, bits)[0], expected)


def test_widths_are_those_of_the_rule(rng):
    """The compiled rule and its NumPy twin against the formula in float64, on inputs far from any price."""
    from d2moe.kernels import reference

    n, k = 500, 3
    planes = np.sort(rng.normal(0, 2, (EXPERTS, 6)).astype(np.float32))[:, ::-1].copy()
    weight = rng.normal(0, 0.1, (EXPERTS, HIDDEN)).astype(np.float32)
    x, h = (rng.normal(0, s, (n, HIDDEN)).astype(np.float32) for s in (3.0, 1.0))
    ids = np.stack([rng.permutation(EXPERTS)[:k] for _ in range(n)]).astype(np.int32)
    gates = rng.dirichlet(np.ones(k), n).astype(np.float32)
    least, most = np.sort(rng.integers(2, 9, (2, n)), 0).astype(np.int32)
    price = rng.normal(0, 2, n).astype(np.float32)
    value = 1.5 * np.log(gates.astype(float)) - 0.5 * np.log(np.square(x.astype(float)).mean(-1))[:, None]
    value = (value + np.einsum("tkh,th->tk", weight[ids].astype(float), h))[..., None] + planes[ids]
    base = planes[:, 0] + rng.exponential(1, EXPERTS).astype(np.float32)
    first = value[..., 0] - planes[ids][..., 0] + base[ids]
    clear = np.minimum(np.abs(value - price[:, None, None]).min(-1), np.abs(first - price[:, None])) > 1e-4
    expected = np.clip(2 + (value >= price[:, None, None]).sum(-1), least[:, None], most[:, None])
    found = reference.WidthRouter(planes, weight, None, 1.5, -0.5).widths(x, h, ids, gates, least, most, price)
    assert clear.mean() > 0.99 and np.array_equal(found[clear], expected[clear])
    expected[(first < price[:, None]) & (least < most)[:, None]] = 0
    found = reference.WidthRouter(planes, weight, base, 1.5, -0.5).widths(x, h, ids, gates, least, most, price)
    assert np.array_equal(found[clear], expected[clear]) and 0.1 < (found == 0).mean() < 0.9


def test_the_compiled_rule_is_that_of_its_twin(routed, rng):
    """Nearly everywhere: NumPy adds in another order, and what is at a price may fall on its other side."""
    path, router = routed
    tokens = tokens_of(rng, 40)
    _, ids, wide = fed(path, tokens, 3.3)
    _, twin_ids, twin = fed(path, tokens, 3.3, kernels="reference")
    same = (ids == twin_ids).all(-1)
    assert same.mean() > 0.9 and (wide == twin)[same].mean() > 0.98
    assert 0.5 < wide.mean() < 8 and router.price(3.3) == pytest.approx(np.interp(3.3, router.dial[:, 0], router.dial[:, 1]))


def test_dials_that_cannot_be_had_are_refused(routed, tmp_path):
    path, _ = routed
    with Engine.load(d2moe.builtin_model(), EngineConfig(context=64)) as engine:
        if engine.router is None:
            with pytest.raises(RequestError, match=r"bits is 2\.7, expected a whole number.*d2moe route train"):
                engine.step([Chunk(engine.new_sequence(), [1], 2.7)])
    with Engine.load(path, EngineConfig(context=64)) as engine:
        for bits in (1.9, 8.1, float("nan"), True, "3"):
            with pytest.raises(RequestError, match="expected a number from 2 to 8"):
                engine.step([Chunk(engine.new_sequence(), [1], bits)])
        with pytest.raises(RequestError, match="one plain width"):
            engine.step([Chunk(engine.new_sequence(), [1], 2.7, "last", True)])
        assert Container.open(path).manifest.files["bit_router.safetensors"].optional
    with pytest.raises(ConfigError, match="whole number"):
        Engine.load(path, EngineConfig(bits=2.5, uniform=True, context=64))


def test_route_show_reports_every_choice(routed, capsys):
    path, _ = routed
    text = "Once upon a time, Lily"
    assert cli.main(["route", "show", str(path), text, "--bits", "3.3", "--dense-bits", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = [token["token"] for token in found["tokens"]]
    _, ids, wide = fed(path, np.array(tokens, np.int32), 3.3)
    assert "".join(token["text"] for token in found["tokens"]) == text and found["average_bits"] == pytest.approx(wide.mean())
    for t, token in enumerate(found["tokens"]):
        assert [layer["experts"] for layer in token["layers"]] == ids[:, t].tolist()
        assert [layer["bits"] for layer in token["layers"]] == wide[:, t].tolist()
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert cli.main(["route", "show", str(path), text, "--bits", "3.3", "--dense-bits", "5"]) == 0
    out = capsys.readouterr().out
    assert f"{wide.mean():.3f} bits on average" in out and f"{ids[0, 0, 0]:>3}:{wide[0, 0, 0] or '–'}" in out
    assert cli.main(["route", "show", str(path), ""]) == 1 and "the text is empty" in capsys.readouterr().err
    assert cli.main(["route", "remove", str(path)]) == 0 and read_router(Container.open(path)) is None
    assert cli.main(["route", "remove", str(path)]) == 1 and "no width router" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(("--bits", "2.7"), "2.7 bits"), (("--quality", "fast"), "2.5 bits"), (("--bits", "3", "--uniform"), "3 bits")],
)
def test_the_dial_on_the_command_line(arguments, shown, capsys):
    assert cli.main(["run", "builtin", "Once", "--max-tokens", "3", *arguments]) == 0
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bits", "uniform", "dense"), [(3, False, 6), (2.5, False, 6), (3, True, 5), (8, False, 8), (4, False, 7), (4, True, 6)]
)
def test_dense_weights_are_wider_where_the_width_router_spends_the_bits(bits, uniform, dense):
    with Engine.load(d2moe.builtin_model(), EngineConfig(bits=bits, uniform=uniform, context=64)) as engine:
        assert engine.dense_widths.bits == dense
