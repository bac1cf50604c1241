"""Which combination of labelled concepts describes where a unit fires?

A unit fires on some tokens; a concept (a part of speech, a word, a topic) holds for some. An explanation is a formula of
concepts such as ((noun AND capitalised) OR proper noun), and fits as well as the two sets of tokens overlap:

    IoU = |fires AND formula| / |fires OR formula|,    score = IoU * penalty^(length - 1)

Formulas are found by beam search (Mu and Andreas 2020): from the best concepts on, each formula F of the beam is extended
to F OR c, F AND c and F AND NOT c for every concept c, as in their code, which negates single concepts only; the best of
any length wins. They search and report on the same data with a penalty of 1; here half of the texts are held out.

All units search at once. The overlap of an extension follows from counts of F and of F AND c alone,

    |F OR c| = |F| + |c| - |F AND c|,    |F AND NOT c| = |F| - |F AND c|        (likewise on the tokens where the unit fires)

so that a step is two matrix products: one over all tokens for the *different* formulas of all beams, which many units
share, and one for every unit over the few tokens where it fires.

The control is the same search after each unit's firings are shifted along the corpus by a random number of tokens: they
come as often and as bunched as before, on other words. Searching among many formulas finds something there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.pausing import progress
from pellucid.errors import InputError, nearest
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

OR, AND, NOT = "OR", "AND", "AND NOT"
OPERATIONS = (OR, AND, NOT)
UNITS = 256  # that search together


@dataclass(frozen=True, eq=False)
class Concepts:
    """Labels of tokens: `masks` [token, concept] says where each of `names` holds.

    >>> Concepts.of({"noun": [True, False], "verb": [False, True]}).names
    ('noun', 'verb')
    """

    names: tuple[str, ...]
    masks: np.ndarray

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("there is no concept: give at least one")
        if self.masks.ndim != 2 or self.masks.shape[1] != len(self.names) or self.masks.dtype != bool:
            raise InputError(
                f"the masks are {list(self.masks.shape)} of {self.masks.dtype}: expected bool, one row per token and a "
                f"column for each of the {len(self.names)} concepts"
            )
        if len(set(self.names)) < len(self.names):
            raise InputError("two concepts have one name")

    def __repr__(self) -> str:
        return f"<Concepts on {len(self.masks)} tokens: {len(self.names)} ({', '.join(self.names[:4])} ...)>"

    @classmethod
    def of(cls, masks: dict[str, Any]) -> Concepts:
        columns = [np.asarray(m, dtype=bool) for m in masks.values()]
        if len({column.shape for column in columns}) > 1:
            raise InputError(
                f"the masks are of {', '.join(str(len(c)) for c in columns)} tokens: expected the same number"
            )
        return cls(tuple(masks), np.stack(columns, 1) if columns else np.zeros((0, 0), dtype=bool))

    @classmethod
    def labels(cls, labels: Sequence[str], least: int = 1, prefix: str = "") -> Concepts:
        """One concept for each label that `least` tokens have: `labels` [token], "" for none."""
        array = np.asarray(labels)
        names, counts = np.unique(array[array != ""], return_counts=True)
        kept = names[counts >= least]
        return cls(tuple(f"{prefix}{name}" for name in kept), array[:, None] == kept[None])

    def __add__(self, other: Concepts) -> Concepts:
        return Concepts(self.names + other.names, np.concatenate([self.masks, other.masks], 1))


@dataclass(frozen=True)
class Formula:
    """A concept and what is done to it in turn: ((first OR second) AND NOT third).

    >>> print(Formula("noun").then("OR", "verb").then("AND NOT", "name"))
    ((noun OR verb) AND NOT name)
    """

    first: str
    steps: tuple[tuple[str, str], ...] = ()

    def then(self, operation: str, concept: str) -> Formula:
        return Formula(self.first, (*self.steps, (operation, concept)))

    @classmethod
    def parse(cls, text: str, concepts: Concepts) -> Formula:
        """What `str` gave. InputError for anything else."""
        text = text.strip()
        if text in concepts.names:
            return cls(text)
        for name in sorted(concepts.names, key=len, reverse=True):
            for operation in (NOT, OR, AND):
                if text.startswith("(") and text.endswith(f" {operation} {name})"):
                    return cls.parse(text[1 : -len(f" {operation} {name})")], concepts).then(operation, name)
        raise InputError(f"cannot read the formula {text!r}{nearest(text, concepts.names)}")

    def __str__(self) -> str:
        text = self.first
        for operation, concept in self.steps:
            text = f"({text} {operation} {concept})"
        return text

    def __len__(self) -> int:
        return 1 + len(self.steps)

    def holds(self, concepts: Concepts) -> np.ndarray:
        """[token] where the formula is true."""
        column = {name: i for i, name in enumerate(concepts.names)}
        for name in (self.first, *(concept for _, concept in self.steps)):
            if name not in column:
                raise InputError(f"there is no concept {name!r}{nearest(name, column)}")
        found = concepts.masks[:, column[self.first]].copy()
        for operation, concept in self.steps:
            mask = concepts.masks[:, column[concept]]
            found = found | mask if operation == OR else found & mask if operation == AND else found & ~mask
        return found


@dataclass(frozen=True)
class Beam:
    """How far the search goes: formulas of at most `length` concepts, `width` kept at a time, `penalty` for each beyond one."""

    length: int = 3
    width: int = 10
    penalty: float = 0.99

    def __post_init__(self) -> None:
        if min(self.length, self.width) < 1 or not 0 < self.penalty <= 1:
            raise InputError(f"{self}: expected a length and width of at least 1 and a penalty above 0 and at most 1")


@technique
def compositional(
    activations: Any,
    concepts: Concepts,
    *,
    quantile: float = 0.99,
    groups: Any = None,
    beam: Beam | None = None,
    held_out: float = 0.5,
    seed: int = 0,
    units: Sequence[str] | None = None,
) -> Result:
    """The formula that describes best where each unit fires.

    `activations` [token, unit]: a unit fires where it is above its `quantile` (so that ties are left out), or where it is
    True. `groups` [token] are the texts, of which the share `held_out` is not searched on (by default each token is a text).
    Gives over `unit`: `formula` (text), `length`, `iou` and `score` where searched, `held_out` (IoU on the rest, with its
    95 % interval `low` to `high` over texts), `control` and `control_held_out`, the same for the shifted
    firings with `control_formula`, and `density`, how often the unit fires. A unit that never fires has IoU 0. InputError
    for masks that do not fit.

    >>> compositional(activations, Concepts.labels(tags), groups=where)
    What units fire on
    compositional explanations: iou, score, formula, ... over unit 3...
    """
    beam = beam or Beam()
    firing = firings(activations, quantile)
    if len(firing) != len(concepts.masks):
        raise InputError(f"there are {len(firing)} tokens with activations, but {len(concepts.masks)} with concepts")
    if units is not None and len(units) != firing.shape[1]:
        raise InputError(f"{len(units)} names for {firing.shape[1]} units: expected one each")
    _, text = np.unique(np.arange(len(firing)) if groups is None else np.asarray(groups), return_inverse=True)
    if len(text) != len(firing) or not 0 < held_out < 1 or text.max() < 1:
        raise InputError(
            f"held_out={held_out} of {text.max() + 1} texts: expected a share of at least 2, one per token"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(int(text.max()) + 1)
    tested = np.isin(text, order[: max(1, round(held_out * len(order)))])
    parts = [Concepts(concepts.names, concepts.masks[at]) for at in (~tested, tested)]
    shifted = [_shifted(firing[at], rng) for at in (~tested, tested)]
    with progress[Any](what="units explained", total=2 * firing.shape[1]) as bar:
        found = search(firing[~tested], parts[0], beam, bar)
        null = search(shifted[0], parts[0], beam, bar)
    both, either = held(firing[tested], [f for f, _ in found], parts[1], text[tested])
    low, high = interval(both, seed, over=either, within=(0, 1))
    placebo = held(shifted[1], [f for f, _ in null], parts[1], text[tested])
    data = xr.Dataset(
        {
            "iou": ("unit", [v for _, v in found]),
            "score": ("unit", [v * beam.penalty ** (len(f) - 1) for f, v in found]),
            "formula": ("unit", np.array([str(f) for f, _ in found], dtype=object)),
            "length": ("unit", [len(f) for f, _ in found]),
            "held_out": ("unit", overlap(both, either)),
            "low": ("unit", low),
            "high": ("unit", high),
            "control": ("unit", [v for _, v in null]),
            "control_held_out": ("unit", overlap(*placebo)),
            "control_formula": ("unit", np.array([str(f) for f, _ in null], dtype=object)),
            "density": ("unit", firing.mean(0)),
        },
        {"unit": list(units) if units is not None else range(firing.shape[1])},
    )
    return Result(data, kind="compositional explanations", title="What units fire on")


# ---- the search


def firings(activations: Any, quantile: float) -> np.ndarray:
    """[token, unit] where each unit fires."""
    values = np.asarray(activations)
    if values.ndim != 2 or values.dtype.kind not in "biuf" or not len(values):
        raise InputError(
            f"the activations are {list(values.shape)} of {values.dtype}: expected numbers or bool [token, unit]"
        )
    if values.dtype == bool:
        return values
    if not 0 < quantile < 1:
        raise InputError(f"quantile={quantile}: expected more than 0 and less than 1")
    if np.isnan(values).any():
        token, unit = np.argwhere(np.isnan(values))[0].tolist()
        raise InputError(
            f"the activation of unit {unit} at token {token} is NaN: leave such tokens out, here and in the concepts"
        )
    return values > np.quantile(values.astype(np.float32), quantile, axis=0)


def search(
    firing: np.ndarray, concepts: Concepts, beam: Beam, bar: progress[Any] | None = None
) -> list[tuple[Formula, float]]:
    """Each unit's best formula, and its IoU."""
    masks = torch.from_numpy(np.ascontiguousarray(concepts.masks.T)).float()  # [concept, token]
    found: list[tuple[Formula, float]] = []
    for start in range(0, firing.shape[1], UNITS):
        part = torch.from_numpy(np.ascontiguousarray(firing[:, start : start + UNITS].T))
        found += _Block(part, masks, concepts.names).search(beam)
        if bar is not None:
            bar.step(len(part))
    return found


class _Block:
    """Some units that search together: fires [n, token], masks [c, token]."""

    def __init__(self, fires: Tensor, masks: Tensor, names: Sequence[str]) -> None:
        self.masks, self.names = masks, names
        self.size = masks.sum(1)  # [c]
        self.count = fires.sum(1).float()  # [n]
        widest = max(1, int(self.count.max()))
        rank = fires.long().cumsum(1) - 1
        unit, token = fires.nonzero(as_tuple=True)
        at = torch.full((len(fires), widest), -1)
        at[unit, rank[unit, token]] = token  # [n, k] the tokens where each unit fires; -1 where there are no more
        self.real, self.at = at >= 0, at.clamp_min(0)
        self.seen = self._where_firing(masks)  # [n, c, k]

    def _where_firing(self, masks: Tensor) -> Tensor:
        """[n, mask, k] masks [mask, token] on the tokens where each unit fires."""
        return masks[:, self.at].transpose(0, 1) * self.real[:, None]

    def search(self, beam: Beam) -> list[tuple[Formula, float]]:
        n, c = len(self.at), len(self.names)
        both = self.seen.sum(2)  # [n, c]
        value = _iou(both, self.size, self.count[:, None])
        width = min(beam.width, c)
        score, chosen = _top(value, width)  # [n, w]
        formulas = [[Formula(self.names[i]) for i in row] for row in chosen.tolist()]
        holds = self.masks[chosen.flatten()].view(n, width, -1).bool()
        best = [(row[0], float(v)) for row, v in zip(formulas, score[:, 0], strict=True)]
        best_score = score[:, 0].clone()
        for extra in range(1, beam.length):
            value = self._extended(holds)  # [n, w * 3 * c]
            width = min(beam.width, value.shape[1])
            score, chosen = _top(value, width)
            source, rest = chosen // (3 * c), chosen % (3 * c)
            operation, concept = rest // c, rest % c
            formulas = [
                [row[s].then(OPERATIONS[o], self.names[k]) for s, o, k in zip(*each, strict=True)]
                for row, *each in zip(formulas, source.tolist(), operation.tolist(), concept.tolist(), strict=True)
            ]
            if extra + 1 < beam.length:
                holds = _applied(holds, source, operation, self.masks[concept].bool())
            now = score[:, 0] * beam.penalty**extra
            for i in (now > best_score + 1e-9).nonzero().flatten().tolist():
                best[i], best_score[i] = (formulas[i][0], float(score[i, 0])), now[i]
        return best

    def _extended(self, holds: Tensor) -> Tensor:
        """[n, w * operation * c] the IoU of every extension of formulas that hold [n, w, token]."""
        n, w, _ = holds.shape
        flat = holds.flatten(0, 1)
        different, which = _unique(flat)
        shared = (flat[different].float() @ self.masks.T)[which].view(n, w, -1)  # |F and c|
        own = torch.gather(holds, 2, self.at[:, None].expand(-1, w, -1)) & self.real[:, None]
        own_shared = own.float() @ self.seen.transpose(1, 2)  # |F and c| where the unit fires
        size, own_size = holds.sum(2, keepdim=True).float(), own.sum(2, keepdim=True).float()
        both = (own_size + self.seen.sum(2)[:, None] - own_shared, own_shared, own_size - own_shared)
        all_ = (size + self.size - shared, shared, size - shared)
        values = [_iou(b, a, self.count[:, None, None]) for b, a in zip(both, all_, strict=True)]
        return torch.stack(values, 2).flatten(1)


def _iou(both: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return both / (one + other - both).clamp_min(1)


def _top(value: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best of each row, the first of equals first."""
    order = value.argsort(dim=1, descending=True, stable=True)[:, :width]
    return value.gather(1, order), order


def _unique(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that differ: the first of each kind, and for every row which kind it is."""
    packed = np.packbits(masks.numpy(), axis=1)
    kinds: dict[bytes, int] = {}
    which = [kinds.setdefault(row.tobytes(), len(kinds)) for row in packed]
    first: dict[int, int] = {}
    for i, kind in enumerate(which):
        first.setdefault(kind, i)
    return torch.tensor(list(first.values())), torch.tensor(which)


def _applied(holds: Tensor, source: Tensor, operation: Tensor, masks: Tensor) -> Tensor:
    """[n, w, token] of the extensions chosen; masks [n, w, token] of their concepts."""
    old = holds[torch.arange(len(holds))[:, None], source]
    kind = operation[..., None]
    return torch.where(kind == 0, old | masks, torch.where(kind == 1, old & masks, old & ~masks))


# ---- held out


def held(
    firing: np.ndarray, formulas: Sequence[Formula], concepts: Concepts, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[text, unit] on how many tokens both a unit and its formula hold, and on how many either does."""
    _, text = np.unique(text, return_inverse=True)
    texts = int(text.max()) + 1
    both, either = np.zeros((2, texts, len(formulas)))
    for i, formula in enumerate(formulas):
        holds = formula.holds(concepts)
        both[:, i] = np.bincount(text, holds & firing[:, i], minlength=texts)
        either[:, i] = np.bincount(text, holds | firing[:, i], minlength=texts)
    return both, either


def overlap(both: np.ndarray, either: np.ndarray) -> np.ndarray:
    """[unit] the IoU over all texts."""
    return np.asarray(both.sum(0) / np.maximum(either.sum(0), 1))


def _shifted(firing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each unit's firings moved along the tokens, at least a tenth of the way and around the end."""
    n = len(firing)
    by = rng.integers(max(1, n // 10), max(2, n - n // 10), size=firing.shape[1])
    return np.take_along_axis(firing, (np.arange(n)[:, None] - by) % n, axis=0)
