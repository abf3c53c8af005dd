"""`d2moe trim`: a smaller copy of a model."""

from __future__ import annotations

import click

from d2moe.cli.shared import model_path, print_json, print_table
from d2moe.types import BASE_BITS, MAX_BITS


@click.command()
@click.argument("model")
@click.argument("dst", type=click.Path())
@click.option("--size", metavar="SIZE", help="What the whole of DST may take, as 3GB.")
@click.option("--bits", type=click.FloatRange(BASE_BITS, MAX_BITS), help="Bits that an expert has in DST, on average.")
@click.option("--uniform", is_flag=True, help="All experts alike, which needs no width router: it is worse at the same size.")
@click.option(
    "--dense-bits",
    type=click.IntRange(BASE_BITS, MAX_BITS),
    help="Width of all other weights [default: two to three bits more than an expert has, from 5 to 8, by kind].",
)
@click.option("--dry-run", is_flag=True, help="Say what would stay, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def trim(
    model: str, dst: str, size: str | None, bits: float | None, uniform: bool, dense_bits: int | None, dry_run: bool, as_json: bool
) -> None:
    """Make DST, a copy of MODEL that takes less room.

    Of each expert those bits stay that are worth most for their size: "d2moe route train" has measured what each bit of each expert saves.
    Nothing is quantised anew, so it takes as long as copying, and DST is a model like any other; --bits 8 then reads all that it has.
    Interrupted, the same command goes on where it was.

    \b
    Examples:
      d2moe trim olmoe.d2moe small.d2moe --size 3GB
      d2moe trim olmoe.d2moe small.d2moe --bits 3.2
      d2moe trim olmoe.d2moe four.d2moe --bits 4 --uniform
      d2moe trim olmoe.d2moe small.d2moe --size 3GB --dry-run
    """
    from pathlib import Path

    from d2moe.cli.progress import Bar
    from d2moe.container.trim import Trimmer
    from d2moe.runtime.config import parse_bytes, show_bytes

    if (size is None) == (bits is None):
        raise click.UsageError("give either --size or --bits")
    limit = parse_bytes(size, "--size") if size is not None else 0
    path = model_path(model)
    trimmer = Trimmer(path, uniform=uniform, dense_bits=dense_bits)
    cut = trimmer.to_bits(bits) if bits is not None else trimmer.to_size(limit)
    container, planned = trimmer.container, trimmer.size(cut)
    if not dry_run:
        with Bar(f"copying to {Path(dst).name}") as bar:
            trimmer.write(cut, dst, bar)
    before = sum(f.n_bytes for f in container.manifest.files.values())
    by_layer = [[int((row == b).sum()) for b in range(BASE_BITS, MAX_BITS + 1)] for row in cut.kept]
    if as_json:
        print_json({
            "model": str(path), "dst": dst, "written": not dry_run, "bytes": planned, "bytes_before": before, "bits": cut.bits,
            "dense_bits": cut.dense.bits, "dense_widths": dict(cut.dense.others),
            "kept": {str(layer): row for layer, row in zip(container.moe_layers, cut.kept.tolist(), strict=True)},
        })  # fmt: skip
        return
    facts = [
        ("whole file", show_bytes(before), show_bytes(planned)),
        ("bits of an expert, on average", f"{container.kept.mean():.2f}", f"{cut.bits:.2f}"),
        ("other weights", "as they are", str(cut.dense)),
    ]
    print_table(f"{path.name} -> {dst}" + (" (nothing written)" if dry_run else ""), facts, ("", "before", "after"))
    rows = [
        (str(layer), *(str(n) if n else "" for n in counts), f"{row.mean():.2f}")
        for layer, counts, row in zip(container.moe_layers, by_layer, cut.kept, strict=True)
    ]
    print_table("experts of each layer by the bits they have", rows, ("layer", *map(str, range(BASE_BITS, MAX_BITS + 1)), "average"))
