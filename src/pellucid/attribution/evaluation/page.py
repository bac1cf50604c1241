"""A comparison of methods as one HTML file that works offline: the sentence, the table, and three plots.

Every plot is a figure of plain SVG whose numbers stand in a table on the same page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

import numpy as np

from pellucid.results import Result

COLOURS = ("#2266aa", "#cc5522", "#228855", "#884499", "#aa8811", "#117799", "#bb3366", "#556677", "#775533", "#3355cc")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } p.verdict { font-size: 1.1rem; font-weight: 600; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 3px 9px; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(even) td { background: #f3f5f7; }
tr.random td { font-style: italic; } td small { color: #59636e; } .scroll { overflow-x: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #1b1f24; } footer { color: #59636e; font-size: 12px; margin-top: 2rem; }
"""


def page(found: Result) -> str:
    """The HTML of what `compare` gives."""
    names = [str(m) for m in found.technique.values]
    refused = json.loads(found.data.attrs["refused"])
    left_out = "".join(f"<li>{_text(m)}: {_text(why)}</li>" for m, why in refused.items())
    concordance = (
        f"{float(found.concordance):.2f} [{float(found.concordance_low):.2f}, {float(found.concordance_high):.2f}]"
    )
    parts = [
        f"<h1>{_text(found.title)}</h1><p class=verdict>{_text(found.data.attrs['sentence'])}</p>",
        f"<p>Absent tokens: {_text(found.data.attrs['replacement'])}. Means with 95 % bootstrap intervals over prompts, in "
        "the unit of the target; cost in forward passes a prompt, a backward pass counted as two.</p>",
        f"<p>{_outside(found)}</p>" if "outside" in found.data else "",
        f"<div class=scroll>{_table(found, names)}</div>",
        f"<h2>Faithfulness: area under insertion minus area under deletion</h2>{_dots(found, names)}",
        f"<h2>Curves</h2>{_curves(found, names, 'deletion')}{_curves(found, names, 'insertion')}{_legend(names)}",
        f"<h2>Agreement: Spearman's correlation</h2><p>Kendall's W without random scores: {concordance}</p>{_heat(found, names)}",
        f"<h2>Left out</h2><ul>{left_out}</ul>" if left_out else "",
        f"<footer>{_text(found.provenance.line())}</footer>",
    ]
    title = _text(found.title)
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>"


def _outside(found: Result) -> str:
    shares = ", ".join(
        f"{out:.0%} with {gone:.0%} of the players gone"
        for gone, out in zip(found.absent.values, found.outside.values, strict=True)
    )
    return f"Altered prompts that lie outside the clean ones (5 % would be no different): {shares}."


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(found: Result, names: Sequence[str]) -> str:
    marks = {"more": "↑", "less": "↓"}
    metrics = [str(m) for m in found.metric.values]
    head = "".join(
        f"<th scope=col>{_text(m)} {marks[str(b)]}</th>" for m, b in zip(metrics, found.better.values, strict=True)
    )
    body = ""
    for i in _order(found):
        cells = "".join(
            f"<td>{v:.3g} <small>[{low:.3g}, {high:.3g}]</small></td>"
            for v, low, high in zip(found.value.values[i], found.low.values[i], found.high.values[i], strict=True)
        )
        kind = " class=random" if names[i] == "random" else ""
        body += f"<tr{kind}><th scope=row>{_text(names[i])}</th>{cells}<td>{float(found.cost[i]):.0f}</td></tr>"
    return f"<table><thead><tr><th scope=col>method</th>{head}<th scope=col>cost</th></tr></thead><tbody>{body}</tbody></table>"


def _order(found: Result) -> list[int]:
    """Methods from the most faithful to the least."""
    column = found.metric.values.tolist().index("faithfulness")
    return [int(i) for i in np.argsort(-found.value.values[:, column], kind="stable")]


def _dots(found: Result, names: Sequence[str]) -> str:
    column, order = found.metric.values.tolist().index("faithfulness"), _order(found)
    values, low, high = (np.nan_to_num(found[n].values[:, column]) for n in ("value", "low", "high"))
    first, last = min(0.0, float(low.min())), max(0.0, float(high.max()))
    width = (last - first) or 1.0
    height = 24 * len(names) + 30
    marks = f'<line x1={_x(0.0, first, width)} x2={_x(0.0, first, width)} y1=4 y2={height - 24} stroke="#999"/>'
    for row, i in enumerate(order):
        y = 18 + 24 * row
        marks += (
            f"<text x=160 y={y + 4} text-anchor=end>{_text(names[i])}</text><line x1={_x(low[i], first, width)} "
            f'x2={_x(high[i], first, width)} y1={y} y2={y} stroke="{COLOURS[0]}" stroke-width=2 />'
            f'<circle cx={_x(values[i], first, width)} cy={y} r=4 fill="{COLOURS[0]}"/>'
        )
    for end in (first, last):
        marks += f"<text x={_x(end, first, width)} y={height - 6} text-anchor=middle>{end:.3g}</text>"
    return _figure(marks, 760, height, "Faithfulness of each method with its interval; the numbers are in the table")


def _x(value: float, first: float, width: float) -> str:
    return f"{180 + 540 * (value - first) / width:.1f}"


def _curves(found: Result, names: Sequence[str], which: str) -> str:
    values, share = found[which].values, found.share.values
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    marks = f"<text x=60 y=16>{which}</text>"
    for i in range(len(names)):
        points = " ".join(
            f"{60 + 360 * s:.1f},{230 - 200 * (v - low) / span:.1f}" for s, v in zip(share, values[i], strict=True)
        )
        dash = ' stroke-dasharray="5 4"' if names[i] == "random" else ""
        marks += f'<polyline points="{points}" fill=none stroke="{COLOURS[i % len(COLOURS)]}" stroke-width=2{dash} />'
    for y, value in ((234, low), (34, high)):
        marks += f"<text x=52 y={y} text-anchor=end>{value:.3g}</text>"
    marks += "<text x=60 y=250>0</text><text x=420 y=250 text-anchor=end>all players</text>"
    return _figure(marks, 440, 260, f"The target over the share of players, {which}")


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {_text(name)} &nbsp; '
        for i, name in enumerate(names)
    )
    return f"<p>{items}</p>"


def _heat(found: Result, names: Sequence[str]) -> str:
    head = "".join(f"<th scope=col>{_text(n)}</th>" for n in names)
    body = ""
    for i, name in enumerate(names):
        cells = ""
        for value in found.agreement.sel(measure="spearman").values[i]:
            strength = 0.0 if np.isnan(value) else min(1.0, abs(float(value)))
            colour = "34,102,170" if value >= 0 else "204,85,34"
            cells += f'<td style="background:rgba({colour},{0.5 * strength:.2f})">{value:.2f}</td>'
        body += f"<tr><th scope=row>{_text(name)}</th>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(marks: str, width: int, height: int, label: str) -> str:
    return f'<svg role=img aria-label="{_text(label)}" viewBox="0 0 {width} {height}" width={width} height={height}>{marks}</svg>'
