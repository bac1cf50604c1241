"""Which neurons does this prompt excite, and which of them write the answer?

Sorted by activation: every neuron at the token where it is strongest (or at one position). Sorted by effect: its share
of the answer's logit (minus that of the other prompt's answer) by direct logit attribution, which exists only where the
answer is read. The page of one neuron shows its activation along the prompt and the words it writes: its output direction
through the final norm, held at its scale on this prompt, and the unembedding, minus the mean over the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pellucid import metrics
from pellucid.anatomy.sites import Site
from pellucid.anatomy.weights import linear_map
from pellucid.engine.frozen import linearised
from pellucid.engine.locate import block_of
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.lenses.attribution import Shares
from pellucid.model import Model
from pellucid.neurons.knowledge import layer_of, neuron_sites
from pellucid.tasks.tokens import texts
from pellucid.views import schema as s
from pellucid.views.forms import column
from pellucid.views.question import Question
from pellucid.views.schema import Context, Document, Effect, Fact, Numbers
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
    facts: list[Fact] = []
    raises: tuple[Effect, ...] = ()
    lowers: tuple[Effect, ...] = ()
    note = ""
    strongest = int(values.abs().argmax())
    facts.append(
        Fact(name="strongest here", value=f"{float(values[strongest]):.3g} at {stream.labels[0][strongest]!r}")
    )
    try:
        words = written(question, site)
        raises, lowers = _effects(model, words, True), _effects(model, words, False)
        facts.append(
            Fact(name="words", value="change of the logit for an activation of 1, minus the vocabulary's mean")
        )
    except PellucidError as refusal:
        note = f"Which words it writes cannot be told: {refusal}"
    context = Context(tokens=stream.labels[0], values=Numbers.of(values.numpy()), note="this prompt")
    data = s.Neuron(component=str(site), contexts=(context,), raises=raises, lowers=lowers, facts=tuple(facts))
    return Document(title=f"Neuron {site.unit} of layer {site.layer}", data=data), note


def written(question: Question, site: Site) -> Tensor:
    """[vocabulary] what an activation of 1 adds to the logits, read where the answer is."""
    model, lacking = question.model, question.lacks("direct")
    block, head, stack = block_of(model.anatomy, site), model.anatomy.head, model.anatomy.stacks[-1]
    mlp = block.mlps.get(site.part.partition(".")[0])
    if lacking or head is None or "head" in model.anatomy.refusals or site.stack != stack.name:
        raise Refused(lacking or "it does not write to the stream that the head reads")
    if mlp is None or mlp.linear is None or mlp.path is None or "gate" in mlp.path.names:
        raise Refused("what it writes is worked on before it is added")
    if any(state.norm_in is not None for b in stack.blocks for state in b.states):
        raise Refused("every later layer of this model normalises the stream anew")
    last = f"{stack.prefix}layers.{len(stack.blocks) - 1}.resid_post"
    keep: list[str | Site] = [last, site.whole]
    with torch.no_grad():
        run = model.run(question.inputs, keep=keep)
        at = f"@{question.last_first}"
        weight, bias = linear_map(model.module.get_submodule(mlp.linear.module), mlp.linear.shape)
        given = run.tensor(f"{site.whole}{at}").flatten(2).to(weight.dtype)
        made = given @ weight + (0.0 if bias is None else bias)
        onward, _ = linearised(mlp.path.steps, mlp.path.names, made)
        assert isinstance(site.unit, int)
        row, zero = weight[site.unit][None, None], torch.zeros_like(made)
        direction = (onward(row) - onward(zero)) * block.taps[f"{mlp.part}.out"].layout.scale
        read, _ = linearised(head.steps[: head.after], head.names[: head.after], run.tensor(f"{last}{at}"))
        logits = (read(direction) - read(torch.zeros_like(direction)))[0, 0].float().cpu()
    return logits - logits.mean()


def _effects(model: Model, words: Tensor, largest: bool) -> tuple[Effect, ...]:
    found = words.topk(min(WORDS, len(words)), largest=largest)
    words = texts(model.tokenizer, found.indices).tolist()
    return tuple(Effect(word=word, value=v) for word, v in zip(words, found.values.tolist(), strict=True))
