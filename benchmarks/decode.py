"""Decoding speed, Python's share and roofline on a model of OLMoE-1B-7B's shape with random weights, made on the spot.

    python benchmarks/decode.py --folder /tmp                 7 GB of disk, 5 GB of memory
    python benchmarks/decode.py --folder /tmp --layers 4      a quarter of it

Weights are random, so experts are used evenly: the worst case for a cache. Ends with one JSON line per budget.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

import d2moe
from d2moe.convert.synthetic import OLMOE_1B_7B, synthesise


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True), required=True, help="Where the model is made and kept."
)
@click.option("--layers", default=16, show_default=True, help="Layers of the model; OLMoE has 16.")
@click.option("--bits", default=4, show_default=True)
@click.option(
    "--memory", multiple=True, help="Budgets to measure, e.g. 2GB; default: all in memory, then half of the experts."
)
def main(folder: Path, layers: int, bits: int, memory: tuple[str, ...]) -> None:
    path = folder / f"olmoe-shape-{layers}.d2moe"
    if not path.exists():
        click.echo(f"making {path} …", err=True)
        synthesise(path, OLMOE_1B_7B | {"num_hidden_layers": layers}, d2moe.builtin_model() / "tokenizer.json")
    half = 0.7 + layers * 64 * 3.6e-3 / 2
    for budget in memory or (f"{0.7 + layers * 64 * 3.7e-3:.2f}GB", f"{half:.2f}GB"):
        command = [
            sys.executable,
            "-m",
            "d2moe",
            "bench",
            str(path),
            "--memory",
            budget,
            "--bits",
            str(bits),
            "--context",
            "512",
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
