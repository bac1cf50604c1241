"""Can a fact be rewritten where it sits? Keys found, values searched, one closed form a layer, a changed model.

    rome        one layer, facts one after another, each exactly              Meng et al. 2022; mean keys as Gupta et al. 2024 (R-ROME)
    emmet       one layer, all facts at once, exactly                         Gupta et al. 2024
    memit       several layers, each moving values 1/(layers left) of the way Meng et al. 2023
    alphaedit   the same among directions that ordinary keys hardly use       Fang et al. 2025

`solvers.py` has the forms, `values.py` the search. Nothing is written to the model: what comes is a changed model (low-rank factors
on shared weights), with what it says now measured on the weights as they were rounded; the old model is the undo. Edits of
an edited model go on from it (`after=`), and hold the keys that were edited before, which is what keeps long sequences of
edits stable (2605.26670) whatever the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import choose
from pellucid.causal.tracing import window_curve
from pellucid.changed import Added, check_weights
from pellucid.errors import InputError, Refused, at_least, one_of
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.answers import measured
from pellucid.surgery.covariance import KeyCovariance
from pellucid.surgery.keys import Fact, Memory, Row, about, averaged, facts_of, keys, memories, several, subject_row
from pellucid.surgery.solvers import Metric, identity, update
from pellucid.surgery.values import Search, Values, find_values, residuals
from pellucid.technique import technique

How = Literal["rome", "memit", "emmet", "alphaedit"]
STARTS = ("The", "Therefore", "Because", "I", "You")  # of contexts, as in MEMIT's code
SPREAD = 4  # layers that memit and alphaedit share an edit out to
SHARE = 0.9  # of the way to their values, where a penalty holds them back
# The papers say "{} is a". As the first token of a text a subject has no key of its own where first tokens are attention sinks:
# in SmolLM2 France has cosine .02 with itself elsewhere, and the edit reaches it with .00 of its strength.
ESSENCE = "It is said that {} is a"


@dataclass(eq=False)
class Edited:
    """A model with other facts, and how it came to them: `model` and `before`, `facts`, the `layers` edited, `result` (what each fact's
    prompt says before and after), the `trace` that found the layers (None where they were given), `values`, and `keys` edited so
    far by memory. `undo()` is the model before, bit for bit; `diff()` how far each weight moved; `save(path)` a change file that
    `pl.load(...).changed(path)` takes.
    """

    model: Model
    before: Model
    facts: list[Fact]
    how: str
    layers: list[int]
    result: Result
    values: Values = field(repr=False)
    keys: dict[str, Tensor] = field(repr=False)
    trace: Result | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    previous: Edited | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"<Edited: {self.result.title}>"

    def undo(self) -> Model:
        """The model before this edit."""
        return self.before

    def diff(self) -> Any:
        """Which parameters differ from those of the first model, and by how much: `relative` |W' - W| / |W|, `largest`."""
        return self.model.diff()

    def save(self, path: str | Path) -> Path:
        """The changes as one safetensors file, tied to the weights of the model they began with."""
        return self.model.save_changes(path)

    def alone(self) -> list[Edited]:
        """Each fact edited by itself on the model before, with the values that were found."""
        settings = self.settings
        return [edit(self.before, [f], values=self.values.one(i), **settings) for i, f in enumerate(self.facts)]

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


@technique
def edit(
    model: Model,
    facts: Any,
    how: How = "rome",
    *,
    covariance: KeyCovariance | Literal["off"] | None = None,
    layers: int | Sequence[int] | None = None,
    contexts: int | Sequence[str] = 3,
    essence: Sequence[str] | None = None,
    hold: Sequence[str] = (),
    search: Search | None = None,
    share: float | None = None,
    penalty: float | None = None,
    null_space: float = 0.8,
    values: Values | None = None,
    after: Edited | None = None,
    seed: int = 0,
) -> Edited:
    """Change facts: the model says `fact.new` after its prompt.

    `facts` are `Fact`s (or mappings with their fields). `covariance` is a `KeyCovariance` fitted on this model (or on the one that
    `after` began with) that has the layers; "off" does without, to see what it is worth. `layers` by default where causal
    tracing finds the fact recalled (memit and alphaedit: the four up to there): a trace of the MLPs at the subject's
    last token, kept as `trace`. `contexts`: texts that stand before the prompt while keys and values are taken, or how
    many the model writes itself. `essence`: templates such as "It is said that {} is a" after which the model should go on saying what it says;
    `hold`: templates at whose keys of the subject W must give what it gives. `search` are the settings of the search for values;
    `values` those of another edit of the same facts at the same layers. `share` of the way that values are moved (1 for rome and
    emmet, .9 for the others), or the absolute `penalty` of the papers in its stead; `null_space` is alphaedit's share
    of directions. `after` is an edit to go on from: its keys are held. Encoders of encoder-decoders are edited where the
    subject is read.

    InputError for a subject that is not in its prompt, an unknown covariance, layers that do not reach the answer, keys that are not
    independent; Refused for weights that cannot be written to, and where rounding loses the edit. Nothing is half changed.

    >>> edited = edit(model, Fact("The capital of {} is", "France", " Rome", " Paris"), covariance=C, layers=1)
    >>> text = edited.model.generate("The capital of France is").text
    >>> edited.undo() is model
    True
    """
    one_of(how, How, "how=")
    known = facts_of(facts)
    model = _going_on(model, after)
    _check_covariance(model, covariance, after)
    rows, contexts = _prompts(model, known, contexts, seed)
    if penalty is not None:
        at_least(0, penalty=penalty)
    trace, chosen = layers_for(model, known, how, layers, seed)
    others = [about(model, f, i, t) for t in _essence(model, essence) for i, f in enumerate(known)]
    held = [about(model, f, i, t) for t in several("hold", hold) for i, f in enumerate(known)]
    memory = memories(model, chosen[-1], rows)
    if len(chosen) > 1:
        for layer in chosen:
            Memory.of(model, layer).factor(model)  # refused before any work is done
    if values is None:
        values = find_values(model, memory, rows, others, search)
    elif [m.name for m in values.memory] != [m.name for m in memory] or len(values.delta) != len(known):
        raise InputError("values= are of other facts or layers: leave them out, or give those of an edit of the same")
    solver = _Solver(how, covariance, share, penalty, null_space, len(chosen))
    made, edited_keys, notes = _written(model, chosen, rows, held, values, solver, after)
    _check_written(model, made)
    data = _told(model, made, known, rows, chosen, values, notes)
    said = int(data["exact"].sum())
    where = f"layer {chosen[0]}" if len(chosen) == 1 else f"layers {chosen[0]} to {chosen[-1]}"
    title = f"{how} at {where}: {said} of {len(known)} facts say the new answer" + (
        ", without C" if isinstance(covariance, str) else ""
    )
    settings = {
        "how": how, "layers": chosen, "contexts": list(contexts), "essence": essence, "hold": list(hold), "search": search,
        "share": share, "penalty": penalty, "null_space": null_space, "seed": seed, "covariance": covariance, "after": after,
    }  # fmt: skip
    return Edited(
        made,
        model,
        known,
        how,
        chosen,
        Result(data, kind="edited facts", title=title),
        values,
        edited_keys,
        trace,
        settings,
        after,
    )


# ---- what is asked for


def _going_on(model: Model, after: Edited | None) -> Model:
    if after is not None and model is not after.model:
        raise InputError("after= is an edit of another model: give edit(after.model, ..., after=after)")
    return model


def _check_covariance(model: Model, covariance: Any, after: Edited | None) -> None:
    if isinstance(covariance, str) and covariance == "off":
        return
    if not isinstance(covariance, KeyCovariance):
        raise InputError(
            "covariance= is missing: expected pl.surgery.KeyCovariance(layers=...).fit(model, texts), or 'off' to do without it, "
            "which costs what is near the fact"
        )
    while after is not None:
        model, after = after.before, after.previous
    if hasattr(covariance, "digest_"):
        check_weights(model, covariance.digest_, "this moment matrix")
    covariance.check(model)


def _prompts(
    model: Model, facts: Sequence[Fact], contexts: int | Sequence[str], seed: int
) -> tuple[list[Row], Sequence[str]]:
    """Each fact's prompt alone and behind each context."""
    if isinstance(contexts, int):
        at_least(0, contexts=contexts)
        contexts = written_contexts(model, contexts, seed)
    contexts = several("contexts", contexts)
    made = [subject_row(model, f, i, c, f.new) for c in ("", *contexts) for i, f in enumerate(facts)]
    return made, contexts


def written_contexts(model: Model, n: int, seed: int = 0) -> list[str]:
    """Beginnings that the model writes itself; none where it writes nothing (masked models, encoder-decoders, no tokenizer)."""
    can: Any = getattr(model.module, "can_generate", None)
    stack = model.anatomy.stacks[0]
    if (
        n < 1
        or model.tokenizer is None
        or can is None
        or not can()
        or not stack.causal
        or len(model.anatomy.stacks) > 1
    ):
        return []
    made = []
    for i in range(n):
        start = STARTS[i % len(STARTS)]
        written = model.generate(start, max_new_tokens=8, temperature=1.0, seed=seed + i)
        made.append(
            " ".join(f"{start}{written.texts[0].removeprefix(start)}".split()).replace("{", "(").replace("}", ")")
        )
    return made


def _essence(model: Model, templates: Sequence[str] | None) -> Sequence[str]:
    if templates is not None:
        return several("essence", templates)
    if model.tokenizer is None:
        return ()
    masked = (
        model.anatomy.answering.masked and model.anatomy.stacks[-1].causal is False and len(model.anatomy.stacks) == 1
    )
    return (f"{ESSENCE} {model.tokenizer.mask_token}" if masked else ESSENCE,)


def layers_for(
    model: Model, facts: Sequence[Fact], how: str, layers: Any, seed: int
) -> tuple[Result | None, list[int]]:
    n = len(model.anatomy.stacks[0].blocks)
    several = how in ("memit", "alphaedit")
    if layers is not None:
        listed = list(range(n))[layers] if isinstance(layers, slice) else layers
        given = list(listed) if isinstance(listed, list | tuple | range) else [listed]
        if not all(isinstance(i, int) for i in given):
            raise InputError(f"layers={layers!r}: expected the number of a layer, or a list of them")
        chosen = sorted({choose(i, n, "layer", "layers")[0] for i in given})
        if not chosen or (len(chosen) > 1 and not several):
            raise InputError(f"layers={layers!r}: {how} edits {'at least one layer' if several else 'one layer'}")
        return None, chosen
    ends = [subject_row(model, f, i).at or 0 for i, f in enumerate(facts)]
    spans: Any = [(_begins(model, f, end), end + 1) for f, end in zip(facts, ends, strict=True)]
    prompts: Any = [f.asked for f in facts]
    one = len(facts) == 1
    trace = window_curve(
        model,
        prompts[0] if one else prompts,
        subject=spans[0] if one else spans,
        windows=(min(10, n),),
        draws=3,
        seed=seed,
    )
    effect = trace.data["effect"].values.reshape(-1)
    best = int(effect[: n - 1].argmax())  # what the last layer does there reaches no answer
    return trace, list(range(max(0, best - SPREAD + 1), best + 1)) if several else [best]


def _begins(model: Model, fact: Fact, end: int) -> int:
    """The subject's first token."""
    if isinstance(fact.subject, tuple):
        return fact.subject[0]
    inputs = model.inputs(fact.asked)
    stream = inputs.streams.get("encoder", inputs.stream(""))
    span = fact._cut()[1] or stream.maps[0].find(fact.subject.strip()) or (0, 1)
    return min(end, int(stream.tokens(0, *span)[0]))


# ---- solving and writing


@dataclass(frozen=True)
class _Solver:
    """Which metric and penalty a method solves with."""

    how: str
    covariance: KeyCovariance | str | None
    share: float | None
    penalty: float | None
    null_space: float
    layers: int

    def metric(self, memory: str) -> Metric:
        if not isinstance(self.covariance, KeyCovariance):
            return identity
        if self.how == "alphaedit":
            free = self.covariance.free(memory, self.null_space)
            return lambda k: _left(k, free(k), memory, self.null_space)
        covariance = self.covariance
        return lambda k: covariance.solve(memory, k)

    @property
    def each(self) -> float:
        """The share of what is left at its turn that each layer moves, so that all of them together go the `share`."""
        whole = (1.0 if self.how in ("rome", "emmet") else SHARE) if self.share is None else self.share
        if not 0 < whole <= 1:
            raise InputError(f"share={whole!r}: expected how far values are moved, more than 0 and at most 1")
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            left = float(np.prod([1 - middle / (self.layers - i) for i in range(self.layers)]))
            low, high = (middle, high) if 1 - left < whole else (low, middle)
        return 1.0 if whole == 1 else high

    def __call__(self, memory: str, k: Tensor, r: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor, float]:
        metric = self.metric(memory)
        if self.how != "rome":
            return update(k, r, metric, penalty=self.penalty, share=self.each, old=old)
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for each, move in zip(
            k.double(), r.double(), strict=True
        ):  # one after another: what the ones before moved is known
            for left, right in zip(lefts, rights, strict=True):
                move = move - left * (right @ each)
            left, right, _ = update(each[None], move[None], metric, penalty=self.penalty, share=self.each)
            lefts.append(left[:, 0])
            rights.append(right[0])
        return torch.stack(lefts, 1), torch.stack(rights), self.penalty or 0.0


def _left(k: Tensor, projected: Tensor, memory: str, share: float) -> Tensor:
    if bool((projected.norm(dim=1) < 1e-4 * k.norm(dim=1)).any()):
        raise InputError(
            f"a key of layer {memory} has nothing in the {share:.0%} of directions that ordinary keys use least: give a larger "
            "null_space, or edit another layer (in the first ones a key may be that of its token alone)"
        )
    return projected


def _written(
    model: Model,
    layers: list[int],
    rows: list[Row],
    held: list[Row],
    values: Values,
    solver: _Solver,
    after: Edited | None,
) -> tuple[Model, dict[str, Tensor], dict[str, float]]:
    """The changed model, the keys edited so far by memory, and the penalty by memory."""
    current, changes = model, list[Added]()
    kept = dict(after.keys) if after is not None else {}
    penalties: dict[str, float] = {}
    start = averaged(residuals(model, layers[-1], rows), rows) if len(layers) > 1 else None
    for i, layer in enumerate(layers):
        if i + 1 == len(layers) == 1:
            memory, k, move = values.memory, values.keys, values.delta
        else:
            memory = memories(current, layer, rows)
            made, routed = keys(current, memory, rows)
            k = averaged(made, rows, routed)
            assert start is not None
            gone = averaged(residuals(current, layers[-1], rows), rows) - start
            move = (values.delta - gone) / (len(layers) - i) / memory[0].factor(model)
        spared = keys(current, memory, held)[0] if held else None
        for name in dict.fromkeys(m.name for m in memory):
            mine = [f for f, m in enumerate(memory) if m.name == name]
            still = [] if spared is None else [spared[[j for j, row in enumerate(held) if row.fact in mine]]]
            old = [kept[name], *still] if name in kept and solver.how != "rome" else still
            left, right, penalties[name] = solver(name, k[mine], move[mine], torch.cat(old) if old else None)
            changes.append(memory[mine[0]].added(left, right))
            kept[name] = torch.cat([kept[name], k[mine]]) if name in kept else k[mine]
        current = model.changed(changes)
    return current, kept, penalties


def _check_written(model: Model, made: Model) -> None:
    for change in made.loaded.changes[len(model.loaded.changes) if model.base is made.base else 0 :]:
        if not isinstance(change, Added):
            continue
        old, new = (m.module.get_parameter(change.parameter)[change.part] for m in (model, made))
        if torch.equal(old, new):
            raise Refused(
                f"{change.parameter} is kept in {str(new.dtype).removeprefix('torch.')}, whose rounding loses this edit whole: open the "
                "model with dtype='float32'"
            )


def _told(
    model: Model,
    made: Model,
    facts: Sequence[Fact],
    rows: Sequence[Row],
    layers: list[int],
    values: Values,
    penalties: dict[str, float],
) -> xr.Dataset:
    """What each fact's prompt says before and after, measured on the weights as they are."""
    pairs = [(f.asked, f.new) for f in facts]
    known = [i for i, f in enumerate(facts) if f.true is not None]
    columns: dict[str, Any] = {}
    for when, each in (("before", model), ("after", made)):
        found = measured(each, [*pairs, *((facts[i].asked, facts[i].true) for i in known)])
        columns[f"new_{when}"] = found.probability[: len(facts)]
        true = np.full(len(facts), np.nan)
        true[known] = found.probability[len(facts) :]
        columns[f"true_{when}"] = true
        columns["exact"] = found.exact[: len(facts)]
    columns["wanted"] = np.exp(-values.history[-1].numpy())
    columns["delta"] = (values.delta.norm(dim=1) / values.h).numpy()
    names = [f"{f.subject}" for f in facts]
    data = xr.Dataset({k: ("fact", np.asarray(v)) for k, v in columns.items()}, {"fact": names})
    moved = []
    for layer in layers:
        m = Memory.of(model, layer)
        old, new = (x.module.get_parameter(m.parameter).double() for x in (model, made))
        moved.append(float((new - old).norm() / old.norm()))
    data = data.assign(relative=("layer", np.array(moved))).assign_coords(layer=layers)
    data.attrs |= {"penalty": penalties, "step": len(values.history) - 1}
    split = [
        f.subject
        for i, f in enumerate(facts)
        if len({r.ids[r.at] for r in rows if r.fact == i and r.at is not None}) > 1
    ]
    if split:
        data.attrs["split"] = (
            split  # the subject's last token is another one at the beginning of a text and behind a space
        )
    opening = sorted({f"{facts[r.fact].subject}" for r in rows if r.at == 0}) if model.anatomy.stacks[0].causal else []
    if opening:
        data.attrs["opening"] = opening  # a text's first token is often a sink, with a key that all first tokens share
    return data


def wrong_layer(model: Model, layers: Sequence[int]) -> list[int]:
    """As many layers, as far from these as the model has them, of those that can reach an answer."""
    n = len(model.anatomy.stacks[0].blocks)
    at_least(2, layers=n)
    middle = sum(layers) / len(layers)
    first = n - 1 - len(layers) if middle < n / 2 else 0
    return list(range(max(0, first), max(0, first) + len(layers)))


def again(edited: Edited, **changed: Any) -> Edited:
    """The same facts edited with other settings, from the same model."""
    settings = {**edited.settings, **changed}
    return edit(edited.before, edited.facts, **settings)
