"""Quality per byte beside other quantisers: makes docs/quality.md and a file of raw results.

    python benchmarks/quality.py --shared ../shared --peer-python PEER/bin/python

Every contestant's weights are put into one float32 model as they come back from their code, so only weights are compared; ours
are also run by the engine, with activations in int8. Scored are perplexity and the mean Kullback-Leibler divergence from the float32
model, which scatters far less and does not reward luck. Bytes are all weights as stored: codes, scales, zeros, float32 norms and
routers, and in ours the padding of records.

Needs torch. HQQ needs `pip install '.[benchmark]'`, llama.cpp's types `gguf` here and PEER, an environment with `llama-cpp-python`
and `numpy`. What is not installed is left out, and the page says so. About an hour on two cores; a run that was
stopped goes on with --resume.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import quality_llama as llama
import quality_quantisers as peers
import torch
from quality_model import Model, Text, Weights, is_expert, matrices, read, read_text
from quality_page import CUT, page
from tokenizers import Tokenizer

from d2moe.container import Container, read_router
from d2moe.container.trim import Trimmer
from d2moe.convert.calibration import Calibration
from d2moe.convert.pipeline import convert
from d2moe.convert.route_training import train
from d2moe.convert.source import open_source
from d2moe.convert.torch_decoder import matrix
from d2moe.errors import D2MoeError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk
from d2moe.types import SPARED_BY_TOKEN, DenseWidths

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quality.md"
BITS = (2, 3, 4, 5, 6, 8)
SIZES = (2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Average widths of experts to which ours is cut."""
DIALS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0)
ROUTER_TOKENS = 65536
"""To measure what each plane is worth with."""
TIED = 0.1
"""What an embedding's own rows count beside the head's inputs, for all quantisers that are calibrated (as in our own)."""
TEXTS = {"WikiText-2 test": "wikitext2.test.raw.txt", "held-out Wikipedia": "heldout_wiki.txt"}


@dataclass(frozen=True)
class Contestant:
    """One row. `dense` names the rule by which weights other than the experts' got their width: "wider" (two bits more, 5 to 8: the
    engine's default where embedding and head are one), "same", or "own" (llama.cpp's mixes). `run`: "weights" in the float32
    model, or "engine"."""

    family: str
    code: str
    dense: str
    n_bytes: int
    run: str = "weights"

    @property
    def key(self) -> tuple[str, ...]:
        return (self.family, self.code, self.dense, self.run)


Logits = Callable[[torch.Tensor], torch.Tensor]
Entry = tuple[Contestant, Logits]


def tell(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def dense_width(bits: float, rule: str, spared: float = 0.0) -> int:
    return DenseWidths.beside(bits, own_embedding=False, spared=spared).bits if rule == "wider" else int(bits)


class Laboratory:
    """The float32 model, what meets its matrices in the calibration text, and a folder for files."""

    def __init__(self, checkpoint: Path, calibration: Calibration, folder: Path, done: set[tuple[str, ...]]):
        """`done`: keys of rows that are not wanted again."""
        self.checkpoint, self.calibration, self.folder, self.done = checkpoint, calibration, folder, done
        with open_source(checkpoint) as source:
            self.weights, self.shape = read(source), source.shape
            ids = torch.from_numpy(calibration.windows(source).astype(np.int64))
        try:
            self.model = Model(self.shape)
        except ValueError as error:
            raise click.ClickException(f"{checkpoint}: is {error}") from None
        self.float_bytes = sum(4 * w.numel() for n, w in self.weights.items() if n not in matrices(self.weights))
        self._ids = ids

    def _kept(self, name: str, measure: Callable[[Weights, torch.Tensor, Callable[[str], None]], Weights]) -> Weights:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            torch.save(measure(self.weights, self._ids, tell), path)
        found: Weights = torch.load(path)
        return found

    @cached_property
    def second_moments(self) -> Weights:
        return self._kept("second-moments", self.model.hessians)

    @cached_property
    def hessians(self) -> Weights:
        """Second moments, and for an embedding that is the head, too, something of its own rows."""
        found = dict(self.second_moments)
        if self.shape.tied_embeddings:
            mean = found["embed"].diagonal(dim1=-2, dim2=-1).mean()
            found["embed"] = found["embed"] / mean + TIED * torch.eye(found["embed"].shape[-1])
        return found

    @cached_property
    def sensitivities(self) -> Weights:
        found = self._kept("sensitivities", self.model.sensitivities)
        return {name: x if x.ndim == 3 else x[None] for name, x in found.items()}

    def logits_of(self, weights: Weights) -> Logits:
        return lambda ids: self.model.logits(weights, ids)

    # --- ours ---

    def ours(self, family: str, calibrated: bool) -> Iterator[Entry]:
        rules = ("wider", "same") if calibrated else ("wider",)
        runs = ("weights", "engine") if calibrated else ("weights",)
        wanted = [(b, rule, run) for b in BITS for rule in rules for run in runs if (family, f"{b} bits", rule, run) not in self.done]
        if not wanted:
            return
        path = self.folder / f"{'calibrated' if calibrated else 'nearest'}.d2moe"
        if not path.exists():
            tell(f"{family}: converting")
            convert(self.checkpoint, path, calibration=self.calibration if calibrated else None)
        container = Container.open(path)
        for bits, rule, run in wanted:
            dense = dense_width(bits, rule)
            if run == "weights":
                logits = self.logits_of(container_weights(container, self.weights, bits, dense))
            else:
                logits = engine_logits(path, bits, dense)
            yield Contestant(family, f"{bits} bits", rule, container_bytes(container, bits, dense), run), logits

    def routed(self) -> Path:
        """Ours with its width router."""
        plain, path = self.folder / "calibrated.d2moe", self.folder / "dialled.d2moe"
        if path.exists() and ((router := read_router(Container.open(path))) is None or router.worth is None):
            shutil.rmtree(path)  # of an earlier version
        if not path.exists():
            tell("d2moe: training the width router")
            if not plain.exists():
                convert(self.checkpoint, plain, calibration=self.calibration)
            shutil.copytree(plain, path)
            tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
            texts = {f.name: tokenizer.encode(read_text(f), add_special_tokens=False).ids for f in self.calibration.files}
            train(path, texts, reference=self.checkpoint, tokens=ROUTER_TOKENS)
        return path

    def cut(self) -> Iterator[Entry]:
        """Ours cut to a size by what each plane is worth (d2moe trim), and converted again for what was left of each expert
        (convert --widths-of)."""
        for bits in SIZES:
            keys = [(family, f"{bits:g} bits", "wider", run) for family in CUT for run in ("weights", "engine")]
            if all(key in self.done for key in keys):
                continue
            small, made = self.folder / f"cut-{bits:g}.d2moe", self.folder / f"made-{bits:g}.d2moe"
            if not small.exists():
                trimmer = Trimmer(self.routed())
                trimmer.write(trimmer.to_bits(bits), small)
            if not made.exists():
                tell(f"d2moe, made for its size: converting at {bits:g} bits")
                convert(self.checkpoint, made, calibration=self.calibration, widths_of=small)
            for family, path in zip(CUT, (small, made), strict=True):
                container = Container.open(path)
                n_bytes = container_bytes(container, 8, 8)
                code, weights = f"{bits:g} bits", container_weights(container, self.weights, 8, 8)
                yield Contestant(family, code, "wider", n_bytes), self.logits_of(weights)
                yield Contestant(family, code, "wider", n_bytes, "engine"), engine_logits(path, 8, 8)

    def dialled(self) -> Iterator[Entry]:
        """Ours with its width router, as the engine runs it. Bytes are those of a model all of whose experts had the average width:
        what a token reads of its experts is the same share of them."""
        for dial in DIALS:
            if ("d2moe, dial", f"{dial:g} bits", "wider", "engine") in self.done:
                continue
            path = self.routed()
            dense = dense_width(dial, "wider", SPARED_BY_TOKEN)
            n_bytes = container_bytes(Container.open(path), dial, dense)
            yield Contestant("d2moe, dial", f"{dial:g} bits", "wider", n_bytes, "engine"), engine_logits(path, dial, dense)

    # --- separate and nested quantisers ---

    def simple(
        self, family: str, quantise: Callable[[str, int], peers.Quantised], rules: Iterable[str]
    ) -> Iterator[Entry]:
        """A family that gives a matrix at a width, independent of all others."""
        made: dict[tuple[str, int], peers.Quantised] = {}

        def at(name: str, bits: int) -> peers.Quantised:
            if (name, bits) not in made:
                made[name, bits] = quantise(name, bits)
            return made[name, bits]

        for bits in BITS:
            for rule in rules:
                if (family, f"{bits} bits", rule, "weights") in self.done:
                    continue
                weights, n_bytes = dict(self.weights), float(self.float_bytes)
                for name in matrices(self.weights):
                    found = at(name, bits if is_expert(name) else dense_width(bits, rule))
                    weights[name] = found.weights.view_as(self.weights[name])
                    n_bytes += found.n_bytes
                yield Contestant(family, f"{bits} bits", rule, round(n_bytes)), self.logits_of(weights)

    def separate(self, method: Callable[[torch.Tensor, torch.Tensor, int, int], peers.Quantised], group: int) -> Any:
        return lambda name, bits: method(self._cube(name), self.hessians[name], bits, group)

    def nested(self, method: Callable[[str, torch.Tensor], dict[int, peers.Quantised]]) -> Any:
        made: dict[str, dict[int, peers.Quantised]] = {}

        def at(name: str, bits: int) -> peers.Quantised:
            if name not in made:
                made[name] = method(name, self._cube(name))
            return made[name][bits]

        return at

    def _cube(self, name: str) -> torch.Tensor:
        w = self.weights[name]
        return w if w.ndim == 3 else w[None]

    # --- llama.cpp ---

    def llama(self, python: Path) -> Iterator[Entry]:
        folder = self.folder / "llama"
        folder.mkdir(exist_ok=True)
        names = [f"{kind}.{how}" for kind in llama.FILE_TYPES for how in ("pure", "mix")]
        missing = [n for n in names if not (folder / f"{n}.gguf").exists()]
        if missing:
            llama.write(folder / "float32", self.weights, self.shape)
            squares = {
                llama.gguf_name(n): h.diagonal(dim1=-2, dim2=-1).reshape(-1).numpy()
                for n, h in self.second_moments.items()
            }
            np.savez(folder / "importance.npz", **squares)
        for name in missing:
            tell(f"llama.cpp: making {name}")
            command = [python, Path(llama.__file__), folder / "float32", folder / "importance.npz", folder, name]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise click.ClickException(f"llama.cpp, {name}:\n{done.stderr[-2000:]}")
        for kind in llama.FILE_TYPES:
            pure = llama.read(folder / f"{kind}.pure.gguf")
            wider = llama.read(folder / f"{WIDER[kind]}.pure.gguf")
            yield self._gguf("llama.cpp", kind, "same", pure, pure)
            yield self._gguf("llama.cpp", kind, "wider", pure, wider)
            mix = llama.read(folder / f"{kind}.mix.gguf")
            yield self._gguf("llama.cpp mixes", llama.FILE_TYPES[kind], "own", mix, mix)

    def _gguf(self, family: str, code: str, rule: str, experts: Any, dense: Any) -> Entry:
        weights, n_bytes = {}, 0
        for name, w in self.weights.items():
            values, size = (experts if is_expert(name) else dense)[llama.gguf_name(name)]
            weights[name] = torch.from_numpy(np.array(values, np.float32)).view_as(w)
            n_bytes += size
        return Contestant(family, code, rule, n_bytes), self.logits_of(weights)


WIDER = {"Q2_K": "Q5_K", "IQ2_S": "Q5_K", "Q3_K": "Q5_K", "IQ3_S": "Q5_K", "Q4_K": "Q6_K", "IQ4_XS": "Q6_K"}
WIDER |= {"Q5_K": "Q8_0", "Q6_K": "Q8_0", "Q8_0": "Q8_0"}
"""llama.cpp's type for the other weights that is nearest to our default (7 bits become 8: it has no type of 7)."""


def container_weights(container: Container, like: Weights, bits: int, dense: int) -> Weights:
    """Everything in a container as float32 at the two widths, or at what there is; the floats are its own, which it balanced."""
    turn = container.record.rotation_of
    weights: Weights = {}
    for name, w in like.items():
        if is_expert(name):
            layer, part = int(name.split(".")[1]), name.rpartition(".")[2]
            found = [container.read_expert(layer, e, container.width(layer, e, bits))[part] for e in range(container.experts)]
            weights[name] = torch.stack([matrix(m, m.bits, w.shape[1], w.shape[2], turn(part)) for m in found])
        elif name in container.nested:
            whole = container.read_nested(name, dense)
            weights[name] = matrix(whole, whole.bits, w.shape[0], w.shape[1], turn(name))
        else:
            weights[name] = torch.from_numpy(np.array(container.read_dense(name)))
    return weights


def container_bytes(container: Container, bits: float, dense: int) -> int:
    """Also of widths between two whole ones."""
    below, above = (container.experts_bytes(b) for b in (math.floor(bits), math.ceil(bits)))
    return round(below + (above - below) * (bits % 1)) + container.dense_bytes(DenseWidths(dense))


def engine_logits(path: Path, bits: float, dense: int) -> Logits:
    engine: list[Engine] = []  # opened when it is first asked

    def logits(ids: torch.Tensor) -> torch.Tensor:
        if not engine:
            engine.append(Engine.load(path, EngineConfig(bits=bits, dense_bits=dense, threads=1)))
        rows = []
        for window in ids.tolist():
            sequence = engine[0].new_sequence()
            rows.append(torch.from_numpy(np.array(engine[0].step([Chunk(sequence, window, bits, "all")]))))
            sequence.free()
        return torch.stack(rows)

    return logits


def contestants(lab: Laboratory, peer_python: Path | None) -> list[tuple[int, Iterator[Entry]]]:
    """How many rows are still wanted, and what makes them one by one; what has to be left out is told."""
    n, both, wider = len(BITS), ("wider", "same"), ("wider",)
    any_precision = lab.nested(lambda name, w: peers.any_precision(w, lab.sensitivities[name]))
    matgptq = lab.nested(lambda name, w: peers.matgptq(w, lab.hessians[name], 64, "experts" if is_expert(name) else "dense"))
    found = [
        ({"d2moe"}, 4 * n, lab.ours("d2moe", calibrated=True)),
        ({"d2moe, dial"}, len(DIALS), lab.dialled()),
        (set(CUT), 4 * len(SIZES), lab.cut()),
        ({"d2moe, uncalibrated"}, n, lab.ours("d2moe, uncalibrated", calibrated=False)),
        ({"GPTQ, group 64"}, 2 * n, lab.simple("GPTQ, group 64", lab.separate(peers.gptq, 64), both)),
        ({"GPTQ, group 128"}, 2 * n, lab.simple("GPTQ, group 128", lab.separate(peers.gptq, 128), both)),
        ({"round to nearest, group 64"}, n, lab.simple("round to nearest, group 64", lab.separate(peers.nearest, 64), wider)),
        ({"MWQ, group 128"}, n, lab.simple("MWQ, group 128", lab.nested(lambda name, w: peers.mwq(w, lab.hessians[name], 128)), wider)),
        ({"MatGPTQ-like, group 64"}, n, lab.simple("MatGPTQ-like, group 64", matgptq, wider)),
        ({"Any-Precision"}, n, lab.simple("Any-Precision", any_precision, wider)),
    ]
    try:
        import hqq.core.quantize  # noqa: F401
    except ImportError as error:
        tell(f"LEFT OUT: HQQ ({error}; pip install '.[benchmark]')")
    else:
        found.append(({"HQQ, group 64"}, 2 * n, lab.simple("HQQ, group 64", lab.separate(peers.hqq, 64), both)))
    if not peer_python:
        tell("LEFT OUT: llama.cpp's types, as no --peer-python was given")
    elif not importlib.util.find_spec("gguf"):
        tell("LEFT OUT: llama.cpp's types, as gguf is not installed here (pip install gguf)")
    else:
        found.append(({"llama.cpp", "llama.cpp mixes"}, 3 * len(llama.FILE_TYPES), lab.llama(peer_python)))
    return [(n - sum(key[0] in families for key in lab.done), entries) for families, n, entries in found]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shared",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=ROOT.parent / "shared",
    show_default=True,
    help="Folder with models/qwen3moe-14m, data/perplexity and data/calibration.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Hugging Face checkpoint of a family of mixtures without shared experts [default: SHARED/models/qwen3moe-14m].",
)
@click.option(
    "--peer-python", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Interpreter with llama_cpp."
)
@click.option(
    "--windows", type=click.IntRange(1), default=468, show_default=True, help="Windows of 256 tokens of each text."
)
@click.option(
    "--kl-windows", type=click.IntRange(1), default=128, show_default=True, help="The first of them, for divergences."
)
@click.option("--calibration-tokens", type=click.IntRange(1), default=131072, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep containers and GGUF files here.")
@click.option("--name", help="Of the model on the page, and of benchmarks/results/quality-NAME.jsonl [default: the checkpoint's folder].")
@click.option(
    "--page", "page_path", type=click.Path(path_type=Path), help=f"A page of these results alone [default: {PAGE}, of all there are]."
)
@click.option("--resume", is_flag=True, help="Keep the rows that are in the file of results.")
@click.option("--only-page", is_flag=True, help="Write the page from the file of results, without measuring.")
def main(
    shared: Path, checkpoint: Path | None, peer_python: Path | None, windows: int, kl_windows: int, calibration_tokens: int,
    folder: Path | None, name: str | None, page_path: Path | None, resume: bool, only_page: bool,
) -> None:  # fmt: skip
    """Measure all contestants and write the page.

    \b
    Examples:
      python benchmarks/quality.py --peer-python ~/peer/bin/python --folder /tmp/quality
      python benchmarks/quality.py --windows 8 --kl-windows 8 --name try --page try.md
      python benchmarks/quality.py --checkpoint olmoe-41m --folder /tmp/quality-olmoe
      python benchmarks/quality.py --only-page
    """
    checkpoint = checkpoint or shared / "models" / "qwen3moe-14m"
    name = name or checkpoint.resolve().name
    out = ROOT / "benchmarks" / "results" / f"quality-{name}.jsonl"
    if not only_page:
        with tempfile.TemporaryDirectory() as temporary:
            place = folder or Path(temporary)
            place.mkdir(parents=True, exist_ok=True)
            try:
                measure(shared, checkpoint, out, place, peer_python, windows, kl_windows, calibration_tokens, resume)
            except (D2MoeError, OSError) as error:
                raise click.ClickException(str(error)) from None
    if not out.exists():
        raise click.ClickException(f"{out} does not exist; run without --only-page first")
    files = [out] if page_path else sorted(out.parent.glob("quality-*.jsonl"))
    results = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    page_path = page_path or PAGE
    page_path.write_text(page(results), encoding="utf-8")
    tell(f"{page_path} written")


def measure(
    shared: Path, checkpoint: Path, out: Path, folder: Path, python: Path | None, windows: int, kl_windows: int, calibration: int,
    resume: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)  # the engine's sums do not depend on it, torch's do
    files = tuple(shared / "data" / "calibration" / n for n in ("exl3_c4.utf8", "exl3_wiki.utf8"))
    for needed in (checkpoint, *files, *(shared / "data" / "perplexity" / f for f in TEXTS.values())):
        if not needed.exists():
            raise click.ClickException(f"{needed} does not exist; --shared names the folder with models and data")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = []
    for text, file in TEXTS.items():
        ids = tokenizer.encode(read_text(shared / "data" / "perplexity" / file), add_special_tokens=False).ids
        texts.append(Text(text, ids, 256, windows, kl_windows))
    protocol = {"windows": windows, "kl_windows": kl_windows, "calibration_tokens": calibration}
    done: set[tuple[str, ...]] = set()
    if resume and out.exists():
        for line in out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["protocol"] != protocol:
                raise click.ClickException(
                    f"{out} was measured with {row['protocol']}, this run has {protocol}; leave out --resume"
                )
            done.add(tuple(row[k] for k in ("family", "code", "dense", "run")))
    lab = Laboratory(checkpoint, Calibration(files, calibration), folder, done)
    with out.open("a" if resume else "w", encoding="utf-8") as file:

        def score(made: Contestant, logits: Logits) -> None:
            scores = {t.name: t.score(logits) for t in texts}
            shown = ", ".join(f"{s.perplexity:.3f} / {s.mean_kl:.5f}" for s in scores.values())
            tell(
                f"{made.family}, {made.code}, other weights {made.dense}, {made.run}: {made.n_bytes / 1e6:.2f} MB, {shown}"
            )
            if made.key not in done:
                found = {n: asdict(s) | {"perplexity": s.perplexity, "mean_kl": s.mean_kl} for n, s in scores.items()}
                facts = {"model": about} if made.key == plain.key else {}
                file.write(json.dumps({**asdict(made), **facts, "protocol": protocol, "scores": found}) + "\n")
                file.flush()

        shape, everything = lab.shape, sum(4 * w.numel() for w in lab.weights.values())
        about = {"name": out.stem.removeprefix("quality-"), "family": shape.model_type, "weights": everything // 4, "layers": shape.layers}
        about |= {"experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden, "inner": shape.expert_inner}
        plain = Contestant(
            "float32", "float32", "same", everything
        )  # what all others are compared with, so always scored
        score(plain, lab.logits_of(lab.weights))
        groups = contestants(lab, python)
        total, seen, begun = sum(n for n, _ in groups), 0, time.monotonic()
        for made, logits in chain.from_iterable(entries for _, entries in groups):
            if made.key in done:
                continue
            score(made, logits)
            seen += 1
            left = (time.monotonic() - begun) / seen * (total - seen)
            tell(f"{seen} of {total} rows, about {left / 60:.0f} min left")


if __name__ == "__main__":
    sys.exit(main())
