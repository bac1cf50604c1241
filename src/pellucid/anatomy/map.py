"""The map of a model and its proofs, and how it looks: one description, as plain data, and a tree drawn from that data.

Blocks that are alike are folded into one entry; every proof is shown with its error, every refusal with its
reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from pellucid.anatomy.answering import Answering
from pellucid.anatomy.fingerprint import Memo, parts
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Attention, Block, Mlp, Path, Proof, Stack, State, Unembedding
from pellucid.anatomy.weights import is_packed, lets_gradients_through
from pellucid.errors import Refused

MARK = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "dim")}
CLAIMS = {
    "coverage": "every block that attends is mapped",
    "taps": "every place where a tensor can be met is passed",
    "logits": "with everything kept, the logits are the native ones",
    "residual": "every residual is the one before plus the contributions",
    "chain": "every block receives what the one before hands over",
    "attention": "pattern times v is z, and z is what the native kernel gives",
    "projection": "z times the output projection makes the contribution",
    "heads": "where z is gated, a head stays that head; a projection reads nothing but z",
    "neurons": "neurons times the down projection make the contribution",
    "experts": "the experts' routed contributions add up to the native output",
    "position-wise": "neurons depend on their own position only",
    "reads": "changed columns of a projection change their own head or neuron and no other",
    "values": "random values put in for heads or neurons reach all that reads them",
    "unembedding": "the head, by the unembedding's own weights, makes the logits",
    "ablation": "a head switched off is that head's weights switched off",
}


@dataclass(repr=False)
class Anatomy:
    """The map of a model and its proofs. Print it to see the tree."""

    module: Any  # a transformers model
    stacks: tuple[Stack, ...]
    head: Unembedding | None
    proofs: list[Proof]
    refusals: dict[str, str]  # site pattern -> reason
    inputs: dict[str, Any]  # the probe the map was found and proven with
    route: str
    answering: Answering  # what its logits mean
    memo: Memo = field(init=False)  # what is worked out about the module later, for as long as its weights stay

    def __post_init__(self) -> None:
        self.memo = Memo(self.module)
        self.located: dict[Site, Any] = {}  # where sites are met, see `engine.locate`
        self._built = [(m._modules, list(m._modules.values())) for m in parts(self.module)]

    @property
    def outdated(self) -> bool:
        """Whether modules were exchanged since: an adapter was put in or taken out, a layer was replaced."""
        return any(list(now.values()) != then for now, then in self._built)

    def check(self) -> None:
        """Refused where it is outdated."""
        if self.outdated:
            raise Refused(
                "modules of this model were exchanged since it was opened (an adapter put in or taken out): its map is "
                "that of before; ask the model anew, or open it again with pl.load"
            )

    def check_gradients(self) -> None:
        """Refused where a layer lets no gradient through: beside the residual stream it would be missing unseen."""
        name = self.memo("what lets no gradient through", lambda: next(self._blind(), ""))
        if name:
            raise Refused(
                f"no gradient passes {name!r}: its weights are quantised and its kernel is for inference only; use a "
                "method that only runs the model (ablation, patching, occlusion), or load it unquantised"
            )

    def _blind(self) -> Iterator[str]:
        """Packed linear modules on the map without a gradient; each class is tried once."""
        tried: set[Any] = set()
        for block in (b for s in self.stacks for b in s.blocks):
            linears = [(linear.module, linear.shape) for linear in block.linears]
            readers = [(r.modules[0], (r.width,)) for found in block.reads.values() for r in found if r.modules]
            for name, shape in (*linears, *readers):
                module = self.module.get_submodule(name)
                kind = type(module), *(type(p) for p in module.parameters())
                if kind in tried or not is_packed(module):
                    continue
                tried.add(kind)
                if not lets_gradients_through(module, shape):
                    yield name

    @property
    def complete(self) -> bool:
        return all(p.holds is not False for p in self.proofs)

    def tree(self) -> Tree:
        """The map as a rich tree: stacks, blocks folded when alike, the head, every proof, every refusal."""
        return tree(self)

    def to_dict(self) -> dict[str, Any]:
        """What the tree shows, as plain data."""
        return describe(self)

    def to_json(self) -> str:
        """What the tree shows, as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        return text(self)


# ---- as data


def describe(anatomy: Anatomy) -> dict[str, Any]:
    """The map and its proofs as data for JSON: only names, numbers, lists and dictionaries."""
    applying = [p for p in anatomy.proofs if p.holds is not None]
    return {
        "model": type(anatomy.module).__name__,
        "complete": anatomy.complete,
        "proven": f"{sum(bool(p.holds) for p in applying)} of {len(applying)} proofs that apply hold",
        "attention": anatomy.route,
        "stacks": [_stack(s) for s in anatomy.stacks],
        "head": _head(anatomy.head),
        "proofs": [{"name": p.name, "holds": p.holds, "error": p.error, "detail": p.detail} for p in anatomy.proofs],
        "refused": dict(anatomy.refusals),
    }


def _stack(stack: Stack) -> dict[str, Any]:
    return {
        "name": stack.name,
        "layers": len(stack.blocks),
        "d_model": stack.d_model,
        "causal": stack.causal,
        "blocks": [{"layers": layers, **entry} for layers, entry in _folded(stack.blocks)],
    }


def _folded(blocks: tuple[Block, ...]) -> list[tuple[list[int], dict[str, Any]]]:
    """Descriptions of unlike blocks, each with the layers it is true of."""
    found: list[tuple[list[int], dict[str, Any]]] = []
    for block in blocks:
        entry = _block(block)
        alike = next((layers for layers, known in found if known == entry), None)
        if alike is None:
            found.append(([block.index], entry))
        else:
            alike.append(block.index)
    return found


def _block(block: Block) -> dict[str, Any]:
    return {
        "form": block.form,
        "residual": [_state(state) for state in block.states],
        "attention": {a.part: _attention(a, block) for a in block.attentions.values()},
        "mlp": {m.part: _mlp(m, block) for m in block.mlps.values()},
        "sites": sorted(block.taps),
        "module": block.whole,
    }


def _state(state: State) -> str:
    """`norm(in + 0.9 attn.out + constant)`"""
    terms = []
    for term in state.terms:
        c = term.coefficient
        size = "" if c == 1.0 else f"{c:.3g} " if isinstance(c, float) else "vector "
        terms.append(f"mix({size}{term.source})" if term.carried is not None else f"{size}{term.source}")
    total = " + ".join(terms + (["constant"] if state.constant is not None else []))
    return total if state.norm_out is None else f"{_local(state.norm_out.module)}({total})"


def _attention(a: Attention, block: Block) -> dict[str, Any]:
    return {
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "d_head": a.d_head,
        "d_value": a.d_value,
        "route": a.route,
        "gated": a.gated,
        "module": _inside(a.module, block),
        "output": _output(_inside(a.o_proj, block) if a.o_proj else None, "z", a.path),
    }


def _mlp(m: Mlp, block: Block) -> dict[str, Any]:
    if m.experts is not None:
        e = m.experts
        return {
            "experts": e.count,
            "selected": e.selected,
            "neurons": e.d_neurons,
            "module": _inside(e.module, block),
        }
    width = m.linear.width if m.linear is not None else None
    return {
        "neurons": width,
        "output": _output(_inside(m.down_proj, block) if m.down_proj else None, "neurons", m.path),
    }


def _output(linear: str | None, given: str, path: Path | None) -> str | None:
    """`post_norm(o_proj(z))`, or None where a contribution is no chain from one projection."""
    if linear is None or path is None:
        return None
    made = f"{_local(linear)}({given})"
    for name in path.names:
        made = f"{_local(name)}({made})"
    return made


def _head(head: Unembedding | None) -> dict[str, Any] | None:
    if head is None:
        return None
    return {
        "steps": [_local(name) for name in head.names],
        "norm": head.norm.module if head.norm is not None else None,
        "unembedding": head.unembed or "an operation of the head",
    }


def _inside(name: str, block: Block) -> str:
    inner = name.removeprefix(f"{block.module}.")
    return inner if inner != name else _local(name)


def _local(name: str) -> str:
    """The last word of a module's name, without the number it has in a list."""
    return next((word for word in reversed(name.split(".")) if not word.isdigit()), name)


# ---- the tree


def tree(anatomy: Anatomy) -> Tree:
    """The map as a rich tree, for terminals of any width."""
    data = describe(anatomy)
    state = "green" if data["complete"] else "bold red"
    title = Text.assemble(
        (data["model"], "bold"),
        "  ",
        (data["proven"], state),
        (f"  ·  attention: {data['attention']}", "dim"),
    )
    root = Tree(title, guide_style="dim")
    for stack in data["stacks"]:
        _draw_stack(root, stack)
    if data["head"] is not None:
        root.add(Text.assemble(("head  ", "bold"), " → ".join(data["head"]["steps"])))
    proofs = root.add(Text("proofs", "bold"))
    for proof in data["proofs"]:
        mark, style = MARK[proof["holds"]]
        error = "" if proof["error"] is None else "exact" if proof["error"] == 0 else f"{proof['error']:.0e}"
        words = proof["detail"] or CLAIMS.get(proof["name"], "")
        proofs.add(Text.assemble((f"{mark} {proof['name']:<14}", style), f"{error:<7}", (words, "dim")))
    if data["refused"]:
        refused = root.add(Text("refused", "bold"))
        for reason, sites in _by_reason(data["refused"]).items():
            refused.add(Text.assemble((", ".join(sites), "yellow"), "  ", (reason, "dim")))
    return root


def _draw_stack(root: Tree, stack: dict[str, Any]) -> None:
    prefix = f"{stack['name']}." if stack["name"] else ""
    kind = {True: "causal", False: "bidirectional", None: "causality not probed"}[stack["causal"]]
    label = stack["name"] or "stack"
    facts = f"{stack['layers']} layers, d_model {stack['d_model']}, {kind}"
    node = root.add(Text.assemble((f"{label}  ", "bold"), facts))
    for block in stack["blocks"]:
        where = f"{prefix}layers.{ranges(block['layers'])}"
        form = block["form"] if block["module"] else f"{block['form']}, written in its parent"
        layer = node.add(Text.assemble((where, "cyan"), "  ", form))
        for state in block["residual"]:
            layer.add(Text.assemble(("residual  ", "dim"), state))
        for part, a in block["attention"].items():
            heads = f"{a['heads']} heads" + (
                f" on {a['kv_heads']} key-value heads" if a["kv_heads"] != a["heads"] else ""
            )
            width = f"width {a['d_head']}" + (f" (values {a['d_value']})" if a["d_value"] != a["d_head"] else "")
            gate = ", gated" if a["gated"] else ""
            _draw_part(layer, part, f"{heads}, {width}, {a['route']}{gate}", a["output"])
        for part, m in block["mlp"].items():
            _draw_part(layer, part, _mlp_facts(m), m.get("output"))


def _draw_part(layer: Tree, part: str, facts: str, output: str | None) -> None:
    node = layer.add(Text.assemble((f"{part}  ", "bold"), facts))
    if output is not None:
        node.add(Text(f"{part}.out = {output}", "dim"))


def _mlp_facts(m: dict[str, Any]) -> str:
    if "experts" in m:
        return f"{m['experts']} experts of {m['neurons']} neurons, {m['selected']} for a token"
    return "neurons refused" if m["neurons"] is None else f"{m['neurons']} neurons"


def ranges(numbers: list[int]) -> str:
    """
    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs = [[numbers[0], numbers[0]]]
    for a, b in pairwise(numbers):
        if b == a + 1:
            runs[-1][1] = b
        else:
            runs.append([b, b])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _by_reason(refused: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site, reason in refused.items():
        found.setdefault(reason, []).append(site)
    return found


def text(anatomy: Anatomy, width: int = 110) -> str:
    """The tree as plain text."""
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(tree(anatomy))
    return captured.get().rstrip()
