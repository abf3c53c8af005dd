"""Ways to choose widths in one frame: perplexity and KL divergence over average bits, on a converted model in torch.

    python benchmarks/route.py MODEL --calibration c4.txt wiki.txt --text wikitext2.txt stories.txt

Float activations, dense weights at 8 bits, windows of 256 tokens; a dropped expert counts 0 bits. Thresholds are set on the
calibration text. One JSON line for each point.

  uniform    one width (whole averages only)
  measured   `d2moe route train`
  layers     the same with one row of values for all experts of a layer
  static     widths by expert alone, by measured importance (EdgeMoE, arXiv 2308.14352)
  gate       by squared gate alone, all layers alike
  mass       two widths by the gate mass ranked before an expert (HOBBIT, arXiv 2411.01433), 4 and 2 bits, below 3 on average 3 and 2
  priority   the largest gates of each layer first, under its budget (MoNE, arXiv 2407.19985); looks at the whole batch
  fewer      4 bits, and the light experts left out by layer sensitivity times squared gate (AdapMoE, arXiv 2408.10284)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from d2moe.container import Container
from d2moe.convert.bit_router import Rule, batches, calibrate, divergence, looking, measure, plain, run, windows_of
from d2moe.convert.torch_decoder import TorchDecoder
from d2moe.runtime.tokenizer import Tokenizer


class Frame:
    def __init__(self, model: str, calibration: list[str], tokens: int):
        container = Container.open(model)
        self.decoder, tokenizer = TorchDecoder(container), Tokenizer.load(Path(model))
        self.encode = lambda path: tokenizer.encode(Path(path).read_text(encoding="utf-8"))
        self.windows, _ = windows_of([self.encode(path) for path in calibration], tokens)
        self.measured = measure(self.decoder, self.windows, lambda done, total: None)
        self.gates: list[Tensor] = []  # of each layer with experts, on the calibration text
        seen: list = []
        for part in batches(self.windows):
            run(self.decoder, self.decoder.embed(part), lambda m: looking(seen))
        layers = len(self.decoder.moe_layers)
        self.gates = [torch.cat([routed[3] for routed in seen[m::layers]]) for m in range(layers)]
        self.rules = {"measured": self.measured.rule(), "layers": self.measured.rule(prior=math.inf)}
        experts = self.rules["measured"]
        chosen = [torch.cat([routed[2] for routed in seen[m::layers]]).flatten() for m in range(layers)]
        uses = torch.stack([torch.bincount(ids, minlength=container.experts) for ids in chosen])
        importance = (self.measured.mass / uses.clamp(min=1)).clamp(min=1e-30).log()[..., None]  # mean squared gate
        self.rules["static"] = Rule(experts.planes + importance, torch.zeros(layers, 2))
        steps = (-math.log(4.0) * torch.arange(6.0)).expand_as(experts.planes)
        self.rules["gate"] = Rule(steps.contiguous(), torch.tensor([[2.0, 0.0]]).repeat(layers, 1))
        self.dials = {name: calibrate(self.decoder, rule, self.windows, lambda done, total: None) for name, rule in self.rules.items()}

    def choice(self, method: str, bits: float):
        """What chooses the widths in each layer, None where the method cannot give this average."""
        if method == "uniform":
            return plain(int(bits)) if bits == int(bits) else None
        if method in self.rules:
            rule = self.rules[method]
            return rule.at(rule.router(self.dials[method]).price(bits))
        return {"mass": self.mass, "priority": self.priority, "fewer": self.fewer}[method](bits)

    def mass(self, bits: float):
        high = 4 if bits >= 3 else 3
        before = torch.cat([gates.cumsum(-1) - gates for gates in self.gates])
        share = (bits - 2) / (high - 2)
        if share < 1 / before.shape[1]:  # the first expert always has the high width
            return None
        limit = before.flatten().quantile(min(1.0, share))
        return lambda m: lambda x, h, ids, gates: 2 + (high - 2) * (gates.cumsum(-1) - gates <= limit).long()

    def priority(self, bits: float):
        """Shares of 2, 3 and 4 bits with the most entropy for this mean, as in the paper; the largest gates take the most."""
        low, high = -50.0, 50.0
        for _ in range(100):
            tilt = (low + high) / 2
            share = torch.softmax(tilt * torch.tensor([0.0, 1.0, 2.0]), 0)
            low, high = (tilt, high) if float(share @ torch.tensor([2.0, 3.0, 4.0])) < bits else (low, tilt)

        def choose(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
            order = gates.flatten().argsort(descending=True)
            widths = torch.full_like(order, 2)
            first, second = int(float(share[2]) * len(order) + 0.5), int(float(share[1] + share[2]) * len(order) + 0.5)
            widths[order[:second]], widths[order[:first]] = 3, 4
            return widths.view_as(ids)

        return lambda m: choose

    def fewer(self, bits: float):
        first = self.rules["layers"].planes[:, 0, 0].exp()  # what a layer loses by the first step of width
        value = torch.cat([(s * gates.square()).flatten() for s, gates in zip(first, self.gates, strict=True)])
        limit = value.quantile(1 - bits / 4)

        def layer(m: int):
            def choose(x: Tensor, h: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
                kept = first[m] * gates.square() >= limit
                kept[:, 0] = True
                gates *= kept / (gates * kept).sum(-1, keepdim=True)  # those that stay share the whole weight
                return 4 * kept.long()

            return choose

        return layer

    def score(self, windows: Tensor, choice, teacher: list[Tensor]) -> tuple[float, float, float]:
        """(average bits, KL in nats a token, perplexity of the tokens after the first of each window)."""
        taken, kl, nll = [], 0.0, 0.0

        def noted(m: int):
            inner = choice(m)

            def choose(*routed: Tensor) -> Tensor:
                taken.append(inner(*routed))
                return taken[-1]

            return choose

        for part, p in zip(batches(windows), teacher, strict=True):
            q = self.decoder.log_probabilities(run(self.decoder, self.decoder.embed(part), noted))
            kl += float(divergence(p, q).sum())
            nll -= float(q[:, :-1].gather(-1, part[:, 1:, None]).sum())
        bits = float(torch.cat([widths.flatten() for widths in taken]).float().mean())
        return bits, kl / windows.numel(), math.exp(nll / windows[:, 1:].numel())


METHODS = ("uniform", "measured", "layers", "static", "gate", "mass", "priority", "fewer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--bits", nargs="+", type=float, default=[2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    options = parser.parse_args()
    frame, begun = Frame(options.model, options.calibration, options.calibration_tokens), time.time()
    points = len(options.text) * len(options.bits) * len(options.methods)
    done = 0
    for path in options.text:
        ids = torch.tensor(frame.encode(path)[: options.tokens])
        windows = ids[: len(ids) // 256 * 256].view(-1, 256)
        teacher = [frame.decoder.log_probabilities(run(frame.decoder, frame.decoder.embed(part), plain(8))) for part in batches(windows)]
        for bits in options.bits:
            for method in options.methods:
                choice = frame.choice(method, bits)
                done += 1
                if choice is None:
                    continue
                found, kl, perplexity = frame.score(windows, choice, teacher)
                row = {"text": Path(path).name, "method": method, "dial": bits, "bits": found, "kl": kl, "perplexity": perplexity}
                print(json.dumps(row), flush=True)
                left = (time.time() - begun) / done * (points - done)
                print(f"{done} of {points}, {left:.0f} s left", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
