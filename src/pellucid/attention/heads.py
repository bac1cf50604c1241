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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.attention.patterns import Attended, Kind, attended, kinds, single, special, stacked, visible
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Scores = dict[str, Tensor]  # name -> [head]


@technique
def head_summaries(
    model: Model,
    prompts: Sequence[Any] | str | None = None,
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

    >>> head_summaries(model, ["The capital of France is"]).sel(layer=0).entropy  # doctest: +SKIP
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
    if not texts and not probes:
        raise InputError("there is nothing to look at: give prompts, or probes")
    kind = chosen(model, stack)
    totals: list[dict[str, Tensor]] = []
    for found in read_all(model, texts, edits):
        marks = torch.from_numpy(special(model, found.run.inputs.stream(kind.stack)))
        totals.append(_averaged(found, kind, lambda a, seen, marks=marks: habits(a, seen, marks)))
    means = _mean(totals)
    if probes:
        repeats = [
            _averaged(attended(model, each, edits), kind, lambda a, seen: repeated(a, seen, length))
            for each in repetitions(model, length, probes, seed)
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


def repetitions(model: Model, length: int, samples: int, seed: int) -> list[Inputs]:
    """Random ordinary tokens said twice, after a BOS where there is one."""
    size = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    usable = torch.tensor(ordinary_ids(model.tokenizer, size))
    if len(usable) < length:
        raise InputError(f"the probes need {length} different tokens, this vocabulary has {len(usable)}: give length=")
    bos = getattr(model.tokenizer, "bos_token_id", None)
    start = [] if bos is None or bos >= size else [bos]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(samples):
        once = usable[torch.randperm(len(usable), generator=generator)[:length]].tolist()
        made.append(model.inputs([[*start, *once, *once]]))
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
