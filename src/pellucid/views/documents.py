"""How does a finding look? From what a method returns to the document of the view that fits it.

A logit lens becomes a lens grid, attributions become coloured tokens, attention patterns heads one can look through,
effects over two dimensions a grid, numbers along something a curve, circuits a graph, an anatomy a map. What has no view
of its own is a table, so every result has a document. The choice rests on the names of dimensions that all methods share
(layer, head, position, query, key), hardly on the method's name, so that a new method is shown as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xarray as xr

from pellucid.anatomy.structure import Anatomy as Map
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.views import schema as s
from pellucid.views.looking import attention, is_pattern
from pellucid.views.maps import anatomy, circuit
from pellucid.views.monitors import roc, traces
from pellucid.views.naming import named, site_of
from pellucid.views.pages import neuron, selective
from pellucid.views.schema import Code, Document, Fact, Numbers
from pellucid.views.source import code, origin

ROWS = 2000  # of a table
ASIDE = ("low", "high", "error", "value")  # told with the main numbers: their interval, the metric they are a change of
EDGES = 400  # of a graph of scores
PLANES = 12
LINES = 7  # of a chart with one for each layer


def document(thing: Any, **about: Any) -> Document:
    """The document of a result, a circuit, an anatomy, or an object that holds one (a model, a fitted estimator).

    `about` replaces fields of it: `title`, `lead`, `care`, `code`. InputError for anything else.

    >>> effect = xr.DataArray([[0.5, -2.0]], dims=("layer", "head"), name="effect")
    >>> document(Result(effect, kind="ablation")).data.unit
    'effect'
    """
    made = _document(thing)
    if isinstance(about.get("code"), str):
        about["code"] = Code(python=about["code"])
    return msgspec.structs.replace(made, **about) if about else made


def _document(thing: Any) -> Document:
    if isinstance(thing, Document):
        return thing
    if isinstance(thing, Map):
        return Document(title=f"What {type(thing.module).__name__} is made of", data=anatomy(thing))
    if all(hasattr(thing, name) for name in ("graph", "on", "scores", "provenance")):
        return Document(
            title=f"A circuit of {len(thing)} edges", data=circuit(thing), provenance=origin(thing.provenance)
        )
    if isinstance(thing, Result):
        data, made = _view(thing), thing.provenance
        return Document(
            title=_title(thing), data=data, lead=_prompts(thing, data), code=code(made), provenance=origin(made)
        )
    if isinstance(thing, xr.DataArray | xr.Dataset):
        return _document(Result(thing, kind="tensor", title=str(getattr(thing, "name", None) or "tensor")))
    held = next((getattr(thing, n) for n in ("anatomy", "result_", "result") if hasattr(thing, n)), None)
    if isinstance(held, Map | Result):
        return _document(held)
    if losses := getattr(thing, "losses_", None) or getattr(thing, "losses", None):
        return Document(title=f"Training of {type(thing).__name__}", data=curves(_training(thing, np.asarray(losses))))
    raise InputError(f"a {type(thing).__name__} has no view: give a result, a circuit, an anatomy or a document")


def _training(fitted: Any, losses: np.ndarray) -> Result:
    """What a fit leaves behind: a loss [step], or several [step, site], as the tuned lens has one for each site."""
    dims, sites = ("step", "site")[: losses.ndim], list(getattr(fitted, "biases", ()))
    names = {"site": sites} if losses.ndim == 2 and len(sites) == losses.shape[1] else {}
    return Result(xr.DataArray(losses, {"step": np.arange(len(losses)), **names}, dims, "loss"), kind="training curve")


def _title(result: Result) -> str:
    """The title, with a model named by its file and not by all directories above it."""
    model = result.provenance.model
    return result.title.replace(model, Path(model).name) if model.startswith("/") else result.title


def _prompts(result: Result, data: s.View) -> str:
    """Which prompt is shown, where the result has several."""
    if "prompt" not in result.main.dims or isinstance(data, s.Table):
        return ""
    n = result.main.sizes["prompt"]
    which = "the mean over" if isinstance(data, s.Contributions) else "the first of"
    return f"Shown is {which} {n} prompts; result.sel(prompt=i) shows one." if n > 1 else ""


def _view(result: Result) -> s.View:
    data, main = result.data, result.main
    if hasattr(result, "__dict__") and "graph" in vars(result):  # scores of edges
        return circuit(result.circuit(min(EDGES, len(result.graph))))  # type: ignore[operator]
    if result.kind in ("neuron page", "neuron selectivity"):
        return neuron(result) if result.kind == "neuron page" else selective(result)
    if {"top_token", "probability", "prediction"} <= set(data.data_vars):
        return lens(result)
    if {"contribution", "total"} <= set(data.data_vars) and "component" in data.dims:
        return contributions(result)
    if {"true_positive", "false_positive"} <= set(data.variables):
        return traces(result) if "position" in main.dims else roc(result)
    if any(is_pattern(v) for v in data.data_vars.values()):
        return attention(result)
    if main.dtype.kind in "iufb":
        dims = [d for d in main.dims if d != "prompt" or main.sizes[d] > 1]
        if dims == ["position"] and "token" in data.coords:
            return tokens({str(main.name): result})
        if (
            len(dims) in (2, 3)
            and "prompt" not in dims
            and (len(dims) == 2 or min(main.sizes[d] for d in dims) <= PLANES)
        ):
            return curves(result) if {"window", "step"} & set(dims) and len(dims) == 2 else grid(result)
        if len(dims) == 1 and main.size > 2 and (_ordered(main) or "curve" in result.kind):
            return curves(result)
    return table(result)


# ---- one kind after another


def tokens(methods: Mapping[str, Result], unit: str = "") -> s.Tokens:
    """One text under several methods, each a number per token; how far their orders agree is said beside them.

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
    pairs = [(a, b) for i, a in enumerate(arrays) for b in list(arrays)[i + 1 :]]
    agreement = tuple(
        Fact(name=f"{a} and {b}", value=f"{spearman(arrays[a][told], arrays[b][told]):.2f}") for a, b in pairs
    )
    return s.Tokens(tokens=texts, positions=positions, tracks=tracks, unit=unit or ("" if len(arrays) > 1 else next(iter(arrays))), comparison=agreement)  # fmt: skip


def lens(result: Result, others: Mapping[str, Result] | None = None, name: str = "") -> s.Lens:
    """A lens; `others` are further lenses on the same tokens and layers by name, shown by choice."""
    readings = {name or result.kind.replace(" lens", ""): result, **(others or {})}
    each = {n: _first(r.data) for n, r in readings.items()}
    data = next(iter(each.values()))
    words = sorted({str(t) for d in each.values() for t in d["top_token"].values.ravel()})
    index = {word: i for i, word in enumerate(words)}
    return s.Lens(
        tokens=_texts(data["token"]), positions=_integers(data["position"]), layers=_texts(data["layer"]), words=tuple(words),
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


def grid(result: Result, unit: str = "") -> s.Grid:
    """Effects over two dimensions, or over three of which the one with the fewest labels is chosen by buttons."""
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
                                  low=low, high=high, component=component.replace("{part}", str(label))))  # fmt: skip
    first = next(iter(variables.values())).values
    told = (
        n for n in ("clean", "corrupted", "total_effect") if n in result.data and result.data[n].dtype.kind in "iuf"
    )
    facts = tuple(Fact(name=n.replace("_", " "), value=f"{float(result.data[n].mean()):.3g}") for n in told)
    return s.Grid(rows=_axis(main, rows, over), columns=_axis(main, columns, over), planes=tuple(planes), unit=unit or str(main.name),
                  signed=bool(np.nanmin(first, initial=0) < 0), prompts=_pair(data), facts=facts)  # fmt: skip


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
    labels = _texts(main[dim]) if dim in main.coords else tuple(map(str, range(main.sizes[dim])))
    components = tuple(f"layers.{x}" for x in labels) if dim == "layer" and not over else ()
    return s.Axis(name=dim, labels=labels, components=components)


def curves(result: Result) -> s.Curves:
    """Variables along the one dimension they share, with intervals; of two dimensions one line for each label of the other."""
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
    return s.Curves(x=ruler, y=s.Ruler(name=f"{main.name} ({unit})" if unit else str(main.name)), lines=lines)


def _family(main: xr.DataArray, along: str, x: Numbers) -> tuple[s.Line, ...]:
    """One line for each label of the other dimension; of many, some from the first to the last."""
    other = next(str(d) for d in main.dims if d != along)
    n = main.sizes[other]
    shown = range(n) if n <= LINES else sorted(set(np.linspace(0, n - 1, LINES).round().astype(int).tolist()))
    labels = main[other].values if other in main.coords else np.arange(n)
    values = main.transpose(other, along).values.astype(float)
    return tuple(s.Line(name=f"{other} {labels[i]}" if labels.dtype.kind in "iuf" else str(labels[i]), x=x, y=Numbers.of(values[i])) for i in shown)  # fmt: skip


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


def table(result: Result, rows: int = ROWS) -> s.Table:
    """The cells of the main variable with all that is known of each; the largest first where they are too many."""
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


# ---- small things


def _first(data: xr.Dataset) -> xr.Dataset:
    """The first prompt, where a variable is per prompt."""
    return data.isel(prompt=0) if "prompt" in data.dims and data.sizes["prompt"] else data


def _texts(array: xr.DataArray) -> tuple[str, ...]:
    return tuple("" if v is None or v != v else str(v) for v in array.values.ravel().tolist())


def _integers(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(int(v) for v in array.values.ravel().tolist() if v == v)


def _ordered(main: xr.DataArray) -> bool:
    """Whether the one dimension is an order (layers, sizes) and not a set of names."""
    dim = str(main.dims[0])
    return dim in ("layer", "size", "k", "rank", "step", "epoch", "fraction", "steps") or (
        dim in main.coords and main[dim].dtype.kind in "iuf" and bool((np.diff(main[dim].values) > 0).all())
    )
