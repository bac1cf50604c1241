"""What does each head habitually do?

Where the attention of a head goes, averaged over the queries of given prompts:

    entropy     of a row, in nats; `focus` = 1 - entropy / log(number of visible keys): 1 is one token, 0 all alike
    distance    sum over keys of attention * |query - key|, in tokens
    diagonal    to itself         previous, next    to the neighbours         first    to the first token
    separator   to special tokens (none in the prompt: NaN)

and, on random tokens said twice (n different tokens, then the same again; i counts in the second half, after a BOS
where the tokenizer has one):

    duplicate   from i to i - n, where its token stood first
    induction   from i to i - n + 1, what followed it there (Olsson et al. 2022)
    previous_random   from i to i - 1, where no meaning helps

Every score of attention has its `..._chance`, what a head that looks at all visible keys alike has on the same
prompts: a score near it means nothing. Queries that see a single key are left out, they have no choice.

Which heads behave alike?

The distance of two heads is how differently they look at the same tokens (Clark et al. 2019):

    d(g, h) = mean over queries of all prompts of JS(A_g[query], A_h[query])        in nats, 0 to log 2

Clark et al. sum where we take the mean. Heads are joined by average linkage (scikit-learn) into `n` groups, or into
the number between 2 and 10 with the best silhouette; they are laid out in two dimensions by classical scaling, so
that distances on the map follow d. The silhouette is compared with its control: that of the same number of groups for
distances which are permuted among the pairs of heads. Groups no better than that are an artefact of cutting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.comparing import js
from pellucid.attention.patterns import Attended, Kind, attended, kinds, single, special, stacked, visible
from pellucid.corpus import read_each
from pellucid.engine.edits import Edit
from pellucid.engine.given import Chat, Pair
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.tasks import repeated_tokens
from pellucid.technique import technique

Scores = dict[str, Tensor]  # name -> [head]


@technique
def head_summaries(
    model: Model,
    prompts: Sequence[Any] | str | Pair | Chat | None = None,
    *,
    stack: str = "",
    probes: int = 8,
    length: int = 20,
    edits: Sequence[Edit] = (),
    seed: int = 0,
) -> Result:
    """Scores [layer, head] of every head, on `prompts` and on `probes` random sequences of 2 x `length` tokens.

    Without prompts only the probes are run, with `probes=0` only the prompts. `stack` is "encoder" or "decoder" where
    there are two. `..._chance` are per layer. InputError if there is nothing to run; raises as `patterns` does.

    >>> head_summaries(model, ["The capital of France is"]).sel(layer=0).entropy
    <xarray.DataArray 'entropy' (head: 8)>...
    """
    if (nothing := prompts is None or (isinstance(prompts, list | tuple) and not prompts)) and not probes:
        raise InputError("there is nothing to look at: give prompts, or probes")
    texts = [] if nothing else read_each(model, prompts)
    kind = chosen(model, stack)
    totals: list[dict[str, Tensor]] = []
    for found in read_all(model, texts, edits):
        marks = torch.from_numpy(special(model, found.run.inputs.stream(kind.stack)))
        totals.append(_averaged(found, kind, lambda a, seen, marks=marks: habits(a, seen, marks)))
    means = _mean(totals)
    if probes:
        repeats = [
            _averaged(attended(model, single(model, row[None]), edits), kind, lambda a, seen: repeated(a, seen, length))
            for row in repeated_tokens(model.tokenizer, probes, seed, length=length, vocabulary=model.vocabulary)
        ]
        means |= _mean(repeats)
    dims = {True: ("layer",), False: ("layer", "head")}
    data = xr.Dataset({n: (dims[n.endswith("_chance")], v.numpy()) for n, v in means.items()})
    data = data.assign_coords(layer=list(kind.layers), head=range(data.sizes["head"]))
    return Result(data, kind="head summaries", title="What each head habitually does")


def chosen(model: Model, stack: str) -> Kind:
    """The self-attention of a stack."""
    of = [kind for kind in kinds(model.anatomy) if kind.area == "attn"]
    found = next((kind for kind in of if kind.stack == stack), None) or (of[0] if len(of) == 1 else None)
    if found is None:
        raise InputError(f"stack={stack!r}: this model has {' and '.join(repr(kind.stack) for kind in of)}")
    return found


def read_all(model: Model, prompts: Sequence[Any], edits: Sequence[Edit] = ()) -> Iterator[Attended]:
    """The patterns of prompts, one after the other (so that no padding is in them)."""
    for prompt in prompts:
        yield attended(model, single(model, prompt), edits)


def _averaged(found: Attended, kind: Kind, score: Any) -> dict[str, Tensor]:
    """Name -> [layer, head], or [layer] for a chance."""
    layers = found.values[kind]
    scores = [score(a, seen) for a, seen in zip(layers, visible(layers), strict=True)]
    return {
        name: torch.stack([s[name] for s in scores]) if name.endswith("_chance") else stacked([s[name] for s in scores])
        for name in scores[0]
    }


def _mean(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over prompts that have the score at all."""
    return {name: torch.nanmean(torch.stack([one[name] for one in each]), 0) for name in (each[0] if each else {})}


def habits(a: Tensor, seen: Tensor, marks: Tensor) -> Scores:
    """Scores of patterns a [head, query, key], with the visible keys [query, key] and the special tokens [key]."""
    n = a.shape[-1]
    rows = seen.sum(1) > 1
    if not bool(rows.any()):
        raise InputError("no query of this prompt sees two keys: give a longer prompt")
    a, seen = a[:, rows], seen[rows]
    alike = seen / seen.sum(1, keepdim=True)
    q, k = torch.arange(n)[rows][:, None], torch.arange(n)[None]
    entropy = -(a * a.clamp_min(torch.finfo(a.dtype).tiny).log()).sum(-1)
    gaps = (q - k).abs().to(a)
    made = {
        "entropy": entropy.mean(1),
        "focus": (1 - entropy / seen.sum(1).log()).mean(1),
        "distance": (a * gaps).sum(-1).mean(1),
        "distance_chance": (alike * gaps).sum(-1).mean(),
    }
    places = {"diagonal": k == q, "previous": k == q - 1, "next": k == q + 1, "first": (k == 0).expand(len(q), n)}
    places["separator"] = marks[None].expand(len(q), n)
    for name, where in places.items():
        where = where & seen
        possible = where.any(1) if name not in ("first", "separator") else torch.ones(len(q), dtype=torch.bool)
        nothing = not bool(where.any())
        here = (a * where).sum(-1)[:, possible].mean(1)
        made[name] = torch.full_like(here, float("nan")) if nothing else here
        made[f"{name}_chance"] = a.new_tensor(float("nan")) if nothing else (alike * where).sum(1)[possible].mean()
    return made


def repeated(a: Tensor, seen: Tensor, length: int) -> Scores:
    """Scores of patterns on a repetition: the last `length` tokens say again what the `length` before them said."""
    first = a.shape[-1] - length
    i = torch.arange(first + 1, first + length)
    alike = seen / seen.sum(1, keepdim=True)
    made: Scores = {}
    for name, j in {"duplicate": i - length, "induction": i - length + 1, "previous_random": i - 1}.items():
        made[name] = a[:, i, j].mean(1)
        made[f"{name}_chance"] = alike[i, j].mean()
    return made


def distributions(model: Model, prompts: Sequence[Any], kind: Kind, edits: Sequence[Edit] = ()) -> list[np.ndarray]:
    """Per prompt the patterns of all heads of all layers, [head of all layers, query, key]."""
    return [torch.cat(found.values[kind]).numpy() for found in read_all(model, prompts, edits)]


@technique
def head_clusters(
    model: Model,
    prompts: Sequence[Any] | str,
    n: int | None = None,
    *,
    stack: str = "",
    draws: int = 20,
    edits: Sequence[Edit] = (),
    seed: int = 0,
) -> Result:
    """Groups of heads that look at the same places.

    Gives `cluster` [layer, head] (-1 where a layer has fewer heads), the map `x`, `y` [layer, head], `distance`
    [one, other] over all heads (coordinates `one_head` such as "3.1"), `silhouette` and the control `silhouette_chance`
    (mean over `draws`). InputError for n below 2 or not below the number of heads; raises as `patterns` does.

    >>> head_clusters(model, ["The capital of France is", "Water boils at"], n=4).cluster
    <xarray.DataArray 'cluster' (layer: 24, head: 8)>...
    """
    texts = read_each(model, prompts)
    kind = chosen(model, stack)
    distance = distances(distributions(model, texts, kind, edits))
    counts = [model.anatomy.stacks[_stack(model, kind.stack)].blocks[i].attentions["attn"].heads for i in kind.layers]
    heads = [(row, head) for row, count in enumerate(counts) for head in range(count)]
    if n is not None and not 2 <= n < len(heads):
        raise InputError(f"{n} groups of {len(heads)} heads: expected from 2 to {len(heads) - 1}")
    candidates = [n] if n is not None else range(2, min(10, len(heads) - 1) + 1)
    if not candidates:
        raise InputError(f"{len(heads)} heads cannot be grouped: expected at least 3")
    best, labels = max(((_silhouette(distance, found), found) for found in (joined(distance, c) for c in candidates)),
                       key=lambda pair: pair[0])  # fmt: skip
    count = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    chance = np.mean([_silhouette(d, joined(d, count)) for d in (_shuffled(distance, rng) for _ in range(draws))])
    shape = len(counts), max(counts)
    grids: dict[str, Any] = {"cluster": np.full(shape, -1), "x": np.full(shape, np.nan), "y": np.full(shape, np.nan)}
    for name, values in {"cluster": labels, **dict(zip("xy", scaled(distance), strict=True))}.items():
        for place, value in zip(heads, values, strict=True):
            grids[name][place] = value
    names = [f"{kind.layers[row]}.{head}" for row, head in heads]
    data = xr.Dataset(
        {**{name: (("layer", "head"), grid) for name, grid in grids.items()}, "distance": (("one", "other"), distance),
         "silhouette": best, "silhouette_chance": float(chance)},
        {"layer": list(kind.layers), "head": range(shape[1]), "one_head": ("one", names), "other_head": ("other", names)},
    )  # fmt: skip
    return Result(data, kind="head clusters", title=f"{count} groups of heads that look alike")


def _stack(model: Model, name: str) -> int:
    return next(i for i, stack in enumerate(model.anatomy.stacks) if stack.name == name)


def distances(patterns: Sequence[np.ndarray]) -> np.ndarray:
    """[head, head] mean Jensen-Shannon divergence, from patterns [head, query, key] of several prompts."""
    total, rows = np.zeros((len(patterns[0]),) * 2), 0
    for each in patterns:
        a = torch.from_numpy(each)
        rows += a.shape[1]
        for g in range(len(a)):
            total[g] += js(a[g].expand_as(a), a).double().sum(1).numpy()
    mean = total / rows
    np.fill_diagonal(mean, 0.0)
    return (mean + mean.T) / 2


def joined(distance: np.ndarray, n: int) -> np.ndarray:
    """[head] the group of each head, numbered from the largest group on."""
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(n, metric="precomputed", linkage="average").fit_predict(distance)
    order = np.argsort(-np.bincount(found, minlength=n), kind="stable")
    return np.argsort(order)[found]


def _silhouette(distance: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(distance, labels, metric="precomputed"))


def _shuffled(distance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    i, j = np.triu_indices(len(distance), 1)
    made = np.zeros_like(distance)
    made[i, j] = rng.permutation(distance[i, j])
    return made + made.T


def scaled(distance: np.ndarray) -> np.ndarray:
    """[2, head] coordinates by classical scaling: the two largest eigenvectors of the centred squared distances."""
    n = len(distance)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-centre @ distance**2 @ centre / 2)
    made = vectors[:, -2:] * np.sqrt(np.clip(values[-2:], 0, None))
    made *= np.where(made[np.abs(made).argmax(0), range(made.shape[1])] < 0, -1, 1)  # signs are arbitrary: fix them
    return made.T[::-1]
