"""How is each kind of view drawn on matplotlib axes? One function for each, named in its row of `kinds`.

What is drawn is the data of the interactive view, so both show the same numbers in the same colours (web/src/lib/colour.ts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pellucid.errors import InputError, nearest
from pellucid.views import schema as s
from pellucid.views.markup import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

AMOUNTS = ("#fbfaf7", "#a9d3c5", "#3f96a0", "#12466b")  # from nothing to the most
SIGNED = ("#7c3503", "#c9681a", "#f5bd86", "#fbfaf7", "#9cc3ea", "#2a6db5", "#0e3a73")
LINES = ("#1b6f86", "#b3500f", "#6b4fa0", "#3d7a35", "#a03060", "#6b6358")
INK, SOFT, RULE = "#201e1b", "#67625a", "#e2ded5"
BARS = 16  # of a chart of bars: the largest
WRITTEN = 400  # cells of a grid up to which words are written into them


def size(data: s.View) -> tuple[float, float]:
    """Inches: a column of a paper, higher or wider where there is more to show."""
    rows, columns = 12, 18
    match data:
        case s.Grid():
            rows, columns = len(data.rows.labels), len(data.columns.labels)
        case s.Lens():
            rows, columns = len(data.layers), 3 * len(data.tokens)
        case s.Tokens():
            rows, columns = (len(data.tokens), 12) if len(data.tracks) == 1 else (len(data.tracks), len(data.tokens))
        case s.Attention():
            rows, columns = len(data.stacks[0].queries), len(data.stacks[0].keys)
        case s.Circuit():
            rows, columns = 24, 30
    return min(max(3.6, 0.28 * columns + 1.6), 14), min(max(2.6, 0.22 * rows + 1.2), 14)


def _chosen(items: Sequence[Any], choice: str | None, what: str) -> Any:
    names = [item.name for item in items]
    if choice is None:
        return items[0]
    if choice not in names:
        raise InputError(f"this view has no {what} {choice!r}{nearest(choice, names)}: there are {', '.join(names)}")
    return items[names.index(choice)]


def _map(signed: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("pellucid", SIGNED if signed else AMOUNTS).with_extremes(bad="#d9d5cc")


def _heat(ax: Axes, values: np.ndarray, *, signed: bool, unit: str, full: float | None = None) -> AxesImage:
    """A grid of colours with its scale; what is signed has nothing in the middle. NaN is grey."""
    if full is None:
        full = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    image = ax.imshow(values, cmap=_map(signed), vmin=-full if signed else 0, vmax=full, aspect="auto")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _ticks(ax: Axes, side: str, labels: Sequence[str], most: int = 40) -> None:
    """Labels of a grid's rows ("y") or columns ("x"), thinned where they would run into one another."""
    at = range(0, len(labels), -(-len(labels) // most) or 1)
    texts = [visible(str(labels[i])) for i in at]
    if side == "y":
        ax.set_yticks(list(at), texts)
    else:
        turned = max(map(len, texts), default=0) > 2
        ax.set_xticks(list(at), texts, rotation=45 if turned else 0, ha="right" if turned else "center")


def _bars(ax: Axes, names: Sequence[str], values: np.ndarray, unit: str, *, order: bool = True) -> None:
    """Horizontal bars, the first on top; of many the largest in size."""
    kept = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:BARS] if order else np.arange(len(values))
    ax.barh(range(len(kept)), values[kept], color=[SIGNED[5] if v >= 0 else SIGNED[1] for v in values[kept]])
    ax.set_yticks(range(len(kept)), [visible(names[i]) for i in kept])
    ax.invert_yaxis()
    ax.axvline(0, color=SOFT, lw=0.6)
    ax.set_xlabel(unit, fontsize=8)


# ---- one for each kind


def grid(data: s.Grid, ax: Axes, choice: str | None) -> None:
    plane = _chosen(data.planes, choice, "plane")
    _heat(ax, plane.values.array(), signed=data.signed, unit=plane.unit or data.unit, full=data.full)
    for side, axis in (("y", data.rows), ("x", data.columns)):
        _ticks(ax, side, axis.labels)
        (ax.set_ylabel if side == "y" else ax.set_xlabel)(axis.name, fontsize=8)
    if len(data.planes) > 1:
        ax.set_title(f"{ax.get_title(loc='left')}: {plane.name}", loc="left", fontsize=10, color=INK, wrap=True)


def tokens(data: s.Tokens, ax: Axes, choice: str | None) -> None:
    """Bars of one method, or a strip for each of several."""
    if len(data.tracks) == 1 or choice is not None:
        track = _chosen(data.tracks, choice, "method")
        return _bars(ax, data.tokens, track.values.array().astype(float), data.unit or track.name, order=False)
    each = [t.values.array().astype(float) for t in data.tracks]
    scaled = np.stack([v / (data.full or np.nanmax(np.abs(v), initial=0.0) or 1.0) for v in each])
    unit = "share of the method's largest" if data.full is None else "share of the largest of all"
    _heat(ax, scaled, signed=any(t.signed for t in data.tracks), unit=unit)
    _ticks(ax, "y", [t.name for t in data.tracks])
    _ticks(ax, "x", data.tokens)


def lens(data: s.Lens, ax: Axes, choice: str | None) -> None:
    """The best guess after each layer at each token, the last layer on top, as the stream is usually drawn."""
    reading = _chosen(data.readings, choice, "lens")
    best, p = reading.top.array()[..., 0], reading.probability.array()[..., 0]
    _heat(ax, p, signed=False, unit="probability", full=1.0)
    ax.invert_yaxis()
    _ticks(ax, "y", data.layers)
    _ticks(ax, "x", data.tokens)
    ax.set_ylabel("layer", fontsize=8)
    if best.size <= WRITTEN * 2:
        for (i, j), word in np.ndenumerate(best):
            ink = "white" if p[i, j] > 0.55 else INK
            ax.text(j, i, visible(data.words[word])[:9], ha="center", va="center", fontsize=5.5, color=ink)


def contributions(data: s.Contributions, ax: Axes, choice: str | None) -> None:
    _bars(ax, data.names, data.values.array().astype(float), data.unit)


def attention(data: s.Attention, ax: Axes, choice: str | None) -> None:
    """One head's pattern: the first shown, or "layer.head" of `choice`."""
    from pellucid.views.looking import pattern_of

    stack = data.stacks[0]
    names = [f"{h.layer}.{h.head}" for h in stack.heads]
    if choice is not None and choice not in names:
        raise InputError(
            f"this view has no head {choice!r}{nearest(choice, names)}: write it as layer.head, say {names[0]}"
        )
    i = stack.first if choice is None else names.index(choice)
    _heat(ax, pattern_of(stack, i), signed=False, unit="attention", full=1.0)
    _ticks(ax, "y", stack.queries)
    _ticks(ax, "x", stack.keys)
    ax.set_ylabel(f"query of head {names[i]}", fontsize=8)
    ax.set_xlabel("key", fontsize=8)


def curves(data: s.Curves, ax: Axes, choice: str | None) -> None:
    """Lines with their intervals: told apart by dashes as well as by colour."""
    lines = data.lines if choice is None else [_chosen(data.lines, choice, "curve")]
    dashes: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 3))]
    for i, line in enumerate(lines):
        colour = SOFT if line.dashed else LINES[i % len(LINES)]
        x, y = line.x.array(), line.y.array()
        ax.plot(x, y, color=colour, ls=":" if line.dashed else dashes[i % len(dashes)], lw=1.4, label=visible(line.name),
                marker="o" if len(x) <= 12 else None, ms=3)  # fmt: skip
        if line.low is not None and line.high is not None:
            ax.fill_between(x, line.low.array(), line.high.array(), color=colour, alpha=0.15, lw=0)
    for level in data.levels:
        ax.axhline(level.y, color=SOFT, lw=0.8, ls="--")
        ax.annotate(level.name, (1, level.y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    if data.x.log:
        ax.set_xscale("log")
    if data.y.log:
        ax.set_yscale("log")
    if data.x.labels:
        _ticks(ax, "x", data.x.labels, 20)
    ax.set_xlabel(data.x.name, fontsize=8)
    ax.set_ylabel(data.y.name, fontsize=8)
    if len(lines) > 1:
        ax.legend(fontsize=7, frameon=False)


def traces(data: s.Traces, ax: Axes, choice: str | None) -> None:
    """A line for each of a few monitors with its threshold, a strip for each of many layers."""
    values, limits = data.values.array().astype(float), None if data.thresholds is None else data.thresholds.array()
    if len(values) > len(LINES):
        _heat(ax, values, signed=data.signed, unit=data.unit)
        _ticks(ax, "y", data.rows.labels)
        ax.set_ylabel(data.rows.name, fontsize=8)
    else:
        for i, row in enumerate(values):
            ax.plot(row, color=LINES[i], lw=1.4, marker="o", ms=3, label=data.rows.labels[i])
            if limits is not None and np.isfinite(limits[i]):
                ax.axhline(limits[i], color=LINES[i], lw=0.8, ls="--")
        ax.set_ylabel(data.unit, fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    _ticks(ax, "x", data.tokens)


def circuit(data: s.Circuit, ax: Axes, choice: str | None) -> None:
    """Parts by depth, from below; an edge is as wide as its score is large, orange where it counts against."""
    depths: dict[int, list[int]] = {}
    for i, node in enumerate(data.nodes):
        depths.setdefault(node.layer, []).append(i)
    at = {i: ((k + 0.5) / len(row), y) for y, (_, row) in enumerate(sorted(depths.items())) for k, i in enumerate(row)}
    scores = data.scores.array().astype(float)
    full = float(np.nanmax(np.abs(scores), initial=0.0)) or 1.0
    for a, b, score in zip(data.sources.array(), data.targets.array(), scores, strict=True):
        size = abs(score) / full
        colour = SIGNED[5] if score >= 0 else SIGNED[1]
        ax.annotate("", at[int(b)], at[int(a)], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0.4 + 2.2 * size, "alpha": 0.3 + 0.6 * size,
                    "shrinkA": 9, "shrinkB": 9, "mutation_scale": 6, "connectionstyle": "arc3,rad=.08"})  # fmt: skip
    for i, (x, y) in at.items():
        node = data.nodes[i]
        text = node.group or (f"{node.label}{f' {node.position}' if node.position else ''}")
        ax.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
            bbox={"boxstyle": "round,pad=.3", "fc": AMOUNTS[0], "ec": SOFT, "lw": 0.6},
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.6, len(depths) - 0.4)
    ax.set_axis_off()


def anatomy(data: s.Anatomy, ax: Axes, choice: str | None) -> None:
    """Each stack a column of its blocks, those alike together, with what one of them holds."""
    for column, stack in enumerate(data.stacks):
        y = 0.0
        for block in stack.blocks:
            height = 0.6 + 0.12 * len(block.layers)
            held = ", ".join(
                filter(
                    None,
                    (
                        f"{block.heads} heads" if block.heads else "",
                        f"{block.neurons} neurons" if block.neurons else "",
                    ),
                )
            )
            span = f"layers {block.layers[0]}" + (f" to {block.layers[-1]}" if len(block.layers) > 1 else "")
            ax.barh(y + height / 2, 0.9, height=height * 0.94, left=column, color=AMOUNTS[1], edgecolor=SOFT, lw=0.6)
            ax.text(
                column + 0.45,
                y + height / 2,
                f"{stack.name} {span}\n{held}".strip(),
                ha="center",
                va="center",
                fontsize=7,
                color=INK,
            )
            y += height
    failed = [p.name for p in data.proofs if p.holds is False]
    told = f"{sum(p.holds is True for p in data.proofs)} proofs hold" + (
        f", not: {', '.join(failed)}" if failed else ""
    )
    ax.set_xlabel(told, fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])


def neuron(data: s.Neuron, ax: Axes, choice: str | None) -> None:
    """What it writes where that is known, else how its activations are spread."""
    written = [*data.raises, *data.lowers]
    if written:
        return _bars(ax, [e.word for e in written], np.array([e.value for e in written]), "logit per unit")
    if data.edges is None or data.counts is None:
        peaks = [float(np.nanmax(c.values.array(), initial=0.0)) for c in data.contexts]
        return _bars(ax, ["".join(c.tokens)[-40:] for c in data.contexts], np.array(peaks), "largest activation")
    ax.stairs(data.counts.array(), data.edges.array(), fill=True, color=SIGNED[5])
    ax.set_yscale("log")
    ax.set_xlabel("activation", fontsize=8)
    ax.set_ylabel("tokens", fontsize=8)
    return None


def table(data: s.Table, ax: Axes, choice: str | None) -> None:
    """The first column of numbers (or the one chosen) as bars, named by the columns of text beside it."""
    numbers = {c.name: c.numbers.array().astype(float).ravel() for c in data.columns if c.numbers is not None}
    if not numbers:
        raise InputError("this table has no column of numbers to draw: use result.to_frame()")
    if choice is not None and choice not in numbers:
        raise InputError(
            f"this table has no column {choice!r}{nearest(choice, numbers)}: there are {', '.join(numbers)}"
        )
    measured = [name for name in numbers if not name.endswith(("layer", "position", "index", "step"))]
    drawn = choice or (measured or list(numbers))[0]
    named = [list(c.texts) for c in data.columns if c.texts is not None]
    named = named or [[f"{name} {v:g}" for v in values] for name, values in numbers.items() if name != drawn][:2]
    names = [" ".join(cells) for cells in zip(*named, strict=True)] or [str(i) for i in range(len(numbers[drawn]))]
    _bars(ax, names, numbers[drawn], drawn)
