"""Models for benchmarks/serve.py, and what the bytes of a run allow: how many times the tokens a batch can bring."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2moe.convert.synthetic import OLMOE_1B_7B
from d2moe.policy.trace import Trace
from d2moe.runtime.memory import kv_bytes
from d2moe.runtime.request import Request
from d2moe.runtime.sampling import SamplingParams
from d2moe.runtime.scheduler import Job, Scheduler
from d2moe.simulate.device import guess
from d2moe.simulate.facts import model_facts
from d2moe.simulate.simulate import simulate
from d2moe.types import WIDTHS

SMALL = {"vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 12, "max_position_embeddings": 4096, "eos_token_id": 0}
MIXTRAL = {"model_type": "mixtral", "num_attention_heads": 16, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
LLAMA = {**MIXTRAL, "model_type": "llama", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": OLMOE_1B_7B | SMALL | {"intermediate_size": 512},
    "mixtral": MIXTRAL | SMALL | {"intermediate_size": 3584, "num_local_experts": 8, "num_experts_per_tok": 2},
    "half": MIXTRAL | SMALL | {"intermediate_size": 3584, "num_local_experts": 8, "num_experts_per_tok": 4},
    "dense": LLAMA | SMALL | {"intermediate_size": 14336},
}
"""Small ones of the families' proportions; "half" has every other expert chosen, of "dense" the feed-forward block is the one expert."""
NO_DEVICE = guess(1e9, 1e10, expert_bytes=dict.fromkeys(WIDTHS, 0), dense_bytes=0, expert_weights=0)
"""Bytes are counted, not time."""



def bounds(model: Any, count: int, tokens: int, slots: int) -> dict[str, dict[str, Any]]:
    """How many times the tokens a second of one answer `count` at once can bring, by the bytes of the same run: those that a step
    reads from memory; and from storage, with `slots` bytes for experts, what our policy reads for one answer over the least that
    any could read for `count` (Belady's rule over the same routing)."""
    engine = model.engine
    traces = [routing(model, some, tokens) for some in (1, count)]
    dense, kv = model_facts(engine.container.path).kept_bytes(engine.dense_widths), kv_bytes(engine.shape, engine.config.kv, 1)
    touched = [memory_bytes(trace, dense, kv) for trace in traces]
    out: dict[str, dict[str, Any]] = {"in memory": {"bytes_a_step": touched, "bound": count * touched[0] / touched[1]}, "streamed": {}}
    for policy in ("belady", "hebf"):
        read = [simulate(trace, NO_DEVICE, slots, policy=policy) for trace in traces]
        out["streamed"][policy] = {"bytes_a_token": [r.bytes_per_token for r in read], "hit_rate": [r.hit_rate for r in read]}
    out["streamed"]["bound"] = out["streamed"]["hebf"]["bytes_a_token"][0] / out["streamed"]["belady"]["bytes_a_token"][1]
    return out


def bodies(count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Requests of one round of `together`."""
    rng = np.random.default_rng(seed)
    return [{"prompt": rng.integers(1, 4096, 8).tolist(), "max_tokens": tokens, "temperature": 1.0, "seed": i} for i in range(count)]


def routing(model: Any, count: int, tokens: int) -> Trace:
    """What the steps of one round route, its prompts left out."""
    engine = model.engine
    scheduler = Scheduler(engine)
    for body in bodies(count, tokens, 1):
        params = SamplingParams.make({**{k: v for k, v in body.items() if k != "prompt"}, "ignore_eos": True})
        made = Request(body["prompt"], params, model.tokenizer, vocab=engine.shape.vocab, context=engine.context, eos_ids=())
        scheduler.add(Job(made, engine.config.bits, lambda _: None, reuse=False))
    while len(scheduler.running) < count or any(job.due > 1 for job in scheduler.running):
        scheduler.step()
    recorder = engine.record(0)
    while len(scheduler.running) == count:
        scheduler.step()
    engine.stop_recording()
    scheduler.abandon(RuntimeError("enough"))
    return recorder.trace()


def memory_bytes(trace: Trace, dense: int, kv: int) -> float:
    """Bytes that a step must read from memory: all dense weights, each expert that any of its tokens wants, keys and values."""
    m, total = trace.meta, 0
    prefix = np.array([0, 0, *(m.base_bytes + i * m.plane_bytes for i in range(7))])
    for step in trace:
        for call in step.calls:
            widest = np.zeros(m.experts, np.int32)
            np.maximum.at(widest, call.ids.reshape(-1), call.bits.reshape(-1))
            total += int(prefix[widest].sum())
    return dense + (total + kv * int(trace.arrays["position"].sum())) / trace.steps
