"""Train a copy of a model on its task and on its reasons; beside it stand plain training and what knows nothing.

    loss = cross-entropy + sum of weight * objective

Arms, each trained on the same batches in the same order, once for every seed:

    plain        the cross-entropy alone: what everything else is compared with
    objective    with the objectives
    control      with the same objectives on random tokens, shuffled rationales, another direction: what knows nothing
    augmented    where objectives are about exchangeable words: these exchanged in the texts, and no penalty (cost 1)

What is read off is behaviour on texts that were not trained on and on `shifts` of them, beside what the explanations say. An
arm whose loss on its own training texts never left the best constant prediction (95 % of its entropy) is `untrained`, and its
other numbers are not drawn. A loss or a gradient that is no number stops; the weights are put back to where all were.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.checkpoint import fingerprint
from pellucid.engine.edits import Edit
from pellucid.engine.saved import load_edits, save_edits
from pellucid.errors import InputError, PellucidError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.training import Keeper, constant, draws, train
from pellucid.tuning.data import Batch, Encoded, Rationales
from pellucid.tuning.learnt import Learnt
from pellucid.tuning.measuring import NUMBERS, Measures, measured, term_values, verdict
from pellucid.tuning.objective import NONE, Beside, Objective, Pass, generator, parts
from pellucid.tuning.parts import Chosen, choose
from pellucid.tuning.reasons import Augment
from pellucid.tuning.routing import Route

UNTRAINED = 0.95  # of the entropy of the answers
TURNS = 5
SILENT = 3  # steps at which an objective was exactly 0
COPIED = "/copied."  # in the name of a tensor beside the model that is a copy of one in it, and learns at the same rate


class Diverged(PellucidError, FloatingPointError):
    """A loss or a gradient is no number; `model` has the weights of the last step for which all were."""

    model: Model


class Good:
    """Trained tensors as they were when loss and gradients were last numbers: a copy, made once they are found to be."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.own, self.copies = list(tensors.values()), list[Tensor]()

    @torch.no_grad()
    def keep(self) -> None:
        if not self.copies:
            self.copies = [torch.empty_like(t) for t in self.own]
        torch._foreach_copy_(self.copies, [t.detach() for t in self.own])

    @torch.no_grad()
    def back(self) -> None:
        if self.copies:
            torch._foreach_copy_([t.detach() for t in self.own], self.copies)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a fit gave: the `model` and its `control` (first seed), every arm by name, the `edits` they are run under, the
    `result`, the names of tensors outside the choice that changed (`changed`, empty), and by arm and objective the tensors that
    were trained `beside` the model; by arm the `objectives` with what they learnt."""

    model: Model
    control: Model | None
    arms: Mapping[str, Model] = field(repr=False)
    edits: tuple[Edit, ...]
    result: Result = field(repr=False)
    changed: tuple[str, ...] = ()
    beside: Mapping[str, Beside] = field(default_factory=dict, repr=False)
    objectives: Mapping[str, tuple[Objective, ...]] = field(default_factory=dict, repr=False)

    def save(self, folder: str | Path) -> Path:
        """Write what `load_tuned` opens again: the trained weights as changes of the model that was tuned, and the edits it is run
        under (sparse attention, few neurons), tied to them; of objectives that are kept with what they learnt a file each, which their
        `load` opens. Other tensors beside the model are in `tuned.beside`.

        >>> again, edits = load_tuned(model, tuned.save("tuned"))
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_changes(folder / "weights.safetensors")
        kept = [each for each in self.objectives.get("objective", ()) if isinstance(each, Learnt) and each.weight > 0]
        for each in kept:
            each.save(folder / f"{type(each).__name__}.safetensors")
        theirs = {edit for each in kept for edit in map(type, each.edits(self.model))}
        plain = [edit for edit in self.edits if type(edit) not in theirs]
        if plain:
            save_edits(plain, folder / "edits.safetensors", model=self.model)
        else:
            (folder / "edits.safetensors").unlink(missing_ok=True)
        return folder

    def __repr__(self) -> str:
        return f"<Tuned {self.model.name}: {self.result.title}>"


def load_tuned(model: Model, folder: str | Path) -> tuple[Model, tuple[Edit, ...]]:
    """The tuned model that `Tuned.save` wrote, on the model that was tuned, and the edits it is to be run under, those of a `Bottleneck`
    among them. InputError for another model's, or for a folder that holds none.

    >>> again, edits = load_tuned(model, tuned.save("tuned"))
    """
    folder = Path(folder)
    if not (folder / "weights.safetensors").exists():
        raise InputError(f"{str(folder)!r} holds no tuned model: expected a folder that Tuned.save wrote")
    made = model.changed(folder / "weights.safetensors")
    edits = folder / "edits.safetensors"
    found = list(load_edits(edits, model=made)) if edits.exists() else []
    for kind in Learnt.__subclasses__():
        if (file := folder / f"{kind.__name__}.safetensors").exists():
            learnt = kind.load(file)
            learnt.belongs(made)
            found += learnt.edits(made)
    return made, tuple(found)


@technique
def fit(
    model: Model, data: Rationales, objectives: Any = (), *, test: Rationales | None = None,
    shifts: Mapping[str, Rationales] | None = None, layers: Any = None, control: bool = True, seeds: Sequence[int] = (0, 1, 2),
    steps: int = 60, batch: int = 16, accumulate: int = 1, learning_rate: float = 3e-4, head_learning_rate: float | None = None,
    weight_decay: float = 0.01, warmup: int = 5, clip: float | None = 1.0, truncate: int | None = None,
    checkpoint: str | Path | None = None,
) -> Tuned:  # fmt: skip
    """Train a copy of `model` on `data` with objectives, beside plain training, a control and the same knowledge as augmentation.

    `objectives` are one, a sum or a list; `test` are texts that are not trained on (else the training texts, said so), `shifts`
    the same texts under another distribution, by name. `layers` says what may change: None for all that is not frozen (of a
    model with adapters these), layers by number, slice or list with the answer's head, or `Only(...)`. `seeds` draw the order of
    batches and what objectives draw; `accumulate` splits a batch into as many passes; `checkpoint` is a folder in which
    every arm is kept, and from which an interrupted fit goes on to the same numbers.

    The result gives `accuracy` [arm, split] with `low` and `high` over seeds (over texts where there is one seed) and
    `accuracy_by_seed` [arm, seed, split]; over `arm` `loss` (on the training texts), `untrained`, `confidence` (mean |log
    odds|), `cost` (CPU time of a step over the plain arm's), and for spans that objectives name `swap_effect` (mean change of the log
    odds, in nats, when the words are exchanged), `gradient_share`, `plausibility` (average precision of gradients, with
    `plausibility_of_random`), `comprehensiveness` and `sufficiency` with that of random tokens; over `arm` x `term` every
    objective's own loss `before` and `after`; over `arm` x `measure` what objectives measure themselves (`measured`, with
    `measured_low` and `measured_high` over seeds). InputError and Refused as objectives say, before the first step.

    >>> fit(model, data, [Consistency("decoy")], shifts={"reversed": other}, seeds=[0], steps=4).result.accuracy
    <xarray.DataArray 'accuracy' (arm: 4, split: 2)>...
    """
    at_least(1, steps=steps, batch=batch, accumulate=accumulate)
    if not seeds or batch % accumulate:
        raise InputError(
            f"seeds={list(seeds)}, batch={batch}, accumulate={accumulate}: expected a seed, and a batch that splits evenly"
        )
    if checkpoint is not None and Path(checkpoint).is_file():
        raise InputError(f"checkpoint={str(checkpoint)!r} is a file: name a folder, in which every arm gets one")
    given = parts(objectives)
    encoded = Encoded(model, data, truncate)
    splits = {
        "test" if test is not None else "training texts": Encoded(model, test if test is not None else data, truncate)
    }
    splits |= {name: Encoded(model, each, truncate) for name, each in (shifts or {}).items()}
    for each in given:
        each.check(model, encoded)
    arms = arms_of(given, control)
    settings = Settings(
        model, encoded, layers, steps, batch, accumulate, learning_rate, head_learning_rate, weight_decay, warmup, clip
    )
    fresh = drawn_beside(model, encoded, given, seeds[0])
    before = term_values(model, next(iter(splits.values())), given, (), seeds[0], fresh)
    found, models, changed, beside, learnt = run_arms(settings, arms, splits, given, seeds, checkpoint)
    cost = step_cost(settings, arms, seeds[0])
    result = _result(found, list(arms), list(seeds), list(splits), before, cost, given, encoded)
    main = "objective" if given else "plain"
    active = [each for each in learnt[main] if each.weight > 0]
    edits = tuple(e for each in active for e in each.edits(models[main], beside[main].get(each.name, NONE)))
    return Tuned(models[main], models.get("control"), models, edits, result, changed, beside, learnt)


def run_arms(
    settings: Settings, arms: Mapping[str, tuple[Objective, ...]], splits: Mapping[str, Encoded], given: Sequence[Objective],
    seeds: Sequence[int], checkpoint: str | Path | None = None,
) -> tuple[dict[tuple[str, int], Measures], dict[str, Model], tuple[str, ...], dict[str, Beside], dict[str, tuple[Objective, ...]]]:  # fmt: skip
    """Every arm trained at every seed: measures, the first seed's models, what changed outside the choice, and the first
    seed's tensors beside them and objectives."""
    found: dict[tuple[str, int], Measures] = {}
    models: dict[str, Model] = {}
    beside: dict[str, Beside] = {}
    learnt: dict[str, tuple[Objective, ...]] = {}
    changed: list[str] = []
    for seed in seeds:
        for arm, own in arms.items():
            fitted = Fit(settings, own, seed)
            fitted.train(
                None if checkpoint is None else Path(checkpoint) / f"{arm}-{seed}.safetensors", f"{arm}, seed {seed}"
            )
            changed += fitted.chosen.changed(settings.model)
            models.setdefault(arm, fitted.chosen.model)
            beside.setdefault(arm, fitted.beside)
            learnt.setdefault(arm, tuple(each.ended(fitted.chosen.model) for each in fitted.objectives))
            found[arm, seed] = measured(
                fitted.chosen.model, settings.data, splits, given, fitted.objectives, seed, fitted.beside
            )
    return found, models, tuple(dict.fromkeys(changed)), beside, learnt


def step_cost(settings: Settings, arms: Mapping[str, Sequence[Objective]], seed: int) -> dict[str, float]:
    """CPU time of a step of each arm over that of the plain one."""
    return timed({arm: Fit(settings, own, seed) for arm, own in arms.items()}, "plain")


def timed(fits: Mapping[str, Fit], base: str) -> dict[str, float]:
    """CPU time of a step of each fit over that of `base`: all in turn, medians over `TURNS` turns."""
    took: dict[str, list[float]] = {arm: [] for arm in fits}
    with torch.random.fork_rng(), torch.enable_grad():
        for each in fits.values():
            for p in each.parameters.values():
                p.requires_grad_(True)
        for turn in range(TURNS + 1):  # the first one warms up
            for arm, each in fits.items():
                s = each.settings
                start = time.process_time()
                each.step(torch.arange(min(s.batch, len(s.data))), s.steps + turn)
                took[arm] += [time.process_time() - start] * (turn > 0)
                for p in each.parameters.values():
                    p.grad = None
    return {arm: float(np.median([a / b for a, b in zip(took[arm], took[base], strict=True)])) for arm in fits}


def arms_of(given: tuple[Objective, ...], control: bool) -> dict[str, tuple[Objective, ...]]:
    arms: dict[str, tuple[Objective, ...]] = {"plain": ()}
    if given:
        arms["objective"] = given
    if control and given:
        known = [each.control() for each in given]
        if any(known):
            arms["control"] = tuple(each for each in known if each is not None)
        words = {name: getattr(each, "by", "swap") for each in given for name in each.forbidden}
        if words and not all(isinstance(each, Augment) for each in given):
            arms["augmented"] = tuple(Augment(where, by=by) for where, by in words.items())
    return arms


# ---- one arm


@dataclass(frozen=True, eq=False)
class Settings:
    """What all arms share."""

    model: Model
    data: Encoded
    layers: Any
    steps: int
    batch: int
    accumulate: int
    learning_rate: float
    head_learning_rate: float | None
    weight_decay: float
    warmup: int
    clip: float | None

    def of(self) -> dict[str, Any]:
        told = {k: repr(v) for k, v in vars(self).items() if k not in ("model", "data")}
        rows = [row.stream("").ids for row in self.data.rows]
        among = self.data.among if self.data.among is None else self.data.among.tolist()
        data = fingerprint(
            rows, self.data.positions, list(self.data.labels or ()), *([] if among is None else [among])
        )[:16]
        return told | {"model": self.model.digest, "data": data}


class Fit:
    """One arm at one seed."""

    def __init__(self, settings: Settings, objectives: Sequence[Objective], seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.asked = tuple(objectives)
        self.chosen: Chosen = choose(settings.model, settings.layers)
        self.objectives = tuple(
            each.begun(self.chosen.model, settings.data, seed) if each.weight > 0 else each for each in objectives
        )
        self.beside = drawn_beside(self.chosen.model, settings.data, self.objectives, seed)
        own = {f"{name}/{k}": t for name, each in self.beside.items() for k, t in each.items()}
        self.parameters: dict[str, Tensor] = self.chosen.parameters | own
        kept = [name for each in self.objectives if each.weight > 0 for name in each.undecayed(self.chosen.model)]
        self.undecayed = frozenset([*self.chosen.masks, *kept])
        self.good, self.silent = Good(self.parameters), dict[str, int]()

    def train(self, path: Path | None, what: str) -> list[Any]:
        s = self.settings
        epochs = math.ceil(s.steps / math.ceil(len(s.data) / s.batch))
        rows = draws(len(s.data), s.batch, epochs, self.seed)[: s.steps]
        keeper = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            keeper = Keeper(path, s.of() | {"objectives": repr(self.asked), "seed": self.seed})
        noted = train(
            self.parameters,
            rows,
            self.step,
            self._optimizer,
            schedule=self._schedule,
            after=self._after,
            keeper=keeper,
            seed=self.seed,
            what=what,
        )
        return noted

    def _after(self, step: int) -> None:
        for each in self.objectives:
            if each.weight > 0:
                each.after(self.chosen.model, self.chosen.parameters, (step + 1) / self.settings.steps, self.seed)

    def _schedule(self, done: float) -> float:
        w = self.settings.warmup
        return min(1.0, (done * self.settings.steps + 1) / w) if w else 1.0

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        s, groups = self.settings, dict[tuple[float, float, bool], list[Tensor]]()

        def pace(done: float) -> float:  # no method: copies of the optimiser's groups must not copy this arm
            return math.prod(each.pace(round(done * s.steps)) for each in self.objectives if each.weight > 0)

        for name, p in zip(self.parameters, parameters, strict=True):
            own = name in self.chosen.parameters
            fresh = name in self.chosen.head or (not own and COPIED not in name)
            rate = s.head_learning_rate if s.head_learning_rate is not None and fresh else s.learning_rate
            groups.setdefault((rate, 0.0 if name in self.undecayed else s.weight_decay, own), []).append(p)
        return torch.optim.AdamW(
            [
                {"params": ps, "lr": lr, "weight_decay": wd, "pace": pace if own else constant}
                for (lr, wd, own), ps in groups.items()
            ]
        )

    def step(self, rows: Tensor, step: int) -> list[float]:
        s = self.settings
        size = math.ceil(len(rows) / s.accumulate)
        noted: dict[str, float] = {}
        batches = [s.data.batch(part.tolist(), step) for part in rows.split(size)]
        answers = sum(len(b.answers) for b in batches)
        for part, own in enumerate(batches):
            values = terms(self.chosen.model, s.data, own, self.objectives, self.seed, step, part, self.beside)
            share = len(own) / len(rows)
            whole = values.pop("task") * (len(own.answers) / answers)
            noted["task"] = noted.get("task", 0.0) + float(whole.detach())
            for each in self.objectives:
                if each.name in values:
                    whole = whole + each.weight * values[each.name] * share
                    noted[each.name] = noted.get(each.name, 0.0) + float(values[each.name].detach()) * share
            check_finite(noted, step, self.chosen.model, self.good)
            whole.backward(inputs=list(self.parameters.values()))
        self.chosen.mask()
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        check_finite({"the gradient": float(norm)}, step, self.chosen.model, self.good)
        self.good.keep()
        for name in noted.keys() - {"task"}:
            self.silent[name] = 0 if noted[name] else self.silent.get(name, 0) + 1
            if self.silent[name] == SILENT:
                warnings.warn(
                    f"{name} was exactly 0 for {SILENT} steps: it trains nothing (is anything in its spans?)",
                    stacklevel=2,
                )
        if s.clip is not None and grads:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), s.clip, norm)
        return [noted["task"], *(noted.get(each.name, 0.0) for each in self.objectives)]


def check_finite(values: Mapping[str, float], step: int, model: Model, good: Good) -> None:
    """Diverged where a term of the loss, or a gradient, is no number; the weights are then what they were while all were."""
    for name, value in values.items():
        if not math.isfinite(value):
            good.back()
            error = Diverged(
                f"{name if name != 'task' else 'the cross-entropy'} is {value} at step {step}: stopped; the error's .model has the "
                "weights of the last step at which all were numbers. A lower learning_rate, or a lower weight, may help"
            )
            error.model = model
            raise error


def drawn_beside(
    model: Model, data: Encoded, objectives: Sequence[Objective], seed: int
) -> dict[str, dict[str, Tensor]]:
    """What objectives train beside the model, fresh; of those that have something."""
    found = {each.name: each.beside(model, data, seed) for each in objectives if each.weight > 0}
    return {name: tensors for name, tensors in found.items() if tensors}


def terms(
    model: Model, data: Encoded, batch: Batch, objectives: Sequence[Objective], seed: int, step: int, part: int = 0,
    beside: Beside = MappingProxyType({}),
) -> dict[str, Tensor]:  # fmt: skip
    """Every term of the loss of one batch, unweighted: the "task" [mean over answers], and each objective's by its name.

    The one place where objectives meet a model: the loop of `fit` and `transformers.Trainer` both ask here.
    """
    active = [each for each in objectives if each.weight > 0]
    routes = [each for each in active if isinstance(each, Route)]
    if not routes:
        return _terms(model, data, batch, active, seed, step, f"{part}", beside, ())
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for row, whose in zip(batch.rows, zip(*(each.groups(batch) for each in routes), strict=True), strict=True):
        groups.setdefault(whose, []).append(row)
    found: dict[str, Tensor] = {}
    for k, (whose, rows) in enumerate(sorted(groups.items(), key=str)):
        own = data.batch(rows, step)
        with ExitStack() as stack:
            cuts = [cut for each, group in zip(routes, whose, strict=True) for cut in each.edits_for(model, group)]
            for each, group in zip(routes, whose, strict=True):
                stack.enter_context(each.closed(model, group))
            values = _terms(model, data, own, active, seed, step, f"{part}/{k}", beside, cuts)
        for name, value in values.items():
            share = len(own.answers) / len(batch.answers) if name == "task" else len(own) / len(batch)
            found[name] = found.get(name, 0.0) + share * value
    return found


def _terms(
    model: Model, data: Encoded, batch: Batch, active: Sequence[Objective], seed: int, step: int, part: str, beside: Beside,
    cuts: Sequence[Edit],
) -> dict[str, Tensor]:  # fmt: skip
    purposes = {each: generator(seed, f"{each.name}/{part}", step) for each in active}
    for each in active:
        batch = each.batch(batch, data, purposes[each])
    for each in active:
        batch = each.shown(model, batch, data, purposes[each], beside.get(each.name, NONE))
    keep, second = [site for each in active for site in each.sites(model)], any(each.second_order for each in active)
    seen = Pass(model, batch, data, keep=keep, edits=cuts, gradients=second, beside=beside)
    found = {"task": seen.task.mean()}
    for each in active:
        value = each.loss(seen, purposes[each])
        if value is not None:
            if each.name in found:
                raise InputError(f"two objectives are called {each.name}: add up their weights, or name other spans")
            found[each.name] = value
    return found


# ---- what came of it


def _result(
    found: Mapping[tuple[str, int], Measures], arms: list[str], seeds: list[int], splits: list[str],
    before: Mapping[str, float], cost: Mapping[str, float], given: tuple[Objective, ...], encoded: Encoded,
) -> Result:  # fmt: skip
    right = {k: m.right for k, m in found.items()}
    accuracy = np.array([[[right[a, s][name].mean() for name in splits] for s in seeds] for a in arms])
    loss = np.array([[found[a, s].loss for s in seeds] for a in arms])
    untrained = (loss >= UNTRAINED * encoded.constant).all(1)
    low, high = np.full((2, len(arms), len(splits)), np.nan)
    for i, a in enumerate(arms):
        for j, name in enumerate(splits):
            values = accuracy[i, :, j] if len(seeds) > 1 else right[a, seeds[0]][name]
            low[i, j], high[i, j] = interval(values, 0, within=(0, 1))
    variables: dict[str, Any] = {
        "accuracy": (("arm", "split"), accuracy.mean(1)), "low": (("arm", "split"), low), "high": (("arm", "split"), high),
        "accuracy_by_seed": (("arm", "seed", "split"), accuracy), "loss": ("arm", loss.mean(1)), "untrained": ("arm", untrained),
    }  # fmt: skip
    for name in NUMBERS:
        values = np.array([[getattr(found[a, s], name) for s in seeds] for a in arms], dtype=float)
        if not np.isnan(values).all():
            variables[name] = ("arm", values.mean(1))
    variables["cost"] = "arm", np.array([cost[a] for a in arms])
    names = list(before)
    coords: dict[str, Any] = {"arm": arms, "split": splits, "seed": seeds}
    own = list(dict.fromkeys(name for m in found.values() for name in m.own))
    if own:
        values = np.array([[[found[a, s].own.get(n, np.nan) for n in own] for s in seeds] for a in arms], dtype=float)
        coords["measure"] = own
        ends = np.array(
            [[interval(v, 0) if len(seeds) > 1 else (np.nan, np.nan) for v in row] for row in values.swapaxes(1, 2)]
        )
        variables |= {
            "measured": (("arm", "measure"), values.mean(1)), "measured_by_seed": (("arm", "seed", "measure"), values),
            "measured_low": (("arm", "measure"), ends[..., 0]), "measured_high": (("arm", "measure"), ends[..., 1]),
        }  # fmt: skip
    if names:
        coords["term"] = names
        values = np.array([[[found[a, s].after.get(n, np.nan) for n in names] for s in seeds] for a in arms])
        variables |= {"before": ("term", [before[n] for n in names]), "after": (("arm", "term"), values.mean(1))}
    data = xr.Dataset(variables, coords)
    data.attrs["interval"] = "over seeds" if len(seeds) > 1 else "over texts"
    told = verdict(data, given, len(seeds) * len(right[arms[0], seeds[0]][splits[0]]))
    data.attrs |= {"verdict": told, "constant_loss": encoded.constant}
    return Result(data, kind="tuning", title=told[0])
