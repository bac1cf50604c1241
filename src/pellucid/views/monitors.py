"""How do probes and monitors look: their verdict at every token and layer, and how well it tells apart?"""

from __future__ import annotations

import numpy as np

from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.cells import Cells, strongest
from pellucid.views.markup import visible
from pellucid.views.schema import Numbers

CHANCE = "chance"
JUDGED = {"area": "area", "low": "low", "high": "high", "control": "shuffled", "control_low": "shuffled_low", "control_high": "shuffled_high"}  # fmt: skip


def _judged(result: Result) -> bool:
    return {"true_positive", "false_positive"} <= set(result.data.variables)


def is_traces(result: Result) -> bool:
    return _judged(result) and "position" in result.main.dims


def is_roc(result: Result) -> bool:
    return _judged(result) and "position" not in result.main.dims


def traces(result: Result) -> s.Traces:
    """Scores [layer, position] with what is known of each layer: its threshold, and its ROC curve on held-out examples."""
    data, layers = result.data, tuple(map(str, result.main["layer"].values.tolist()))
    own = result.main.transpose("layer", "position")
    rocs = tuple(
        s.Roc(
            false_positive=Numbers.of(data["false_positive"].values), true_positive=Numbers.of(data["true_positive"].values[i]),
            **{name: float(data[key].values[i]) for name, key in JUDGED.items() if key in data},
        )
        for i in range(len(layers))
    )  # fmt: skip
    sites = tuple(map(str, data["site"].values.tolist())) if "site" in data.coords else ()
    return s.Traces(
        tokens=tuple(map(str, own["token"].values.tolist())), positions=tuple(map(int, own["position"].values)),
        rows=s.Axis(name="layer", labels=layers, components=sites), values=Numbers.of(own.values), unit=str(data.attrs.get("unit", own.name)),
        thresholds=Numbers.of(data["threshold"].values) if "threshold" in data else None, rocs=rocs,
        signed=bool(np.nanmin(own.values) < 0),
    )  # fmt: skip


def roc(result: Result) -> s.Curves:
    """A curve with its area, or one for each layer, beside what guessing gives."""
    data, found = result.data, result.data["true_positive"]
    x = data["false_positive"].values
    if found.ndim == 1:
        area = f"area {float(data['area']):.3f} [{float(data['low']):.3f}, {float(data['high']):.3f}]"
        lines = [s.Line(name=area, x=Numbers.of(x), y=Numbers.of(found.values))]
    else:
        order = np.argsort(-data["area"].values, kind="stable")[:5]  # those that tell apart best
        lines = [
            s.Line(
                name=f"{found.dims[0]} {found[found.dims[0]].values[i]}, area {float(data['area'].values[i]):.3f}",
                x=Numbers.of(x),
                y=Numbers.of(found.values[i]),
            )
            for i in order
        ]
    ends = Numbers.of([0.0, 1.0])
    lines.append(s.Line(name=CHANCE, x=ends, y=ends, dashed=True))
    return s.Curves(x=s.Ruler(name="false alarms"), y=s.Ruler(name="found"), lines=tuple(lines))


def plain_traces(data: s.Traces) -> Cells:
    values = data.values.array()
    rows = [(data.rows.labels[i], visible(data.tokens[j]), float(values[i, j])) for i, j in strongest(values)]
    return (data.rows.name, "token", data.unit or "value"), rows, values.size
