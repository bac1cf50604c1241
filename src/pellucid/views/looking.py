"""How does attention look? All heads of every stack at a glance, one of them large, with their roles and with all layers together.

Patterns of a long prompt would fill a page: of 512 tokens the 270 heads of SmolLM2-135M are 71 million numbers, nearly all
of them next to nothing, as every row adds up to 1. Beyond `DENSE` numbers a view therefore keeps of each row only the
weights from a floor on, the lowest floor with which no more than `ENTRIES` are left, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from msgspec import structs

from pellucid.errors import InputError
from pellucid.results import Result
from pellucid.views import schema as s
from pellucid.views.cells import Cells, strongest
from pellucid.views.markup import visible
from pellucid.views.schema import Numbers

DENSE = 1_000_000  # numbers kept as they are, in one stack
ENTRIES = 1_500_000  # weights kept where only some are; three bytes each
FLOORS = (0.5 / 255, 0.005, 0.01, 0.02, 0.05, 0.1)
ROLES = (  # of head summaries: what a head is called whose score is as high; the first group is asked first, its highest wins
    {"induction": ("induction", 0.3), "duplicate": ("duplicate token", 0.3), "previous_random": ("previous token", 0.3), "previous": ("previous token", 0.5), "next": ("next token", 0.3)},
    {"diagonal": ("itself", 0.5), "separator": ("separators", 0.5), "first": ("first token", 0.5)},
)  # fmt: skip

Roles = Mapping[tuple[int, int], str]  # (layer, head) -> what the head does


def is_pattern(variable: xr.DataArray) -> bool:
    """Of heads, [layer, head, query, key], or of all heads of a layer together, as rollout gives it."""
    named = [str(d).split("_")[-1] for d in variable.dims]
    return named in (["layer", "head", "query", "key"], ["layer", "query", "key"])


def is_attention(result: Result) -> bool:
    return any(is_pattern(v) for v in result.data.data_vars.values())


def attention(patterns: Result, *more: Result, first: tuple[int, int] | None = None) -> s.Attention:
    """Patterns as heads to look through; an encoder-decoder's three attentions are shown by choice.

    `more` are results on the same prompt: `rollout` and `flow`, which stand beside the heads, and `head_summaries` or
    `head_roles`, which name them. `first` is the (layer, head) shown first. InputError for results about other tokens.
    """
    found = {str(n): v for n, v in patterns.data.data_vars.items() if is_pattern(v)}
    if "rollout" in found:  # shown by itself: its controls are not heads
        found = {n: v for n, v in found.items() if not n.endswith("null")}
    order = sorted(found, key=lambda n: n != "cross")  # the model's own reading of its source first
    made = []
    for name in order:
        flows = tuple(f for result in more for f in _flows(result, name, found[name]))
        roles = {at: role for result in more for at, role in roles_of(result, name).items()}
        made.append(_stack(name, found[name], flows, roles, first if name in ("pattern", "decoder") else None))
    return s.Attention(stacks=tuple(made))


def attentions(results: Mapping[str, Result]) -> s.Attention:
    """One prompt's attention in several models, before and after a change, shown by choice. InputError for other tokens."""
    made = {name: attention(result).stacks for name, result in results.items()}
    first = next(iter(made.values()))
    for name, stacks in made.items():
        if [(a.name, a.queries, a.keys) for a in stacks] != [(a.name, a.queries, a.keys) for a in first]:
            raise InputError(f"{name!r} is about other tokens than {next(iter(made))!r}: compare models on one prompt")
    own = ((name, stack) for name, stacks in made.items() for stack in stacks)
    return s.Attention(
        stacks=tuple(structs.replace(a, name=f"{name}, {a.name}" if a.name else name) for name, a in own)
    )


def _stack(name: str, pattern: xr.DataArray, flows: tuple[s.Flow, ...], roles: Roles, first: tuple[int, int] | None) -> s.Looking:  # fmt: skip
    together = pattern.ndim == 3
    if together:
        pattern = pattern.expand_dims({"head": [0]}, 1)
    layer, head, query, key = map(str, pattern.dims)
    prefix = {"cross": "decoder.", "encoder": "encoder.", "decoder": "decoder."}.get(name, "")
    area = "cross" if name == "cross" else "attn"
    values, layers, heads = pattern.values, pattern[layer].values, pattern[head].values
    flat = [(i, j) for i in range(values.shape[0]) for j in range(values.shape[1]) if np.isfinite(values[i, j]).any()]
    numbers = {(i, j): (int(layers[i]), int(heads[j])) for i, j in flat}
    chosen = _room(values, flat, next((at for at in flat if numbers[at] == first), None))
    listed = tuple(
        s.Head(component=f"{prefix}layers.{numbers[at][0]}" + ("" if together else f".{area}.heads.{numbers[at][1]}"),
               layer=numbers[at][0], head=numbers[at][1], role=roles.get(numbers[at], ""))
        for at in chosen
    )  # fmt: skip
    shown = next((n for n, h in enumerate(listed) if (h.layer, h.head) == first), _telling(values, chosen))
    return s.Looking(
        name={"pattern": "", "cross": "decoder to encoder"}.get(name, name), queries=_labels(pattern, query), keys=_labels(pattern, key),
        heads=listed, flows=flows, first=shown, left_out=len(flat) - len(chosen), **_packed(values, chosen),
    )  # fmt: skip


def _packed(values: np.ndarray, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The patterns [head, query, key] whole, or of each row what is not next to nothing."""
    if len(heads) * values.shape[2] * values.shape[3] <= DENSE:
        return {"pattern": Numbers.of(np.stack([values[at] for at in heads]), "uint8")}
    floor = next((f for f in FLOORS if sum(int((values[at] >= f).sum()) for at in heads) <= ENTRIES), FLOORS[-1])
    kept = [np.nan_to_num(values[at]) >= floor for at in heads]
    return {
        "rows": s.Rows(
            counts=Numbers.of(np.stack([k.sum(1) for k in kept]), "uint16"),
            keys=Numbers.of(np.concatenate([k.nonzero()[1] for k in kept]), "uint16"),
            weights=Numbers.of(np.concatenate([values[at][k] for at, k in zip(heads, kept, strict=True)]), "uint8"),
            floor=floor if floor > FLOORS[0] else 0.0,
        )
    }


def _room(values: np.ndarray, flat: list[tuple[int, int]], asked: tuple[int, int] | None) -> list[tuple[int, int]]:
    """The heads that fit. Where not all do, those that look most at a single place (mostly the first token) go first."""
    queries, keys = values.shape[2:]
    room = max(1, DENSE // (queries * keys), int(ENTRIES * FLOORS[-1] / queries))  # a row holds at most 1 / floor
    if len(flat) <= room:
        return flat
    single = {at: float(np.nanmax(np.nanmean(values[at], 0))) for at in flat}
    return sorted(sorted(flat, key=lambda at: (at != asked, single[at]))[:room])


def _telling(values: np.ndarray, heads: Sequence[tuple[int, int]]) -> int:
    """The head shown first: the one that puts most weight neither on the first token nor on the query itself."""
    length = min(values.shape[2:])
    away = np.eye(*values.shape[2:]) == 0
    away[:, 0] = False
    scores = [float(np.nansum(np.nanmax(np.where(away, values[at], 0), 1))) for at in heads]
    return int(np.argmax(scores)) if length > 1 and scores else 0


def _labels(pattern: xr.DataArray, dim: str) -> tuple[str, ...]:
    token = f"{dim}_token"
    return tuple(map(str, (pattern[token] if token in pattern.coords else pattern[dim]).values.tolist()))


# ---- all layers together


def _flows(result: Result, name: str, pattern: xr.DataArray) -> list[s.Flow]:
    """What a rollout or flow says about one attention, and its control."""
    wanted = {"cross": ("source", "source_null"), "encoder": ("encoder", "encoder_null")}.get(name, ("rollout", "null", "flow"))  # fmt: skip
    query, key = map(str, pattern.dims[-2:])
    made = []
    for variable in wanted:
        if variable not in result.data or result.kind not in ("attention rollout", "attention flow"):
            continue
        values = result.data[variable]
        values = values.isel({str(values.dims[0]): -1}) if values.ndim == 3 else values
        tokens = f"{key}_token"
        if tokens in values.coords and tokens in pattern.coords and values[tokens].values.tolist() != pattern[tokens].values.tolist():  # fmt: skip
            raise InputError(f"{result.kind} is about other tokens than the patterns: give results on one prompt")
        what = result.kind.removeprefix("attention ")
        label = f"{what} of even attention" if variable.endswith("null") else what
        values = values.reindex({query: pattern[query].values})  # flow may be asked for some queries only
        made.append(s.Flow(name=label, values=Numbers.of(values.values)))
    return made


# ---- what heads do


def roles_of(result: Result, name: str = "pattern") -> Roles:
    """(layer, head) -> its role in one attention, by `circuits.head_roles` or the scores of `attention.head_summaries`.

    A head of the summaries is called after its highest score of the first group of `ROLES` that passes, else of the second,
    and only where the score is three times what looking everywhere alike would give.
    """
    data = result.data
    stack = result.provenance.arguments.get("stack") or "decoder"
    if not {"layer", "head"} <= set(data.dims) or name not in (stack, "pattern"):
        return {}
    if "role" in data.data_vars:
        return {(int(a), int(h)): str(data["role"].values[i, j]) for i, a in enumerate(data["layer"].values) for j, h in enumerate(data["head"].values) if data["role"].values[i, j]}  # fmt: skip
    made: dict[tuple[int, int], str] = {}
    for group in ROLES:
        best: dict[tuple[int, int], float] = {}
        for name, (role, least) in group.items():
            if name not in data or f"{name}_chance" not in data:
                continue
            for i, a in enumerate(data["layer"].values):
                for j, h in enumerate(data["head"].values):
                    at, score = (int(a), int(h)), float(data[name].values[i, j])
                    passes = score >= max(least, min(0.9, 3 * float(data[f"{name}_chance"].values[i])))
                    if passes and score > best.get(at, 0.0) and (at in best or at not in made):
                        best[at], made[at] = score, role
    return made


def pattern_of(stack: s.Looking, head: int) -> np.ndarray:
    """The weights [query, key] of a head of the view; what its rows leave out is zero."""
    if stack.pattern is not None:
        return stack.pattern.array()[head]
    weights = np.zeros((len(stack.queries), len(stack.keys)))
    if stack.rows is not None:
        counts = stack.rows.counts.array()
        first, mine = int(counts[:head].sum()), counts[head].astype(int)
        kept = slice(first, first + int(mine.sum()))
        at = np.repeat(np.arange(len(mine)), mine), stack.rows.keys.array()[kept]
        weights[at] = stack.rows.weights.array()[kept]
    return weights


def plain_attention(data: s.Attention) -> Cells:
    stack = data.stacks[0]
    head, last = stack.heads[stack.first], len(stack.queries) - 1
    weights = pattern_of(stack, stack.first)[last]
    rows = [(f"{head.layer}.{head.head}", visible(stack.queries[last]), visible(stack.keys[k]), float(weights[k])) for (k,) in strongest(weights)]  # fmt: skip
    return ("head", "from", "to", "attention"), rows, len(stack.heads) * len(stack.queries) * len(stack.keys)
