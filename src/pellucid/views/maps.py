"""How do the two maps of a model look: what it is made of, and who sends what to whom?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pellucid.anatomy.map import CLAIMS, describe
from pellucid.anatomy.map import Anatomy as Map
from pellucid.views import schema as s
from pellucid.views.cells import Cells, strongest
from pellucid.views.naming import site_of
from pellucid.views.schema import Fact, Numbers


def circuit(found: Any, groups: Mapping[str, str] | None = None) -> s.Circuit:
    """A circuit's edges between boxes; a key or value of several heads goes to those of them that say something.

    `groups` names parts by their site: those of one name stand as one box.
    """
    graph, heard = found.graph, found.on.any(1).tolist()
    nodes = [_node(each, groups or {}) for each in graph.sources]
    ends: dict[int, int] = {}  # readers that no part owns: the logits, perhaps once for each position
    deepest = max((n.layer for n in nodes), default=0)
    edges: list[tuple[int, int, str, float]] = []
    for source, r in found.on.nonzero().tolist():
        reader, mine = graph.readers[r], graph.owners(r)
        if not mine and r not in ends:
            ends[r] = len(nodes)
            nodes.append(
                s.Node(
                    component=reader.name,
                    label=reader.name.partition("@")[0],
                    type="logits",
                    layer=deepest + 1,
                    position=reader.position,
                )
            )
        to = [i for i in mine if heard[i]] or mine or [ends[r]]
        port = reader.kind if reader.kind in ("q", "k", "v") else ""
        edges += [(source, t, port, float(found.scores[source, r])) for t in to]
    about = f"{len(found)} of {len(graph)} edges ({found.fraction:.2%}), {len(found.nodes)} parts"
    about += f"; the rest switched off by {found.how}." if found.how else "."
    sources, targets, ports, scores = zip(*edges, strict=True) if edges else ((), (), (), ())
    return s.Circuit(nodes=tuple(nodes), sources=Numbers.of(np.array(sources, int)), targets=Numbers.of(np.array(targets, int)), ports=tuple(ports),
                     scores=Numbers.of(np.array(scores, float)), about=about)  # fmt: skip


def _node(source: Any, groups: Mapping[str, str]) -> s.Node:
    if source.kind == "embed":
        label = source.name.partition("@")[0].replace("embed.", "")
    else:
        kind = {
            "head": "cross " if source.part == "cross" else "",
            "mlp": "MLP ",
            "neuron": "neuron ",
            "mixer": "mixer ",
        }.get(source.kind, "")
        label = f"{source.stack[:3]} {kind}".lstrip() + (
            f"{source.layer}.{source.unit}" if source.unit >= 0 else str(source.layer)
        )
    return s.Node(
        component=source.name.partition("@")[0],
        label=label,
        type=source.kind,
        layer=source.depth,
        unit=source.unit,
        position=source.position,
        group=groups.get(site_of(source.name.partition("@")[0]), ""),
    )


def anatomy(found: Map) -> s.Anatomy:
    about = describe(found)
    stacks = []
    for stack, told in zip(found.stacks, about["stacks"], strict=True):
        blocks = []
        for entry in told["blocks"]:
            block = stack.blocks[entry["layers"][0]]
            attention = next(iter(block.attentions.values()), None)
            neurons = next((m.linear.width for m in block.mlps.values() if m.linear is not None), 0)
            blocks.append(
                s.Block(
                    layers=tuple(entry["layers"]), form=str(block.form), sites=tuple(sorted(block.taps)), heads=attention.heads if attention else 0,
                    kv_heads=attention.kv_heads if attention else 0, neurons=neurons, refused=tuple(Fact(name=k, value=v) for k, v in block.refused.items()),
                )
            )  # fmt: skip
        stacks.append(s.Stack(name=stack.name, width=stack.d_model, blocks=tuple(blocks)))
    proofs = tuple(
        s.Proof(name=p.name, claim=CLAIMS.get(p.name, ""), holds=p.holds, error=None if p.error is None or not np.isfinite(p.error) else float(p.error), detail=str(p.detail or ""))
        for p in found.proofs
    )  # fmt: skip
    refused = tuple(Fact(name=k, value=str(v)) for k, v in found.refusals.items())
    return s.Anatomy(model=about["model"], stacks=tuple(stacks), proofs=proofs, refused=refused)


def plain_circuit(data: s.Circuit) -> Cells:
    sources, targets, scores = data.sources.array(), data.targets.array(), data.scores.array()
    rows = [(data.nodes[sources[e]].label, data.nodes[targets[e]].label, data.ports[e], float(scores[e])) for (e,) in strongest(scores)]  # fmt: skip
    return ("from", "to", "port", "score"), rows, len(scores)


def plain_anatomy(data: s.Anatomy) -> Cells:
    said = {True: "holds", False: "fails", None: "does not apply"}
    return ("proof", "claim", ""), [(p.name, p.claim, said[p.holds]) for p in data.proofs], len(data.proofs)
