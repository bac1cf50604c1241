"""How does a circuit look? One self-contained piece of HTML: no library, no request, works in a notebook and
on paper.

Depth runs upwards from the embedding to the logits, MLPs stand on the right. A head has three ports below (query, key, value) and one
above; blue edges support the answer, orange ones work against it, and the wider an edge the larger its score.
The slider hides weak edges; beneath is the same as a table.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from pellucid.circuits.circuit import Circuit

WIDTH, HEIGHT, GAP, ROW = 62, 24, 18, 72
PORTS = {"q": 0.2, "k": 0.5, "v": 0.8}
STYLE = """
.pc{--ink:#1c2733;--soft:#5d6b78;--paper:#fff;--line:#c9d2da;--box:#f3f6f8;--plus:#2166ac;--minus:#c65102;
font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);padding:12px}
@media(prefers-color-scheme:dark){.pc{--ink:#e6ebef;--soft:#9aa8b4;--paper:#14191e;--line:#36414b;--box:#1f272e;--plus:#6aaeea;--minus:#f0934a}}
.pc svg{max-width:100%;height:auto;display:block;margin:8px 0}.pc .scroll{overflow-x:auto}
.pc text{font:11px system-ui,sans-serif;fill:var(--ink);text-anchor:middle}.pc .layer{fill:var(--soft);text-anchor:start}
.pc .port{font-size:8px;fill:var(--soft)}.pc rect{fill:var(--box);stroke:var(--line)}
.pc path{fill:none;opacity:.75}.pc .plus{stroke:var(--plus)}.pc .minus{stroke:var(--minus);stroke-dasharray:7 3}
.pc .plain{stroke:var(--soft)}.pc path:hover{opacity:1;stroke-width:5}.pc .off{display:none}
.pc table{border-collapse:collapse;font-size:12px}.pc td,.pc th{padding:1px 10px 1px 0;text-align:left}.pc input{width:16em;vertical-align:middle}
"""
SCRIPT = """
(()=>{const me=document.currentScript.parentElement,slide=me.querySelector('input'),out=me.querySelector('output');
const edges=[...me.querySelectorAll('[data-size]')],nodes=[...me.querySelectorAll('g[data-node]')];
const sizes=edges.map(e=>+e.dataset.size).sort((a,b)=>a-b);
const draw=()=>{const at=+slide.value?sizes[Math.min(sizes.length-1,Math.floor(sizes.length*slide.value/100))]:0,seen=new Set();let n=0;
for(const e of edges){const off=+e.dataset.size<at;e.classList.toggle('off',off);if(!off){n++;seen.add(e.dataset.from);seen.add(e.dataset.to)}}
for(const g of nodes)g.classList.toggle('off',!seen.has(g.dataset.node));
out.textContent=n+' of '+edges.length+' lines, scores from '+at.toPrecision(2)};slide.addEventListener('input',draw);draw()})()
"""


@dataclass(frozen=True)
class Drawing:
    """The drawing of a circuit: shows itself in a notebook; `save` writes a page."""

    svg: str
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> Path:
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Circuit</title><body style="margin:0">{self.html}</body></html>'
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)


def draw(circuit: Circuit, *, title: str = "", table_rows: int = 100) -> Drawing:
    """Draw a circuit (prune it first for one without loose ends). The table lists its `table_rows` strongest
    edges.

    >>> draw(scores.circuit(100).pruned()).save("circuit.html")    # doctest: +SKIP
    """
    graph = circuit.graph
    lines = _lines(circuit)
    names = {n for line in lines for n in line[:2]}
    shown = [s for s in graph.sources if s.name in names]
    layers = [-1, *sorted({s.layer for s in shown} - {-1}), len(graph.groups)]
    columns = sorted({s.unit for s in shown if s.kind == "head"})
    wide, high = 110 + (len(columns) + 1) * (WIDTH + GAP), len(layers) * ROW + 30
    places: dict[str, tuple[float, float]] = {}
    for s in shown:
        y = high - (layers.index(s.layer) + 1) * ROW + 34
        column = columns.index(s.unit) if s.kind == "head" else len(columns)
        places[s.name] = (100 + column * (WIDTH + GAP), y - (ROW - HEIGHT) / 2 * (s.kind == "mlp"))
    embeds = [s.name for s in shown if s.kind == "embed"]
    middle = 100 + len(columns) * (WIDTH + GAP) / 2
    for i, name in enumerate(embeds):
        places[name] = (middle + (i - (len(embeds) - 1) / 2) * (WIDTH + GAP), high - ROW + 34)
    places["logits"] = (middle, high - len(layers) * ROW + 10)
    largest = max((abs(score) for *_, score in lines), default=1.0) or 1.0
    paths = "".join(_path(places, line, largest) for line in sorted(lines, key=lambda line: abs(line[3])))
    boxes = "".join(_box(name, *at, head=".heads." in name) for name, at in places.items())
    labels = "".join(
        f'<text class="layer" x="4" y="{high - (i + 1) * ROW + 50}">layer {layer}</text>'
        for i, layer in enumerate(layers)
        if 0 <= layer < len(graph.groups)
    )
    about = f"{len(circuit)} of {len(graph)} edges ({circuit.fraction:.2%}), {len(circuit.nodes)} nodes"
    about += f"; the rest switched off by {circuit.ablation}" if circuit.ablation else ""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high}" width="{wide:.0f}" role="img" '
        f'aria-label="{html.escape(f"Circuit of {about}; the table lists its edges", quote=True)}">{paths}{boxes}{labels}</svg>'
    )
    table = "".join(
        f"<tr><td>{html.escape(r.source)}</td><td>{html.escape(r.reader)}</td><td>{r.score:.4g}</td></tr>"
        for r in circuit.table().head(table_rows).itertuples()
    )
    page = (
        f'<div class="pc"><style>{STYLE}</style><strong>{html.escape(title or "Circuit")}</strong><br>{html.escape(about)}<br>'
        '<label>hide the weakest <input type="range" min="0" max="100" value="0"> </label><output></output> '
        '<span style="color:var(--plus)">— supports</span> <span style="color:var(--minus)">- - works against</span>'
        f'<div class="scroll">{svg}</div><details><summary>the strongest edges as a table</summary><table><tr><th>source</th>'
        f"<th>reader</th><th>score</th></tr>{table}</table></details><script>{SCRIPT}</script></div>"
    )
    return Drawing(svg.replace("<svg ", '<svg class="pc" ', 1), page)


Line = tuple[str, str, str, float]  # from, to, port, score


def _lines(circuit: Circuit) -> list[Line]:
    """Edges between boxes; a key or value of a group goes to those of its heads that say something."""
    graph, heard = circuit.graph, circuit.on.any(1)
    owners: dict[int, list[int]] = {}
    for i in range(len(graph.sources)):
        for r in graph.inputs_of(i):
            owners.setdefault(r, []).append(i)
    found = []
    for s, r in circuit.on.nonzero().tolist():
        mine = owners.get(r, [])
        to = [graph.sources[i].name for i in mine if heard[i]] or [graph.sources[i].name for i in mine] or ["logits"]
        found += [(graph.sources[s].name, name, graph.readers[r].kind, float(circuit.scores[s, r])) for name in to]
    return found


def _path(places: dict[str, tuple[float, float]], line: Line, largest: float) -> str:
    source, target, port, score = line
    (x0, y0), (x1, y1) = places[source], places[target]
    x0, x1, y1 = x0 + WIDTH / 2, x1 + WIDTH * PORTS.get(port, 0.5), y1 + HEIGHT
    bend = max(20.0, (y0 - y1) * 0.45)
    sign = "plus" if score > 0 else "minus" if score < 0 else "plain"
    label = html.escape(f"{source} -> {target} ({port}): {score:.4g}")
    return (
        f'<path class="{sign}" data-size="{abs(score):.6g}" data-from="{source}" data-to="{target}" '
        f'stroke-width="{0.6 + 3.4 * abs(score) / largest:.2f}" '
        f'd="M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 - bend:.1f} {x1:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"><title>{label}</title></path>'
    )


def _box(name: str, x: float, y: float, head: bool) -> str:
    words = name.split(".")
    text = (
        f"{words[1]}.{words[-1]}"
        if head
        else f"mlp {words[1]}"
        if name.endswith(".mlp")
        else name.replace("embed.", "")
    )
    ports = "".join(
        f'<text class="port" x="{x + WIDTH * at:.1f}" y="{y + HEIGHT - 2:.1f}">{p}</text>'
        for p, at in PORTS.items()
        if head
    )
    return (
        f'<g data-node="{name}"><rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + WIDTH / 2:.1f}" y="{y + (11 if head else 16):.1f}">{html.escape(text)}</text>{ports}</g>'
    )
