"""How do the findings about safety look? Each by the kind of its result; `forms` asks here before its own rules.

monitor evaluation   the ROC curve, with the operating point that the threshold chose, over all and for each source
strengths            effect against price: a line for each site and direction along its strengths, random ones dashed
honesty              what is said and what is read, under each pressure
monitor trace        of several prompts: how far each statistic is above the threshold, prompt by step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.markup import visible
from pellucid.views.schema import Fact, Numbers

SITES = 4


def evaluation(result: Result) -> s.Curves:
    """False alarms against what is found, and where on that curve the threshold stands."""
    data = result.data
    score, label = data["score"].values.astype(float), data["label"].values.astype(bool)
    lines: list[s.Line] = []
    if "area" in data:
        steps = np.unique(score)[::-1]
        x, y = ([0.0, *((score[label == c] >= t).mean() for t in steps)] for c in (False, True))
        area = f"area {float(data['area']):.3f} [{float(data['area_low']):.3f}, {float(data['area_high']):.3f}]"
        lines.append(s.Line(name=area, x=Numbers.of(x), y=Numbers.of(y)))
    for i, source in enumerate(data["source"].values.tolist()):
        alarms, recall = (float(data[k].values[i]) for k in ("alarms", "recall"))
        if np.isnan(alarms) or np.isnan(recall) or (i and len(data["source"]) == 2):
            continue
        low, high = (Numbers.of([float(data[f"recall_{end}"].values[i])]) for end in ("low", "high"))
        named = f"threshold {float(data['threshold']):.3g}" + ("" if source == "all" else f", {source}")
        said = f"{named}: {alarms:.1%} false alarms, {recall:.0%} found"
        lines.append(s.Line(name=said, x=Numbers.of([alarms]), y=Numbers.of([recall]), low=low, high=high))
    ends = Numbers.of([0.0, 1.0])
    lines.append(s.Line(name="chance", x=ends, y=ends, dashed=True))
    return s.Curves(x=s.Ruler(name="false alarms"), y=s.Ruler(name="found"), lines=tuple(lines))


def sweep(result: Result) -> s.Curves:
    """What a push does (up) for what it costs (across), from strength 0 on."""
    data = result.data
    ratio = data["perplexity"].values / float(data["base_perplexity"])  # [site, strength, direction]
    effect, names, sites = data["effect"].values, data["direction"].values.tolist(), data["site"].values.tolist()
    chosen = str(data["chosen_site"].values) if "chosen_site" in data else ""
    own = [i for i, name in enumerate(names) if not name.startswith("random")]
    order = sorted(
        range(len(sites)), key=lambda i: (sites[i] != chosen, -float(np.nan_to_num(np.abs(effect[i][:, own])).max()))
    )
    lines = []
    for rank, i in enumerate(order[:SITES]):
        for k, name in enumerate(names):
            random = k not in own
            if random and rank:
                continue  # random ones of the first site stand for all
            x, y = (Numbers.of([start, *values[i, :, k].tolist()]) for start, values in ((1.0, ratio), (0.0, effect)))
            lines.append(s.Line(name=f"{name} at {sites[i]}", x=x, y=y, dashed=random))
    if chosen:
        j, k = data["strength"].values.tolist().index(float(data["chosen_strength"])), names.index(str(data["chosen_direction"].values))  # fmt: skip
        i = sites.index(chosen)
        test, low, high = (float(data[f"test_{n}"].values[k]) for n in ("effect", "low", "high"))
        said = f"chosen, strength {float(data['chosen_strength']):g}: on test prompts {test:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(s.Line(name=said, x=Numbers.of([float(ratio[i, j, k])]), y=Numbers.of([float(effect[i, j, k])])))
    judge = str(data.attrs.get("judge", "")) or "the judge"
    x_axis = s.Ruler(name="perplexity of the written text, times that of the plain model's")
    return s.Curves(x=x_axis, y=s.Ruler(name=f"effect on {judge}"), lines=tuple(lines), levels=(s.Level(name="no effect", y=0.0),))  # fmt: skip


def beliefs(result: Result) -> s.Curves:
    """Shares of questions, with intervals, under each pressure."""
    data = result.data
    names = tuple(map(str, data["pressure"].values.tolist()))
    x = Numbers.of(np.arange(len(names)))
    lines = tuple(
        s.Line(
            name=name,
            x=x,
            y=Numbers.of(data[key].values),
            low=Numbers.of(data[f"{key}_low"].values),
            high=Numbers.of(data[f"{key}_high"].values),
        )
        for name, key in (("the true answer is said", "says"), ("the true answer is read inside", "believes"))
    )
    return s.Curves(
        x=s.Ruler(name="pressure", labels=names),
        y=s.Ruler(name="share of questions"),
        lines=lines,
        levels=(s.Level(name="chance", y=0.5),),
    )


def is_firings(result: Result) -> bool:
    """The trace of several prompts; that of one is a curve."""
    return result.kind == "monitor trace" and result.main.sizes.get("prompt", 1) > 1


def firings(result: Result) -> s.Grid:
    """Planes by monitor, [prompt, step]: the statistic less the threshold, above 0 where it fires."""
    data = result.data
    monitors, steps = (tuple(map(str, data[k].values.tolist())) for k in ("monitor", "step"))
    levels = np.where(np.isfinite(data["threshold"].values), data["threshold"].values, 0.0)
    above = data["statistic"].values - levels[:, None]  # [prompt, monitor, step]
    acted, done, shown = (data[k].values for k in ("acted", "done", "shown"))
    labels = tuple(f"{i}: {_short(str(text))}" for i, text in enumerate(shown))
    planes = tuple(s.Plane(name=name, values=Numbers.of(above[:, m])) for m, name in enumerate(monitors))
    facts = []
    for m, name in enumerate(monitors):
        rows = [f"{i} at token {int(acted[i, m])} ({done[i, m]})" for i in np.flatnonzero(acted[:, m] >= 0)]
        told = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        facts.append(Fact(name=name, value=told or "no alarm"))
    return s.Grid(
        rows=s.Axis(name="prompt", labels=labels), columns=s.Axis(name="step", labels=steps), planes=planes, unit="above the threshold",
        facts=tuple(facts),
    )  # fmt: skip


def _short(text: str, n: int = 28) -> str:
    text = visible(text)
    return text if len(text) <= n else f"{text[: n - 1]}…"


def frontier(result: Result) -> s.Curves:
    """Accuracy (the worst of any shift, where there is one) against what was bought: a line over the weights, the others as points."""
    data = result.data
    measure = next(str(n) for n in data.data_vars if n not in FRONTIER)
    y = "shifted" if "shifted" in data else "accuracy"
    points = [p for p in data["point"].values.tolist() if not bool(data["untrained"].sel(point=p))]
    tried = [p for p in points if p.startswith("weight")]
    groups = {"plain": ["plain"], f"weights {', '.join(p.split()[1] for p in tried)}": tried} | {p: [p] for p in points if p not in ("plain", *tried)}  # fmt: skip
    lines = []
    for name, some in groups.items():
        own = data.sel(point=[p for p in some if p in points])
        if own.sizes["point"]:
            ends: dict[str, Any] = {n: Numbers.of(own[n].values) for n in ("low", "high")} if y == "accuracy" else {}
            lines.append(s.Line(name=name, x=Numbers.of(own[measure].values), y=Numbers.of(own[y].values), **ends))
    return s.Curves(x=s.Ruler(name=measure.replace("_", " ")), y=s.Ruler(name="accuracy, worst split" if y == "shifted" else y), lines=tuple(lines))  # fmt: skip


FRONTIER = ("accuracy", "low", "high", "cost", "weight", "untrained", "shifted")
CURVES: Mapping[str, Callable[[Result], s.Curves]] = {
    "monitor evaluation": evaluation,
    "strengths": sweep,
    "honesty": beliefs,
    "frontier": frontier,
}
