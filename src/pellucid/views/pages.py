"""Neurons as views: the page of one (contexts with samples beside them, histogram, words), and those that tell concepts apart."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.cells import ROWS, Cells
from pellucid.views.markup import visible
from pellucid.views.schema import Fact, Numbers

# Columns of the table of selective units: their names and variables.
CHOSEN = {"AUROC": "auroc", "point-biserial": "point_biserial", "F1": "f1", "p": "p"}
OUTSIDE = {"AUROC on other texts": "held_out", "low": "low", "high": "high"}
CONCEPT = {"best after a shuffle": "shuffled", "units with p < .05": "significant", "examples": "examples"}


def is_neuron(result: Result) -> bool:
    return result.kind == "neuron page"


def is_selective(result: Result) -> bool:
    return result.kind == "neuron selectivity"


def neuron(result: Result) -> s.Neuron:
    """The view of a `neuron_page`."""
    data = result.data
    facts = [
        Fact(name="tokens read", value=f"{int(data['tokens']):,}"),
        Fact(name="mean", value=f"{float(data['mean']):.3g}"),
        Fact(name="standard deviation", value=f"{float(data['std']):.3g}"),
        Fact(name="positive on", value=f"{100 * float(data['positive']):.3g} %"),
    ]
    for i, relation in enumerate(data["relation"].values if "relation" in data else ()):
        unit, likeness = str(data["neighbour"].values[i, 0]), float(data["similarity"].values[i, 0])
        facts.append(Fact(name=f"nearest by {relation}", value=f"{unit} ({likeness:.2f})"))
    return s.Neuron(
        component=str(data.attrs["unit"]),
        contexts=tuple(_context(result, i) for i in range(data.sizes["context"])),
        edges=Numbers.of(np.append(data["low"].values, data["high"].values[-1:])),
        counts=Numbers.of(np.round(data["count"].values).astype(np.int32)),
        raises=words(data, "raised"),
        lowers=words(data, "lowered"),
        facts=tuple(facts),
    )


def words(data: xr.Dataset, which: str) -> tuple[s.Effect, ...]:
    """The words a unit has "raised" or "lowered", where they are known."""
    known = zip(data[f"{which}_token"].values, data[which].values, strict=True) if which in data else ()
    return tuple(s.Effect(word=str(word), value=float(value)) for word, value in known)


def selective(result: Result) -> s.Table:
    """The units a `neuron_selectivity` found, a row for each concept and rank; its matrices are too wide to be drawn."""
    data = result.data
    best = data[["found", "held_out", "low", "high"]].to_dataframe().reset_index()
    at = [int(np.flatnonzero(data["unit"].values == unit)[0]) for unit in best["found"]]
    row = [int(np.flatnonzero(data["concept"].values == concept)[0]) for concept in best["concept"]]
    columns = [
        s.Column(name="concept", texts=tuple(map(str, best["concept"]))),
        s.Column(name="unit", texts=tuple(map(str, best["found"]))),
        *(s.Column(name=name, numbers=Numbers.of(data[key].values[row, at])) for name, key in CHOSEN.items()),
        *(s.Column(name=name, numbers=Numbers.of(best[key].to_numpy())) for name, key in OUTSIDE.items()),
        *(s.Column(name=name, numbers=Numbers.of(data[key].values[row])) for name, key in CONCEPT.items()),
    ]
    return s.Table(columns=tuple(columns), rows=len(best), components=tuple(map(str, best["found"])))


def _context(result: Result, i: int) -> s.Context:
    data = result.data.isel(context=i)
    there = np.isfinite(data["activation"].values)
    group = str(data["group"].values)
    note = f"text {int(data['prompt'])}, token {int(data['position'])}"
    if group != "top":  # the view shows the largest number of a context, which need not be the one that was drawn
        note += f" with {float(data['peak']):.2f}, a sample from {group} of its activations"
    return s.Context(
        tokens=tuple(str(t) for t in data["token"].values[there]), values=Numbers.of(data["activation"].values[there]), note=note
    )  # fmt: skip


def plain_neuron(data: s.Neuron) -> Cells:
    rows = []
    for context in data.contexts[:ROWS]:
        values = context.values.array()
        at = int(np.nanargmax(np.abs(values)))
        rows.append(("".join(context.tokens[max(0, at - 8) : at]), visible(context.tokens[at]), float(values[at])))
    return ("text before", "token", "activation"), rows, len(data.contexts)
