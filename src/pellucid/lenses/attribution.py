"""Which parts of the model wrote the answer into the residual stream?

The last residual is a sum: the embedding, plus what every attention and MLP (or head, or neuron) added. Once
the scale of the final norm is held at its value in this run, logits are linear in that sum, so each summand
has its share:

    logit(A) - logit(W) = sum over components of  u . c  +  constant,     u = frozen_norm^T (W_U[A] - W_U[W])

(Elhage et al. 2021; "direct" because what a component does through later ones is not counted.) What is
counted is what is really added: after the component's own norm in sandwich families, times the residual
multiplier where there is one. In post-norm families every block's norm is held too, and a contribution is
followed through all of them. Where logits are soft-capped, the logit before the cap is attributed. The shares
are checked to add up to the model's own logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.frozen import Map, affine, linearised
from pellucid.anatomy.layout import TOKENS
from pellucid.anatomy.modes import uncached
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE, error
from pellucid.anatomy.structure import Attention, Block, Mlp, State, Tap
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.places import answer_position, kind_of
from pellucid.engine.run import Session
from pellucid.errors import Refused, one_of
from pellucid.lenses.lens import Positions, one_column
from pellucid.metrics import Answers, logit, logit_difference
from pellucid.model import Model
from pellucid.question import spelled
from pellucid.results import Result
from pellucid.technique import settle, technique

By = Literal["layer", "head", "neuron"]


@technique
def direct_logit_attribution(
    model: Model,
    prompt: Any,
    target: Answers | None = None,
    *,
    against: Answers | None = None,
    by: By = "layer",
    positions: Positions = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
) -> Result:
    """Split the logit of `target` (minus that of `against`) at one position into what each component wrote.

    `by` "layer": embedding, each attention, each MLP; "head": each head, and what the attention adds beside
    them (`rest`: biases); "neuron": each neuron, and the rest of its MLP. A block without heads or neurons
    stays whole. The target is by default the model's own prediction, read at the one position of `positions`, by default
    where the prompts are answered (the last token, the mask). Gives `contribution` [component] with
    coordinates `layer`, `part` and `unit` (-1 where there is none), `total`, the logit (difference) they add
    up to, and `gap`, how far they miss it; `prompt` comes first for several prompts. `decoder` is the
    decoder's text in an encoder-decoder. Under `edits` it is the edited run that is split; a site they write to counts as
    edited.

    Refused where the head is not linear after its norms (masked models with a transform), where an edit adds to the
    residual itself (it is no component), or a proof it needs failed. InputError for more than one position.

    >>> dla = direct_logit_attribution(model, "The capital of France is", by="head")
    >>> dla.top(3)
    component layer part unit contribution total gap
    ...
    """
    one_of(by, By, "cannot attribute by ")
    inputs = model.inputs(prompt, decoder=decoder)
    positions = answer_position(model, inputs) if positions is None else positions
    if positions is None and "head" not in model.anatomy.refusals:
        raise Refused(
            f"direct logit attribution splits a logit that is read at one token, and {model.name} gives a "
            f"{kind_of(model, inputs)}: where it labels words, name one with positions="
        )
    shares = Shares(model, inputs, positions, by, edits)
    if target is None:
        target = shares.prediction
        settle(target=target)
    wanted = logit(target) if against is None else logit_difference(target, against)
    bound = model.bind(wanted, len(inputs))
    shares.split(bound.score)
    return shares.result(target)


@dataclass(eq=False)
class Component:
    """What is added to the stream: a site's name, where it is, and its share [prompt] or [prompt, unit]."""

    name: str
    layer: int
    part: str
    share: Tensor

    def rows(self) -> Iterator[tuple[str, int, str, int, Tensor]]:
        if self.share.ndim == 1:
            yield self.name, self.layer, self.part, -1, self.share
        for unit in range(self.share.shape[1] if self.share.ndim == 2 else 0):
            yield f"{self.name}.{unit}", self.layer, self.part, unit, self.share[:, unit]


@dataclass(eq=False)
class Shares:
    """Walks from the logits back through the blocks with `u` [prompt, 1, d_model], what the logit reads."""

    model: Model
    inputs: Inputs
    positions: Positions
    by: By
    edits: Sequence[Edit] = ()
    components: list[Component] = field(default_factory=list)

    def __post_init__(self) -> None:
        anatomy = self.model.anatomy
        self.stack = anatomy.stacks[-1]
        if anatomy.head is None or "head" in anatomy.refusals:
            why = anatomy.refusals.get("head", "this model has no head that reads its last residual")
            raise Refused(f"direct logit attribution is refused on this model: {why}")
        self.head = anatomy.head
        taps = {tap for block in self.stack.blocks for tap in self._taps(block)}
        kept, output = self._met(taps)
        stream = self.inputs.stream("")
        columns = one_column(self.inputs, self.positions, "direct logit attribution")[:, None]
        last = kept[self.stack.blocks[-1].taps["resid_post"]]
        if last.shape[:2] != stream.ids.shape or main_output(output).shape[:2] != stream.ids.shape:
            raise Refused("direct logit attribution needs one residual and one row of logits for every token")
        self.read = columns[:, 0] - stream.starts  # counted on each prompt's tokens
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.values = {tap: value[rows, columns] for tap, value in kept.items()}  # [prompt, 1, ...]
        logits = main_output(output)
        self.native = logits[rows, columns].detach()
        self.constant = torch.zeros(len(self.inputs), device=logits.device)

    def _met(self, taps: set[Tap]) -> tuple[dict[Tap, Tensor], Any]:
        """What the run, under its edits, holds at some taps, and its output."""
        anatomy, session = (
            self.model.anatomy,
            Session(self.model.anatomy, self.inputs, (), self.model.resolved(self.edits)),
        )
        writing, kept = session.handlers(), {}

        def heard(tap: Tap) -> Handler:
            def handle(x: Tensor) -> Tensor | None:
                made = writing[tap](x) if tap in writing else None
                if tap in taps:
                    kept[tap] = (x if made is None else made).detach().clone()
                return made

            return handle

        handlers = {tap: heard(tap) for tap in dict.fromkeys((*writing, *taps))}
        with torch.no_grad(), Wiretap(anatomy.module, handlers, len(self.inputs)) as wire:
            output = anatomy.module(**{**uncached(anatomy.module), **self.inputs.tensors})
        session.check(wire)
        return kept, output

    def _taps(self, block: Block) -> Iterator[Tap]:
        terms = [t for s in block.states for t in s.terms]
        added = [t.source for t in terms if t.source != "in" and not t.source.startswith("state")]
        for part in ("resid_pre", "resid_post", *added):
            if part not in block.taps:
                why = block.refused.get(part) or block.refused.get("resid", "it is not on the map")
                site = f"{self.stack.prefix}layers.{block.index}.{part}"
                raise Refused(f"direct logit attribution needs {site!r}, which is refused on this model: {why}")
            yield block.taps[part]
        if block.taps["resid_pre"].layout.canonical != TOKENS or any(t.carried for t in terms):
            raise Refused("this model mixes its residual streams by weights of the pass: shares do not add up")
        yield from (state.norm_in for state in block.states if state.norm_in is not None)
        units = {
            "head": [f"{part}.z_out" for part in block.attentions],
            "neuron": [f"{part}.neurons" for part in block.mlps],
        }
        yield from (block.taps[part] for part in units.get(self.by, ()) if part in block.taps)

    @property
    def prediction(self) -> list[int]:
        found: list[int] = self.native[:, 0].argmax(-1).tolist()
        return found

    # ---- from the logits to the embedding

    def split(self, score: Any) -> None:
        """Follow `score`, linear in the logits [prompt, 1, vocabulary], back through head and blocks."""
        resid = self.values[self.stack.blocks[-1].taps["resid_post"]]
        after = self.head.after
        head, before = linearised(self.head.steps[:after], self.head.names[:after], resid)

        def tail(x: Tensor) -> Tensor:
            for step in self.head.steps[after:]:
                x = step(x)
            return x

        self.capped = not affine(tail, before)
        whole: Map = (lambda x: score(head(x))) if self.capped else (lambda x: score(tail(head(x))))
        self.total = score(before if self.capped else self.native)
        u = self._pull(whole, resid)
        for block in reversed(self.stack.blocks):
            u = self._state(block, block.states[-1], u)
        self._add("embed", -1, "embed", _dot(u, self.values[self.stack.blocks[0].taps["resid_pre"]]))
        self.components.reverse()
        self._add("constant", -1, "constant", self.constant)

    def _pull(self, function: Map, like: Tensor) -> Tensor:
        """The gradient [prompt, 1, d] of an affine map to [prompt]; its value at zero joins the constant."""
        with torch.enable_grad():
            zero = torch.zeros_like(like).requires_grad_()
            value = function(zero)
            (u,) = torch.autograd.grad(value.sum(), zero)
        self.constant = self.constant + value.detach()
        return u

    def _state(self, block: Block, state: State, u: Tensor) -> Tensor:
        """Give a state's contributions their shares; returns the direction the block's input is read in."""
        if state.norm_in is not None:
            module = self.model.module.get_submodule(state.norm_in.module)
            norm, _ = linearised([module], [state.norm_in.module], self.values[state.norm_in])
            outer = u
            u = self._pull(lambda x: _dot(norm(x), outer), u)
        if state.constant is not None:
            self.constant = self.constant + _dot(u, state.constant.expand_as(u))
        entering = torch.zeros_like(u)
        for term in reversed(state.terms):
            direction = u * term.coefficient
            if term.source == "in":
                entering = entering + direction
            elif term.source.startswith("state"):
                entering = entering + self._state(block, block.states[int(term.source.split()[1])], direction)
            else:
                self._contribution(block, term.source, direction)
        return entering

    # ---- one contribution, whole or by heads or neurons

    def _contribution(self, block: Block, part: str, u: Tensor) -> None:
        site = f"{self.stack.prefix}layers.{block.index}.{part}"
        whole = _dot(u, self.values[block.taps[part]])
        area = part.partition(".")[0]
        attention, mlp = block.attentions.get(area), block.mlps.get(area)
        port = {"head": "z_out", "neuron": "neurons"}.get(self.by, "")
        what: Attention | Mlp | None = (attention if port == "z_out" else mlp) if port else None
        tap = block.taps.get(f"{area}.{port}")
        inner = self._inside(block, tap, what, u) if what is not None and tap is not None else None
        if inner is None:
            self._add(site, block.index, part, whole)
            return
        units, rest = inner
        kind = "heads" if port == "z_out" else "neurons"
        self._add(site.replace(".out", ".rest"), block.index, f"{area}.rest", rest)
        self._add(site.replace(".out", f".{kind}"), block.index, f"{area}.{kind}", units)

    def _inside(self, block: Block, tap: Tap, what: Attention | Mlp, u: Tensor) -> tuple[Tensor, Tensor] | None:
        """Shares [prompt, unit] of what enters an output projection and [prompt] of the biases added to it.

        None where it does not reach the stream linearly: the contribution then stays whole.
        """
        linear, path = what.linear, what.path
        given = self.values[tap].flatten(2)  # [prompt, 1, unit * width]
        if linear is None or linear.width != given.shape[2] or path is None or path.onward is None:
            return None
        count = what.heads if isinstance(what, Attention) else given.shape[2]
        weight, bias = linear_map(self.model.module.get_submodule(linear.module), linear.shape)
        weight = weight.to(given.dtype)
        constant = torch.zeros_like(weight[0]) if bias is None else bias
        onward, made = linearised([s for _, s in path.onward], [n for n, _ in path.onward], given @ weight + constant)
        out = block.taps[f"{what.part}.out"]
        if error(made * out.layout.scale, self.values[out]) > TOLERANCE.get(given.dtype, 4e-2):
            return None  # something on the way, a convolution for instance, also reads other positions
        with torch.enable_grad():
            zero = torch.zeros_like(made).requires_grad_()
            value = _dot(onward(zero), u) * out.layout.scale
            (direction,) = torch.autograd.grad(value.sum(), zero)
        shares = (given * (direction @ weight.T))[:, 0].unflatten(1, (count, -1)).sum(-1)
        return shares, value.detach() + _dot(direction, constant.expand_as(direction))

    def _add(self, name: str, layer: int, part: str, share: Tensor) -> None:
        self.components.append(Component(name, layer, part, share.detach()))

    # ---- what is handed back

    def result(self, target: Any) -> Result:
        rows = [row for component in self.components for row in component.rows()]
        shares = torch.stack([row[4] for row in rows], 1)
        gap = shares.double().sum(1) - self.total.double()
        worst, scale = float(gap.abs().max()), max(1.0, float(shares.abs().max()))
        if worst > 30 * TOLERANCE.get(self.native.dtype, 4e-2) * scale:
            why = "an edit adds to the residual itself" if self.edits else "the map of this model is not additive"
            raise Refused(f"the shares miss the logit by {worst:.1e}: {why}")
        tokens = [row[i] for row, i in zip(self.inputs.stream("").labels, self.read.tolist(), strict=True)]
        data = xr.Dataset(
            {
                "contribution": (("prompt", "component"), shares.float().cpu().numpy()),
                "total": ("prompt", self.total.detach().float().cpu().numpy()),
                "gap": ("prompt", gap.float().cpu().numpy()),
            },
            coords={
                "component": [row[0] for row in rows],
                "layer": ("component", np.array([row[1] for row in rows])),
                "part": ("component", [row[2] for row in rows]),
                "unit": ("component", np.array([row[3] for row in rows])),
                "token": ("prompt", tokens),
            },
            attrs={"attributed": "logit before the soft cap" if self.capped else "logit", "by": self.by},
        )
        data = data.isel(prompt=0) if len(self.inputs) == 1 else data
        return Result(data, kind="direct logit attribution", title=f"What wrote {spelled(self.model, target)}")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[prompt, 1, d] twice -> [prompt]"""
    return (a * b).sum((1, 2))
