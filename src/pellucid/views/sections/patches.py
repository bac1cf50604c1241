"""Where does the fact travel? Activation patching, layer by position."""

from __future__ import annotations

import numpy as np
import torch

from pellucid.causal import patching
from pellucid.engine.edits import Patch
from pellucid.results import Result
from pellucid.views.counterfactual import unrelated
from pellucid.views.evidence import Evidence, Foreign
from pellucid.views.markup import Html, join, number, percent, quoted, tag
from pellucid.views.page import Section, missing
from pellucid.views.question import WORK, Question
from pellucid.views.schema import Axis, Document, Grid, Numbers, Plane

TITLE = "Where does the fact travel?"
HALF = 0.5  # of the answer: what a place must bring back to be said to carry the fact
PLACES = 24  # that are patched from unrelated prompts as well


def patches(question: Question, evidence: Evidence) -> Section:
    if question.counterfactual is None:
        why = "patching needs a prompt of as many tokens with another answer, and replacing single words gave none: give one with --counterfactual “...”"
        return missing("patches", "The patches", TITLE, why)
    layers, positions = _places(question)
    effect, clean, corrupted, found = _patched(question, layers, positions)
    evidence.restored = float(np.nanmax(effect))
    evidence.arrives = _arrives(question, effect, layers, positions)
    evidence.foreign = _foreign(question, effect, layers, positions, clean, corrupted)
    lead = join(
        "The counterfactual is run (", _changed(question), f"; {question.metric_name} {number(corrupted, sign=True)} instead of {number(clean, sign=True)}), and before one layer, "
        "at one token, the state is put back to what it was on the prompt. 1 means that this alone brings the whole answer back, 0 that it does nothing: "
        "follow the strong colours down to see where the fact goes.",
    )  # fmt: skip
    care = (
        f"{_control(evidence)}“Enough to bring the answer back” is not “needed”: other places may carry the fact too."
    )
    if question.made:
        care += f" The counterfactual was made by pellucid ({question.made}); with another one the picture can differ."
    return Section(
        "patches", "The patches", TITLE, lead, _fewer(question, layers, positions) or "", (_view(question, effect, layers, positions),), care=care,
        finding=_finding(question, effect, layers, positions), results=found,
    )  # fmt: skip


def _view(question: Question, effect: np.ndarray, layers: list[int], positions: list[int]) -> Document:
    assert question.counterfactual is not None
    tokens = tuple(question.tokens[p] for p in positions)
    other = question.model.inputs(question.counterfactual)
    theirs = other.streams.get("encoder", other.stream("")).labels[0]
    data = Grid(
        rows=Axis(name="layer", labels=tuple(map(str, layers))),
        columns=Axis(name="token", labels=tokens, positions=tuple(positions), marked=tuple(positions.index(p) for p in question.changed if p in positions)),
        planes=(Plane(name="residual stream", values=Numbers.of(effect), component=f"{question.prefix}layers.{{row}}.resid_pre"),),
        unit="answer brought back", full=max(1.0, float(np.nanquantile(np.abs(effect), 0.99))), prompts=(tuple(question.tokens), tuple(theirs)),
    )  # fmt: skip
    return Document(title="Patching by layer and token", data=data)


def _changed(question: Question) -> str:
    """What differs, word by word: “Rome” instead of “Paris”."""
    assert question.counterfactual is not None
    other = question.model.inputs(question.counterfactual)
    theirs = other.streams.get("encoder", other.stream("")).labels[0]
    runs: list[list[int]] = []
    for p in question.changed:
        if runs and p == runs[-1][-1] + 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    said = [
        f"{quoted(''.join(theirs[p] for p in run))} instead of {quoted(''.join(question.tokens[p] for p in run))}"
        for run in runs
    ]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def _over(question: Question, layers: str = "*", position: int | str = "*") -> str:
    return f"{question.prefix}layers.{layers}.resid_pre@{position}"


def _places(question: Question) -> tuple[list[int], list[int]]:
    """Layers and positions to patch: all of them, or for a long prompt those that fit into `WORK`.

    Under a causal mask nothing before the first changed token can differ, so nothing is patched there.
    """
    stack, length = question.model.anatomy.stacks[0], len(question.tokens)
    layers, positions = list(range(len(stack.blocks))), list(range(length))
    if len(layers) * length * length <= 2 * WORK:
        return layers, positions
    first = question.changed[0] if stack.causal else 0
    near = {
        p + d
        for p in (*question.changed, question.position if len(question.inputs.streams) == 1 else length - 1)
        for d in (0, -1, 1)
    }
    wanted = sorted(p for p in near if first <= p < length)[:24]
    room = 2 * WORK // length
    rest = [p for p in positions[first:][::-1] if p not in wanted]
    wanted = sorted(wanted + rest[: max(0, room // len(layers) - len(wanted))])
    step = max(1, round(len(layers) * len(wanted) / room))
    return layers[::step] + ([] if (len(layers) - 1) % step == 0 else [layers[-1]]), wanted


def _patched(
    question: Question, layers: list[int], positions: list[int]
) -> tuple[np.ndarray, float, float, tuple[Result, ...]]:
    """Shares of the total effect [layer, position], and the metric without patches on the prompt and on the counterfactual."""
    model, metric = question.model, question.metric
    depth, length = len(model.anatomy.stacks[0].blocks), len(question.tokens)
    chosen = "*" if len(layers) == depth else ",".join(map(str, layers))
    if len(positions) == length and chosen == "*":
        found: tuple[Result, ...] = (
            patching(model, question.prompt, question.counterfactual, over=_over(question), metric=metric),
        )
        effect = found[0]["share"].values
    else:
        found = tuple(
            patching(
                model,
                question.prompt,
                question.counterfactual,
                over=_over(question, chosen, p),
                metric=metric,
            )
            for p in positions
        )
        effect = np.stack([f["share"].values.reshape(len(layers)) for f in found], 1)
    return effect, float(found[0]["clean"]), float(found[0]["corrupted"]), found


def _foreign(
    question: Question, effect: np.ndarray, layers: list[int], positions: list[int], clean: float, corrupted: float
) -> Foreign | None:
    """The strongest places once more, with states of unrelated prompts: what putting in anything else does there."""
    strong = [(i, j) for i, j in np.argwhere(effect >= HALF).tolist()]
    strong = strong[:: -(-len(strong) // PLACES)] if strong else []
    if not strong:
        return None
    model, sites = question.model, [_over(question, str(layers[i]), positions[j]) for i, j in strong]
    found = []
    for prompt in unrelated(question):
        with torch.no_grad():
            run = model.run(prompt, keep=[_over(question).partition("@")[0]])
        swept = model.sweep(question.counterfactual, [Patch(site, run) for site in sites], question.metric)
        found.append((swept.values[:, 0].double().cpu().numpy() - corrupted) / (clean - corrupted))
    own = float(np.mean([effect[at] for at in strong]))
    return Foreign(len(strong), own, float(np.mean(found)), len(found))


def _control(evidence: Evidence) -> str:
    found = evidence.foreign
    if found is None:
        return ""
    return (
        f"Control: states of {found.prompts} unrelated prompts of this length, put into {found.places} of the strongest places one at a time, bring back "
        f"{number(found.other, sign=True)} on average, where those of the prompt bring back {number(found.own, sign=True)}. "
    )


def _arrives(question: Question, effect: np.ndarray, layers: list[int], positions: list[int]) -> int | None:
    """The layer from which on the state where the answer is read brings half of it back or more."""
    if len(question.inputs.streams) > 1 or question.position not in positions or question.position in question.changed:
        return None
    late = effect[:, positions.index(question.position)] >= HALF
    return next((layers[i] for i in range(len(layers)) if late[i:].all()), None)


def _fewer(question: Question, layers: list[int], positions: list[int]) -> Html | None:
    depth, length = len(question.model.anatomy.stacks[0].blocks), len(question.tokens)
    if (len(layers), len(positions)) == (depth, length):
        return None
    text = f"The prompt is long: patched are {len(positions)} of its {length} tokens (those that differ, their neighbours and the last) at {len(layers)} of {depth} layers."
    return tag("p", text, class_="note")


def _finding(question: Question, effect: np.ndarray, layers: list[int], positions: list[int]) -> str:
    """From where to where the fact moves: the changed tokens, then the place where the answer is read."""
    changed = [positions.index(p) for p in question.changed if p in positions]
    word = (
        quoted("".join(question.tokens[p] for p in question.changed))
        if len(question.changed) <= 4
        else "the tokens that differ"
    )
    early = np.nanmax(effect[:, changed], 1) if changed else np.zeros(len(layers))
    held = [i for i, e in enumerate(early) if e >= HALF]
    text = f"The fact sits at {word} up to layer {layers[held[-1]]}" if held else ""
    arrived = _arrives(question, effect, layers, positions)
    if held and arrived is not None:
        text += (
            f" and at {quoted(question.answered[question.position])}, where the answer is read, from layer {arrived} on"
        )
    if text:
        return f"{text} (putting back that one state restores half of the answer or more)."
    i, j = np.unravel_index(int(np.nanargmax(effect)), effect.shape)
    return f"No single state carries the fact; most does {quoted(question.tokens[positions[j]])} before layer {layers[i]}, which restores {percent(max(0.0, float(effect[i, j])))} of the answer."
