"""Train, interpret, adjust: measure, find, change, measure again on held-out data, accept or roll back, and keep a ledger of it.

A round:

    measured = measure(model, fitted)                     what is wrong, on the data that may be looked at
    changed  = change(model, fitted, measured, round)     what finds the cause and mends it: an edit of weights, a fine-tuning
    accept    where, on held-out data, the goal rises (the lower end of its paired interval is above 0) and no guard falls
              by more than its tolerance (the lower end of the guard's interval is above -tolerance)

Held-out data that decides many rounds is looked at many times, so the intervals are at the level 1 - .05 / rounds: the chance that a
useless change is accepted in any of them is about .05. A last number for the model that comes out wants data that no round has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors.torch import load_file, save_file

from pellucid.changed import Change, Replaced
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

LEDGER = "ledger.json"
Measure = Callable[[Model, Any], Mapping[str, Any]]
Changing = Callable[[Model, Any, Mapping[str, Any], int], "Model | Change | Sequence[Change] | None"]


@dataclass(eq=False)
class Improved:
    """What came out: the `model` with every accepted change, the `rounds`, each a result, and the `result` over all of them."""

    result: Result
    model: Model = field(repr=False)
    rounds: list[Result] = field(repr=False)


@technique
def improve(
    model: Model,
    measure: Measure,
    change: Changing,
    fitted: Any,
    held_out: Any,
    *,
    ledger: str | Path,
    rounds: int = 3,
    tolerance: Mapping[str, float] | float = 0.0,
    seed: int = 0,
) -> Improved:
    """Up to `rounds` rounds as the module says; the model you give keeps every bit.

    `measure(model, data)` gives numbers by name, higher is better, each for every example ([example], the same examples each time):
    the first is the goal, the others guard. `change(model, fitted, measured, round)` returns a changed model, changes for
    `model.changed`, or None, which ends the loop; after a round that was rolled back it is asked again, with the next number.
    `ledger` is a folder: `round-000.zip` is each round's result, `round-000.safetensors` the parameters it changed. The same call
    goes on where it was interrupted. Each result has over `measure` `before` and `after` on held-out data, the paired `change` with `low`
    and `high`, `fitted_before` and `fitted_after`, and `accepted`. InputError for a folder of another model or other measures.

    >>> improved = improve(model, measure, edit_facts, train, test, ledger="runs/facts", tolerance={"others": .02})
    """
    at_least(1, rounds=rounds)
    folder = Path(ledger)
    folder.mkdir(parents=True, exist_ok=True)
    level = 1 - 0.05 / rounds
    before = _measured(measure(model, held_out), None)
    done, now = _resumed(model, folder, list(before), rounds)
    if now is not model:
        before = _measured(measure(now, held_out), list(before))
    for i in progress(range(len(done), rounds), "rounds"):
        seen = _measured(measure(now, fitted), list(before))
        made = change(now, fitted, {k: v.mean() for k, v in seen.items()}, i)
        if made is None:
            break
        new = made if isinstance(made, Model) else now.changed(made)
        parameters = _differing(now, new)
        after, again = (_measured(measure(new, data), list(before)) for data in (held_out, fitted))
        result = _round(before, after, seen, again, tolerance, level, seed, i)
        save_file(parameters, str(folder / f"round-{i:03d}.safetensors"))
        result.save(folder / f"round-{i:03d}.zip")
        done.append(result)
        _write(folder, model, before, done, rounds)
        if bool(result.data.accepted):
            now, before = new, after
    if not done:
        raise InputError("change= gave nothing in the first round: there is nothing to judge")
    return Improved(_summary(done), now, done)


def _round(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    seen: Mapping[str, np.ndarray],
    again: Mapping[str, np.ndarray],
    tolerance: Mapping[str, float] | float,
    level: float,
    seed: int,
    i: int,
) -> Result:
    names = list(before)
    ends = {k: interval(after[k] - before[k], seed, level=level) for k in names}
    change = {k: float((after[k] - before[k]).mean()) for k in names}
    allowed = {k: tolerance.get(k, 0.0) if isinstance(tolerance, Mapping) else tolerance for k in names[1:]}
    if isinstance(tolerance, Mapping) and (unknown := [k for k in tolerance if k not in names[1:]]):
        raise InputError(
            f"tolerance= names {unknown[0]!r}, which is no guard: these are {', '.join(names[1:]) or 'none'}"
        )
    # a guard whose examples are all as they were has an interval without width at 0, which is above -0 as well
    fell = [k for k in names[1:] if not (float(ends[k][0]) > -allowed[k] or bool((after[k] >= before[k]).all()))]
    rises = float(ends[names[0]][0]) > 0
    why = "" if rises else f"{names[0]} does not rise for sure"
    why = why or (f"{', '.join(fell)} may fall by more than allowed" if fell else "")
    columns = {
        "before": [before[k].mean() for k in names], "after": [after[k].mean() for k in names],
        "change": [change[k] for k in names], "low": [float(ends[k][0]) for k in names], "high": [float(ends[k][1]) for k in names],
        "fitted_before": [seen[k].mean() for k in names], "fitted_after": [again[k].mean() for k in names],
    }  # fmt: skip
    data = xr.Dataset({k: ("measure", v) for k, v in columns.items()}, {"measure": names})
    data = data.assign(accepted=not why, level=level)
    said = (
        f"accepted: {names[0]} {columns['before'][0]:.3g} to {columns['after'][0]:.3g}"
        if not why
        else f"rolled back: {why}"
    )
    return Result(data, kind="improvement round", title=f"Round {i}, {said}")


def _summary(done: Sequence[Result]) -> Result:
    data = xr.concat(
        [r.data[["before", "after", "change", "low", "high", "accepted"]] for r in done], "round"
    ).assign_coords(round=range(len(done)))
    n = int(data.accepted.sum())
    goal = str(data.measure.values[0])
    last = float(data.after[int(np.flatnonzero(data.accepted.values)[-1]), 0]) if n else float(data.before[0, 0])
    said = f"{goal} {float(data.before[0, 0]):.3g} to {last:.3g} on held-out data that {len(done)} rounds looked at"
    return Result(data, kind="improvement", title=f"{n} of {len(done)} changes accepted: {said}")


def _measured(found: Mapping[str, Any], names: list[str] | None) -> dict[str, np.ndarray]:
    made = {k: np.asarray(v, dtype=float).reshape(-1) for k, v in found.items()}
    short = next((k for k, v in made.items() if len(v) < 2 or not np.isfinite(v).all()), None)
    if not made or short is not None:
        raise InputError(
            f"measure= gave no number for each of several examples of {short or 'anything'}: expected [example] by name"
        )
    if names is not None and list(made) != names:
        raise InputError(
            f"measure= gave {', '.join(made)} and before {', '.join(names)}: expected the same names each time"
        )
    return made


def _differing(old: Model, new: Model) -> dict[str, Any]:
    """The parameters a change gave new numbers. InputError where it changed more than numbers."""
    a, b = (dict(m.module.named_parameters(remove_duplicate=False)) for m in (old, new))
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        raise InputError(
            "the changed model has other parameters (layers taken out, modules exchanged): a round changes numbers only"
        )
    return {
        k: v.detach().cpu().contiguous().clone() for k, v in b.items() if v is not a[k] and not bool((v == a[k]).all())
    }


def _write(folder: Path, model: Model, before: Mapping[str, Any], done: Sequence[Result], rounds: int) -> None:
    about = {
        "digest": model.digest,
        "measures": list(before),
        "rounds": rounds,
        "accepted": [bool(r.data.accepted) for r in done],
    }
    part = folder / f"{LEDGER}.part"
    part.write_text(json.dumps(about, indent=1))
    part.replace(folder / LEDGER)


def _resumed(model: Model, folder: Path, names: list[str], rounds: int) -> tuple[list[Result], Model]:
    """The rounds that are done, and the model after them."""
    if not (folder / LEDGER).exists():
        return [], model
    try:
        about = json.loads((folder / LEDGER).read_text())
        same = about["digest"] == model.digest and about["measures"] == names and about["rounds"] == rounds
        accepted = list(about["accepted"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(folder)!r} is no ledger: delete it or name another folder") from error
    if not same:
        raise InputError(
            f"{str(folder)!r} is the ledger of another model, of other measures or for another number of rounds: name another folder"
        )
    done = [Result.load(folder / f"round-{i:03d}.zip") for i in range(len(accepted))]
    for i, ok in enumerate(accepted):
        if ok:
            kept = load_file(str(folder / f"round-{i:03d}.safetensors"))
            model = model.changed([Replaced(k, v, ties="apart") for k, v in kept.items()])
    return done, model
