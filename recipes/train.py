"""Trains a small OLMoE from text, on CPU or GPU, and leaves a Hugging Face checkpoint. See README.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts import fast_experts, prepare_cpu
from text import batch, tokens_of
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ALL_EXPERTS_FUNCTIONS.register("fast", fast_experts)


def model_of(args: argparse.Namespace, vocabulary: int) -> OlmoeForCausalLM:
    """A fresh model. Weights start at 1 / sqrt(hidden), and `down_proj` larger by sqrt(experts / top): the gate's weights
    of the chosen experts add to about top / experts at first, which would mute them."""
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        num_experts=args.experts,
        num_experts_per_tok=args.top,
        max_position_embeddings=2048,
        initializer_range=args.hidden**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=False,
    )
    config._experts_implementation = "fast"
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
        model.lm_head.weight.mul_(0.5)
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_((args.experts / args.top) ** 0.5)
    return model


def balance_loss(router_logits: tuple[Tensor, ...], top: int) -> Tensor:
    """Mean over layers of experts * sum_e (share of choices of e) * (mean probability of e): 1 where all are equal
    (Switch Transformer, equations 4 to 6, with the shares of a top-k router)."""
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        chances = logits.float().softmax(-1)
        chosen = chances.topk(top).indices
        shares = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        losses.append(experts * (shares * chances.mean(0)).sum())
    return torch.stack(losses).mean()


def losses_of(model: OlmoeForCausalLM, windows: np.ndarray, device: str, amp: bool) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy in nats, balance loss) of windows [n, context + 1]."""
    rows = torch.from_numpy(windows).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        out = model.model(rows[:, :-1], output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state)
    loss = cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    return loss, balance_loss(out.router_logits, model.config.num_experts_per_tok)


def rate(progress: float) -> float:
    """Share of the learning rate at `progress` of the run: up over its first 2 %, then straight down to 0."""
    return min(0.05 + progress / 0.02, (1 - progress) / 0.98, 1.0)


class Run:
    """A run and what its checkpoint holds: weights, optimiser, steps made and seconds spent."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = Path(args.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer_file = Path(args.tokenizer) / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.train, self.held_out = tokens_of(
            [Path(p) for p in args.text], self.tokenizer, self.folder, args.documents, args.seed
        )
        torch.manual_seed(args.seed)
        self.model = model_of(args, self.tokenizer.get_vocab_size()).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def tokens(self) -> int:
        return self.step * self.args.batch * self.args.context

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its tokens, or of its minutes, whichever is further."""
        shares = []
        if self.args.tokens:
            shares.append(self.tokens / self.args.tokens)
        if self.args.minutes:
            shares.append(self.seconds / 60 / self.args.minutes)
        return min(max(shares), 1.0)

    def _fixed(self) -> dict[str, Any]:
        names = ("hidden", "inner", "layers", "heads", "experts", "top", "context", "batch", "seed")
        return {name: getattr(self.args, name) for name in names}

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for name, value in self._fixed().items():
            if state["fixed"][name] != value:
                was = f"{self.checkpoint} was begun with --{name} {state['fixed'][name]}, not {value}"
                raise SystemExit(f"{was}; give that, or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Writes the checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "fixed": self._fixed(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def held_out_loss(self) -> float:
        """Nats a token on the first windows of the documents kept back."""
        args = self.args
        windows = min((len(self.held_out) - 1) // args.context, args.held_out)
        if windows < 1:
            return float("nan")
        starts = range(0, windows * args.context, args.context)
        rows = np.stack([self.held_out[s : s + args.context + 1].astype(np.int64) for s in starts])
        losses = []
        with torch.no_grad():
            for at in range(0, windows, args.batch):
                part = rows[at : at + args.batch]
                losses += [float(losses_of(self.model, part, self.device, args.bf16)[0])] * len(part)
        return sum(losses) / windows

    def make_step(self) -> float:
        """One update; returns the training loss in nats a token."""
        args = self.args
        began = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = args.rate * rate(self.progress)
        rows = batch(self.train, self.step, args.batch, args.context, args.seed)
        loss, balance = losses_of(self.model, rows, self.device, args.bf16)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        self.step += 1
        self.seconds += time.monotonic() - began
        return value

    def export(self) -> Path:
        """Writes the Hugging Face form: safetensors in bfloat16, config.json and the tokenizer's files."""
        folder = self.folder / "model"
        weights = {name: value.to(torch.bfloat16) for name, value in self.model.state_dict().items()}
        exported = OlmoeForCausalLM(self.model.config).to(torch.bfloat16)
        exported.load_state_dict(weights)
        exported.config.use_cache = True
        exported.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = Path(self.args.tokenizer) / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes())
        return folder


class Stop:
    """Ctrl-C and termination end the run after the step it is in; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(run: Run, stop: Stop) -> None:
    """Steps until the run's tokens or minutes are used, with a line of progress and a checkpoint now and then."""
    args = run.args
    total = sum(p.numel() for p in run.model.parameters())
    print(f"{total:,} weights, {len(run.train):,} training tokens, {run.device}, from step {run.step}", flush=True)
    said = saved = time.monotonic()
    losses: list[float] = []
    tokens, seconds = run.tokens, run.seconds
    while run.progress < 1 and not stop.asked:
        losses.append(run.make_step())
        now = time.monotonic()
        if now - said >= args.say_every:
            speed = (run.tokens - tokens) / max(run.seconds - seconds, 1e-9)
            left = run.seconds / run.progress * (1 - run.progress) / 60 if run.progress else float("inf")
            loss = sum(losses) / len(losses)
            print(
                f"{100 * run.progress:5.1f} %  step {run.step:,}  {run.tokens / 1e6:.2f} M tokens  loss {loss:.3f}  "
                f"{speed:,.0f} tokens/s  {left:.0f} min left",
                flush=True,
            )
            said, losses = now, []
            tokens, seconds = run.tokens, run.seconds
        if now - saved >= 60 * args.save_every:
            print(f"         held-out loss {run.held_out_loss():.4f}", flush=True)
            run.save()
            saved = time.monotonic()
    run.save()


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text", nargs="+", required=True, help="text files (.zst too), documents separated by <|endoftext|>; one named twice counts twice"
    )
    parser.add_argument("--documents", type=int, help="take at most so many documents, drawn at random [default: all]")
    parser.add_argument("--tokenizer", required=True, help="folder with a tokenizer.json")
    parser.add_argument("--out", required=True, help="folder for tokens, checkpoint and model; a run that is there goes on")
    parser.add_argument("--minutes", type=float, help="end after so many minutes of training")
    parser.add_argument("--tokens", type=float, help="end after so many tokens")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=256, help="width of an expert")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=8, help="experts per token")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda [default: cuda where there is one]")
    parser.add_argument("--held-out", type=int, default=64, help="windows of held-out text to score")
    parser.add_argument("--say-every", type=float, default=30, help="seconds between lines of progress")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints")
    args = parser.parse_args(given)
    if not args.minutes and not args.tokens:
        parser.error("say how long to train: --minutes or --tokens")
    for path in [*map(Path, args.text), Path(args.tokenizer) / "tokenizer.json"]:
        if not path.is_file():
            parser.error(f"{path} does not exist; --text takes files, --tokenizer a folder with a tokenizer.json")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    prepare_cpu()
    run, stop = Run(args), Stop()
    train(run, stop)
    if run.progress < 1:
        print(f"stopped at step {run.step}; the same command goes on from {run.checkpoint}")
        return 130
    folder = run.export()
    facts = {"tokens": run.tokens, "minutes": run.seconds / 60, "held_out_loss": run.held_out_loss()}
    (run.folder / "result.json").write_text(json.dumps(facts, indent=1))
    print(f"{run.tokens:,} tokens in {run.seconds / 60:.1f} minutes, held-out loss {facts['held_out_loss']:.4f}\n{folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
