"""How do the six common kinds of result look: numbers of tokens, a lens, contributions, a grid, curves, a table?

For each what fits it, its view, its strongest numbers in plain words, and several of them in one view. The choice rests on
the names of dimensions that all methods share (layer, head, position, query, key), hardly on the method's name, so that a
new method is shown as well. The rows of `kinds` gather them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import xarray as xr

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.views import schema as s
from pellucid.views import watching
from pellucid.views.cells import ROWS, Cells, strongest
from pellucid.views.markup import visible
from pellucid.views.monitors import CHANCE, is_roc, roc
from pellucid.views.naming import named, site_of
from pellucid.views.pages import is_selective, selective
from pellucid.views.schema import Fact, Numbers

LISTED = 2000  # rows of a table
ASIDE = (
    "low",
    "high",
    "error",
    "value",
    "p",
)  # told with the main numbers: interval, test, the metric they are a change of
PLANES = 12
LINES = 7  # of a chart with one for each layer


# ---- tokens


def is_tokens(result: Result) -> bool:
    return _numeric(result) and _dims(result) == ["position"] and "token" in result.data.coords


def token_view(result: Result) -> s.Tokens:
    return tokens({str(result.main.name): result})


def tokens(methods: Mapping[str, Result], unit: str = "") -> s.Tokens:
    """One text under several methods, each a number per token; how far their orders agree is said beside them.
    One method on several models (before and after a change) has one scale, so that what has become small looks small.

    InputError where they are not about the same tokens.
    """
    results = [_first(r.data) for r in methods.values()]
    texts, positions = _texts(results[0]["token"]), _integers(results[0]["position"])
    for name, each in zip(methods, results, strict=True):
        if _texts(each["token"]) != texts:
            raise InputError(
                f"{name!r} is about other tokens than {next(iter(methods))!r}: compare methods on one prompt"
            )
    arrays = {name: next(iter(each.data_vars.values())).values for name, each in zip(methods, results, strict=True)}
    signed = any(bool(np.nanmin(v) < 0) for v in arrays.values()) or all("attribution" in each for each in results)
    tracks = tuple(s.Track(name=name, values=Numbers.of(v), signed=signed) for name, v in arrays.items())
    told = np.any(
        [v != 0 for v in arrays.values()], axis=0
    )  # a token that every method leaves out says nothing about agreement
    made = [r.provenance for r in methods.values()]
    models = {p.digest for p in made if p is not None and p.digest is not None}
    asked = [
        (p.method, str({k: v for k, v in p.arguments.items() if k not in ("target", "against")})) for p in made if p
    ]
    alike = len(models) == len(made) > 1 and len(set(asked)) == 1
    pairs = [(a, b) for i, a in enumerate(arrays) for b in list(arrays)[i + 1 :]]
    agreement = tuple(
        Fact(name=f"{a} and {b}", value=f"{spearman(arrays[a][told], arrays[b][told]):.2f}") for a, b in pairs
    )
    return s.Tokens(tokens=texts, positions=positions, tracks=tracks, unit=unit or ("" if len(arrays) > 1 else next(iter(arrays))), comparison=agreement,
                    full=float(np.nanmax([np.abs(v) for v in arrays.values()])) or None if alike else None)  # fmt: skip


def plain_tokens(data: s.Tokens) -> Cells:
    tracks = [t.values.array() for t in data.tracks]
    rows = [(p, visible(data.tokens[p]), *(float(t[p]) for t in tracks)) for (p,) in sorted(strongest(tracks[0]))]
    return ("", "token", *(t.name for t in data.tracks)), rows, len(data.tokens)


# ---- lenses


def is_lens(result: Result) -> bool:
    return {"top_token", "probability", "prediction"} <= set(result.data.data_vars)


def lens(result: Result, others: Mapping[str, Result] | None = None, name: str = "") -> s.Lens:
    """A lens; `others` are further lenses on the same tokens and layers by name, shown by choice."""
    readings = {name or result.kind.replace(" lens", ""): result, **(others or {})}
    each = {n: _first(r.data) for n, r in readings.items()}
    data = next(iter(each.values()))
    words = sorted({str(t) for d in each.values() for t in d["top_token"].values.ravel()})
    index = {word: i for i, word in enumerate(words)}
    return s.Lens(
        tokens=_texts(data["token"]), positions=_integers(data["position"]), layers=_layers(data), words=tuple(words),
        components=_texts(data["site"]) if "site" in data.coords else tuple(f"layers.{x}.resid_post" for x in _texts(data["layer"])),
        readings=tuple(_reading(n, d, index) for n, d in each.items()), prediction=_texts(data["prediction"]),
    )  # fmt: skip


def _reading(name: str, data: xr.Dataset, index: Mapping[str, int]) -> s.Reading:
    top = np.vectorize(lambda t: index[str(t)], otypes=[np.int32])(data["top_token"].values)
    more = {n: Numbers.of(data[n].values.astype(float)) for n in ("rank", "kl", "entropy") if n in data}
    followed = tuple(
        s.Followed(word=str(w), rank=Numbers.of(data["target_rank"].values[..., i].astype(float)), log_probability=Numbers.of(data["target_log_probability"].values[..., i]))
        for i, w in enumerate(data["target"].values)
    ) if "target" in data.coords else ()  # fmt: skip
    return s.Reading(name=name, top=Numbers.of(top), probability=Numbers.of(data["probability"].values), followed=followed, **more)  # fmt: skip


def lenses(methods: Mapping[str, Result]) -> s.Lens:
    """Several lenses on one prompt in one grid; InputError where tokens or layers differ."""
    first, *others = methods.items()
    views = {name: lens(result) for name, result in methods.items()}
    _same("tokens", {name: v.tokens for name, v in views.items()})
    _same("layers", {name: v.components for name, v in views.items()})
    return lens(first[1], dict(others), name=first[0])


def plain_lens(data: s.Lens) -> Cells:
    reading, last = data.readings[0], len(data.tokens) - 1
    top, p = reading.top.array(), reading.probability.array()
    layers = sorted(set(np.linspace(0, len(data.layers) - 1, ROWS).round().astype(int).tolist()))
    rows = [(data.layers[i], visible(data.tokens[last]), visible(data.words[top[i, last, 0]]), float(p[i, last, 0])) for i in layers]  # fmt: skip
    return ("layer", "after", "best guess", "probability"), rows, len(rows)


# ---- contributions


def is_contributions(result: Result) -> bool:
    return {"contribution", "total"} <= set(result.data.data_vars) and "component" in result.data.dims


def contributions(result: Result) -> s.Contributions:
    data = result.data.mean("prompt") if "prompt" in result.data.dims else result.data
    layer, part, unit = (result.data[n].values for n in ("layer", "part", "unit"))
    sites = [site_of(str(c)) for c in result.data["component"].values]
    names = [
        named(int(a), str(p), int(u)) if a >= 0 else _before(str(p)) for a, p, u in zip(layer, part, unit, strict=True)
    ]
    return s.Contributions(
        names=tuple(names), components=tuple(sites), parts=tuple(_area(str(p)) for p in part), layer=Numbers.of(layer),
        values=Numbers.of(data["contribution"].values), total=float(data["total"]), gap=float(data["gap"]),
        unit=f"contribution to the {result.data.attrs.get('attributed', 'logit')}",
    )  # fmt: skip


def _before(part: str) -> str:
    return {"embed": "embedding", "constant": "constants"}.get(part, part)


def _area(part: str) -> str:
    area = part.partition(".")[0]
    return {"attn": "attention", "mlp": "MLP", "cross": "cross-attention"}.get(area, _before(area))


def plain_contributions(data: s.Contributions) -> Cells:
    values = data.values.array()
    return ("part", data.unit), [(data.names[i], float(values[i])) for (i,) in strongest(values)], len(values)


# ---- grids


def is_grid(result: Result) -> bool:
    """Numbers over two dimensions, or three with few labels in one; along a window or steps they are curves, and rows of
    different units (`attrs["rows"]` is "unlike") have no colours in common."""
    dims, sizes = _dims(result), result.main.sizes
    if watching.is_firings(result):
        return True
    if not _numeric(result) or "prompt" in dims or is_selective(result) or _unlike(result):
        return False
    return (len(dims) == 2 and not _along(dims)) or (len(dims) == 3 and min(sizes[d] for d in dims) <= PLANES)


def grid(result: Result, unit: str = "") -> s.Grid:
    """Effects over two dimensions, or over three of which the one with the fewest labels is chosen by buttons."""
    if watching.is_firings(result):
        return watching.firings(result)
    data, main = _first(result.data), _first(result.data)[str(result.main.name)]
    dims = [str(d) for d in main.dims]
    third = min(dims, key=lambda d: (d != "part", main.sizes[d])) if len(dims) == 3 else None
    rows, columns = [d for d in dims if d != third]
    over = str(data.attrs.get("over", result.provenance.arguments.get("over", "")))
    component = _template(over, rows, columns, third)
    variables = {str(main.name): main} if third else {str(n): v for n, v in data.data_vars.items() if v.dims == main.dims and v.dtype.kind in "iuf"}  # fmt: skip
    planes = []
    for name, variable in variables.items():
        if name != main.name and (name.endswith(("_low", "_high")) or name in ASIDE):
            continue
        ends = [next((data[n] for n in (f"{name}_{e}", e) if n in data.data_vars and data[n].dims == main.dims), None) for e in ("low", "high")]  # fmt: skip
        for label in main[third].values if third else [None]:
            at = {} if label is None else {third: label}
            low, high = (None if e is None else Numbers.of(e.sel(at).values) for e in ends)
            planes.append(s.Plane(name=str(label) if third else name, values=Numbers.of(variable.sel(at).transpose(rows, columns).values.astype(float)),
                                  low=low, high=high, component=component.replace("{part}", str(label)),
                                  unit="" if name == main.name else name))  # fmt: skip
    # an effect has two sides even where only one of them is seen
    signed = main.name == "effect" or any(bool(np.nanmin(v.values, initial=0) < 0) for v in variables.values())
    told = (
        n for n in ("clean", "corrupted", "total_effect") if n in result.data and result.data[n].dtype.kind in "iuf"
    )
    facts = tuple(Fact(name=n.replace("_", " "), value=f"{float(result.data[n].mean()):.3g}") for n in told)
    return s.Grid(rows=_axis(main, rows, over), columns=_axis(main, columns, over), planes=tuple(planes), unit=unit or str(main.name),
                  signed=signed, prompts=_pair(data), facts=facts)  # fmt: skip


def _pair(data: xr.Dataset) -> tuple[tuple[str, ...], ...]:
    """The two aligned prompts a patch is taken between, token by token."""
    return tuple(tuple(map(str, tokens)) for tokens in data.attrs.get("prompts", ()))


def _template(over: str, rows: str, columns: str, third: str | None) -> str:
    """`layers.*.attn.heads.*` with {row} and {column} where its wildcards are, if the axes are those.

    >>> _template("layers.*.attn.heads.*@-1", "layer", "head", None), _template("", "layer", "position", "part")
    ('layers.{row}.attn.heads.{column}', 'layers.{row}.{part}')
    """
    if not over:
        if (rows, columns) == ("layer", "head"):
            return "layers.{row}.attn.heads.{column}"
        return "" if rows != "layer" else "layers.{row}.{part}" if third == "part" else "layers.{row}"
    site = site_of(over.partition("@")[0])
    axes = {"{row}": rows, "{column}": columns}
    wanted = [place for place, name in axes.items() if name in ("layer", "head", "neuron", "expert", "unit")]
    if site.count("*") != len(wanted):
        return ""
    for place in wanted:
        site = site.replace("*", place, 1)
    return site


def _axis(main: xr.DataArray, dim: str, over: str) -> s.Axis:
    token = next((c for c in (f"{dim}_token", "token") if c in main.coords and main[c].dims == (dim,)), None)
    if token and main[dim].dtype.kind in "iu":
        return s.Axis(name="token", labels=_texts(main[token]), positions=_integers(main[dim]))
    told = _layers if dim == "layer" else lambda of: _texts(of[dim])
    labels = told(main) if dim in main.coords else tuple(map(str, range(main.sizes[dim])))
    components = tuple(f"layers.{x}" for x in labels) if dim == "layer" and not over else ()
    return s.Axis(name=dim, labels=labels, components=components)


def grids(results: Mapping[str, Result]) -> s.Grid:
    """Planes of several results over the same rows and columns, on one scale."""
    methods = {name: grid(result) for name, result in results.items()}
    _same("rows", {name: v.rows.labels for name, v in methods.items()})
    _same("columns", {name: v.columns.labels for name, v in methods.items()})
    first = next(iter(methods.values()))
    planes = tuple(
        msgspec.structs.replace(plane, name=name if len(view.planes) == 1 else f"{name}: {plane.name}")
        for name, view in methods.items()
        for plane in view.planes
    )
    signed = any(view.signed for view in methods.values())
    return msgspec.structs.replace(first, planes=planes, signed=signed, facts=())


def plain_grid(data: s.Grid) -> Cells:
    plane = data.planes[0]
    values = plane.values.array()
    rows = [(data.rows.labels[i], visible(data.columns.labels[j]), float(values[i, j])) for i, j in strongest(values)]
    return (data.rows.name, data.columns.name, f"{data.unit}, {plane.name}"), rows, values.size


# ---- curves


def is_curves(result: Result) -> bool:
    if is_roc(result) or result.kind in watching.CURVES:
        return True
    dims = _dims(result)
    if not _numeric(result) or "prompt" in dims:
        return False
    return (len(dims) == 2 and _along(dims)) or (
        len(dims) == 1 and result.main.size > 2 and (_ordered(result.main) or "curve" in result.kind)
    )


def curves(result: Result) -> s.Curves:
    """Variables along the one dimension they share, with intervals; of two dimensions one line for each label of the other."""
    if is_roc(result):
        return roc(result)
    if (made := watching.CURVES.get(result.kind)) is not None:
        return made(result)
    data, main = _first(result.data), _first(result.data)[str(result.main.name)]
    dims = [str(d) for d in main.dims if d != "prompt"]
    along = "step" if "step" in dims else dims[-1]
    coordinate = main[along].values if along in main.coords else np.arange(main.sizes[along])
    share = data["share"] if "share" in data.coords and data["share"].dims == (along,) else None
    coordinate = coordinate if share is None else share.values
    ordinal = coordinate.dtype.kind not in "iuf"
    x = Numbers.of(np.arange(len(coordinate)) if ordinal else coordinate)
    lines = _family(main, along, x) if len(dims) == 2 else _variables(data, main, x)
    positive = not ordinal and coordinate.min() > 0 and coordinate.max() / coordinate.min() > 50
    ruler = s.Ruler(name=along if share is None else "share", log=bool(positive and along != "step"), labels=tuple(map(str, coordinate)) if ordinal else ())  # fmt: skip
    unit = str(main.attrs.get("unit", ""))
    y = s.Ruler(name=f"{main.name} ({unit})" if unit else str(main.name))
    return s.Curves(x=ruler, y=y, lines=lines, levels=_levels(data, dims))


def _levels(data: xr.Dataset, dims: list[str]) -> tuple[s.Level, ...]:
    """The threshold of each line, where the result has one."""
    if "threshold" not in data or not set(data["threshold"].dims) < set(dims) or len(dims) != 2:
        return ()
    other = str(data["threshold"].dims[0])
    names, values = data[other].values.tolist(), data["threshold"].values.tolist()
    return tuple(s.Level(name=f"{n}: threshold", y=v) for n, v in zip(names, values, strict=True) if np.isfinite(v))


def _family(main: xr.DataArray, along: str, x: Numbers) -> tuple[s.Line, ...]:
    """One line for each label of the other dimension; of many, some from the first to the last."""
    other = next(str(d) for d in main.dims if d != along)
    n = main.sizes[other]
    shown = range(n) if n <= LINES else sorted(set(np.linspace(0, n - 1, LINES).round().astype(int).tolist()))
    labels = main[other].values if other in main.coords else np.arange(n)
    values = main.transpose(other, along).values.astype(float)
    return tuple(s.Line(name=f"{other} {labels[i]}" if labels.dtype.kind in "iuf" else str(labels[i]), x=x, y=Numbers.of(values[i]), dashed="random" in str(labels[i])) for i in shown)  # fmt: skip


def _variables(data: xr.Dataset, main: xr.DataArray, x: Numbers) -> tuple[s.Line, ...]:
    """The main variable and those beside it that share its scale, each with its interval."""
    lines: list[s.Line] = []
    for name, variable in data.data_vars.items():
        own = variable.dims == main.dims and variable.dtype.kind in "iuf"
        if not own or (name != main.name and str(name).split("_")[-1] in ASIDE):
            continue
        if lines and not _alike(main.values, variable.values):
            continue  # on another scale: it is in the table
        ends = [next((data[n] for n in (f"{name}_{e}", *([e] if name == main.name else [])) if n in data.data_vars), None) for e in ("low", "high")]  # fmt: skip
        low, high = (None if e is None or e.dims != main.dims else Numbers.of(e.values) for e in ends)
        lines.append(s.Line(name=str(name), x=x, y=Numbers.of(variable.values.astype(float)), low=low, high=high, dashed="random" in str(name) or "chance" in str(name) or "baseline" in str(name)))  # fmt: skip
    return tuple(lines)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    sizes = [float(np.nanmax(np.abs(x))) if np.isfinite(x.astype(float)).any() else 0.0 for x in (a, b)]
    return max(sizes) <= 20 * max(min(sizes), 1e-12)


def charts(results: Mapping[str, Result]) -> s.Curves:
    """Lines of several results, named by them; InputError where they do not run along the same thing."""
    methods = {name: curves(result) for name, result in results.items()}
    _same("x axes", {name: (v.x.name, v.x.labels) for name, v in methods.items()})
    _same("y axes", {name: v.y.name for name, v in methods.items()})
    first = next(iter(methods.values()))
    own = {name: [line for line in view.lines if line.name != CHANCE] for name, view in methods.items()}
    lines = [
        msgspec.structs.replace(line, name=name if len(each) == 1 else f"{name}: {line.name}")
        for name, each in own.items()
        for line in each
    ]
    lines += [line for line in first.lines if line.name == CHANCE]  # the same for all
    return msgspec.structs.replace(first, lines=tuple(lines))


def plain_curves(data: s.Curves) -> Cells:
    def at(line: s.Line, i: int) -> tuple[str, float]:
        x = line.x.array()[i]
        return data.x.labels[int(x)] if data.x.labels else f"{x:.4g}", float(line.y.array()[i])

    rows = [(line.name, *at(line, 0), *at(line, -1)) for line in data.lines[:ROWS] if line.x.shape[0]]
    return ("curve", f"first {data.x.name}", data.y.name, f"last {data.x.name}", data.y.name), rows, len(rows)


# ---- tables


def table(result: Result, rows: int = LISTED) -> s.Table:
    """The cells of the main variable with all that is known of each; the largest first where they are too many."""
    if is_selective(result):
        return selective(result)
    if _unlike(result):
        wide_frame: Any = result.main.to_pandas()
        frame = wide_frame.dropna(how="all").reset_index()
        return s.Table(columns=tuple(column(str(n), frame[n].to_numpy()) for n in frame.columns), rows=len(frame))
    wide = [n for n, v in result.data.data_vars.items() if set(v.dims) <= set(result.main.dims)]
    frame = result.top(rows) if result.main.size > rows else Result(result.data[wide], kind=result.kind).to_frame()
    components: tuple[str, ...] = ()
    for name in ("component", "site"):
        if name in frame and len(frame):
            components = tuple(site_of(str(c)) for c in frame[name])
    made = [column(str(name), frame[name].to_numpy()) for name in frame.columns]
    return s.Table(columns=tuple(made), rows=int(result.main.size), components=components)


def column(name: str, values: Any, **more: Any) -> s.Column:
    """
    >>> column("layer", [1, 2]).numbers.shape, column("token", ["a"]).texts
    ((2,), ('a',))
    """
    array = np.asarray(values)
    if array.dtype.kind in "iuf":
        return s.Column(name=name, numbers=Numbers.of(array), **more)
    more.setdefault("tokens", name == "token" or name.endswith("_token"))
    return s.Column(name=name, texts=tuple("" if v is None or v != v else str(v) for v in array.tolist()), **more)


def plain_table(data: s.Table) -> Cells:
    columns = [_column(c) for c in data.columns]
    n = min(map(len, columns), default=0)
    return [c.name for c in data.columns], [[c[i] for c in columns] for i in range(n)], n


def _column(column: s.Column) -> list[Any]:
    if column.numbers is not None:
        return [float(x) for x in column.numbers.array().ravel()[:ROWS]]
    return [visible(text) if column.tokens else text for text in (column.texts or ())[:ROWS]]


# ---- small things


def _numeric(result: Result) -> bool:
    return result.main.dtype.kind in "iufb"


def _dims(result: Result) -> list[str]:
    """The dimensions that are shown: a single prompt is none."""
    return [str(d) for d in result.main.dims if d != "prompt" or result.main.sizes[d] > 1]


def _unlike(result: Result) -> bool:
    return result.main.ndim == 2 and result.main.attrs.get("rows") == "unlike"


def _along(dims: list[str]) -> bool:
    return bool({"window", "step", "removed"} & set(dims))


def _same(what: str, values: Mapping[str, Any]) -> None:
    (name, first), *others = values.items()
    for other, value in others:
        if value != first:
            raise InputError(f"{other!r} has other {what} than {name!r}: they cannot stand in one view")


def _first(data: xr.Dataset) -> xr.Dataset:
    """The first prompt, where a variable is per prompt."""
    return data.isel(prompt=0) if "prompt" in data.dims and data.sizes["prompt"] else data


def _texts(array: xr.DataArray) -> tuple[str, ...]:
    return tuple("" if v is None or v != v else str(v) for v in array.values.ravel().tolist())


def _layers(data: xr.Dataset | xr.DataArray) -> tuple[str, ...]:
    """Layers by their numbers; what enters the first one is numbered -1 and goes by its name."""
    return tuple("embed" if name == "-1" else name for name in _texts(data["layer"]))


def _integers(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(int(v) for v in array.values.ravel().tolist() if v == v)


def _ordered(main: xr.DataArray) -> bool:
    """Whether the one dimension is an order (layers, sizes) and not a set of names."""
    dim = str(main.dims[0])
    return dim in ("layer", "size", "k", "rank", "step", "epoch", "fraction", "steps") or (
        dim in main.coords and main[dim].dtype.kind in "iuf" and bool((np.diff(main[dim].values) > 0).all())
    )
