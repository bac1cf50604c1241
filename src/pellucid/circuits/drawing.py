"""How does a circuit look? One self-contained piece of HTML: no library, no request, works in a notebook and
on paper.

Depth runs upwards from the embedding to the logits, an encoder below its decoder, MLPs stand on the right; where
nodes are parted by position, each position has its own columns. A head has three ports below (query, key, value)
and one above; blue edges support the answer, orange ones work against it, and the wider an edge the larger its score.
The slider hides weak edges; beneath is the same as a table.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from pellucid.circuits.circuit import Circuit
from pellucid.circuits.graph import Reader, Source

WIDTH, HEIGHT, GAP, ROW = 62, 24, 18, 72
PORTS = {"q": 0.2, "k": 0.5, "v": 0.8}
BESIDE = ("mixer", "mlp", "neuron")  # to the right of the heads
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
    """The drawing of a circuit: shows itself in a notebook; `save` writes a page, or the picture as .svg."""

    svg: str
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> Path:
        if Path(path).suffix == ".svg":
            Path(path).write_text(self.svg.replace(">", f"><style>{STYLE}</style>", 1), encoding="utf-8")
            return Path(path)
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
    nodes: list[Node] = [*graph.sources, *(r for r in graph.readers if r.kind == "logits")]
    nodes = [n for n in nodes if n.name in names or n.name == "logits"]
    layers = sorted({-1, graph.depth, *(n.depth for n in nodes)})
    columns, centres, wide = _columns(nodes, graph.split.places)
    high = len(layers) * ROW + 50
    places: dict[str, tuple[float, float]] = {}
    for n in nodes:
        y = high - 20 - (layers.index(n.depth) + 1) * ROW + 34
        places[n.name] = (columns[_slot(n)], y - (ROW - HEIGHT) / 2 * (n.kind in BESIDE))
    largest = max((abs(score) for *_, score in lines), default=1.0) or 1.0
    paths = "".join(_path(places, line, largest) for line in sorted(lines, key=lambda line: abs(line[3])))
    boxes = "".join(_box(n, *places[n.name]) for n in nodes)
    rows = {n.depth: f"{n.stack or 'layer'} {n.layer}" for n in nodes if 0 <= n.depth < graph.depth}
    labels = "".join(
        f'<text class="layer" x="4" y="{high - 20 - (layers.index(depth) + 1) * ROW + 50}">{html.escape(label)}</text>'
        for depth, label in rows.items()
    ) + "".join(f'<text x="{x:.1f}" y="{high - 6}">{html.escape(f"@{p}")}</text>' for p, x in centres.items() if p)
    about = f"{len(circuit)} of {len(graph)} edges ({circuit.fraction:.2%}), {len(circuit.nodes)} nodes"
    about += f"; the rest switched off by {circuit.how}" if circuit.how else ""
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
Node = Source | Reader
Slot = tuple[str, int, str, int]  # position, kind of column, attention, head


def _slot(node: Node) -> Slot:
    if node.kind == "head":
        return node.position, 0, node.part, node.unit
    if node.kind in BESIDE:
        return node.position, 1, node.kind, node.unit
    return node.position, 2, f"{node.kind} {node.name.partition('@')[0]}", 0


def _columns(nodes: list[Node], positions: tuple[str, ...]) -> tuple[dict[Slot, float], dict[str, float], float]:
    """x of every column, the middle of every position, and the whole width."""
    found: dict[Slot, float] = {}
    centres: dict[str, float] = {}
    x = 100.0
    for position in [p for p in positions or ("",) if any(n.position == p for n in nodes)]:
        own = sorted({_slot(n) for n in nodes if n.position == position})
        inner, left = [s for s in own if s[1] < 2], x
        for slot in inner or own[:1]:
            found[slot] = x
            x += WIDTH + GAP
        centres[position] = (left + x - GAP) / 2
        for kind in ("embed", "logits"):  # in the middle, below and above
            ends = [s for s in own if s[1] == 2 and s[2].startswith(kind)]
            for i, slot in enumerate(ends):
                found[slot] = centres[position] - WIDTH / 2 + (i - (len(ends) - 1) / 2) * (WIDTH + GAP)
        x += GAP * bool(position)
    return found, centres, x


def _lines(circuit: Circuit) -> list[Line]:
    """Edges between boxes; a key or value of several heads (or positions) goes to those that say something."""
    graph, heard = circuit.graph, circuit.on.any(1).tolist()
    found = []
    for s, r in circuit.on.nonzero().tolist():
        mine, reader = graph.owners(r), graph.readers[r]
        to = [graph.sources[i].name for i in mine if heard[i]] or [graph.sources[i].name for i in mine] or [reader.name]
        found += [(graph.sources[s].name, name, reader.kind, float(circuit.scores[s, r])) for name in to]
    return found


def _path(places: dict[str, tuple[float, float]], line: Line, largest: float) -> str:
    source, target, port, score = line
    (x0, y0), (x1, y1) = places[source], places[target]
    x0, x1, y1 = x0 + WIDTH / 2, x1 + WIDTH * PORTS.get(port, 0.5), y1 + HEIGHT
    bend = max(20.0, (y0 - y1) * 0.45)
    sign = "plus" if score > 0 else "minus" if score < 0 else "plain"
    label = html.escape(f"{source} -> {target} ({port}): {score:.4g}")
    return (
        f'<path class="{sign}" data-size="{abs(score):.6g}" data-from="{html.escape(source)}" data-to="{html.escape(target)}" '
        f'stroke-width="{0.6 + 3.4 * abs(score) / largest:.2f}" '
        f'd="M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 - bend:.1f} {x1:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"><title>{label}</title></path>'
    )


def _box(node: Node, x: float, y: float) -> str:
    head = node.kind == "head"
    if head:
        text = f"{'×' if node.part == 'cross' else ''}{node.layer}.{node.unit}"
    elif node.kind == "neuron":
        text = f"n{node.layer}.{node.unit}"
    elif node.kind in BESIDE:
        text = f"{node.kind} {node.layer}"
    else:
        text = node.name.partition("@")[0].replace("embed.", "").replace("coder.embed", "c. embed")
    ports = "".join(
        f'<text class="port" x="{x + WIDTH * at:.1f}" y="{y + HEIGHT - 2:.1f}">{p}</text>'
        for p, at in PORTS.items()
        if head
    )
    return (
        f'<g data-node="{html.escape(node.name)}"><title>{html.escape(node.name)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + WIDTH / 2:.1f}" y="{y + (11 if head else 16):.1f}">{html.escape(text)}</text>{ports}</g>'
    )
