"""`d2moe trace` and `simulate`: policies compared on recorded routing, without a model's weights."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2moe.cli.shared import CONTEXT_OPTION, engine_options, model_path, open_model, print_json, print_table, read_text
from d2moe.errors import ConfigError, RequestError
from d2moe.policy import POLICIES
from d2moe.types import BASE_BITS, MAX_BITS


@click.command()
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--out", required=True, type=click.Path(dir_okay=False, writable=True), help="The .npz file to write.")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False), help="Record the routing of this text, a token at a time."
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of the text fed at once first.")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens after them, or tokens to generate.")
@click.option("--synthetic", is_flag=True, help="Make a trace up with the statistics of real models; MODEL may be a config.json.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences of a made-up trace.")
@click.option("--zipf", type=float, default=1.0, show_default=True, help="Exponent of its experts' popularity.")
@click.option(
    "--again", type=click.FloatRange(0, 0.99), default=0.48, show_default=True, help="Share of experts that come again on its next token."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of a made-up trace, or of sampling.")
@engine_options
@CONTEXT_OPTION
def trace(
    model: str | None,
    prompt: str | None,
    out: str,
    text: str | None,
    prompt_tokens: int,
    tokens: int,
    synthetic: bool,
    sequences: int,
    zipf: float,
    again: float,
    seed: int,
    **engine: Any,
) -> None:
    """Record which experts MODEL chooses, for `d2moe simulate` and for policies that learn.

    Of a text with --text, of the answer to PROMPT without. The file is a NumPy .npz with the expert ids, widths and gates of every
    layer and token, and what the next layers' routers would have said.

    \b
    Examples:
      d2moe trace builtin --text wiki.txt --out wiki.npz
      d2moe trace olmoe.d2moe "Once upon a time" --tokens 500 --memory 2GB --out story.npz
      d2moe trace Qwen3-30B-A3B/config.json --synthetic --sequences 4 --out made-up.npz
    """
    path = model_path(model)
    if not Path(out).absolute().parent.is_dir():  # said now, not after the run
        raise ConfigError(f"{out} cannot be written: there is no folder {Path(out).absolute().parent}")
    if not synthetic and (sequences, zipf, again) != (1, 1.0, 0.48):
        raise click.UsageError("--sequences, --zipf and --again are for made-up traces; add --synthetic")
    if synthetic:
        found = _made_up(path, prompt_tokens, tokens, sequences, int(engine["bits"] or 4), seed, zipf, again)
    else:
        if (text is None) == (prompt is None):
            raise click.UsageError("give either --text or a PROMPT to record, or --synthetic")
        found = _recorded(path, prompt, None if text is None else read_text(text), prompt_tokens, tokens, seed, engine)
    found.save(out)
    same, chance = found.overlap()
    click.echo(
        f"{out}: {found.steps} steps, {found.tokens} tokens, {found.meta.layers} layers; {100 * same:.0f} % of a token's experts "
        f"were those of the token before, by chance {100 * chance:.0f} %"
    )


def _recorded(
    path: Path, prompt: str | None, text: str | None, prompt_tokens: int, tokens: int, seed: int, engine: dict[str, Any]
) -> Any:
    from d2moe.cli.progress import Bar
    from d2moe.runtime.request import Chunk

    with contextlib.closing(open_model(path, engine)) as m, Bar("recording", light=True) as bar:
        real: Any = m.engine
        recorder = real.record()
        if text is None:
            values: dict[str, Any] = {"temperature": 1.0, "seed": seed, "ignore_eos": True, "max_tokens": tokens}
            for number, _ in enumerate(m.stream(prompt or "", **values)):
                bar(number + 1, tokens)
            return recorder.trace()
        ids = m.tokenizer.encode(text)[: prompt_tokens + tokens]
        if len(ids) < 2:
            raise RequestError("the text has fewer than two tokens; give a longer one")
        ids = ids[: m.engine.context]
        first = min(prompt_tokens, len(ids) - 1)
        sequence, bits, uniform = m.engine.new_sequence(), m.engine.config.bits, m.engine.config.uniform
        try:
            m.engine.step([Chunk(sequence, ids[:first], bits, "last", uniform)])
            for number, token in enumerate(ids[first:]):
                m.engine.step([Chunk(sequence, [token], bits, "last", uniform)])
                bar(number + 1, len(ids) - first)
        finally:
            sequence.free()
        return recorder.trace()


def _made_up(path: Path, prompt_tokens: int, tokens: int, sequences: int, bits: int, seed: int, zipf: float, again: float) -> Any:
    from d2moe.simulate.facts import model_facts
    from d2moe.simulate.synthetic import Statistics, synthetic_trace

    meta = model_facts(path).meta()
    return synthetic_trace(
        meta,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        sequences=sequences,
        bits=bits,
        seed=seed,
        statistics=Statistics(zipf=zipf, again=again),
    )


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(exists=True, dir_okay=False))
@click.option("--policy", "policies", multiple=True, type=click.Choice(list(POLICIES)), help="May be given several times [default: all].")
@click.option(
    "--memory", "memories", multiple=True, metavar="SIZE|SHARE%", help="For experts, as 2GB, or as 50% of all at the trace's width. "
    "May be given several times [default: 25%, 35%, 50%, 75%]."
)
@click.option("--bits", type=click.IntRange(BASE_BITS, MAX_BITS), help="Width instead of the trace's own.")
@click.option("--device", help="A profile's file, or bandwidths as io=1.2GB,memory=30GB [default: this device's profile with --model].")
@click.option("--model", help="Model of the trace: a converted model, or a config.json for --device by bandwidths.")
@click.option("--learn", type=click.Path(exists=True, dir_okay=False), help="A trace that policies may learn from beforehand.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line instead of a table.")
def simulate(
    trace_file: str,
    policies: tuple[str, ...],
    memories: tuple[str, ...],
    bits: int | None,
    device: str | None,
    model: str | None,
    learn: str | None,
    as_json: bool,
) -> None:
    """What TRACE would take with other policies, budgets and devices.

    The engine's own decisions and bookkeeping on a modelled device: hit rate and bytes are those that the engine would have.
    hit is the share of the wanted bytes that was in memory, bound the least time that reading or computing alone would take over
    the time taken.

    \b
    Examples:
      d2moe simulate wiki.npz --device io=1.2GB,memory=30GB --model builtin --memory 50% --policy hebf --policy lru
      d2moe simulate wiki.npz --device laptop.json --bits 3 --json
    """
    from d2moe.cli.progress import Bar
    from d2moe.policy.policy import policy_class
    from d2moe.policy.trace import Trace
    from d2moe.runtime.config import show_bytes
    from d2moe.simulate.simulate import simulate as run

    found = Trace.load(trace_file)
    taught = Trace.load(learn) if learn else None
    target = _device(device, model)
    width = bits or int(found.arrays["bits"].max(initial=BASE_BITS))
    m = found.meta
    whole = m.layers * m.experts * (m.base_bytes + (width - BASE_BITS) * m.plane_bytes)
    budgets = [_budget(text, whole) for text in memories or ("25%", "35%", "50%", "75%")]
    names = policies or tuple(POLICIES)
    learners = [name for name in names if policy_class(name).learns]
    if taught and not learners:
        raise ConfigError(f"--learn: {', '.join(names)} learns nothing beforehand; leave it out")
    same = found.overlap()
    tables: list[list[tuple[str, ...]]] = []
    with Bar("simulating") as bar:
        for memory in budgets:
            tables.append([])
            for name in names:
                result = run(found, target, memory, policy=name, bits=bits, learn=taught if name in learners else None)
                bar(len(names) * (len(tables) - 1) + len(tables[-1]) + 1, len(budgets) * len(names), name)
                tables[-1].append(_row(result))
                if as_json:
                    print_json({"trace": trace_file, "device": target.name, "again": same[0], "chance": same[1], **asdict(result)})
    if as_json:
        return
    again = f"{100 * same[0]:.0f} % of a token's experts come again on the next, by chance {100 * same[1]:.0f} %"
    click.echo(f"{trace_file} on {target.name}; {again}\n")
    head = ("policy", "tokens/s", "prompt", "hit", "per token", "stall", "bound", "bits", "foreseen")
    for memory, rows in zip(budgets, tables, strict=True):
        print_table(f"{show_bytes(memory)} for experts, {100 * memory / whole:.0f} % of all at {width} bits", rows, head)


def _row(result: Any) -> tuple[str, ...]:
    from d2moe.runtime.config import show_bytes

    right = result.forecast_right
    return (
        result.policy,
        f"{result.tokens_per_s:.2f}",
        f"{result.prompt_tokens_per_s:.1f}",
        f"{100 * result.hit_rate:.1f} %",
        show_bytes(result.bytes_per_token),
        f"{100 * result.stall_share:.0f} %",
        f"{100 * result.bound_share:.0f} %",
        f"{result.average_bits:.2f}",
        "-" if right is None else f"{100 * right:.0f} %",
    )


def _device(text: str | None, model: str | None) -> Any:
    from d2moe.container import Container
    from d2moe.evaluate.profile import known_profile
    from d2moe.runtime.config import EngineConfig
    from d2moe.simulate.device import Device, parse_rates
    from d2moe.simulate.facts import model_facts

    if text is None:
        if model is None:
            raise click.UsageError("give --device, or --model with a profile of this device")
        found = known_profile(Container.open(model_path(model)))
        if found is None:
            raise ConfigError(f'this device has no profile with {model}; run "d2moe profile {model}", or give --device')
        return found
    if parse_rates(text) is None:
        if not Path(text).is_file():
            raise ConfigError(f"device is {text!r}, expected a profile's file, or two bandwidths as io=1.2GB,memory=30GB")
        return Device.load(Path(text))
    if model is None:
        raise click.UsageError("--device by bandwidths needs --model, to know what is computed beside the experts")
    facts = model_facts(model_path(model))
    return facts.device(text, facts.dense_widths(EngineConfig(bits=BASE_BITS)))


def _budget(text: str, whole: int) -> int:
    from d2moe.runtime.config import parse_bytes

    if text.endswith("%"):
        with contextlib.suppress(ValueError):
            if 0 < (share := float(text[:-1])) <= 1000:
                return int(share / 100 * whole)
        raise ConfigError(f"memory is {text!r}, expected a share above 0%")
    return parse_bytes(text, "memory")
