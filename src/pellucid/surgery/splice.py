"""Where does an answer live on its way through the model? B is run, and at depth N gets A's residual at some positions.

    share[N] = (m(B with A's residual at N) - m(B)) / (m(A) - m(B)),        m = logit(A's answer) - logit(B's answer)

1 where what was put in is enough for A's answer, 0 where it brings nothing. Depth N is before block N; the last depth is after
the last block. Where one position's share falls and another's rises, the blocks between hand the answer over. It is patching of
the residual (Vig et al. 2020, Meng et al. 2022), systematically over depth, and A and B may have different lengths as long as
the chosen positions go together, one by one. All depths and positions are one sweep.

Only some of the positions say anything: with all of them spliced the rest of the run is A's run, and the share is 1 at every
depth. The result says so. The control puts in another pair's A: what it wins is what any other residual there would, by taking
B's answer away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Metrics, numbers
from pellucid.causal.grid import described, shares, totals
from pellucid.engine.edits import Edit, Patch, aligned_values
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run, stream_of
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.tasks import Prompts
from pellucid.technique import technique


@technique
def splice(
    model: Model,
    a: Any,
    b: Any = None,
    *,
    positions: Any = None,
    over: str | None = None,
    metric: Metrics | Any = None,
    decoder: Any = None,
    draws: int = 1,
    seed: int = 0,
) -> Result:
    """The share of A's answer that A's residual brings into B's run, for every depth and every set of positions.

    `a` and `b` are prompts, or lists of them, pair by pair; or `a` is a task (`pl.tasks.Prompts`), whose clean prompts are
    spliced into its corrupted ones. `positions` are what is spliced together, by name: a position as sites have it (-1,
    "0:2", "'France'", a span of the task), a list of these, or a pair `(in a, in b)` of positions or of texts, one for each
    prompt: `{"subject": (["France", "Spain"], ["Italy", "Japan"]), "last": -1}`. A text stands for all its tokens, or for
    its last one where it has more in one prompt than in another. By default "changed", where pairs of one length differ,
    "last", and both. `over` are other sites than the residual at every depth, such as "layers.*.mlp.out". `metric` is by
    default the logit of A's predicted answer less that of B's (of a task, its own).

    Gives over `set` x `depth` (or `layer`) `share`, `effect`, with their intervals over pairs and `p`; `control`, the share
    of the pair's difference that the residuals of `draws` other pairs win; over `set` `block`, the one that changes the share
    most (-1: none by a tenth), and `tokens`, how many are spliced (0: all). InputError where positions do not go together, or A and B say the same.

    >>> splice(model, "The capital of France is", "The capital of Italy is").share
    <xarray.DataArray 'share' (set: 3, depth: 9)>...
    """
    at_least(0, draws=draws)
    spans = None
    if isinstance(a, Prompts):
        b = a.corrupted if b is None else b
        metric = a.metric() if metric is None else metric
        a, spans = a.clean, a.spans
    if b is None:
        raise InputError("splice needs two prompts: give b, or a task (pl.tasks.Prompts), which has both")
    ours = model.inputs(a, decoder=decoder, spans=spans)
    theirs = model.inputs(b, decoder=decoder, spans=spans)
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} prompts a and {len(theirs)} prompts b: give them in pairs")
    sites, dim, depths = _sites(model, over)
    sets, ours, theirs = _sets(positions, ours, theirs, sites[0])
    with torch.no_grad():
        run = model.run(ours, keep=list(dict.fromkeys(s.whole for s in sites)))
    metric = _asked(model, run, theirs) if metric is None else metric
    wins = numbers(model.score(run, metric))
    order = [np.roll(np.arange(len(ours)), i) for i in range(min(draws, len(ours) - 1) + 1)]
    cells = [(rows, pieces, site) for rows in order for pieces in sets.values() for site in sites]
    swept = model.sweep(
        theirs, [[e for p in pieces for e in p.edits(run, site, rows)] for rows, pieces, site in cells], metric
    )
    values, plain = numbers(swept.values).reshape(len(order), len(sets) * len(sites), -1), numbers(swept.clean)
    if (apart := np.abs((wins - plain).mean())) <= 1e-6 * max(1.0, float(np.abs(wins).max())):
        raise InputError(
            f"the metric is the same on a and on b (apart by {apart:.1g} on average): there is nothing to bring over"
        )
    change, shape = np.moveaxis(values - plain, 2, 1), (len(sets), len(sites))  # [draw, pair, cell]
    columns = described("effect", change[0], seed, test=True) | shares(change[0], wins - plain, seed)
    data = xr.Dataset(
        {k: (("set", dim), columns[k].reshape(shape)) for k in sorted(columns, key=lambda k: k != "share")},
        {"set": list(sets), dim: depths},
        {"over": "" if over is None else over, "metric": str(getattr(metric, "name", metric))},
    )
    if len(order) > 1:
        control = np.mean([shares(each, wins - plain, seed)["share"] for each in change[1:]], 0)
        data["control"] = (("set", dim), control.reshape(shape))
    steps = np.abs(np.diff(data.share.values, axis=1))
    data["tokens"] = ("set", [sum(p.size for p in pieces) for pieces in sets.values()])
    if over is None:
        data["block"] = ("set", [int(row.argmax()) if row.max() > 0.1 else -1 for row in steps])
    data = data.assign(totals(plain, wins, seed, denoise=True)).assign_coords(text=("prompt", list(theirs.texts)))
    trivial = [name for name, pieces in sets.items() if over is None and any(p.size == 0 for p in pieces)]
    data.attrs["says nothing"] = trivial
    title = _title(model, data, over)
    return Result(data.isel(prompt=0) if len(ours) == 1 else data, kind="splice", title=title)


def _title(model: Model, data: xr.Dataset, over: str | None) -> str:
    """What was found: from where to where the answer is handed over, and a control that does as well."""
    trivial, dim = data.attrs["says nothing"], "layer" if over is not None else "depth"
    told, said = [str(s) for s in data["set"].values if s not in trivial], []
    if over is not None:
        for name in told:
            share = data.share.sel(set=name)
            at = int(share.values.argmax())
            said.append(f"{name}: {float(share[at]):.0%} of A's answer by {over} of layer {int(share[dim][at])}")
    else:
        away = {name: int(data.block.sel(set=name)) for name in told if _turns(data, name) < 0}
        to = {name: int(data.block.sel(set=name)) for name in told if _turns(data, name) > 0}
        both = sorted({*away.values()} & {*to.values()})
        if both:
            here = [", ".join(n for n, i in each.items() if i == both[0]) for each in (away, to)]
            said.append(f"block {both[0]} hands the answer from {here[0]} to {here[1]}")
        said += [f"{name} decides until block {i}" for name, i in away.items() if i not in both]
        said += [f"{name} decides after block {i}" for name, i in to.items() if i not in both]
        for name in told:
            if name not in away and name not in to:
                won = float(data.share.sel(set=name).mean())
                said.append(f"{name}: no block changes who wins (A's answer {won:.0%} on average)")
    if "control" in data:
        best = data.share.max(dim)
        equal = [n for n in told if float(best.sel(set=n)) > 0.1 and float(data.control.sel(set=n).max()) >= 0.9 * float(best.sel(set=n))]  # fmt: skip
        if equal:
            said.insert(0, f"another pair's residual does as well ({', '.join(equal)})")
    if trivial:
        said.append(f"{', '.join(trivial)}: all positions spliced is A's own run, so this says nothing")
    return f"{model.name}: {'; '.join(said) or 'no position is told apart'}"


def _turns(data: xr.Dataset, name: str) -> int:
    """1 where the block that changes the share most raises it, -1 where it lowers it, 0 where none changes it by a tenth."""
    block = int(data.block.sel(set=name))
    return 0 if block < 0 else int(np.sign(np.diff(data.share.sel(set=name).values)[block]))


@dataclass(frozen=True)
class _Piece:
    """Positions that go together: columns of a's stream [pair, n], and how b's are called; size 0 for all."""

    columns: Tensor | None
    there: Any
    size: int

    def edits(self, run: Run, site: Site, rows: np.ndarray) -> list[Edit]:
        values = aligned_values(run, site)[rows]
        if self.columns is not None:
            values = values[torch.arange(len(rows))[:, None], self.columns[rows].to(values.device)]
        return [Patch(replace(site, at=self.there), values)]


def _sites(model: Model, over: str | None) -> tuple[list[Site], str, list[int]]:
    if over is not None:
        sites = model.sites(over)
        layers = [s.layer for s in sites]
        if any(s.at is not None or "position" not in s.dims or not isinstance(s.layer, int) for s in sites) or len(
            set(layers)
        ) != len(sites):
            raise InputError(f"over={over!r}: expected one site of each layer, without '@', such as 'layers.*.mlp.out'")
        return sites, "layer", [int(i) for i in layers]  # type: ignore[arg-type]
    stack = model.anatomy.stacks[-1]
    n = len(stack.blocks)
    names = [f"{stack.prefix}layers.{i}.resid_pre" for i in range(n)] + [f"{stack.prefix}layers.{n - 1}.resid_post"]
    return [model.sites(name)[0] for name in names], "depth", list(range(n + 1))


def _asked(model: Model, run: Run, theirs: Inputs) -> Any:
    """The difference of the logits of what the model says to a and to b."""
    asked = Question.of(model, run.inputs, run=run), Question.of(model, theirs)
    ids = [[answer.id for answer in each.answers] for each in asked]
    alike = next((i for i, (x, y) in enumerate(zip(*ids, strict=True)) if x == y), None)
    if alike is not None or not ids[0]:
        said = (
            "the model gives no answers" if not ids[0] else f"the model says the same to both prompts of pair {alike}"
        )
        raise InputError(f"{said}: give a metric, such as pl.metrics.logit_difference(' Paris', ' Rome')")
    return Question.of(model, theirs, ids[0], against=ids[1]).metric


# ---- positions that go together


def _sets(positions: Any, ours: Inputs, theirs: Inputs, site: Site) -> tuple[dict[str, list[_Piece]], Inputs, Inputs]:
    a, b = stream_of(ours, site), stream_of(theirs, site)
    named: dict[str, Any] = {}
    if isinstance(positions, Mapping):
        named = dict(positions)
    elif positions is None:
        same = bool((a.lengths == b.lengths).all())
        differ = [[j for j, (x, y) in enumerate(zip(*(s.ids[i][s.mask[i].bool()].tolist() for s in (a, b)), strict=False)) if x != y]
                  for i in range(len(ours))] if same else []  # fmt: skip
        if differ and all(differ):
            ours, theirs = _spanned(
                ours, theirs, "changed", [(d[0], d[-1] + 1) for d in differ], [(d[0], d[-1] + 1) for d in differ]
            )
            named = {"changed": "changed", "last": -1, "both": ["changed", -1]}
        named = named or {"last": -1}
    else:
        pieces = (
            list(positions)
            if isinstance(positions, Sequence) and not isinstance(positions, str | tuple)
            else [positions]
        )
        named = {str(p): p for p in pieces}
    made: dict[str, list[_Piece]] = {}
    for name, given in named.items():
        made[str(name)] = []
        for i, one in enumerate(given if isinstance(given, list) else [given]):
            piece, ours, theirs = _piece(f"{name} {i}", one, ours, theirs, site)
            made[str(name)].append(piece)
    if not made or not all(made.values()):
        raise InputError("positions= names no positions: give some, such as {'last': -1}")
    return made, ours, theirs


def _piece(name: str, given: Any, ours: Inputs, theirs: Inputs, site: Site) -> tuple[_Piece, Inputs, Inputs]:
    here, there = given if isinstance(given, tuple) and len(given) == 2 else (given, given)
    texts = [isinstance(x, list | tuple) and all(isinstance(t, str) for t in x) for x in (here, there)]
    if any(texts):
        if not all(texts):
            raise InputError(
                f"the positions {given!r:.80} are texts in one prompt and none in the other: name both alike"
            )
        spans = [[each.stream(site.stack).named(t, i) for i, t in enumerate(side)]
                 for each, side in zip((ours, theirs), map(list, (here, there)), strict=True) if _as_many(each, side)]  # fmt: skip
        sizes = {len(found) for side in spans for found in side}
        first = [[(found[0] if len(sizes) == 1 else found[-1], found[-1] + 1) for found in side] for side in spans]
        ours, theirs = _spanned(ours, theirs, name, *first)
        here = there = name
    a, b = stream_of(ours, site), stream_of(theirs, site)
    try:
        mine, yours = a.find(here), b.find(there)
    except TypeError:
        raise InputError(
            f"{given!r:.80} is no position: expected -1, '0:2', a text in quotes, or a pair (in a, in b)"
        ) from None
    if mine is None or yours is None:
        if not (mine is None and yours is None) or not torch.equal(a.lengths, b.lengths):
            raise InputError("all positions can only be spliced between prompts of equal length: name some")
        return _Piece(None, None, 0), ours, theirs
    if mine.shape[1] != yours.shape[1]:
        raise InputError(
            f"{given!r:.80} names {mine.shape[1]} tokens in a and {yours.shape[1]} in b: name as many, or the last of them"
        )
    whole = bool((a.lengths == mine.shape[1]).all() and (b.lengths == mine.shape[1]).all())
    return _Piece(mine - a.starts[:, None], there, 0 if whole else int(mine.shape[1])), ours, theirs


def _as_many(inputs: Inputs, texts: Sequence[str]) -> bool:
    if len(texts) != len(inputs):
        raise InputError(f"{len(texts)} texts name positions of {len(inputs)} prompts: give one for each")
    return True


def _spanned(
    ours: Inputs, theirs: Inputs, name: str, mine: list[tuple[int, int]], yours: list[tuple[int, int]]
) -> tuple[Inputs, Inputs]:
    """Both with a span of this name in every stream that has these positions."""

    def put(inputs: Inputs, spans: list[tuple[int, int]]) -> Inputs:
        return replace(
            inputs,
            streams={k: replace(s, spans={**s.spans, name: spans}, _found={}) for k, s in inputs.streams.items()},
        )

    return put(ours, mine), put(theirs, yours)
