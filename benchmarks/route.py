"""Ways to choose widths in one frame: perplexity and KL divergence over average bits, on a converted model in torch.

    python benchmarks/route.py MODEL --calibration c4.txt wiki.txt --text wikitext2.txt stories.txt --out route.jsonl --plot route.svg

Float activations, dense weights at 8 bits, windows of 256 tokens, KL from the model at 8 bits; a dropped expert counts 0 bits. Every
method's threshold is set on the text that is scored, so that averages are equal; what the dial of the calibration text gives there is
reported beside it ("dial_bits"). One JSON line for each point in --out, a table in Markdown at the end. `--read` makes table and
picture of lines that are there.

    python benchmarks/route.py MODEL --cost

is what the router costs: its bytes, its operations, and the time of a step with a router that always answers 3 bits against plain 3
bits, in one engine by turns.

  uniform    one width (whole averages only)
  router     the width router in MODEL, as "d2moe route train" wrote it
  measured   a router measured here on the calibration text
  no hidden  the same without the hidden state
  no zero    the same without leaving experts out
  layers     no hidden, and one row of values for all experts of a layer
  static     widths by expert alone, by measured importance (EdgeMoE, arXiv 2308.14352)
  gate       by squared gate alone, all layers alike
  mass       two widths by the gate mass ranked before an expert (HOBBIT, arXiv 2411.01433): 3 and 2 bits, from 3 on
             4 and 2, from 5 on 8 and 4
  priority   the largest gates of each layer first, under its budget (MoNE, arXiv 2407.19985), 2 to 4 bits, from 5 on
             5 to 8; looks at the whole batch
  fewer      4 bits, 8 from 5 on, and the light experts left out by layer sensitivity times squared gate (AdapMoE, arXiv 2408.10284)
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import d2moe
from d2moe.container import BitRouter, Container, read_router, write_router
from d2moe.convert.bit_router import (
    Rule,
    batches,
    bits_at,
    calibrate,
    divergence,
    full_width,
    looking,
    measure,
    plain,
    prices_of,
    run,
    windows_of,
)
from d2moe.convert.torch_decoder import Choose, TorchDecoder
from d2moe.models import shape_from_config
from d2moe.runtime.request import Chunk
from d2moe.runtime.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a small lighthouse on a rock in the northern sea. Every evening the keeper climbed to the lamp. "
METHODS = ("uniform", "router", "measured", "no hidden", "no zero", "layers", "static", "gate", "mass", "priority", "fewer")
NAMES = {
    "router": "router of the file",
    "static": "by expert (EdgeMoE)",
    "gate": "squared gate alone",
    "mass": "gate mass (HOBBIT)",
    "priority": "priority (MoNE)",
    "fewer": "fewer experts (AdapMoE)",
}
Choice = Callable[[int], Choose]
"""What chooses the widths in each layer with experts."""


class Frame:
    """The model, and the rules that need calibration text."""

    def __init__(self, model: str, calibration: list[str], tokens: int):
        container = Container.open(Path(model))
        self.decoder, tokenizer = TorchDecoder(container), Tokenizer.load(Path(model))
        self.encode = lambda path: tokenizer.encode(Path(path).read_text(encoding="utf-8"))
        windows, _, _ = windows_of({path: self.encode(path) for path in calibration}, tokens)
        measured = measure(self.decoder, windows, lambda done, total: None)
        layers = len(self.decoder.moe_layers)
        rule = measured.rule()
        self.rules = {"measured": rule, "layers": measured.rule(prior=math.inf, hidden=False)}
        chosen = [ids.flatten() for _, _, ids, _ in routed_on(self.decoder, windows)]
        uses = torch.stack([torch.bincount(ids, minlength=container.experts) for ids in chosen])
        importance = (measured.mass / uses.clamp(min=1)).clamp(min=1e-30).log()[..., None]  # mean squared gate
        widths_alone = measured.rule(hidden=False).planes
        never = torch.full_like(widths_alone[..., :1], math.inf)  # the others leave no expert out
        self.rules["static"] = Rule(torch.cat([never, widths_alone[..., 1:] + importance], -1), torch.zeros(layers, 2))
        self.rules["no zero"] = Rule(torch.cat([never, rule.planes[..., 1:]], -1), rule.powers, rule.weight)
        self.rules["no hidden"] = measured.rule(hidden=False)
        steps = torch.cat([never, (-math.log(4.0) * torch.arange(6.0)).expand_as(widths_alone[..., 1:])], -1)
        self.rules["gate"] = Rule(steps.contiguous(), torch.tensor([[2.0, 0.0]]).repeat(layers, 1))
        self.dials = {"measured": calibrate(self.decoder, rule, windows, lambda done, total: None)}
        written = read_router(container)
        if written is not None:
            weight = None if written.weight is None else torch.tensor(written.weight)
            base = torch.full(written.planes.shape[:2], math.inf) if written.base is None else torch.tensor(written.base)
            planes = torch.cat([base[..., None], torch.tensor(written.planes)], -1)
            self.rules["router"] = Rule(planes, torch.tensor(written.powers), weight)
            self.dials["router"] = written.dial

    def price(self, method: str, bits: float) -> float | None:
        """What the dial of the calibration text says."""
        if method not in self.dials:
            return None
        return self.rules[method].router(self.dials[method]).price(bits)


def routed_on(decoder: TorchDecoder, windows: Tensor) -> list[tuple[Tensor, ...]]:
    """x, h, experts and gates of all tokens, for each layer with experts."""
    seen: list[tuple[Tensor, ...]] = []
    for part in batches(windows):
        run(decoder, decoder.embed(part), lambda m: looking(seen))
    layers = len(decoder.moe_layers)
    return [tuple(torch.cat(part) for part in zip(*seen[m::layers], strict=True)) for m in range(layers)]


class Text:
    """A text that methods are scored on."""

    def __init__(self, frame: Frame, path: str, tokens: int):
        self.frame, self.decoder = frame, frame.decoder
        ids = torch.tensor(frame.encode(path)[:tokens])
        self.windows = ids[: len(ids) // 256 * 256].view(-1, 256)
        self.teacher = [full_width(self.decoder, part) for part in batches(self.windows)]
        self.routed = routed_on(self.decoder, self.windows)
        self.values = {
            name: torch.cat([rule.values(m, *routed).flatten(0, 1) for m, routed in enumerate(self.routed)])
            for name, rule in frame.rules.items()
        }

    def dial_bits(self, method: str, bits: float) -> float | None:
        """The average on this text at the price that the calibration text gave the dial."""
        price = self.frame.price(method, bits)
        return None if price is None else bits_at(self.values[method], price)

    def choice(self, method: str, bits: float) -> Choice | None:
        """None where the method cannot give this average."""
        if method == "uniform":
            return plain(int(bits)) if bits == int(bits) else None
        if method in self.values:
            return self.frame.rules[method].at(float(prices_of(self.values[method], np.array([bits]))[0]))
        if method == "router":  # a file without one
            return None
        return {"mass": self.mass, "priority": self.priority, "fewer": self.fewer}[method](bits)

    def mass(self, bits: float) -> Choice | None:
        high, low = (8, 4) if bits >= 5 else (4, 2) if bits >= 3 else (3, 2)
        before = torch.cat([gates.cumsum(-1) - gates for *_, gates in self.routed])
        share = (bits - low) / (high - low)
        if share < 1 / before.shape[1]:  # the first expert always has the high width
            return None
        limit = quantile(before.flatten(), min(1.0, share))
        return lambda m: lambda x, h, ids, gates: low + (high - low) * (gates.cumsum(-1) - gates <= limit).long()

    def priority(self, bits: float) -> Choice:
        """Shares of the widths with the most entropy for this mean, as in the paper; the largest gates take the most."""
        widths = torch.arange(5.0, 9) if bits >= 5 else torch.arange(2.0, 5)
        low, high = -50.0, 50.0
        for _ in range(100):
            tilt = (low + high) / 2
            share = torch.softmax(tilt * widths, 0)
            low, high = (tilt, high) if float(share @ widths) < bits else (low, tilt)
        shares = share.flip(0).cumsum(0)

        def choose(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
            order = gates.flatten().argsort(descending=True)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            rank = torch.searchsorted(shares[:-1], (place + 0.5) / len(order))
            return (int(widths[-1]) - rank).view_as(ids)

        return lambda m: choose

    def fewer(self, bits: float) -> Choice:
        width = 8 if bits >= 5 else 4
        first = self.frame.rules["layers"].planes[:, 0, 1].exp()  # what a layer loses by the first step of width
        value = torch.cat([(s * gates.square()).flatten() for s, (*_, gates) in zip(first, self.routed, strict=True)])
        limit = quantile(value, 1 - bits / width)

        def layer(m: int) -> Choose:
            def choose(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
                kept = first[m] * gates.square() >= limit
                kept[:, 0] = True
                gates *= kept / (gates * kept).sum(-1, keepdim=True)  # those that stay share the whole weight
                return width * kept.long()

            return choose

        return layer

    def score(self, choice: Choice) -> tuple[float, float, float]:
        """(average bits, KL in nats a token, perplexity of the tokens after the first of each window)."""
        taken, kl, nll = [], 0.0, 0.0

        def noted(m: int) -> Choose:
            inner = choice(m)

            def choose(*routed: Tensor) -> Tensor:
                taken.append(inner(*routed))
                return taken[-1]

            return choose

        for part, p in zip(batches(self.windows), self.teacher, strict=True):
            q = self.decoder.log_probabilities(run(self.decoder, self.decoder.embed(part), noted))
            kl += float(divergence(p, q).sum())
            nll -= float(q[:, :-1].gather(-1, part[:, 1:, None]).sum())
        bits = float(torch.cat([widths.flatten() for widths in taken]).float().mean())
        return bits, kl / self.windows.numel(), math.exp(nll / self.windows[:, 1:].numel())


def quantile(values: Tensor, share: float) -> float:
    """Of any number of values, which torch's own does not take."""
    return float(values.sort()[0][min(len(values) - 1, max(0, int(share * len(values))))])


def measure_all(options: argparse.Namespace) -> list[dict]:
    frame, rows, begun, done = Frame(options.model, options.calibration, options.calibration_tokens), [], time.time(), 0
    points = len(options.text) * len(options.bits) * len(options.methods)
    with Path(options.out).open("w", encoding="utf-8") if options.out else sys.stderr as out:
        for path in options.text:
            text = Text(frame, path, options.tokens)
            for bits in options.bits:
                for method in options.methods:
                    choice = text.choice(method, bits)
                    done += 1
                    if choice is None:
                        continue
                    found, kl, perplexity = text.score(choice)
                    row = {"text": Path(path).name, "method": method, "dial": bits, "bits": found, "kl": kl, "perplexity": perplexity}
                    rows.append(row | {"dial_bits": text.dial_bits(method, bits)})
                    print(json.dumps(rows[-1]), file=out, flush=True)
                    left = (time.time() - begun) / done * (points - done)
                    print(f"{done} of {points}, {left:.0f} s left", end="\r", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: KL in 10^-2 nats and perplexity by text, average and method."""
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    lines = ["| text, bits | " + " | ".join(NAMES.get(m, m) for m in methods) + " | dial |", "|---" * (len(methods) + 2) + "|"]
    for text, bits in dict.fromkeys((row["text"], row["dial"]) for row in rows):
        mine = {row["method"]: row for row in rows if (row["text"], row["dial"]) == (text, bits)}
        cells = [f"{100 * mine[m]['kl']:.3g}, {mine[m]['perplexity']:.2f}" if m in mine else "" for m in methods]
        dial = next((f"{mine[m]['dial_bits']:.2f}" for m in ("router", "measured") if m in mine and mine[m]["dial_bits"]), "")
        lines.append(f"| {text}, {bits:g} | " + " | ".join(cells) + f" | {dial} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """KL over the average that came out, a panel for each text."""
    from matplotlib import pyplot

    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False, sharey=True)
    for panel, text in zip(panels[0], texts, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points = sorted((row["bits"], row["kl"]) for row in rows if (row["text"], row["method"]) == (text, method))
            style = {"linewidth": 2.5, "color": "black"} if method == "router" else {"linewidth": 1}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=NAMES.get(method, method), **style)
        panel.set(title=text, xlabel="bits on average", yscale="log")
    panels[0][0].set_ylabel("KL divergence from 8 bits, nats a token")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def cost(model: Path, repeats: int = 200) -> None:
    """Prints one JSON line for a router without and one with a part of the hidden state."""
    container = Container.open(model)
    shape = shape_from_config(container.config, str(model))
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    expert = 3 * shape.hidden * shape.expert_inner
    others = shape.layers * attention + 3 * shape.hidden * (shape.layers - len(shape.moe_layers)) * shape.dense_inner
    active = others + len(shape.moe_layers) * (shape.top_k * expert + shape.hidden * (shape.experts + 3 * shape.shared_inner))
    active += shape.hidden * shape.vocab
    rng = np.random.default_rng(0)
    layers, experts, hidden = len(shape.moe_layers), shape.experts, shape.hidden
    for with_hidden in (False, True):
        planes = np.tile(np.float32([9, -9, -9, -9, -9, -9]), (layers, experts, 1))
        weight = rng.normal(0, 1e-3, (layers, experts, hidden)).astype(np.float32) if with_hidden else None
        powers = np.tile(np.float32([0.1, 0.1]), (layers, 1))
        base = np.full((layers, experts), 9, np.float32)
        router = BitRouter(planes, powers, weight, np.float32([[2.5, 0], [3.5, 0]]), base)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "model.d2moe"
            shutil.copytree(model.resolve(), copy, copy_function=lambda source, target: Path(target).symlink_to(source))
            write_router(copy, router, {"method": "always 3 bits"})
            found = {tokens: _slower(copy, tokens, repeats) for tokens in (1, 64)}
        pairs = layers * shape.top_k
        line = {
            "router": "gate and hidden state" if with_hidden else "gate",
            "bytes_percent": 100 * router.n_bytes / sum(facts.n_bytes for facts in container.manifest.files.values()),
            "multiplications_percent": 100 * (layers * hidden * with_hidden * shape.top_k + layers * hidden + 2 * pairs) / active,
            "decode_percent": found[1],
            "prompt_of_64_percent": found[64],
        }
        print(json.dumps(line))


def _slower(model: Path, tokens: int, repeats: int) -> float:
    """Per cent that a step of `tokens` takes longer with the router, both by turns; the tenth percentiles, which other work on the machine
    disturbs least."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with d2moe.load(model, bits=3, threads=1) as loaded:
        engine = loaded.engine
        prompt = (loaded.tokenizer.encode(PROMPT) * 64)[:64]
        for repeat in range(repeats if tokens > 1 else repeats // 16):
            for uniform in (repeat % 2 == 0, repeat % 2 == 1):
                sequence = engine.new_sequence()
                engine.step([Chunk(sequence, prompt, 3, "last", uniform)])
                for at in range(0 if tokens > 1 else 32):
                    began = time.perf_counter()
                    engine.step([Chunk(sequence, prompt[at : at + 1], 3, "last", uniform)])
                    seconds[uniform].append(time.perf_counter() - began)
                if tokens > 1:
                    began = time.perf_counter()
                    engine.step([Chunk(sequence, prompt[:tokens], 3, "last", uniform)])
                    seconds[uniform].append(time.perf_counter() - began)
                sequence.free()
    routed, plain_ones = (float(np.quantile(seconds[uniform], 0.1)) for uniform in (False, True))
    return 100 * (routed / plain_ones - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", nargs="+")
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 7])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--out", help="file for the JSON lines [default: standard error]")
    parser.add_argument("--read", nargs="+", help="files that --out wrote, instead of measuring")
    parser.add_argument("--plot", help="picture of the curves, .svg or .png; needs matplotlib")
    parser.add_argument("--cost", action="store_true", help="what the router costs, and nothing else")
    options = parser.parse_args()
    if options.cost and options.model:
        cost(Path(options.model))
        return
    if options.read:
        rows = [json.loads(line) for path in options.read for line in Path(path).read_text(encoding="utf-8").splitlines()]
    elif options.model and options.calibration and options.text:
        rows = measure_all(options)
    else:
        parser.error("give MODEL, --calibration and --text, or --read")
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
