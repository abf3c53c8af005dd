"""The engine against transformers running on the same dequantised weights, for every family."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the test extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")

from checkpoints import FAMILIES, tiny_checkpoint  # noqa: E402

from d2moe.container import PROJECTIONS, Container  # noqa: E402
from d2moe.convert.pipeline import convert  # noqa: E402
from d2moe.convert.torch_decoder import matrix  # noqa: E402
from d2moe.models import family, shape_from_config  # noqa: E402
from d2moe.runtime.config import EngineConfig  # noqa: E402
from d2moe.runtime.engine import Engine  # noqa: E402
from d2moe.runtime.request import Chunk  # noqa: E402


@pytest.fixture(
    scope="module", params=[(f, d) for f in FAMILIES for d in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def case(request, tmp_path_factory):
    """(container path, transformers model, decisive) of one family; the model's weights are replaced per width.

    Decisive weights (sharp routers, strong norms) find wrong wiring; transformers' own initialisation is what the bound
    for integer activations is meant for: with sharp random routers one rounding step can send a token elsewhere.
    """
    name, decisive = request.param
    folder = tmp_path_factory.mktemp(name)
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"{name}: seed {seed}")
    _, model = tiny_checkpoint(name, folder / "hf", seed=seed, decisive=decisive)
    path = convert(folder / "hf", folder / "model.d2moe")
    return path, model, decisive


def dequantised(path, model, bits, dense_bits):
    """The model with the container's own weights: experts at `bits`, all others at `dense_bits`, or their default for None."""
    container = Container.open(path)
    shape = shape_from_config(container.config, str(path))
    names = family(shape.model_type).source_names(shape)
    record = container.record
    shapes = {p: (record.matrix(p).rows, record.matrix(p).cols, record.rotation_of(p)) for p in PROJECTIONS}
    widths = EngineConfig(bits=bits, dense_bits=dense_bits).dense_widths(own_embedding=container.has("head"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for canonical, source in names.dense.items():
        if not source.names:
            continue
        target = next(n for n in source.names if n in state)
        if not source.quantized:  # conversion moves factors between norms and columns
            state[target] = torch.from_numpy(container.read_dense(canonical).copy()).reshape(source.shape)
            continue
        width, turned = widths.of(canonical), record.rotation_of(canonical)
        state[target] = matrix(container.read_nested(canonical, width), width, *source.shape, turned)
    for layer in container.moe_layers:
        if names.is_dense:
            parts = container.read_expert(layer, 0, bits)
            for target, part in zip(names.expert(layer, 0)[0], PROJECTIONS, strict=True):
                state[target] = matrix(parts[part], bits, *shapes[part])
            continue
        prefix = next(k for k in state if k.startswith(f"model.layers.{layer}.") and k.endswith("experts.gate_up_proj"))
        for expert in range(container.experts):
            parts = container.read_expert(layer, expert, bits)
            w = {p: matrix(parts[p], bits, *shapes[p]) for p in PROJECTIONS}
            state[prefix][expert] = torch.cat([w["gate"], w["up"]])
            state[prefix.replace("gate_up_proj", "down_proj")][expert] = w["down"]
    original = {k: v.clone() for k, v in model.state_dict().items()}
    return state, original


def answers(model, state, tokens):
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()


def per_token(found, expected):
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize(("bits", "dense_bits"), [(2, 8), (3, None), (4, 8), (8, 6)])
def test_logits_agree_with_transformers(case, bits, dense_bits):
    path, model, decisive = case
    state, original = dequantised(path, model, bits, dense_bits)
    rng = np.random.default_rng()
    tokens = rng.integers(0, 300, 300 if bits == 3 else 50).astype(np.int32)
    try:
        expected = answers(model, state, tokens)
    finally:
        model.load_state_dict(original)

    with Engine.load(
        path, EngineConfig(kernels="reference-float", bits=bits, dense_bits=dense_bits, context=320)
    ) as engine:
        # The middle token here, too: two floats that differ in the last bit can decide a near tie of a router.
        assert np.median(per_token(fed(engine, tokens, bits), expected)) <= 1e-3
        assert np.median(per_token(fed(engine, tokens[:10], bits, one_by_one=True), expected[:10])) <= 1e-3

    with Engine.load(path, EngineConfig(bits=bits, dense_bits=dense_bits, context=320)) as engine:
        found = fed(engine, tokens, bits)
        if not decisive:
            # The middle token: one in some dozens sits at a near tie and is routed to another expert.
            assert np.median(per_token(found, expected)) <= 4e-2
        # Every shorter prompt, and feeding token by token, gives the same bits, so the bound holds for them, too.
        for n in (1, 2, 33, int(rng.integers(3, 50))):
            assert np.array_equal(fed(engine, tokens[:n], bits), found[:n]), n
        assert np.array_equal(fed(engine, tokens, bits, one_by_one=True), found)


def fed(engine, tokens, bits, one_by_one=False):
    """Logits of all tokens of a fresh sequence."""
    sequence = engine.new_sequence()
    pieces = np.split(tokens, len(tokens)) if one_by_one else [tokens]
    rows = [engine.step([Chunk(sequence, piece, bits, "all")]) for piece in pieces]
    sequence.free()
    return np.concatenate(rows)


@pytest.mark.parametrize(("dense_bits", "kv"), [(8, "f16"), (3, "q8")])
def test_reference_with_integer_activations_is_the_native_engine(case, dense_bits, kv):
    """On many short texts: a float that lands on the other side of a rounding step moves one activation by one step of 127,
    and its key and value are seen by all later tokens of that text, so one long text would say little."""
    path, _, _ = case
    rng = np.random.default_rng()
    results = {}
    texts = rng.integers(0, 50, (16, 4)).astype(np.int32)
    for kernels in ("reference", "native"):
        with Engine.load(path, EngineConfig(kernels=kernels, context=64, dense_bits=dense_bits, kv=kv)) as engine:
            results[kernels] = np.concatenate([fed(engine, text, 3) for text in texts])
    # Keys and values in bytes are rounded once more, and coarser.
    assert np.median(per_token(results["native"], results["reference"])) < (5e-3 if kv == "f16" else 2e-2)
