"""docs/quality.md from the rows of benchmarks/quality.py. Every number and every verdict is computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
OURS, DIALLED, NESTED = "d2moe", "d2moe, dial", ("MWQ, group 128", "MatGPTQ-like, group 64", "Any-Precision", "d2moe, uncalibrated")
CUT = ("d2moe, cut", "d2moe, made for its size")
GOALS = {2: 3.5, 3: 0.8, 4: 0.25, 8: 0.05}
"""Per cent of perplexity above float32 that the project wants at most, all weights included."""
NEAR = 0.02
"""A divergence this much lower, as a share, is called equal."""

HEAD = """# Quality per byte

Made by `benchmarks/quality.py` ([raw results](../benchmarks/results)). The models are small; how larger ones behave is not shown here.

- **Texts**: WikiText-2 test (raw) and held-out Wikipedia, windows of 256 tokens without overlap.
- **KL**: mean Kullback-Leibler divergence from the float32 model, in thousandths of a nat. It is the better measure: it scatters less,
  and perplexity may fall with a little noise. From 6 bits on it may be made by the few
  tokens that a router at a near tie sends to another expert, so it scatters there, too.
- **MB** (10^6 bytes): all weights with codes, scales, zeros, codebooks, norms and routers; ours with the padding of records (5 % of
  the experts at 2 bits where they are 256 x 256, none in OLMoE's shape).
- **Calibration**: the same tokens of C4 and Wikipedia for d2moe, GPTQ, MWQ, MatGPTQ-like, Any-Precision and llama.cpp's
  importance matrix.
- **Weights only**, as they come back from their codes, in one float32 model; "engine" is ours as it runs, with int8 activations.

The peers (details in `benchmarks/quality_quantisers.py` and `quality_llama.py`): GPTQ is our own, with act order, static groups,
asymmetric; with these settings, which beat its defaults, GPTQModel 7.7's class gives the same layer errors to 0.5 %. Inputs are the
unquantised model's for everyone. HQQ is the package with its defaults. llama.cpp's types are made by its own quantiser with an
importance matrix; "mixes" are its file types as they come. MWQ, MatGPTQ and Any-Precision are re-made from their papers.
"""
MODEL = """
# {name}

{family}, {weights:.1f} M weights ({float_mb:.1f} MB in float32), {layers} layers of {experts} experts of {hidden} x {inner}, {top_k} per
token. Perplexity is of the first {tokens:,} predictions of each text, {base} in float32; KL of the first {kl_tokens:,};
calibration on {calibration:,} tokens.
"""
ROWS = """
## All rows, by size

The other weights (attention, embedding) are two bits wider than the experts, 5 to 8 ("wider", the engine's default where
embedding and head are one; a dial's are three bits wider, those of cut models as `d2moe trim` cuts them; in llama.cpp's types
Q5_K, Q6_K, Q8_0), as wide as the experts ("same"), or what llama.cpp's mixes
make of them ("own").
"""
FAMILIES = ("GPTQ, group 64", "GPTQ, group 128", "HQQ, group 64", "llama.cpp", "llama.cpp mixes")


def page(results: Sequence[Sequence[Row]]) -> str:
    """Of one or more models' rows."""
    return "\n".join((HEAD, *(_model(rows) for rows in results)))


def _model(rows: Sequence[Row]) -> str:
    base = next(r for r in rows if r["family"] == "float32")
    texts = list(base["scores"])
    first = base["scores"][texts[0]]
    kl_tokens = max(r["scores"][texts[0]]["kl_tokens"] for r in rows)
    about = dict(base["model"])
    parts = [
        MODEL.format(
            **about | {"weights": about["weights"] / 1e6},
            float_mb=base["n_bytes"] / 1e6,
            tokens=first["tokens"],
            kl_tokens=kl_tokens,
            base=", ".join(f"{base['scores'][t]['perplexity']:.3f}" for t in texts),
            calibration=base["protocol"]["calibration_tokens"],
        )
    ]
    missing = [f for f in (*FAMILIES, *NESTED) if f not in families(rows)]
    if missing:
        parts.append(f"**Not measured in this run**: {'; '.join(missing)}.")
    sections = (verdict, cut, dialled, widths, goals)
    parts += [*(section(rows, texts) for section in sections), ROWS, table(rows, texts)]
    return "\n".join(parts)


def kl(row: Row, text: str) -> float:
    return float(row["scores"][text]["mean_kl"])


def curve_at(points: Sequence[tuple[int, float]], n_bytes: int) -> float | None:
    """The divergence of a family at a size, its logarithm interpolated between the neighbours in size; beyond the largest that of
    the largest, below the smallest None. `points` ascend in size and fall in divergence."""
    if points and n_bytes >= points[-1][0]:
        return points[-1][1]
    for (a, below), (b, above) in pairwise(points):
        if a <= n_bytes <= b and b > a:
            share = (n_bytes - a) / (b - a)
            return math.exp((1 - share) * math.log(below) + share * math.log(above))
    return None


def families(rows: Sequence[Row]) -> list[str]:
    return list(
        dict.fromkeys(r["family"] for r in rows if r["family"] not in ("float32", OURS, *CUT) and r["run"] == "weights")
    )


def rival(rows: Sequence[Row], family: str, text: str, n_bytes: int) -> float | None:
    """The best that a family offers at that size under any of its rules for the other weights, leaving out what a smaller one of
    the same rule beats."""
    found = []
    for rule in ("wider", "same", "own"):
        points: list[tuple[int, float]] = []
        for row in sorted(
            (r for r in rows if r["family"] == family and r["dense"] == rule), key=lambda r: r["n_bytes"]
        ):
            if not points or kl(row, text) < points[-1][1]:
                points.append((row["n_bytes"], kl(row, text)))
        value = curve_at(points, n_bytes)
        if value is not None:
            found.append(value)
    return min(found, default=None)


def best_separate(rows: Sequence[Row], text: str, n_bytes: int) -> tuple[str, float] | None:
    """The best family of separate quantisers at that size, and its divergence."""
    values = {f: v for f in families(rows) if f not in NESTED and (v := rival(rows, f, text, n_bytes)) is not None}
    return min(values.items(), key=lambda item: item[1], default=None)


def verdict(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Ours beside each family at our size."""
    known = families(rows)
    out = [
        "\n## At our size",
        "",
        "KL of each family at exactly the bytes of ours: its logarithm interpolated between the family's two nearest sizes, under the",
        'better of its rules for the other weights, or that of its largest where ours is larger; "–" where it is never so small.',
        "The next larger size of a family may be far better for a few per cent more bytes: see all rows below.",
        "The last column is ours over the best *separate* quantiser; the ones in italics are nested, or ours without calibration.",
        "",
    ]
    lost: list[tuple[str, str]] = []
    won, even, beaten = lost.copy(), lost.copy(), lost.copy()
    for text in texts:
        head = [text, "MB", "**d2moe**", *(f"*{f}*" if f in NESTED else f for f in known), "ours / best separate"]
        out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in (r for r in rows if r["family"] == OURS and r["dense"] == "wider" and r["run"] == "weights"):
            mine = kl(row, text)
            values = {f: rival(rows, f, text, row["n_bytes"]) for f in known}
            separate = {f: v for f, v in values.items() if v is not None and f not in NESTED}
            best = min(separate, key=lambda f: separate[f], default=None)
            cells = [row["code"], f"{row['n_bytes'] / 1e6:.2f}", f"**{1000 * mine:.3f}**"]
            cells += ["–" if (v := values[f]) is None else f"{1000 * v:.3f}" for f in known]
            where = (text, row["code"].split()[0])
            beaten += [(f"{f}, {text}", where[1]) for f in NESTED if (values.get(f) or math.inf) < mine]
            if best is None:
                cells.append("–")
            else:
                ratio = mine / separate[best]
                cells.append(f"{ratio:.2f} ({best})")
                (lost if ratio > 1 + NEAR else won if ratio < 1 - NEAR else even).append(where)
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    groups = {
        "Better than every separate quantiser": won,
        "Within 2 % of the best": even,
        "**Worse than the best**": lost,
    }
    groups["Worse than a nested one"] = beaten
    out += [f"- {label}: {_by_name(found)}." for label, found in groups.items()]
    return "\n".join(out)


def cut(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Ours cut to a size, and rounded for it, beside the best separate quantiser of that size."""
    ours: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["family"] in CUT and row["run"] == "weights":
            ours.setdefault(row["code"], {})[row["family"]] = row
    if not ours:
        return ""
    out = [
        "\n## Cut to a size",
        "",
        "What a model takes on disk, and in memory where all of it is there. *Cut*: `d2moe trim`, the same records cut shorter, so that",
        "each expert keeps the bits that are worth most; the average is named. *Made for its size*: `d2moe convert --widths-of` rounds",
        "again, each expert for the bits it was left, whose lower widths are worse in turn. A separate quantiser could give each expert a",
        "width of its own, too; none of these does. KL, and in brackets ours over the best separate quantiser at the same bytes.",
        "",
        "| average | MB | " + " | ".join(f"{t}: cut | made for its size | best separate" for t in texts) + " |",
        "|" + "---|" * (2 + 3 * len(texts)),
    ]
    won: dict[str, list[tuple[str, str]]] = {family: [] for family in CUT}
    for code, pair in ours.items():
        n_bytes = pair[CUT[0]]["n_bytes"]
        cells = [code, f"{n_bytes / 1e6:.2f}"]
        for text in texts:
            best = best_separate(rows, text, n_bytes)
            for family in CUT:
                if family not in pair:
                    cells.append("–")
                    continue
                mine = kl(pair[family], text)
                cells.append(f"{1000 * mine:.3f}" + (f" ({mine / best[1]:.2f})" if best else ""))
                if best is None or mine < best[1] * (1 - NEAR):
                    won[family].append((text, code.split()[0]))
            cells.append(f"{1000 * best[1]:.3f} ({best[0]})" if best else "–")
        out.append("| " + " | ".join(cells) + " |")
    better = "Better than every separate quantiser of its size"
    out += ["", *(f"- {better}, {family.removeprefix('d2moe, ')}: {_by_name(where)}." for family, where in won.items())]
    return "\n".join(out)


def _by_name(found: Sequence[tuple[str, str]]) -> str:
    """Pairs (name, bits) as text."""
    names = dict.fromkeys(name for name, _ in found)
    return "; ".join(f"{n} at {', '.join(b for m, b in found if m == n)} bits" for n in names) or "nowhere"


def dialled(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Ours by the width router beside the best separate quantiser at the same bytes a token reads."""
    mine = [r for r in rows if r["family"] == DIALLED]
    if not mine:
        return ""
    out = [
        "\n## At the bytes that a token reads",
        "",
        "Where experts come from storage, what counts is what a token reads of them. With the width router each token reads each of its",
        "experts at a width of its own; MB is what all experts would take at the average, so it can be held against a separate one,",
        "whose tokens read all their experts at one width. Ours is the engine's, activations in int8; theirs are weights alone.",
        "",
        "| dial | MB | " + " | ".join(f"{t}: KL | best separate | ours / best" for t in texts) + " |",
        "|" + "---|" * (2 + 3 * len(texts)),
    ]
    for row in mine:
        cells = [row["code"], f"{row['n_bytes'] / 1e6:.2f}"]
        for text in texts:
            best = best_separate(rows, text, row["n_bytes"])
            other = (f"{1000 * best[1]:.3f} ({best[0]})", f"{kl(row, text) / best[1]:.2f}") if best else ("–", "–")
            cells += [f"{1000 * kl(row, text):.3f}", *other]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def widths(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Ours over each family that has the same widths, bytes left aside."""
    mine = [r for r in rows if r["family"] == OURS and r["run"] == "weights"]
    coded = {(r["family"], r["code"], r["dense"]): r for r in rows if r["run"] == "weights"}
    known = [f for f in families(rows) if any((f, m["code"], m["dense"]) in coded for m in mine)]
    out = [
        "\n## At the same widths",
        "",
        "KL of ours over that of each family at the same widths, whatever the bytes; below 1 ours is better. Ours takes",
        "more bytes than GPTQ on rows as narrow as these: a float32 a row is an eighth of a bit a weight here, a sixty-fourth in OLMoE.",
        "",
        "| text | bits | other weights | " + " | ".join(known) + " |",
        "|" + "---|" * (3 + len(known)),
    ]
    for text in texts:
        for row in mine:
            cells = [text, row["code"], row["dense"]]
            for family in known:
                other = coded.get((family, row["code"], row["dense"]))
                cells.append(f"{kl(row, text) / kl(other, text):.2f}" if other else "–")
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def change(row: Row, base: Row, text: str) -> float:
    return 100 * (row["scores"][text]["perplexity"] / base["scores"][text]["perplexity"] - 1)


def goals(rows: Sequence[Row], texts: Sequence[str]) -> str:
    base = next(r for r in rows if r["family"] == "float32")
    out = [
        "\n## Against our own goals",
        "",
        "Perplexity above float32, %, all weights quantised, the other weights two bits wider:",
        "",
        "| bits | goal | " + " | ".join(f"{t}, weights | engine" for t in texts) + " |",
        "|" + "---|" * (2 + 2 * len(texts)),
    ]
    for bits, goal in GOALS.items():
        cells = []
        for text in texts:
            for run in ("weights", "engine"):
                row = _ours(rows, bits, run)
                value = change(row, base, text) if row else math.nan
                cells.append(f"{value:+.2f}" if value <= goal else f"**{value:+.2f}, missed**" if row else "–")
        out.append(f"| {bits} | {goal} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _ours(rows: Sequence[Row], bits: int, run: str) -> Row | None:
    wanted = (OURS, f"{bits} bits", "wider", run)
    return next((r for r in rows if (r["family"], r["code"], r["dense"], r["run"]) == wanted), None)


def table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    base = next(r for r in rows if r["family"] == "float32")
    head = ["contestant", "code", "other weights", "MB", *(c for t in texts for c in (t, "%", "KL"))]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda r: (r["n_bytes"], r["family"], r["run"])):
        name = row["family"] + (", engine" if row["run"] == "engine" else "")
        cells = [
            f"**{name}**" if row["family"] == OURS else name,
            row["code"],
            row["dense"],
            f"{row['n_bytes'] / 1e6:.2f}",
        ]
        for text in texts:
            cells += [
                f"{row['scores'][text]['perplexity']:.3f}",
                f"{change(row, base, text):+.2f}",
                f"{1000 * kl(row, text):.3f}",
            ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"
