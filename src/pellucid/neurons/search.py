"""Which input activates a unit most?

Tokens are exchanged one at a time. With e_i the embedding at position i, the gradient of the objective J says to first
order what another token v would change there,

    J(v at i) - J  ~  dJ/de_i . (e_v - e_i)

(HotFlip, Ebrahimi et al. 2018). Of the `top` best tokens of every position some exchanges are drawn and evaluated exactly,
and the best one is kept if it is an improvement (greedy coordinate gradient, Zou et al. 2023; their code keeps the best
exchange even where it is none). Several restarts climb side by side in one batch, from the best of some random texts and, of
every two, one from the contexts of a corpus that activate the unit most: from random text the gradient of a unit that fires
on few words does not lead to them. The objective is

    J = activation - fluency * s * (mean cross-entropy of the text under the model itself, in nats per token)

with s the standard deviation of the unit over random texts, so that `fluency=1` pays one nat with one deviation. A token
is also what its predecessors foretell: log p(v | before) is known for every v and is added to the estimate. Models that
look ahead have no such cross-entropy and are searched without it.

Controls: as many evaluations spent on random texts of the same length, and on the same climb from the same texts with
exchanges drawn blindly (a gradient counts as three evaluations); the best context of the corpus, whole and cut to length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.corpus import longest
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.neurons.harvest import Units
from pellucid.neurons.objective import ROWS_OF_TOKENS, Found, Objective, Unit
from pellucid.neurons.vocabulary import Vocabulary
from pellucid.results import Result
from pellucid.technique import technique

STARTS = 64  # random texts: the restarts are the best of them, and they give the unit's spread
GRADIENT = 3  # a forward and backward pass, in evaluations
CONTEXT = 256  # tokens of a corpus text that are read
WINDOWS = 16  # contexts of the corpus that are cut to the length of the search

Propose = Callable[[Tensor, int], Tensor]  # texts [n, position], a number -> [n, number, position]


@dataclass(frozen=True)
class Exchanges:
    """How many are considered: the `top` tokens of each position by gradient, and `trials` evaluated for each step and
    restart. `readable`: only texts whose tokens survive being written and read again."""

    top: int = 128
    trials: int = 48
    readable: bool = True

    def __post_init__(self) -> None:
        at_least(1, top=self.top, trials=self.trials)


@technique
def activating_inputs(
    model: Model,
    unit: Unit,
    *,
    length: int = 10,
    steps: int = 30,
    restarts: int = 4,
    fluency: float = 0.0,
    texts: Sequence[str] = (),
    exchanges: Exchanges | None = None,
    seed: int = 0,
) -> Result:
    """Texts of `length` tokens that activate a unit, beside what blind search and a corpus (`texts`) give.

    `unit` is a site with one number per position ("layers.3.mlp.neurons.17"), or `Units`, a direction or function read at a
    site, or (Units, number) for one of several (a feature of a dictionary). Where a model is causal its activation at the
    last token counts, elsewhere the largest over the tokens.

    Gives over `restart`, best first: `objective`, `activation`, `nats` (cross-entropy per token; NaN where the model has
    none), `text`, `tokens` [restart, position] and `path` [restart, step], the objective on the way; over `control` the same
    as `control_objective`, `control_activation`, `control_nats`, `control_text`; `spread` is s, `evaluations` the number
    spent on each. Interrupted (Ctrl-C), it returns what was found; controls that did not run are left out.

    InputError for another unit, a text that cannot be written, or a `fluency` the model does not have; Refused where no
    gradient reaches the embeddings.

    >>> activating_inputs(model, "layers.12.mlp.neurons.7", fluency=0.5, length=4, steps=2, restarts=1)
    Inputs that activate layers.12.mlp.neurons.7
    activating inputs: objective, activation, nats, ... over restart 1, position 4, step 3, control 2...
    """
    at_least(1, length=length, steps=steps, restarts=restarts)
    if isinstance(texts, str):
        raise InputError("expected several texts: put the one text into a list")
    exchanges = exchanges or Exchanges()
    vocabulary, generator = Vocabulary.of(model, exchanges.readable), torch.Generator().manual_seed(seed)
    aim = Objective(model, unit, vocabulary, fluency)
    drawn = aim.score(vocabulary.draw(max(STARTS, restarts), length, generator))
    aim.spread = float(drawn.activation.std()) or 1.0
    given, windows = from_corpus(aim, texts, length) if texts else ({}, None)
    known = [] if windows is None else [best(aim, windows, (restarts + 1) // 2)]
    start = Found.joined([*known, best(aim, drawn, restarts - sum(len(each.rows) for each in known))])
    with progress[Any](what="steps of the search", total=2 * steps) as bar:
        climb = Climb(aim, start, exchanges.trials, steps, bar)
        climb.run(_steepest(aim, exchanges.top, generator))
        controls = given
        try:
            if not climb.interrupted:
                blind = Climb(aim, start, exchanges.trials + GRADIENT, steps, bar)
                blind.run(_blind(vocabulary, generator))
                controls["blind exchanges"] = best(aim, blind.found, 1)
                rows = vocabulary.draw(blind.evaluations, length, generator)
                controls["random texts"] = best(aim, aim.score(rows), 1)
        except KeyboardInterrupt:
            pass
    return _result(aim, climb, controls, _named(unit))


@dataclass(eq=False)
class Climb:
    """Texts that get better step by step: `found`, and their objective at every step, `path`."""

    aim: Objective
    found: Found
    trials: int
    steps: int
    bar: progress[Any]
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.found = self.found.at(torch.arange(len(self.found.rows)))  # a copy: it is written to
        self.path = [self.aim.value(self.found)]

    @property
    def evaluations(self) -> int:
        """What all steps spend, if each takes its `trials` for every text."""
        return self.steps * self.trials * len(self.found.rows)

    def run(self, propose: Propose) -> None:
        """Ctrl-C ends it where it is."""
        try:
            for _ in range(self.steps):
                self._step(propose)
                self.bar.step()
        except KeyboardInterrupt:
            self.interrupted = True

    def _step(self, propose: Propose) -> None:
        n = len(self.found.rows)
        rows, of = _readable(self.aim.vocabulary, propose(self.found.rows, 3 * self.trials), self.trials)
        if len(rows):
            tried = self.aim.score(rows)
            value = torch.full((n,), -torch.inf).scatter_reduce(0, of, self.aim.value(tried), "amax")
            for i in (value > self.path[-1]).nonzero().flatten().tolist():
                at = int(torch.where(of == i, self.aim.value(tried), -torch.inf).argmax())
                for old, new in zip(vars(self.found).values(), vars(tried).values(), strict=True):
                    old[i] = new[at]
        self.path.append(self.aim.value(self.found))


def best(aim: Objective, found: Found, n: int) -> Found:
    """The `n` with the largest objective, best first."""
    return found.at(torch.argsort(aim.value(found), descending=True, stable=True)[:n])


# ---- which exchanges


def _steepest(aim: Objective, top: int, generator: torch.Generator) -> Propose:
    """Exchanges drawn among the `top` of each position by the gradient."""

    def propose(rows: Tensor, number: int) -> Tensor:
        gain = aim.estimates(rows)
        choices = gain.topk(min(top, gain.shape[2]), dim=2).indices
        where, which = _drawn(rows, number, choices.shape[2], generator)
        token = choices[torch.arange(len(rows))[:, None], where, which]
        return _exchanged(rows, where, aim.vocabulary.allowed[token])

    return propose


def _blind(vocabulary: Vocabulary, generator: torch.Generator) -> Propose:
    """Exchanges drawn among all tokens."""

    def propose(rows: Tensor, number: int) -> Tensor:
        where, which = _drawn(rows, number, len(vocabulary.allowed), generator)
        return _exchanged(rows, where, vocabulary.allowed[which])

    return propose


def _drawn(rows: Tensor, number: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = len(rows), number
    return (torch.randint(rows.shape[1], shape, generator=generator), torch.randint(tokens, shape, generator=generator))


def _exchanged(rows: Tensor, where: Tensor, token: Tensor) -> Tensor:
    made = rows[:, None].repeat(1, where.shape[1], 1)
    return made.scatter(2, where[..., None], token[..., None])


def _readable(vocabulary: Vocabulary, proposed: Tensor, trials: int) -> tuple[Tensor, Tensor]:
    """Up to `trials` different ones of each text's exchanges that survive, and which text each comes from."""
    rows, of = [], []
    for i, each in enumerate(proposed):
        each = torch.tensor(list(dict.fromkeys(map(tuple, each.tolist()))))
        rows.append(each[vocabulary.survive(each)][:trials])
        of += [i] * len(rows[-1])
    return torch.cat(rows), torch.tensor(of, dtype=torch.long)


# ---- what a corpus has


def from_corpus(aim: Objective, corpus: Sequence[str], length: int) -> tuple[dict[str, Found], Found | None]:
    """The context of a corpus with the largest activation, as it stands there and cut to `length`; and the best contexts
    that can be cut so and survive. Long texts are read in windows."""
    tokenizer = aim.vocabulary.tokenizer
    if tokenizer is None:
        raise InputError("this model was opened without a tokenizer, so a corpus of texts cannot be read")
    every = tokenizer(list(corpus), add_special_tokens=False)["input_ids"]
    size = min(CONTEXT, longest(aim.model))
    texts = [part for row in every for i in range(0, len(row), size) if len(part := row[i : i + size]) > 1]
    if not texts:
        raise InputError("the corpus has no text of two tokens or more")
    peaks: list[tuple[float, int, int]] = []
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(texts):
        by_length.setdefault(len(row), []).append(i)
    for size, group in sorted(by_length.items()):
        n = max(1, ROWS_OF_TOKENS // size)
        for part in (group[at : at + n] for at in range(0, len(group), n)):
            values = aim.values(torch.tensor([texts[i] for i in part])).float()
            if aim.causal:
                values[:, 0] = -torch.inf  # it sees nothing but itself, and many models park attention there
            peak = values.max(1)
            peaks += zip(peak.values.tolist(), part, peak.indices.tolist(), strict=True)
    peaks.sort(reverse=True)
    value, i, position = peaks[0]
    whole = torch.tensor([texts[i][: position + 1] if aim.causal else texts[i]])
    found = {"corpus": Found(whole, torch.tensor([value]), aim.score(whole, nats=True).nats)}
    cut = [w for _, i, p in peaks[: 8 * WINDOWS] if len(w := _window(texts[i], p, length, aim.causal)) == length]
    rows = torch.tensor(list(dict.fromkeys(map(tuple, cut))), dtype=torch.long).view(-1, length)
    rows = rows[aim.vocabulary.survive(rows)][:WINDOWS]
    if not len(rows):
        return found, None
    windows = aim.score(rows)
    return found | {"corpus, same length": best(aim, windows, 1)}, windows


def _window(row: list[int], position: int, length: int, causal: bool) -> list[int]:
    """`length` tokens up to a position, or around it where the model looks ahead."""
    start = position + 1 - length if causal else min(max(0, position - length // 2), len(row) - length)
    return row[start : start + length] if start >= 0 else []


# ---- the result


def _named(unit: Unit) -> str:
    if isinstance(unit, tuple):
        return f"{unit[0].label}.{unit[1]}"
    return unit.label if isinstance(unit, Units) else str(unit)


def _result(aim: Objective, climb: Climb, controls: dict[str, Found], unit: str) -> Result:
    order = torch.argsort(climb.path[-1], descending=True, stable=True)
    found, path = climb.found.at(order), torch.stack(climb.path, 1)[order]
    made: dict[str, Any] = {**_columns(aim, found, "restart"), "tokens": (("restart", "position"), found.rows.numpy())}
    made["path"] = (("restart", "step"), path.numpy())
    if controls:
        each = [_columns(aim, one, "control") for one in controls.values()]
        for name in each[0]:
            made[f"control_{name}"] = ("control", np.concatenate([one[name][1] for one in each]))
    made |= {"spread": aim.spread, "evaluations": climb.evaluations + GRADIENT * len(found.rows) * climb.steps}
    counted = "last token" if aim.causal else "largest over the tokens"
    attrs = {
        "activation": counted,
        "fluency": "own cross-entropy" if aim.speaks else "none",
        "interrupted": climb.interrupted,
    }
    data = xr.Dataset(made, {"control": list(controls)}, attrs)
    return Result(data, kind="activating inputs", title=f"Inputs that activate {unit}")


def _columns(aim: Objective, found: Found, dim: str) -> dict[str, tuple[str, np.ndarray]]:
    """Texts in words and numbers; cross-entropy also where the search did not ask for it."""
    nats = found.nats if aim.fluency or not aim.speaks else aim.score(found.rows, nats=True).nats
    found = Found(found.rows, found.activation, nats)
    return {
        "objective": (dim, aim.value(found).numpy()),
        "activation": (dim, found.activation.numpy()),
        "nats": (dim, nats.numpy()),
        "text": (dim, np.array(aim.vocabulary.texts(found.rows), dtype=object)),
    }
