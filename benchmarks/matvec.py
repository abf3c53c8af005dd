"""Products of nested weights against what the machine can do: matrix-vector against its read bandwidth, and
matrix-matrix (prompts) in multiply-adds. Weights are larger than any cache; everything alternates within each round,
so that other load on the machine hits all alike. Prints a table and one JSON line.

    python benchmarks/matvec.py --bits 2,3,4,8 --threads 1,2 --rounds 9
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from d2moe.container.layout import MatrixLayout
from d2moe.kernels import native
from d2moe.types import GROUP

COLS = 4096


def filled(n_bytes: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes; a block repeated, since only the addresses matter."""
    return np.resize(np.frombuffer(rng.bytes(min(n_bytes, 1 << 22)), np.uint8), n_bytes)


@dataclass
class Weights:
    """A nested matrix that is at least `n_bytes` large at each width: the less bits, the more rows."""

    n_bytes: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = self.layout(2).rows
        self.base = filled(MatrixLayout(rows, COLS, GROUP).base_bytes, rng)
        self.planes = [filled(self.layout(bits).plane_bytes, rng) for bits in range(3, 9)]
        self.affine = filled(MatrixLayout(rows, COLS, GROUP).affine_bytes, rng)
        self.row_scale = np.resize(rng.random(1 << 16, np.float32), rows)

    def layout(self, bits: int, rows: int = 0) -> MatrixLayout:
        return MatrixLayout(rows or -(-self.n_bytes * 8 // (bits * COLS * 16)) * 16, COLS, GROUP)

    def call(self, table: str, bits: int, threads: int, m: int = 1, rows: int = 0) -> tuple[Callable[[], None], int, int]:
        """The product, the bytes it reads, its multiply-adds."""
        layout = self.layout(bits, rows)
        t, g = layout.tiles, layout.groups

        def cut(a: np.ndarray, *shape: int) -> np.ndarray:
            return a[: int(np.prod(shape))].reshape(shape)

        row_scale, affine = cut(self.row_scale, t, 16), cut(self.affine, t, g, 2, 16)
        base = cut(self.base, t, g, GROUP // 16, 64)
        planes = [cut(p, t, g, GROUP // 32, 64) for p in self.planes[: bits - 2]]
        x = np.random.default_rng(1).standard_normal((m, COLS), np.float32)
        q = native.quantize_activations(table, x, GROUP)

        def product() -> None:
            native.matmul(table, layout.rows, COLS, GROUP, bits, row_scale, affine, base, planes, *q, threads)

        return product, layout.base_bytes + (bits - 2) * layout.plane_bytes + layout.affine_bytes, layout.rows * COLS * m


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def whole_numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as e:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 2,3,4") from e


@click.command(epilog="Example: python benchmarks/matvec.py --bits 2,4 --threads 2 --tokens 128")
@click.option("--bits", callback=whole_numbers, default="2,3,4,8", show_default=True, help="Widths, 2 to 8.")
@click.option("--threads", callback=whole_numbers, default="1,2", show_default=True)
@click.option("--tokens", callback=whole_numbers, default="16,128,512", show_default=True, help="Prompt lengths.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of the weights at every width.")
@click.option("--table", default=None, help="Kernel table; the best one if not given.")
def main(
    bits: list[int], threads: list[int], tokens: list[int], rounds: int, gigabytes: float, table: str | None
) -> None:
    """Matrix-vector speed at each width as a share of read bandwidth, and matrix-matrix speed."""
    table = table or native.tables()[-1]
    weights = Weights(int(gigabytes * 2**30))
    calls = {(n, b): weights.call(table, b, n) for n in threads for b in bits}
    prompts = {(n, b, m): weights.call(table, b, n, m, 4096) for n in threads for b in bits for m in tokens}
    bandwidth: dict[int, list[float]] = {n: [] for n in threads}
    speed: dict[tuple[int, int], list[float]] = {key: [] for key in calls}
    macs: dict[tuple[int, int, int], list[float]] = {key: [] for key in prompts}
    for index in range(rounds + 1):  # the first one warms up
        for n in threads:
            bandwidth[n].append(native.read_bandwidth(weights.n_bytes, n, 0.0, table) / 1e9)
        for key, (call, n_bytes, _) in calls.items():
            speed[key].append(n_bytes / seconds(call) / 1e9)
        for prompt, (call, _, n_macs) in prompts.items():
            macs[prompt].append(n_macs / seconds(call) / 1e9)
        if index == 0:
            for measured in (*bandwidth.values(), *speed.values(), *macs.values()):
                measured.clear()
    report(table, weights.n_bytes, bandwidth, speed, macs)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def report(
    table: str,
    n_bytes: int,
    bandwidth: dict[int, list[float]],
    speed: dict[tuple[int, int], list[float]],
    macs: dict[tuple[int, int, int], list[float]],
) -> None:
    out = Table(
        title=f"kernel table {table}, {n_bytes / 2**30:.1f} GiB of weights, group {GROUP}: median (low to high)"
    )
    for column in ("what", "threads", "GB/s", "of bandwidth"):
        out.add_column(column, justify="right")
    line: dict[str, object] = {
        "benchmark": "matvec",
        "table": table,
        "bytes": n_bytes,
        "group": GROUP,
        "rounds": len(next(iter(bandwidth.values()))),
    }
    rows = []

    def text(s: dict[str, float], digits: int) -> str:
        return f"{s['median']:.{digits}f} ({s['low']:.{digits}f} to {s['high']:.{digits}f})"

    for n, values in bandwidth.items():
        out.add_row("read only", str(n), text(spread(values), 1), "")
        line[f"read_gb_per_s_{n}"] = spread(values)
        for (threads, b), measured in speed.items():
            if threads == n:
                ratio = spread([a / r for a, r in zip(measured, values, strict=True)])
                out.add_row(f"{b} bits", str(n), text(spread(measured), 1), text(ratio, 2))
                rows.append({"bits": b, "threads": n, "gb_per_s": spread(measured), "ratio": ratio})
    prompts = Table(title=f"prompts, 4096 x {COLS}: median (low to high)")
    for column in ("bits", "tokens", "threads", "10^9 multiply-adds/s"):
        prompts.add_column(column, justify="right")
    for (n, b, m), measured in macs.items():
        prompts.add_row(str(b), str(m), str(n), text(spread(measured), 0))
    console = Console()
    console.print(out)
    if macs:
        console.print(prompts)
    line["matvec"] = rows
    line["prompts"] = [{"threads": n, "bits": b, "tokens": m, "gmac_per_s": spread(v)} for (n, b, m), v in macs.items()]
    print(json.dumps(line))


if __name__ == "__main__":
    main()
