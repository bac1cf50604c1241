"""How does a finding look? From what a method returns to the document of the view that fits it.

A logit lens becomes a lens grid, attributions become coloured tokens, attention patterns heads one can look through,
effects over two dimensions a grid, numbers along something a curve, circuits a graph, an anatomy a map. What has no view
of its own is a table, so every result has a document. The choice rests on the names of dimensions that all methods share
(layer, head, position, query, key), hardly on the method's name, so that a new method is shown as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xarray as xr

from pellucid.anatomy.structure import Anatomy as Map
from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.maps import anatomy, circuit
from pellucid.views.naming import named, site_of
from pellucid.views.schema import Code, Document, Fact, Numbers
from pellucid.views.source import code, origin

ROWS = 2000  # of a table
PATTERN = 1_500_000  # numbers of an attention view: beyond, the heads that say least are left out
ASIDE = ("low", "high", "error", "value")  # told with the main numbers: their interval, the metric they are a change of
EDGES = 400  # of a graph of scores
PLANES = 12


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
    raise InputError(f"a {type(thing).__name__} has no view: give a result, a circuit, an anatomy or a document")


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
    if {"top_token", "probability", "prediction"} <= set(data.data_vars):
        return lens(result)
    if {"contribution", "total"} <= set(data.data_vars) and "component" in data.dims:
        return contributions(result)
    if any(_is_pattern(v) for v in data.data_vars.values()):
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
            return curves(result) if "window" in dims else grid(result)
        if len(dims) == 1 and main.size > 2 and (_ordered(main) or "curve" in result.kind):
            return curves(result)
    return table(result)


def compare(methods: Mapping[str, Result], title: str = "") -> Document:
    """Several methods on one prompt, beneath one another, with the rank correlations of their orders.

    InputError where they are not about the same tokens.

    >>> compare({"gradients": shares, "occlusion": drops}).save_html("words.html")    # doctest: +SKIP
    """
    return Document(title=title or " and ".join(methods), data=tokens(methods))


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
        Fact(name=f"{a} and {b}", value=f"{rank_correlation(arrays[a][told], arrays[b][told]):.2f}") for a, b in pairs
    )
    return s.Tokens(tokens=texts, positions=positions, tracks=tracks, unit=unit or ("" if len(arrays) > 1 else next(iter(arrays))), comparison=agreement)  # fmt: skip


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, over what both have; equal values share their mean rank.

    >>> rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
    1.0
    """
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3:
        return float("nan")
    ranks = [np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x]) for x in (a[both], b[both])]
    spread = ranks[0].std() * ranks[1].std()
    return (
        float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / spread) if spread else float("nan")
    )


def lens(result: Result, **others: Result) -> s.Lens:
    """A lens; `others` are further lenses on the same prompt (tuned=...), shown by choice."""
    readings = {result.kind.replace(" lens", ""): _first(result.data), **{n: _first(r.data) for n, r in others.items()}}
    data = next(iter(readings.values()))
    words = sorted({str(t) for each in readings.values() for t in each["top_token"].values.ravel()})
    index = {word: i for i, word in enumerate(words)}
    made = []
    for name, each in readings.items():
        top = np.vectorize(lambda t: index[str(t)], otypes=[np.int32])(each["top_token"].values)
        more = {n: Numbers.of(each[n].values.astype(float)) for n in ("rank", "kl", "entropy") if n in each}
        made.append(
            s.Reading(name=name, top=Numbers.of(top), probability=Numbers.of(each["probability"].values), **more)
        )
    followed = tuple(
        s.Followed(word=str(w), rank=Numbers.of(data["target_rank"].values[..., i].astype(float)), log_probability=Numbers.of(data["target_log_probability"].values[..., i]))
        for i, w in enumerate(data["target"].values)
    ) if "target" in data.coords else ()  # fmt: skip
    return s.Lens(
        tokens=_texts(data["token"]), positions=_integers(data["position"]), layers=_texts(data["layer"]), words=tuple(words),
        components=_texts(data["site"]) if "site" in data.coords else tuple(f"layers.{x}.resid_post" for x in _texts(data["layer"])),
        readings=tuple(made), prediction=_texts(data["prediction"]), followed=followed,
    )  # fmt: skip


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


def _is_pattern(variable: xr.DataArray) -> bool:
    """Of heads, [layer, head, query, key], or of all heads of a layer together, as rollout gives it."""
    named = [str(d).split("_")[-1] for d in variable.dims]
    return named in (["layer", "head", "query", "key"], ["layer", "query", "key"])


def attention(result: Result, *, flows: Mapping[str, np.ndarray] | None = None, roles: Mapping[tuple[int, int], str] | None = None, first: tuple[int, int] | None = None) -> s.Attention:  # fmt: skip
    """Patterns as heads to look through; `flows` are [query, key] over all layers, `first` the (layer, head) shown first.

    Where they are too many for a page, the heads that look most at a single place (mostly the first token) are left out.
    """
    name, pattern = next((str(n), v) for n, v in result.data.data_vars.items() if _is_pattern(v))
    together = pattern.ndim == 3
    if together:
        pattern = pattern.expand_dims({"head": [0]}, 1)
    layer, head, query, key = map(str, pattern.dims)
    stack = {"cross": "decoder.", "encoder": "encoder.", "decoder": "decoder."}.get(name, "")
    area = "cross" if name == "cross" else "attn"
    values, layers, heads = pattern.values, pattern[layer].values, pattern[head].values
    flat = [(i, j) for i in range(values.shape[0]) for j in range(values.shape[1]) if np.isfinite(values[i, j]).any()]
    room = max(1, PATTERN // (values.shape[2] * values.shape[3]))
    chosen = flat
    if len(flat) > room:
        single = {(i, j): float(np.nanmax(np.nanmean(values[i, j], 0))) for i, j in flat}
        asked = {at: (int(layers[at[0]]), int(heads[at[1]])) == first for at in flat}
        chosen = sorted(sorted(flat, key=lambda at: (not asked[at], single[at]))[:room])
    listed = tuple(
        s.Head(component=f"{stack}layers.{layers[i]}" + ("" if together else f".{area}.heads.{heads[j]}"), layer=int(layers[i]), head=int(heads[j]), role=(roles or {}).get((int(layers[i]), int(heads[j])), ""))
        for i, j in chosen
    )  # fmt: skip
    shown = next((n for n, h in enumerate(listed) if (h.layer, h.head) == first), _telling(values, chosen))
    return s.Attention(
        queries=_labels(pattern, query), keys=_labels(pattern, key), heads=listed, pattern=Numbers.of(np.stack([values[i, j] for i, j in chosen]), "uint8"),
        flows=tuple(s.Flow(name=n, values=Numbers.of(v)) for n, v in (flows or {}).items()), first=shown, left_out=len(flat) - len(chosen),
    )  # fmt: skip


def _telling(values: np.ndarray, heads: Sequence[tuple[int, int]]) -> int:
    """The head shown first: the one that puts most weight neither on the first token nor on the query itself."""
    length = min(values.shape[2:])
    away = np.eye(*values.shape[2:]) == 0
    away[:, 0] = False
    scores = [float(np.nansum(np.nanmax(np.where(away, values[i, j], 0), 1))) for i, j in heads]
    return int(np.argmax(scores)) if length > 1 and scores else 0


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
                  signed=bool(np.nanmin(first, initial=0) < 0), facts=facts)  # fmt: skip


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
    """Variables along the one dimension they share (or, for window x layer, one line per window), with intervals."""
    data, main = _first(result.data), _first(result.data)[str(result.main.name)]
    dims = [str(d) for d in main.dims]
    along = dims[-1]
    coordinate = main[along].values if along in main.coords else np.arange(main.sizes[along])
    ordinal = coordinate.dtype.kind not in "iuf"
    x = Numbers.of(np.arange(len(coordinate)) if ordinal else coordinate)
    lines: list[s.Line] = []
    if len(dims) == 2:
        lines = [
            s.Line(name=f"{dims[0]} {label}", x=x, y=Numbers.of(main.values[i].astype(float)))
            for i, label in enumerate(main[dims[0]].values)
        ]
    else:
        for name, variable in data.data_vars.items():
            if (
                variable.dims != main.dims
                or variable.dtype.kind not in "iuf"
                or (name != main.name and str(name).split("_")[-1] in ASIDE)
            ):
                continue
            if lines and not _alike(main.values, variable.values):
                continue  # on another scale: it is in the table
            ends = [next((data[n] for n in (f"{name}_{e}", *([e] if name == main.name else [])) if n in data.data_vars), None) for e in ("low", "high")]  # fmt: skip
            low, high = (None if e is None or e.dims != main.dims else Numbers.of(e.values) for e in ends)
            lines.append(s.Line(name=str(name), x=x, y=Numbers.of(variable.values.astype(float)), low=low, high=high, dashed="random" in str(name) or "chance" in str(name) or "baseline" in str(name)))  # fmt: skip
    positive = not ordinal and coordinate.min() > 0 and coordinate.max() / coordinate.min() > 50
    ruler = s.Ruler(name=along, log=bool(positive), labels=tuple(map(str, coordinate)) if ordinal else ())
    return s.Curves(x=ruler, y=s.Ruler(name=str(main.name)), lines=tuple(lines))


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


def _labels(pattern: xr.DataArray, dim: str) -> tuple[str, ...]:
    token = f"{dim}_token"
    return _texts(pattern[token]) if token in pattern.coords else tuple(map(str, range(pattern.sizes[dim])))


def _ordered(main: xr.DataArray) -> bool:
    """Whether the one dimension is an order (layers, sizes) and not a set of names."""
    dim = str(main.dims[0])
    return dim in ("layer", "size", "k", "rank", "step", "epoch", "fraction", "steps") or (
        dim in main.coords and main[dim].dtype.kind in "iuf" and bool((np.diff(main[dim].values) > 0).all())
    )
