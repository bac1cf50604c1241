"""Draws docs/img/surgery.svg: what removing blocks and what splicing at every depth say of the same eight capitals.

    python -m benchmarks.surgery_figure [--table] [--texts paired.tsv] [--out docs/img/surgery.svg]

Above, the share of A's answer that A's residual wins at each depth of B's run, at the subject's and at the last position, beside what
another pair's residual wins; below, what is lost without each block: of the capitals' margin (logits) and of text (nats).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import pellucid as pl
from benchmarks.surgery_states import PAIRED, _margin, capitals, reviews
from scripts.demo_model import smollm2

DOCS = Path(__file__).parent.parent / "docs" / "surgery.md"
WIDTH, HEIGHT, LEFT, TOP = 760, 210, 60, 34  # of one panel
COLOURS = {"subject": "#3366cc", "last": "#cc5500", "another pair's subject": "#9aa5b5", "capitals' margin": "#3366cc", "text": "#9aa5b5"}  # fmt: skip


def panel(top: float, title: str, label: str, series: dict[str, tuple[list[float], list[float]]], low: float, high: float, dashed: set[str]) -> list[str]:  # fmt: skip
    """Lines over depth 0 to 30, with their names at the right."""

    def x(v: float) -> float:
        return LEFT + v / 30 * (WIDTH - LEFT - 170)

    def y(v: float) -> float:
        return top + HEIGHT - (min(max(v, low), high) - low) / (high - low) * (HEIGHT - 10)

    made = [f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{title}</text>']
    for v in np.linspace(low, high, 4):
        made.append(f'<line x1="{LEFT}" x2="{x(30)}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#8884" />')
        made.append(f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>')
    made.append(f'<rect x="{x(23):.1f}" width="{x(24) - x(23):.1f}" y="{top}" height="{HEIGHT}" fill="#f2b70033" />')
    made += [f'<text x="{x(v):.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{v}</text>' for v in (0, 5, 10, 15, 20, 23, 26, 30)]  # fmt: skip
    made.append(f'<text x="{x(30) + 24}" y="{top + HEIGHT + 18}">{label}</text>')
    for number, (name, (xs, ys)) in enumerate(series.items()):
        made += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{COLOURS[name]}" />' for a, b in zip(xs, ys, strict=True)]  # fmt: skip
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        made.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"{dash} />')
        made.append(f'<text x="{x(30) + 12}" y="{top + 20 + 20 * number}" fill="{COLOURS[name]}">{name}</text>')
    return made


Lines = dict[str, tuple[list[float], list[float]]]


def measured(texts: str, tokens: int) -> tuple[Lines, Lines]:
    """Both panels, from the model."""
    torch.set_num_threads(1)
    model = pl.load(str(smollm2()))
    a, b, subject = capitals()
    with pl.quiet():
        spliced = pl.surgery.splice(model, a, b, positions={"subject": subject, "last": -1})
        print(spliced.title, flush=True)
        removed = pl.surgery.layer_importance(model, reviews(texts, 8), {"capitals": (a, _margin(model, a, b))}, tokens=tokens)  # fmt: skip
        print(removed.title, flush=True)
    out, share = removed.data.isel(part=0), spliced.data.share
    depths = [float(d) for d in share.depth.values]
    top = {name: (depths, [*share.sel(set=name).values]) for name in ("subject", "last")}
    top["another pair's subject"] = (depths, [*spliced.data.control.sel(set="subject").values])
    blocks = [i + 0.5 for i in range(30)]
    lost = -out.effect.sel(capability="capitals").values
    return top, {"capitals' margin": (blocks, [*lost]), "text": (blocks, [*out.loss.values])}


def tabled() -> tuple[Lines, Lines]:
    """Both panels, from the table that `benchmarks.surgery_states splice` printed and the docs keep."""
    body = DOCS.read_text().split("| depth, or block |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[float(c.strip(" *")) for c in line.strip("|").split("|")] for line in body]
    columns = [[row[i] for row in rows] for i in range(7)]
    top = {name: (columns[0], columns[i]) for name, i in (("subject", 1), ("last", 2), ("another pair's subject", 4))}
    blocks = [x + 0.5 for x in columns[0]]
    return top, {"capitals' margin": (blocks, [-x for x in columns[6]]), "text": (blocks, columns[5])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default=PAIRED)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument(
        "--table", action="store_true", help="draw the depths of the table in docs/surgery.md, without the model"
    )
    parser.add_argument("--out", default="docs/img/surgery.svg")
    given = parser.parse_args()
    top, low = tabled() if given.table else measured(given.texts, given.tokens)
    second = TOP + HEIGHT + 64
    lines = panel(TOP, "Splice: share of A's answer won by A's residual", "depth", top, -0.2, 1.1, {"another pair's subject"})  # fmt: skip
    lines += panel(second, "Removal: what is lost of the capitals' margin (logits) and of text (nats a token); above 8 cut", "block", low, -1, 8, {"text"})  # fmt: skip
    size = f'width="{WIDTH}" height="{second + HEIGHT + 30}" viewBox="0 0 {WIDTH} {second + HEIGHT + 30}"'
    Path(given.out).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" fill="#222">\n<rect width="100%" height="100%" fill="white" />\n' + "\n".join(lines) + "\n</svg>\n")  # fmt: skip
    print(given.out)


if __name__ == "__main__":
    main()
