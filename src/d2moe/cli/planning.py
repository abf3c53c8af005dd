"""`d2moe profile` and `plan`: what this device does, and what any device would."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2moe.cli.shared import dense_text, engine_options, model_path, open_model, print_json, print_table
from d2moe.errors import ConfigError
from d2moe.types import BASE_BITS, MAX_BITS

PROFILE_CONTEXT = 256


@click.command()
@click.argument("model", required=False)
@click.option("--again", is_flag=True, help="Measure although there is a profile.")
@click.option("--json", "as_json", is_flag=True, help="The whole profile as one JSON object, as --device takes it from a file.")
@engine_options
def profile(model: str | None, again: bool, as_json: bool, **engine: Any) -> None:
    """Measure this device with MODEL, once, and show what was found.

    Reads through the engine's own reader, past the page cache and through it, over block sizes and queue depths; the
    arithmetic of an expert and of all else over widths; the memory's bandwidth. The profile is kept in the cache folder
    ($XDG_CACHE_HOME or ~/.cache, d2moe/devices) and used by run, bench, simulate and plan; for another model, CPU,
    file system or number of threads there is another. Close other programs while it runs, about half a minute.

    \b
    Examples:
      d2moe profile olmoe.d2moe --memory 2GB
      d2moe profile olmoe.d2moe --json > laptop.json
    """
    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.evaluate.profile import known_profile, profile_path, profile_tokens
    from d2moe.evaluate.profile import profile as measure
    from d2moe.simulate.device import FORMAT

    path = model_path(model)
    container = Container.open(path)
    threads = engine["threads"]
    found = None if again else known_profile(container, threads)
    fresh = found is None
    if found is None:
        with contextlib.closing(open_model(path, {**engine, "context": PROFILE_CONTEXT})) as m, Bar("measuring", light=True) as bar:
            real: Any = m.engine
            found = measure(real, profile_tokens(m.tokenizer.encode), bar)
        found.save(profile_path(container, threads))
    if as_json:
        print_json({"format": FORMAT, **asdict(found)})
        return
    rows = [(k, v) for k, v in _profile_rows(found)]
    print_table(f"{found.name} with {path.name}", rows)
    for name, rates in found.facts["reads"].items():
        if rates:
            depths = list(next(iter(rates.values())))
            table = [(f"{int(size) / 1e3:,.0f} kB", *(f"{r / 1e9:.2f}" for r in by.values())) for size, by in rates.items()]
            print_table(f"reads, {name}, GB/s", table, ("block", *(f"{d} in flight" for d in depths)))
    times = [(str(b), f"{1e6 * t[0]:.0f}", f"{1e6 * t[1]:.1f}") for b, t in found.expert_s.items()]
    print_table("one expert, microseconds", times, ("bits", "one token", "each further token"))
    click.echo(f"{'kept in' if fresh else 'measured before; --again measures anew:'} {profile_path(container, threads)}", err=True)


def _profile_rows(found: Any) -> list[tuple[str, str]]:
    chosen = found.facts["chosen"]
    reads = "past the page cache" if chosen["direct"] else "through the page cache"
    return [
        ("CPU", f"{found.facts['cpu']}, {found.facts['threads']} threads, kernels {found.facts['kernels']}"),
        ("storage", found.facts["tier"]),
        ("chosen", f"{reads}, {chosen['read_depth']} reads in flight: {chosen['why']}"),
        ("reading ahead", _preloading(found)),
        ("memory bandwidth", f"{found.memory_bytes_per_s / 1e9:.1f} GB/s"),
        ("all but experts, one token", f"{1e3 * found.dense_s[0]:.2f} ms at {dense_text(found.facts)}"),
        ("one decision", f"{1e6 * found.decide_s:.0f} microseconds"),
        ("measured", found.facts["measured"]),
    ]


def _preloading(found: Any) -> str:
    if (measured := found.facts.get("preload")) is None:
        return "not measured; --again does"
    if not measured["read_bytes"]:
        return "off: everything is in memory at this budget"
    on = "on" if found.facts["chosen"]["policy"] == "preload" else "off"
    return f"{on}: base planes ahead give {measured['gain']:.2f} times the speed, {100 * measured['right']:.0f} % of the guesses were right"


@click.command()
@click.argument("model")
@click.option("--device", help="A profile's file, or bandwidths as io=1.2GB,memory=30GB [default: this device's profile].")
@click.option("--memory", "memories", multiple=True, metavar="SIZE", help="Of the whole process; may be given several times.")
@click.option(
    "--bits", "widths", multiple=True, type=click.IntRange(BASE_BITS, MAX_BITS), help="May be given several times [default: 2, 3, 4, 6, 8]."
)
@click.option("--target", type=click.FloatRange(min=0, min_open=True), metavar="TOKENS/S", help="Say what reaches this speed.")
@click.option("--trace", "trace_file", type=click.Path(exists=True, dir_okay=False), help="Routing of a real run [default: made up].")
@click.option(
    "--optimize", is_flag=True, help="Search the widths, by token and expert, that lose least and reach --target or --target-bytes."
)
@click.option("--target-bytes", metavar="SIZE", help="With --optimize: read at most so much a token, as 40MB.")
@click.option("--write", is_flag=True, help="With --optimize: put the width router made from measured losses into MODEL, which has none.")
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens a sequence may hold.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [default: all CPUs this process may use].")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per budget and width instead of a table.")
def plan(
    model: str,
    device: str | None,
    memories: tuple[str, ...],
    widths: tuple[int, ...],
    target: float | None,
    trace_file: str | None,
    optimize: bool,
    target_bytes: str | None,
    write: bool,
    context: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say which budget and width would give which speed, before anything is downloaded.

    MODEL is a converted model, or the config.json of one that is not at hand. Speeds are simulated for one sequence, with routing that
    is made up with the statistics of real models unless --trace has some; "-" does not fit. A device known by two bandwidths is a guess.

    With --optimize it says which --bits to give instead: the widest average whose widths, spent by the model's width router if it looks at
    gates alone, else by one made from the losses that calibration measured, reach the target.

    \b
    Examples:
      d2moe plan Qwen3-30B-A3B/config.json --device io=3.5GB,memory=60GB
      d2moe plan olmoe.d2moe --memory 2GB --memory 4GB --target 10
      d2moe plan olmoe.d2moe --memory 2GB --optimize --target 10 --trace wiki.npz
    """
    from d2moe.cli.progress import Bar
    from d2moe.container import Container
    from d2moe.evaluate.profile import known_profile
    from d2moe.policy.trace import Trace
    from d2moe.runtime.config import EngineConfig, parse_bytes, show_bytes
    from d2moe.runtime.memory import usable_cpus
    from d2moe.simulate.facts import model_facts
    from d2moe.simulate.plan import default_budgets
    from d2moe.simulate.plan import plan as run

    if (target_bytes or write) and not optimize:
        raise click.UsageError("--target-bytes and --write are for --optimize; add it")
    if optimize and (trace_file is None or (target is None and target_bytes is None) or widths):
        raise click.UsageError("--optimize needs --trace and --target or --target-bytes, and finds --bits itself")
    path = model_path(model)
    facts = model_facts(path)
    context = min(context, facts.shape.context)
    stored = None
    if device is None:
        stored = known_profile(Container.open(path), threads) if (path / "experts").is_dir() else None
        if stored is None:
            raise ConfigError(f'this device has no profile with {path}; run "d2moe profile {path}", or give --device')
    trace = None
    if trace_file:
        trace = Trace.load(trace_file)
        trace.check(len(facts.shape.moe_layers), facts.shape.experts, facts.shape.top_k, str(path))
    cpus = threads or usable_cpus()
    budgets = [parse_bytes(m) for m in memories] or default_budgets(facts, context, cpus)
    if optimize:
        assert trace is not None
        most = float(parse_bytes(target_bytes, "target-bytes") if target_bytes else "inf")
        limits = {"tokens_per_s": target or 0.0, "bytes_per_token": most}
        target_device = stored or facts.device(str(device), facts.dense_widths(EngineConfig(bits=BASE_BITS)))
        _optimize(path, facts, target_device, budgets, trace, limits, context, cpus, write, as_json)
        return
    bits = widths or (2, 3, 4, 6, 8)
    with Bar("planning") as bar:
        found = run(
            facts,
            lambda dense: stored or facts.device(str(device), dense),
            budgets,
            bits,
            context=context,
            threads=cpus,
            trace=trace,
            progress=bar,
        )
    if as_json:
        for choice in found:
            print_json(asdict(choice))
    else:
        speed = [["-" if c.tokens_per_s is None else f"{c.tokens_per_s:.2f}" for c in found if c.memory_bytes == m] for m in budgets]
        rows = [(show_bytes(m), *cells) for m, cells in zip(budgets, speed, strict=True)]
        print_table(f"{facts.name}: tokens/s by memory of the whole process and width", rows, ("memory", *(f"{b} bits" for b in bits)))
    if target is not None:
        click.echo(_advice([c for c in found if (c.tokens_per_s or 0) >= target], target, show_bytes))


def _advice(fits: list[Any], target: float, show: Any) -> str:
    if not fits:
        return f"nothing of this reaches {target:g} tokens/s; allow more memory or fewer bits"
    best = min(fits, key=lambda c: (-c.bits, c.memory_bytes))
    return f"{target:g} tokens/s with the least loss: {best.bits} bits in {show(best.memory_bytes)}, {best.tokens_per_s:.2f} tokens/s"


def _optimize(
    path: Path, facts: Any, device: Any, budgets: list[int], trace: Any, limits: dict[str, Any], context: int, threads: int,
    write: bool, as_json: bool,
) -> None:  # fmt: skip
    """The widest average and the widest plain width that reach the limits, by budget of the whole process."""
    from d2moe.cli.progress import Bar
    from d2moe.container import Container, read_router, write_router
    from d2moe.errors import MemoryBudgetError
    from d2moe.runtime.config import EngineConfig, show_bytes
    from d2moe.simulate.optimize import from_losses, gates_alone, optimise
    from d2moe.simulate.plan import experts_bytes

    container = Container.open(path)
    router = read_router(container)
    if write and router is not None:
        raise ConfigError(f'{path} has a width router, which is used; "d2moe route remove {path}" takes it out, to --write another')
    without = router is None
    if router is None or not gates_alone(router):
        router = from_losses(container, trace)
    rows, done = [], 0
    with Bar("searching") as bar:
        for number, budget in enumerate(budgets):

            def advance(number: int = number) -> None:
                nonlocal done
                done += 1
                bar(min(done, 12 * number + 11), 12 * len(budgets))

            try:
                memory = experts_bytes(facts, EngineConfig(memory_bytes=budget, bits=MAX_BITS, context=context), threads)
                best, plain = optimise(trace, router, device, memory, kept=facts.kept, progress=advance, **limits)
            except MemoryBudgetError:
                best = plain = None
            rows.append((show_bytes(budget), *_outcome(best), *_outcome(plain)[:1], *_outcome(plain)[3:]))
            if as_json:
                found = {name: None if o is None else asdict(o) for name, o in (("routed", best), ("plain", plain))}
                print_json({"memory_bytes": budget, **limits, **found})
    if not as_json:
        head = ("memory", "--bits", "tokens/s", "read per token", "loss", "plain width", "its loss")
        print_table(f"{facts.name}: the widest average that reaches the target, beside one width for all", rows, head)
    if write:
        about = {"method": "losses", "teacher": "calibration", "tokens": trace.tokens}
        write_router(path, router, about)
        click.echo(f"{path}: the width router from measured losses was written, so --bits takes any number", err=True)
    elif without:
        click.echo(f"{path} has no width router; --write puts the one from measured losses into it, then --bits takes any number", err=True)


def _outcome(found: Any) -> tuple[str, str, str, str]:
    from d2moe.runtime.config import show_bytes

    if found is None:
        return ("-", "-", "-", "-")
    return (f"{found.bits:g}", f"{found.tokens_per_s:.2f}", show_bytes(found.bytes_per_token), f"{found.loss:.4g}")
