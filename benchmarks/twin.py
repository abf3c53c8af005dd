"""The same function in weights that are harder to round: a heavy-tailed twin of a Hugging Face checkpoint.

    python benchmarks/twin.py CHECKPOINT TWIN [--sigma 1]

Rows of experts' up projections are multiplied by exp(normal(0, sigma)), and the columns of the down projections that meet them divided by
these; float32, so nothing is rounded on the way. Checkpoints of one tensor per expert, named up_proj and down_proj.
"""

from __future__ import annotations

import argparse
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAME = re.compile(r"(.*\.experts\.\d+)\.(up|down)_proj\.weight")


def rescaled(name: str, weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """float32 [rows, columns]; as it was if it is no up or down projection of an expert."""
    found, weight = NAME.fullmatch(name), weight.float()
    if not found:
        return weight
    inner = weight.shape[0] if found[2] == "up" else weight.shape[1]
    generator = torch.Generator().manual_seed(zlib.crc32(found[1].encode()))  # the same for both, in whichever file they are
    factor = torch.exp(sigma * torch.randn(inner, generator=generator))
    return weight * factor[:, None] if found[2] == "up" else weight / factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("twin", type=Path)
    parser.add_argument("--sigma", type=float, default=1.0)
    options = parser.parse_args()
    options.twin.mkdir(parents=True)
    count = 0
    for path in sorted(options.checkpoint.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, options.twin / path.name)
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: rescaled(name, file.get_tensor(name), options.sigma) for name in file.keys()}  # noqa: SIM118
        count += sum(NAME.fullmatch(name) is not None for name in tensors)
        save_file(tensors, options.twin / path.name, {"format": "pt"})
    if not count:
        parser.error(f"{options.checkpoint} has no experts.N.up_proj.weight and down_proj.weight; nothing was rescaled")
    print(f"{options.twin}: {count} matrices rescaled")


if __name__ == "__main__":
    main()
