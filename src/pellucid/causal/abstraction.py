"""Does the model compute its answer the way this program does?

A causal model is a small graph of variables. A neural model implements it under an alignment (variable -> site) if swapping
a variable's value with that of another input has in the program the effect that swapping the site's activations has in the
network (Geiger et al. 2021, "Causal Abstractions of Neural Networks"):

    interchange-intervention accuracy = share of (base, source) pairs where
        network(base, with site taken from source) answers  program(base, with variable taken from source)

A number alone misleads: where the interchange does not change the program's output, a site that does nothing is right too.
So pairs are drawn half from those where it changes, and beside the accuracy stand `changed` (on these pairs alone: what a
dead site gets wrong), `floor` (no intervention at all) and `task` (the network's accuracy as a plain predictor).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.grid import Grid, Over, described, named
from pellucid.engine.edits import swaps
from pellucid.errors import InputError, nearest
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class CausalModel:
    """A program as a graph: each input's possible values, and each variable's parents and function, in order.

    >>> both_equal = CausalModel(
    ...     {"a": range(3), "b": range(3), "c": range(2)},
    ...     {"same": (("a", "b"), lambda a, b: a == b), "out": (("same", "c"), lambda s, c: int(s) == c)})
    >>> both_equal.run({"a": 1, "b": 1, "c": 0})["out"], both_equal.interchange({"a": 1, "b": 1, "c": 0},
    ...     {"a": 0, "b": 1, "c": 0}, ["same"])["out"]
    (False, True)
    """

    inputs: Mapping[str, Sequence[Any]]
    variables: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]]

    def __post_init__(self) -> None:
        known = list(self.inputs)
        for name, (parents, _) in self.variables.items():
            for parent in parents:
                if parent not in known:
                    raise InputError(
                        f"the parent {parent!r} of {name!r} does not stand before it{nearest(parent, known)}"
                    )
            known.append(name)
        if not self.variables:
            raise InputError("a causal model needs at least one variable; the last one is its output")

    @property
    def output(self) -> str:
        """The last variable."""
        return list(self.variables)[-1]

    def run(self, setting: Setting, fixed: Setting | None = None) -> dict[str, Any]:
        """The value of every variable, those in `fixed` held."""
        values = {name: (fixed or {}).get(name, setting[name]) for name in self.inputs}
        for name, (parents, function) in self.variables.items():
            held = fixed is not None and name in fixed
            values[name] = fixed[name] if held else function(*(values[p] for p in parents))  # type: ignore[index]
        return values

    def interchange(self, base: Setting, source: Setting, names: Iterable[str]) -> dict[str, Any]:
        """What `base` gives when these variables take the values they have for `source`."""
        theirs = self.run(source)
        return self.run(base, {name: theirs[name] for name in names})

    def sample(self, rng: random.Random) -> dict[str, Any]:
        """A setting of the inputs, each drawn uniformly."""
        return {name: rng.choice(list(values)) for name, values in self.inputs.items()}


@dataclass(frozen=True)
class Task:
    """How the program's settings become prompts, and its outputs answers.

    `encode` maps a setting to a text or to token ids, all of one length; `decode` maps an output value to the answer: a token
    id, or the class of a classifier. `draw` makes a setting, if not every input uniformly. `around` gives what else the
    forward pass takes for token ids [prompt, position], such as {"attention_mask": ...}.
    """

    program: CausalModel
    encode: Callable[[Setting], str | Sequence[int]]
    decode: Callable[[Any], int]
    draw: Callable[[random.Random], Setting] | None = None
    around: Callable[[Tensor], Mapping[str, Any]] | None = None

    def setting(self, rng: random.Random) -> Setting:
        return self.program.sample(rng) if self.draw is None else self.draw(rng)

    def prompts(self, settings: Sequence[Setting]) -> Any:
        """What `model.run` takes."""
        made = [self.encode(s) for s in settings]
        if isinstance(made[0], str):
            return made
        ids = torch.tensor([list(ids) for ids in made])
        return ids if self.around is None else {"input_ids": ids, **self.around(ids)}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source settings, and the answers: plain, and with the variables interchanged."""

    base: list[Setting]
    source: list[Setting]
    plain: Tensor
    expected: Tensor

    @classmethod
    def draw(cls, task: Task, variables: Sequence[str], n: int, seed: int) -> Pairs:
        """`n` pairs, half of them (as far as 40 n draws find them) such that the interchange changes the output."""
        known = [*task.program.inputs, *task.program.variables]
        for name in variables:
            if name not in known:
                raise InputError(f"the causal model has no variable {name!r}{nearest(name, known)}")
        rng = random.Random(seed)
        kept: dict[bool, list[tuple[Setting, Setting, Any, Any]]] = {True: [], False: []}
        for _ in range(40 * n):
            base, source = task.setting(rng), task.setting(rng)
            plain = task.program.run(base)[task.program.output]
            new = task.program.interchange(base, source, variables)[task.program.output]
            kept[plain != new].append((base, source, plain, new))
            if min(map(len, kept.values())) >= n // 2:
                break
        if not kept[True]:
            raise InputError(f"interchanging {list(variables)} never changes the output: nothing can be tested with it")
        changed = kept[True][: max(n // 2, n - len(kept[False]))]
        chosen = changed + kept[False][: n - len(changed)]
        rng.shuffle(chosen)
        plain, new = (torch.tensor([task.decode(pair[i]) for pair in chosen]) for i in (2, 3))
        return cls([pair[0] for pair in chosen], [pair[1] for pair in chosen], plain, new)

    @property
    def changed(self) -> Tensor:
        return self.plain != self.expected

    def half(self, second: bool) -> Pairs:
        cut = slice(len(self.base) // 2, None) if second else slice(len(self.base) // 2)
        return Pairs(self.base[cut], self.source[cut], self.plain[cut], self.expected[cut])


@technique
def interchange(
    model: Model, task: Task, alignment: Mapping[str, str | Sequence[str]], *, pairs: int = 200, seed: int = 0
) -> Result:
    """The interchange-intervention accuracy of an alignment, {variable: site or sites}, all interchanged together.

    Gives `accuracy`, its interval (over pairs), `changed`, `floor` and `task` as in the module's text; `total_effect` is
    the accuracy above the floor; `clean` and `corrupted` per pair are whether the answer is right with the interchange and
    without it.

    >>> interchange(model, task, {"same": "layers.0.attn.heads.1@-1"}, pairs=40)
    Interchange of same
    interchange: accuracy, low, high, changed, floor, ...
    """
    drawn = Pairs.draw(task, list(alignment), pairs, seed)
    inputs = model.inputs(task.prompts(drawn.base))
    sites = [site for each in alignment.values() for site in named(model, each, inputs)]
    right, plain = _right(model, task, drawn, [sites])
    data = xr.Dataset({k: v[0] for k, v in _columns(right, drawn, seed).items()})
    data = data.assign(_rest(right[0], drawn, plain, seed)).assign(clean=("pair", right[0]))
    return Result(data, kind="interchange", title=f"Interchange of {', '.join(alignment)}")


@technique
def alignment_search(
    model: Model,
    task: Task,
    variable: str,
    *,
    over: Over = "layers.*.resid_post@*",
    pairs: int = 200,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """The accuracy of aligning one variable with every site of `over`, one at a time: which one holds it?

    `accuracy`, `low`, `high` and `changed` over the selectors of `over`, and the rest as of `interchange`, the total effect
    that of the best site. The best of many sites is best partly by luck: `held_out` is the accuracy of the best site of the
    first half of the pairs on the second half. `checkpoint` is a file that keeps what is done, so that an interrupted search
    goes on there.
    """
    drawn = Pairs.draw(task, [variable], pairs, seed)
    grid = Grid.of(model, over, model.inputs(task.prompts(drawn.base)))
    right, plain = _right(model, task, drawn, grid.groups, checkpoint=checkpoint)
    half = right.shape[1] // 2
    best, first = int(right.mean(1).argmax()), int(right[:, :half].mean(1).argmax())
    data = grid.data(_columns(right, drawn, seed)).assign(_rest(right[best], drawn, plain, seed))
    data = data.assign(held_out=right[first, half:].mean()).assign_attrs(best=grid.names[first])
    return Result(data, kind="alignment search", title=f"Where is {variable!r}?")


def predicted(logits: Tensor) -> Tensor:
    """[prompt] the model's answers: the class, or the token it gives most weight at the last position."""
    return (logits if logits.ndim == 2 else logits[:, -1]).argmax(-1)


def _right(
    model: Model, task: Task, drawn: Pairs, cases: Sequence[Sequence[Site]], **options: Any
) -> tuple[np.ndarray, Tensor]:
    """[case, pair] whether the network with a case's sites taken from the source answers as the program does, and its
    answers [pair] without; options of `sweep`."""
    base, source = model.inputs(task.prompts(drawn.base)), model.inputs(task.prompts(drawn.source))
    with torch.no_grad():
        run = model.run(source, keep=list(dict.fromkeys(s.whole for sites in cases for s in sites)))
    classes = run.logits.ndim == 2
    answer = BoundMetric("answer", None if classes else (-1,), None, lambda z: predicted(z).to(z.dtype), classes)
    sweep = model.sweep(base, [swaps(sites, run) for sites in cases], answer, **options)
    right = sweep.values.long().cpu() == drawn.expected
    return right.double().numpy(), sweep.clean.long().cpu()


def _columns(right: np.ndarray, drawn: Pairs, seed: int) -> dict[str, np.ndarray]:
    """Accuracies [case] with their intervals, from what is right [case, pair]."""
    return described("accuracy", right.T, seed, within=(0, 1)) | {"changed": right[:, drawn.changed.numpy()].mean(1)}


def _rest(right: np.ndarray, drawn: Pairs, plain: Tensor, seed: int) -> dict[str, Any]:
    """What a case [pair] is held against: no intervention, and the network as a plain predictor."""
    floor = (plain == drawn.expected).double().numpy()
    made = {"floor": floor.mean(), "task": float((plain == drawn.plain).double().mean())}
    return made | described("total_effect", right - floor, seed, "total_") | {"corrupted": ("pair", floor)}
