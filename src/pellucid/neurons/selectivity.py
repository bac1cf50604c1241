"""Which neurons tell a labelled concept apart, and how surely?

Over labelled places (words with their parts of speech, say), for every unit and every concept, each word being of it or not:

    AUROC            the probability that the unit is more active on a word of the concept than on another (ties: a half)
    point-biserial   the correlation of its activation with the 0/1 label
    F1               of "at least as active as a threshold", at the best one; low for a unit that is less active on the concept

The best of 46,080 neurons looks good by chance. Three things stand against that. The labels are shuffled (all of them, or
within each text), and the *largest* distance of any unit's AUROC from 1/2 is noted each time: a unit's p is the share of
shuffles in which the best unit reached it, which is the correction for having looked at all units (Westfall and Young 1993),
correlated as they are. Units are chosen on one half of the texts, and their AUROC is told on the other. And its interval
comes from drawing whole texts again, since words of one text are no independent examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import Row, by_length, inputs, read_each
from pellucid.engine.watching import watch
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks.tokens import covering, encode
from pellucid.technique import technique

Place = tuple[int, int, int]  # text, first character, last character + 1
UNITS = 1024  # ranked at a time
TOKENS = 2048  # run at a time


@technique
def neuron_selectivity(
    model: Model,
    texts: Sequence[str],
    places: Sequence[Place],
    labels: Sequence[str],
    sites: str = "layers.*.mlp.neurons",
    *,
    pool: Literal["last", "mean"] = "last",
    shuffle: Literal["all", "within texts"] = "all",
    draws: int = 100,
    best: int = 5,
    seed: int = 0,
    memory: int = 1 << 30,
) -> Result:
    """How well every unit of `sites` tells each label from the others, at places (text, first character, last + 1).

    A place's activation is that of its last token, or the mean over its tokens. Over `concept` x `unit`, on the half of the
    texts that `seed` chooses: `auroc`, `point_biserial`, `f1` and `p`, corrected for all units by `draws` shuffles. Over
    `concept`: `significant`, how many units have p < .05, `shuffled`, the AUROC of the best unit after a shuffle (mean), and
    `examples`. Over `concept` x `rank`: `found`, the `best` units by their distance from 1/2, and on the other half their
    `held_out` AUROC with its 95 % interval `low` to `high`. Activations are read in as many passes as `memory` bytes need.
    InputError for labels that do not fit, places without tokens, and sites of the decoder of an encoder-decoder.

    >>> words = bank.spans
    >>> neuron_selectivity(model, words.texts, words.where, bank.tags().labels, "layers.3.mlp.neurons").found
    <xarray.DataArray 'found' (concept: 5, rank: 5)>...
    """
    at_least(1, draws=draws, best=best)
    for name, given, known in (("pool", pool, ("last", "mean")), ("shuffle", shuffle, ("all", "within texts"))):
        if given not in known:
            raise InputError(f"{name}={given!r}: expected {known[0]!r} or {known[1]!r}")
    if isinstance(texts, str):
        raise InputError("expected several texts: put the one text into a list")
    wrong = next((place for place in places if len(place) != 3 or not 0 <= place[0] < len(texts)), None)
    if wrong is not None:
        raise InputError(f"{wrong!r} is no place in {len(texts)} texts: expected (text, first character, last + 1)")
    marks, concepts = _marks(places, labels)
    groups = np.array([text for text, _, _ in places])
    first = _half(groups, marks, concepts, seed)
    shuffles = _shuffles(groups[first], marks[first], shuffle, draws, seed)
    extremes = np.zeros((draws, len(concepts)))  # distances from 1/2
    parts: dict[str, list[np.ndarray]] = {"auroc": [], "point_biserial": [], "f1": []}
    names: list[str] = []
    leaders: list[list[Leader]] = [[] for _ in concepts]
    for name, values in _read(model, texts, places, model.sites(sites), pool, memory):
        for start in range(0, values.shape[1], UNITS):
            x = values[:, start : start + UNITS].T.contiguous()
            units = [name] if Site.parse(name).unit is not None else [f"{name}.{start + i}" for i in range(len(x))]
            less, upto = counts_below(x[:, first])
            scores = auroc(less, upto, marks[first])
            parts["auroc"].append(scores)
            parts["point_biserial"].append(point_biserial(x[:, first], marks[first]))
            parts["f1"].append(best_f1(less, marks[first]))
            again = np.abs(auroc(less, upto, shuffles) - 0.5).max(1)
            extremes = np.maximum(extremes, again.reshape(extremes.shape))
            for c, distance in enumerate(np.abs(scores - 0.5)):
                new = [Leader(distance[i], units[i], x[i, ~first].numpy()) for i in np.argsort(-distance)[:best]]
                leaders[c] = sorted([*leaders[c], *new], key=lambda each: -each.distance)[:best]
            names += units
    made = {key: np.concatenate(each, 1) for key, each in parts.items()}
    made["p"] = np.stack([_p(np.abs(s - 0.5), e) for s, e in zip(made["auroc"], extremes.T, strict=True)])
    held = [_outside(each, marks[~first, c], groups[~first], seed) for c, each in enumerate(leaders)]
    data = xr.Dataset(
        {key: (("concept", "unit"), value.astype(np.float32)) for key, value in made.items()}
        | {
            "found": (
                ("concept", "rank"),
                np.array([[leader.unit for leader in each] for each in leaders], dtype=object),
            ),
            **{key: (("concept", "rank"), np.stack(held)[..., i]) for i, key in enumerate(("held_out", "low", "high"))},
            "significant": ("concept", (made["p"] < 0.05).sum(1)),
            "shuffled": ("concept", 0.5 + extremes.mean(0)),
            "examples": ("concept", marks.sum(0).astype(int)),
        },
        coords={"concept": concepts, "unit": names},
    )
    return Result(data, kind="neuron selectivity", title=f"Neurons of {model.name} by concept")


class Leader(NamedTuple):
    """One of the best units: how far its AUROC is from 1/2, and its activations at the places held out."""

    distance: float
    unit: str
    held_out: np.ndarray


def _p(distances: np.ndarray, extremes: np.ndarray) -> np.ndarray:
    """[unit] the share of shuffles, the real labels counted as one of them, whose best unit got at least that far."""
    reached = len(extremes) - np.searchsorted(np.sort(extremes), distances - 1e-9)
    return np.asarray((1 + reached) / (1 + len(extremes)))


# ---- the measures, for all units [unit, place] and all concepts [place, concept] at once


def counts_below(x: Tensor) -> tuple[Tensor, Tensor]:
    """[unit, place] how many places of the row are less active, and how many are not more active (itself among them).

    >>> counts_below(torch.tensor([[2.0, 1.0, 2.0]]))
    (tensor([[1, 0, 1]], dtype=torch.int32), tensor([[3, 1, 3]], dtype=torch.int32))
    """
    n = x.shape[1]
    values, order = x.sort(dim=1)
    at = torch.arange(n, dtype=torch.int32)
    new = torch.ones(x.shape, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    less = torch.where(new, at, 0).cummax(1).values
    last = torch.ones(x.shape, dtype=torch.bool)
    last[:, :-1] = new[:, 1:]
    upto = torch.where(last, at + 1, n).flip(1).cummin(1).values.flip(1)
    return tuple(torch.empty_like(each).scatter_(1, order, each) for each in (less, upto.int()))  # type: ignore[return-value]


def auroc(less: Tensor, upto: Tensor, marks: np.ndarray) -> np.ndarray:
    """[concept, unit] from the counts: the ranks of the concept's places, added up (Mann and Whitney)."""
    own = torch.from_numpy(marks).float()
    half = (less + upto).float() / 2 - len(marks) / 2  # ranks about their middle: float32 holds their sums
    sums = (half @ own).T.double().numpy()
    one, rest = marks.sum(0)[:, None], (1 - marks).sum(0)[:, None]
    return np.asarray(0.5 + sums / (one * rest))


def point_biserial(x: Tensor, marks: np.ndarray) -> np.ndarray:
    """[concept, unit]; 0 for a unit that is constant."""
    own = torch.from_numpy(marks - marks.mean(0)).float()
    x = x - x.mean(1, keepdim=True)
    size = x.norm(dim=1, keepdim=True) * own.norm(dim=0)
    return (x @ own / size.clamp_min(1e-30)).T.double().numpy()


def best_f1(less: Tensor, marks: np.ndarray) -> np.ndarray:
    """[concept, unit] where "active" means at least a threshold; the best threshold is the activation of some place of the
    concept, so only these are tried."""
    found = []
    for c in range(marks.shape[1]):
        own = less[:, torch.from_numpy(np.flatnonzero(marks[:, c]))]
        called = len(marks) - own.sort(dim=1, descending=True).values  # by a threshold at the k-th most active of them
        right = torch.arange(1, own.shape[1] + 1)
        found.append((2 * right / (own.shape[1] + called)).amax(1))
    return torch.stack(found).double().numpy()


def _outside(leaders: list[Leader], marks: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """[leader, 3] the AUROC of units on texts they were not chosen on, and its interval over texts."""
    orders = [np.argsort(x, kind="stable") for _, _, x in leaders]
    starts = [np.flatnonzero(np.diff(x[o], prepend=-np.inf)) for o, (_, _, x) in zip(orders, leaders, strict=True)]

    def weighed(weights: np.ndarray) -> np.ndarray:
        """[draw, leader] with each place as often as `weights` [draw, place] say."""
        found = []
        for order, start in zip(orders, starts, strict=True):
            of, rest = (np.add.reduceat((weights * y)[:, order], start, axis=1) for y in (marks, 1 - marks))
            below = rest.cumsum(1) - rest / 2
            found.append((of * below).sum(1) / (of.sum(1) * rest.sum(1)))
        return np.stack(found, 1)

    return np.stack([weighed(np.ones((1, len(groups))))[0], *interval(weighed, seed, groups=groups, within=(0, 1))], 1)


# ---- labels


def _marks(places: Sequence[Place], labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """[place, concept] 1 where the place has that label."""
    if len(places) != len(labels) or not len(places):
        raise InputError(f"{len(places)} places but {len(labels)} labels: give one for each, and at least one")
    missing = next((i for i, label in enumerate(labels) if label is None or label != label), None)  # NaN is not itself
    if missing is not None:
        raise InputError(f"place {missing} has no label ({labels[missing]!r}): leave it out")
    concepts, each = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    if len(concepts) < 2:
        raise InputError(f"all places are labelled {concepts[0]!r}: there is nothing to tell apart")
    return np.eye(len(concepts))[each], concepts.tolist()


def _half(groups: np.ndarray, marks: np.ndarray, concepts: list[str], seed: int) -> np.ndarray:
    """[place] whether its text is of the half on which units are chosen."""
    texts = np.random.default_rng(seed).permutation(np.unique(groups))
    first = np.isin(groups, texts[: len(texts) // 2])
    rare = [c for c, a, b in zip(concepts, marks[first].sum(0), marks[~first].sum(0), strict=True) if not (a and b)]
    if rare or len(texts) < 2:
        raise InputError(f"{', '.join(rare) or 'the text'} is not in both halves of the texts: give more of them")
    return first


def _shuffles(groups: np.ndarray, marks: np.ndarray, shuffle: str, draws: int, seed: int) -> np.ndarray:
    """[place, draw * concept] the marks in random orders."""
    rng = np.random.default_rng(seed)
    keys = np.zeros(len(groups)) if shuffle == "all" else groups
    home = np.argsort(keys, kind="stable")
    made = np.empty((draws, *marks.shape), dtype=np.float32)
    for each in made:
        each[home] = marks[np.lexsort((rng.random(len(groups)), keys))]
    return made.transpose(1, 0, 2).reshape(len(groups), -1)


# ---- activations


def _read(
    model: Model, texts: Sequence[str], places: Sequence[Place], sites: Sequence[Site], pool: str, memory: int
) -> Iterator[tuple[str, Tensor]]:
    """Site by site the activations [place, unit], in as many passes over the texts as fit into memory."""
    if len(model.anatomy.stacks) > 1 and any(site.stack == "decoder" for site in sites):
        raise InputError("places are in the text, which goes into the encoder: name its sites")
    if any("position" not in site.dims or site.at is not None for site in sites):
        raise InputError("a unit needs a value at every token: name sites with positions, without '@'")
    cut = [encode(model.tokenizer, text) for text in texts]
    read_each(model, [ids for ids, _ in cut], what="text")
    spans = [_tokens(cut[place[0]][1], place, pool) for place in places]
    of: dict[int, list[int]] = {}
    for i, (text, _, _) in enumerate(places):
        of.setdefault(text, []).append(i)
    rows = [Row(number, tuple(cut[number][0]), number) for number in of]
    widths = _widths(model, rows[0], sites)
    fitting = max(1, memory // (4 * len(places) * max(widths)))
    for at in range(0, len(sites), fitting):
        made = {
            site: torch.empty(len(places), width)
            for site, width in list(zip(sites, widths, strict=True))[at : at + fitting]
        }
        for group in by_length(rows, TOKENS):
            given = inputs(model, group)
            starts = given.stream(sites[0].stack).starts.tolist()
            where = [
                (b, starts[b] + spans[i][0], starts[b] + spans[i][1], i)
                for b, row in enumerate(group)
                for i in of[row.number]
            ]
            watch(model.anatomy, given, {site: _pooler(rows, where) for site, rows in made.items()})
        while made:
            site = next(iter(made))
            yield str(site), made.pop(site)


def _pooler(rows: Tensor, where: list[tuple[int, int, int, int]]) -> Callable[[Tensor], None]:
    def pool(values: Tensor) -> None:
        for b, start, stop, i in where:
            rows[i] = values[b, start:stop].reshape(stop - start, -1).float().mean(0)

    return pool


def _widths(model: Model, row: Row, sites: Sequence[Site]) -> list[int]:
    found: dict[Site, int] = {}
    watch(
        model.anatomy,
        inputs(model, [row]),
        {site: lambda x, site=site: found.__setitem__(site, x[0, 0].numel()) for site in sites},  # type: ignore[misc]
    )
    return [found[site] for site in sites]


def _tokens(offsets: list[tuple[int, int]], place: Place, pool: str) -> tuple[int, int]:
    first, last = covering(offsets, *place[1:])
    if first == last:
        raise InputError(f"no token touches the characters {place[1]} to {place[2]} of text {place[0]}: leave it out")
    return (last - 1 if pool == "last" else first), last
