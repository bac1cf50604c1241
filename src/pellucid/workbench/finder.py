"""Which neurons does this prompt excite, and which of them write the answer?

Sorted by activation: every neuron at the token where it is strongest (or at one position). Sorted by effect: its share
of the answer's logit (minus that of the other prompt's answer) by direct logit attribution, which exists only where the
answer is read. The page of one neuron shows its activation along the prompt and the words it writes
(`pellucid.neurons.logit_effects`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pellucid import metrics
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.lenses.attribution import Shares
from pellucid.neurons import logit_effects
from pellucid.neurons.knowledge import layer_of, neuron_sites
from pellucid.views import pages
from pellucid.views import schema as s
from pellucid.views.forms import column
from pellucid.views.question import Question
from pellucid.views.schema import Context, Document, Fact, Numbers
from pellucid.workbench.messages import NeuronRow

WORDS = 12
NEURON = re.compile(r"(?:\w+\.)?layers\.\d+\.mlp\.neurons\.\d+")


@dataclass(frozen=True)
class Wanted:
    """What is looked for; `layer` and `position` None are all."""

    sort: str = "activation"
    layer: int | None = None
    position: int | None = None
    top: int = 50


def neurons(question: Question, wanted: Wanted) -> tuple[list[NeuronRow], Document, str]:
    """The first neurons, the same as a table, and a remark. InputError for an unknown order; Refused without neurons."""
    if wanted.sort not in ("activation", "effect"):
        raise InputError(f"neurons can be sorted by 'activation' or 'effect', not by {wanted.sort!r}")
    model, note = question.model, ""
    sites = neuron_sites(model)
    layers = [layer_of(site) for site in sites]
    if wanted.layer is not None and wanted.layer not in layers:
        raise InputError(
            f"there are no neurons in layer {wanted.layer}; layers with neurons: {layers[0]} to {layers[-1]}"
        )
    chosen = [site for site in sites if wanted.layer is None or layer_of(site) == wanted.layer]
    with torch.no_grad():
        run = model.run(question.inputs, keep=chosen)
    values = [run.tensor(site)[0].float().cpu() for site in chosen]  # [position, neuron] each
    try:
        effects = direct(question, chosen)
    except PellucidError as refusal:
        if wanted.sort == "effect":
            raise
        effects, note = None, f"No effects here: {refusal}"
    length, answered = len(values[0]), question.position
    at = wanted.position
    if at is not None and not -length <= at < length:
        raise InputError(f"position {at} is outside the prompt, which has {length} tokens")
    if wanted.sort == "effect" and at is not None and at % length != answered:
        raise InputError(f"direct effects exist only at position {answered}, where the answer is read")
    at = answered if wanted.sort == "effect" else None if at is None else at % length
    rows = _ranked(chosen, values, effects, at, answered, wanted)
    return rows, _table(question, rows, wanted.sort), note


def _ranked(
    sites: Sequence[str], values: Sequence[Tensor], effects: list[Tensor] | None, at: int | None, answered: int, wanted: Wanted
) -> list[NeuronRow]:  # fmt: skip
    places = [v.abs().argmax(0) if at is None else torch.full((v.shape[1],), at) for v in values]
    strengths = [v.gather(0, p[None])[0] for v, p in zip(values, places, strict=True)]
    keys = effects if wanted.sort == "effect" and effects is not None else strengths
    flat = torch.cat(list(keys)).abs()
    best = flat.topk(min(max(1, wanted.top), len(flat), 1000)).indices.tolist()
    ends = np.cumsum([len(k) for k in keys])
    rows = []
    for i in best:
        layer = int(np.searchsorted(ends, i, "right"))
        n = i - (int(ends[layer - 1]) if layer else 0)
        position = int(places[layer][n])
        effect = float(effects[layer][n]) if effects is not None and position == answered else None
        rows.append(
            NeuronRow(component=f"{sites[layer]}.{n}", layer=layer_of(sites[layer]), neuron=n, position=position,
                      activation=float(strengths[layer][n]), effect=effect)
        )  # fmt: skip
    return rows


def direct(question: Question, sites: Sequence[str]) -> list[Tensor]:
    """Per site the shares [neuron] of the answer's logit. Refused where logits are not linear in what neurons write."""
    if question.target is None or question.lacks("direct"):
        raise Refused(question.lacks("direct") or "this model has no answer that neurons could write")
    shares = Shares(question.model, question.inputs, question.last_first, "neuron")
    pair = None if question.counterfactual is None else question.against
    metric = (
        metrics.logit(question.target.id) if pair is None else metrics.logit_difference(question.target.id, pair.id)
    )
    shares.split(question.model.bind(metric).score)
    found = {c.name: c.share[0].float().cpu() for c in shares.components if c.part.endswith(".neurons")}
    missing = [site for site in sites if site not in found]
    if missing:
        raise Refused(f"what the neurons of {missing[0]!r} write does not reach the residual stream linearly")
    return [found[site] for site in sites]


def _table(question: Question, rows: Sequence[NeuronRow], sort: str) -> Document:
    tokens = question.answered
    columns = (
        column("layer", [r.layer for r in rows]), column("neuron", [r.neuron for r in rows]),
        column("token", [tokens[r.position] for r in rows]), column("position", [r.position for r in rows]),
        column("activation", [r.activation for r in rows], bar=max((abs(r.activation) for r in rows), default=1.0) or 1.0),
        column("effect", [float("nan") if r.effect is None else r.effect for r in rows], bar=max((abs(r.effect or 0.0) for r in rows), default=1.0) or 1.0),
    )  # fmt: skip
    data = s.Table(columns=columns, rows=len(rows), components=tuple(r.component for r in rows))
    return Document(title=f"Neurons by {sort}", data=data)


# ---- one neuron


def page(question: Question, component: str) -> tuple[Document, str]:
    """The page of one neuron on this prompt. InputError for a component that is no single neuron."""
    if not NEURON.fullmatch(component):
        raise InputError(f"{component!r} is no single neuron; name one as layers.3.mlp.neurons.17")
    model = question.model
    (site,) = model.sites(component)
    with torch.no_grad():
        run = model.run(question.inputs, keep=[site.whole])
    values = run.tensor(site)[0].float().cpu()  # [position]
    stream = run.stream(site)
    raises: tuple[s.Effect, ...] = ()
    lowers, note = raises, ""
    strongest = int(values.abs().argmax())
    facts = [Fact(name="strongest here", value=f"{float(values[strongest]):.3g} at {stream.labels[0][strongest]!r}")]
    try:
        found = logit_effects(model, component, top=WORDS).sel(unit=str(site))
        raises, lowers = pages.words(found.data, "raised"), pages.words(found.data, "lowered")
        facts.append(Fact(name="words", value="change of the logit for an activation of 1, at a residual of size 1"))
    except PellucidError as refusal:
        note = f"Which words it writes cannot be told: {refusal}"
    context = Context(tokens=stream.labels[0], values=Numbers.of(values.numpy()), note="this prompt")
    data = s.Neuron(component=str(site), contexts=(context,), raises=raises, lowers=lowers, facts=tuple(facts))
    return Document(title=f"Neuron {site.unit} of layer {site.layer}", data=data), note
