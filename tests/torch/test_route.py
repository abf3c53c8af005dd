"""Training of the width router: the torch decoder is the engine, what is measured is what it says, and training can be resumed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the test extra: torch")
pytest.importorskip("transformers", reason="needs the test extra: transformers")

from checkpoints import FAMILIES, tiny_checkpoint  # noqa: E402

from d2moe.container import Container, read_router  # noqa: E402
from d2moe.container.verify import verify  # noqa: E402
from d2moe.convert import bit_router, route_training  # noqa: E402
from d2moe.convert.bit_router import Learner, calibrate, measure, plain, run, windows_of  # noqa: E402
from d2moe.convert.pipeline import convert  # noqa: E402
from d2moe.convert.torch_decoder import TorchDecoder  # noqa: E402
from d2moe.errors import RequestError  # noqa: E402
from d2moe.runtime.config import EngineConfig  # noqa: E402
from d2moe.runtime.engine import Engine  # noqa: E402
from d2moe.runtime.request import Chunk  # noqa: E402


def silent(done, total):
    assert 0 <= done <= total


@pytest.fixture(scope="module", params=FAMILIES)
def each_family(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made("qwen2_moe", tmp_path_factory.mktemp("one"))  # with shared experts


def made(family, folder):
    """(container, texts of 300 symbols by name); sharp routers, so that near ties are rare."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"{family}: seed {seed}")
    tiny_checkpoint(family, folder / "hf", seed=seed, decisive=True)
    rng = np.random.default_rng(seed)
    return convert(folder / "hf", folder / "model.d2moe"), {name: rng.integers(0, 300, 1500).tolist() for name in ("one.txt", "two.txt")}


def test_the_torch_decoder_is_the_engine(each_family):
    path, texts = each_family
    decoder, tokens = TorchDecoder(Container.open(path)), np.array(texts["one.txt"][:40], np.int32)
    for bits in (2, 5, 8):
        with Engine.load(path, EngineConfig(kernels="reference-float", dense_bits=8, context=64)) as engine:
            logits = engine.step([Chunk(engine.new_sequence(), tokens, bits, "all")])
        x = run(decoder, decoder.embed(torch.from_numpy(tokens)[None].long()), plain(bits))
        found, expected = decoder.log_probabilities(x)[0], torch.log_softmax(torch.from_numpy(logits), -1)
        # The middle token: one at a near tie of a router may go elsewhere, and those after it see it.
        assert (found - expected).abs().max(-1)[0].median() < 1e-3


def test_training_writes_a_router_whose_dial_holds(model):
    path, texts = model
    trained = route_training.train(path, texts, tokens=2560)
    container = Container.open(path)
    router = read_router(container)
    assert router is not None and trained.method == "measured" and not verify(container).problems
    assert router.worth is not None and (router.worth >= 0).all() and (np.diff(router.worth[..., 1:]) <= 0).all()
    assert [name for name, *_ in trained.table] == ["uniform 3", "uniform 4", "measured 2.5", "measured 3", "measured 4"]
    tokens = np.random.default_rng().integers(0, 300, 250).astype(np.int32)
    for bits in (2.5, 3.25, 6):
        with Engine.load(path, EngineConfig(bits=bits, dense_bits=8, context=256)) as engine:
            sequence = engine.new_sequence()
            engine.step([Chunk(sequence, tokens, bits, "all")])
            # Random tokens are their own domain; 250 of them scatter.
            assert abs(sequence.average_bits - bits) < 0.3


def test_measured_values_are_differences_of_outputs(model):
    path, texts = model
    decoder = TorchDecoder(Container.open(path))
    windows, *_ = windows_of(texts, 2560)
    found = measure(decoder, windows, silent)
    used = found.mass > 0
    assert (found.sense > 0).all() and (found.difference[used] > 0).all()
    assert (found.difference[used][:, 0] > found.difference[used][:, 3]).all(), "two bits are further off than five"
    # What all planes beyond SENSE_BITS saved in a layer is what the layer lost without them.
    at = bit_router.STEPS.tolist().index(bit_router.SENSE_BITS)
    lost = found.sense * (found.mass * found.difference[..., at]).sum(-1) / windows.numel()
    steps = found.steps(prior=0.0) * found.mass[..., None] / windows.numel() * found.sense[:, None, None]
    assert torch.allclose(steps[..., at:].sum((1, 2)), lost, rtol=1e-3)
    assert torch.allclose(found.worth(windows.numel()).sum((1, 2)), steps.sum((1, 2)), rtol=0.2)
    rule = found.rule()
    assert (rule.planes.diff(dim=-1) <= 0).all() and torch.isfinite(rule.planes).all()
    rows = found.rule(prior=float("inf"), hidden=False).planes
    assert (rows == rows[:, :1]).all() and not (rule.planes == rule.planes[:, :1]).all()
    # An expert that the text never used is as good as its layer's middle one.
    found.mass[0, 0], found.difference[0, 0] = 0, 0
    unused, mean = (found.rule(prior, hidden=False).planes[0, 0] for prior in (bit_router.PRIOR, float("inf")))
    assert torch.allclose(unused, mean, atol=1e-4)
    dial = calibrate(decoder, rule, windows, silent)
    widths = [w.flatten() for w in chosen(decoder, windows, rule.at(float(np.interp(3.0, *dial.T))))]
    assert torch.cat(widths).float().mean() == pytest.approx(3.0, abs=0.05)


def test_a_tokens_own_error_is_predicted_but_not_by_its_domain():
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    rng = torch.Generator().manual_seed(seed)
    hidden, experts, windows = 24, 4, 64
    v, domain = torch.nn.functional.normalize(torch.randn(2, hidden, generator=rng))
    h = torch.randn(windows, 256, hidden, generator=rng) + 2 * torch.randn(windows, 1, 1, generator=rng) * domain
    h = h.reshape(-1, hidden)
    ids = torch.stack([torch.randperm(experts, generator=rng)[:2] for _ in range(len(h))])
    gates = torch.rand(ids.shape, generator=rng)
    own = (h @ (v - (v @ domain) * domain) + 0.5 * h @ domain)[:, None] + ids + torch.randn(ids.shape, generator=rng)
    weight, factor = torch.zeros(experts, hidden), torch.ones(experts)
    bit_router._dependence(own, h, ids, gates, weight, factor)
    assert ((weight @ v) > 0.5 * (1 - float(v @ domain) ** 2)).all()
    assert (weight @ domain).abs().max() < 0.15, "half of that of the domains would be there without the pull"
    for e in range(experts):
        token, rank = (ids == e).nonzero(as_tuple=True)
        expected = (gates[token, rank] * (h[token] @ weight[e]).exp()).sum() / gates[token, rank].sum()
        assert torch.allclose(factor[e], expected)


def chosen(decoder, windows, choice):
    seen = []
    run(decoder, decoder.embed(windows), lambda m: lambda *routed: seen.append(choice(m)(*routed)) or seen[-1])
    return seen


def test_learning_goes_on_where_it_was(model):
    path, texts = model
    decoder = TorchDecoder(Container.open(path))
    windows, *_ = windows_of(texts, 2560)
    start = measure(decoder, windows, silent).rule()
    dial = calibrate(decoder, start, windows, silent)
    prices = float(dial[-1, 1]), float(dial[0, 1])
    spoiled = bit_router.Rule(start.planes + torch.linspace(-2, 2, 3)[: len(start.planes), None, None], start.powers * 0.5, start.weight)
    teacher = lambda part: bit_router.full_width(decoder, part)  # noqa: E731
    whole, half = (Learner(decoder, spoiled, prices, 4, seed=3) for _ in range(2))
    for _ in range(4):
        whole.step(windows[:4], teacher)
    for _ in range(2):
        half.step(windows[:4], teacher)
    again = Learner(decoder, start, prices, 4, seed=9)
    again.state = half.state
    for _ in range(2):
        again.step(windows[:4], teacher)
    for a, b, c in zip(vars(whole.rule).values(), vars(again.rule).values(), vars(spoiled).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5) and (c is None or not torch.equal(a, c))  # sums of threads


def test_interrupted_training_is_resumed(model, monkeypatch):
    path, texts = model
    real, calls = route_training.measure, []
    monkeypatch.setattr(route_training, "measure", lambda *a: calls.append(1) or real(*a))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(route_training, "calibrate", interrupt)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        route_training.train(path, texts, tokens=2560)
    monkeypatch.undo()
    monkeypatch.setattr(route_training, "measure", lambda *a: calls.append(2) or real(*a))
    route_training.train(path, texts, tokens=2560)
    assert calls == [1] and not path.with_name(path.name + ".router.partial").exists()


def test_windows_are_spread_over_each_text_and_kept_apart():
    rng = np.random.default_rng()
    texts = {name: rng.integers(0, 300, length).tolist() for name, length in (("long.txt", 40 * 256 + 9), ("short.txt", 3 * 256))}
    measured, held, learned = (part.tolist() for part in windows_of(texts, 16 * 256, learn=24))
    assert (len(measured), len(held), len(learned)) == (6 + 3, 2, 12 + 3)
    assert measured[:6] == [texts["long.txt"][at * 256 : at * 256 + 256] for at in (0, 5, 10, 20, 25, 30)]
    assert not [w for w in held if w in measured or w in learned]
    with pytest.raises(RequestError, match=r"tiny\.txt: has 255 tokens, expected at least 256"):
        windows_of(texts | {"tiny.txt": [1] * 255}, 4096)
    with pytest.raises(RequestError, match=r"short\.txt 768; expected one of at least 1,024"):
        windows_of({"short.txt": texts["short.txt"]}, 4096)


def test_the_switch_of_a_step_is_what_the_loss_changes_by(model):
    """The straight-through gradient of a step's value is that of a mixture of the widths beside the choice."""
    path, texts = model
    decoder = TorchDecoder(Container.open(path))
    windows, *_ = windows_of(texts, 2560)
    start = measure(decoder, windows, silent).rule()
    tokens = decoder.embed(windows[:1])
    seen = []
    decoder.layer(decoder.moe_layers[0], tokens, bit_router.looking(seen))
    flat, h, ids, gates = seen[0]
    values = start.values(0, flat, h, ids, gates)
    price = values.median()
    learner, taken = Learner(decoder, start, (0.0, 0.0), 1), []
    y = learner._layer(decoder.moe_layers[0], tokens, price.reshape(1, 1, 1), taken)
    widths = start.at(float(price))(0)(flat, h, ids, gates)
    assert torch.equal(taken[0].round().long(), widths.sum(-1)) and len(widths.unique()) > 3
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    # By hand: each pair moves by gate * (next width - this one) * sigmoid' / temperature, for the two steps beside its width.
    expected = torch.zeros_like(start.planes[0])
    levels = bit_router.STEPS.tolist()
    for t, k in np.ndindex(*ids.shape):
        at, e = levels.index(widths[t, k]), int(ids[t, k])
        for step in (at - 1, at):
            if 0 <= step < 7:
                s = torch.sigmoid((values[t, k, step] - price) / bit_router.TEMPERATURE)
                a, b = (decoder.each_expert(decoder.moe_layers[0], h[t : t + 1], ids[t, k].view(1, 1), w.view(1, 1))
                        for w in bit_router.STEPS[step : step + 2])  # fmt: skip
                along = ((b - a) @ direction.reshape(-1, decoder.shape.hidden)[t])[0, 0]
                expected[e, step] += gates[t, k] * along * s * (1 - s) / bit_router.TEMPERATURE
    assert torch.allclose(learner._parts["planes"].grad[0], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
