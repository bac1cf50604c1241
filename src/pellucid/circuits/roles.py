"""What does each head do? Roles by where a head looks on generated probes, and by what it copies.

On random tokens said twice (n different tokens, then the same again; i counts in the second half):

    previous    mean attention from a token to the one before it
    duplicate   mean attention from i to i - n, where its token stood first
    induction   mean attention from i to i - n + 1, what followed it there (Olsson et al. 2022)

On prompts with spans IO, S1, S2 (`tasks.indirect_objects`; Wang et al. 2023), from the last token:

    to_io, to_s1, to_s2   mean attention to each
    copy        share of words which the head's value and output matrices alone (OV) put among the first `top`
                predictions, when they read the word's residual after the first layer; `anticopy`: among the
                last ones
    inhibition  how much the copying heads' preference for IO over S, in attention from the last token, falls
                when this head's message to their queries is replaced by its mean; for the heads that look
                most at S2

Scores are shares between 0 and 1 (inhibition: a difference of attention). `role` names the largest that
passes `threshold`. `chance` is what a head that looks everywhere alike would have on the probes: a score near
it means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.causal.contrast import Asked
from pellucid.circuits.ablation import alternatives
from pellucid.circuits.execution import Masked, Runner, wire
from pellucid.circuits.passing import forward
from pellucid.circuits.wiring import Wiring
from pellucid.errors import InputError, Refused
from pellucid.metrics import as_metric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.tasks import Prompts, repeated_tokens
from pellucid.technique import technique


@technique
def head_roles(
    model: Model,
    prompts: Prompts | None = None,
    *,
    words: Sequence[str] | None = None,
    length: int = 20,
    draws: int = 8,
    top: int = 5,
    candidates: int = 8,
    threshold: float = 0.3,
    seed: int = 0,
) -> Result:
    """Scores [layer, head] of every role and the `role` each head is named by ("" for none).

    `prompts` (with spans IO, S1, S2) add the roles of indirect objects; `words` are those copying is tested
    on, by default the answers of the prompts. `candidates`: how many heads are tried for inhibition.

    >>> head_roles(model, pl.tasks.indirect_objects(model.tokenizer, 16)).copy.max()
    <xarray.DataArray 'copy' ()>...
    """
    wiring = wire(model)
    if len(model.anatomy.stacks) > 1:
        raise Refused("head roles are told by where a model of one stack looks; this one has an encoder and a decoder")
    heads = {b.attentions["attn"].heads if "attn" in b.attentions else 0 for b in model.anatomy.stacks[0].blocks}
    if len(heads) > 1:
        raise Refused(f"head roles need the same number of heads in every layer, this model has {sorted(heads)}")
    scores, chance = repeated(model, length, draws, seed)
    if prompts is not None:
        missing = {"IO", "S1", "S2"} - set(prompts.spans)
        if missing:
            raise InputError(f"these prompts have no span {', '.join(sorted(missing))}: use tasks.indirect_objects")
        scores |= looking(model, prompts)
        words = words if words is not None else sorted({a for a in prompts.answers if isinstance(a, str)})
    if words is not None:
        scores["copy"], scores["anticopy"] = copying(wiring, words, top)
    if prompts is not None:
        scores["inhibition"] = inhibition(wiring, prompts, scores, candidates)
    scores = {name: score.cpu() for name, score in scores.items()}
    naming = {
        "previous": "previous token",
        "duplicate": "duplicate token",
        "induction": "induction",
        "inhibition": "S-inhibition",
    }
    role = np.full(next(iter(scores.values())).shape, "", dtype=object)
    best = np.full(role.shape, threshold)
    for name in [n for n in naming if n in scores]:
        value = np.nan_to_num(scores[name].numpy(), nan=0.0) * (
            10 if name == "inhibition" else 1
        )  # .03 of attention counts
        better = value > best
        role[better], best[better] = naming[name], value[better]
    if prompts is not None:
        looks = scores["to_io"].numpy() > threshold / 2
        role[looks & (scores["copy"].numpy() > 0.5)] = "name mover"
        role[looks & (scores["anticopy"].numpy() > 0.5)] = "negative name mover"
    dims = ("layer", "head")
    data = xr.Dataset(
        {**{n: (dims, v.numpy()) for n, v in scores.items()}, "role": (dims, role.astype(str))},
        attrs={"chance": chance},
    )
    data = data.assign_coords(layer=range(role.shape[0]), head=range(role.shape[1]))
    return Result(data, kind="head roles", title="What each head does")


def patterns(model: Model, prompt: Any) -> Tensor:
    """[layer, batch, head, query, key]"""
    with torch.no_grad():
        run = model.run(prompt, keep="layers.*.attn.pattern")
    return torch.stack(
        [run.tensor(f"layers.{i}.attn.pattern") for i in range(len(model.anatomy.stacks[0].blocks))]
    ).float()


def repeated(model: Model, length: int, draws: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """previous, duplicate and induction [layer, head] on random tokens said twice, after a BOS where there is
    one; and what equal attention to every position gives."""
    ids = repeated_tokens(model.tokenizer, draws, seed, length=length, vocabulary=model.vocabulary)
    found, first = patterns(model, ids), ids.shape[1] - length
    i = torch.arange(first + 1, first + length)
    places = {"previous": i - 1, "duplicate": i - length, "induction": i - length + 1}
    seen = i + 1 if model.anatomy.stacks[0].causal is not False else torch.full(i.shape, found.shape[-1])
    return {name: found[..., i, j].mean((1, 3)) for name, j in places.items()}, float((1 / seen).mean())


def looking(model: Model, prompts: Prompts) -> dict[str, Tensor]:
    """Attention [layer, head] from the position the answer is read at to IO, S1 and S2, summed over their
    tokens."""
    found = patterns(model, prompts.clean)
    stream = model.inputs(prompts.clean).stream("")
    last = (stream.starts + stream.lengths + prompts.position).tolist()
    starts = stream.starts.tolist()
    made = {}
    for name in ("IO", "S1", "S2"):
        spans = [(a + s, b + s) for (a, b), s in zip(prompts.spans[name], starts, strict=True)]
        rows = [found[:, b, :, last[b], lo:hi].sum(-1) for b, (lo, hi) in enumerate(spans)]
        made[f"to_{name.lower()}"] = torch.stack(rows).mean(0)
    return made


def copying(wiring: Wiring, words: Sequence[str], top: int) -> tuple[Tensor, Tensor]:
    """Share of words that OV alone puts among the first, and among the last, `top` of the vocabulary: [layer,
    head] each."""
    model, head = wiring.model, wiring.model.anatomy.head
    if head is None:
        raise Refused("copying is read off the predictions, and this model has no head that makes some")
    inputs = model.inputs(list(words))
    stream = inputs.stream("")
    last = stream.starts + stream.lengths - 1
    rows = torch.arange(len(last))
    ids = stream.ids[rows, last]
    with torch.no_grad():
        first = model.run(inputs, keep="layers.0.resid_post").tensor("layers.0.resid_post")[rows, last]
    copied, anti = [], []
    for writing in (w for w in wiring.writings if w.heads):
        reading = next(r for r in wiring.readings if r.depth == writing.depth and _kind(wiring, r) == "v")
        with torch.no_grad():
            values = _values(wiring, reading, first)  # [kv_head, word, e]
            z = values.repeat_interleave(writing.heads // len(values), 0)
            out = writing.messages(z.permute(1, 0, 2)[:, None])[:, :, 0]  # [head, word, d]
            logits = out
            for step in head.steps:
                logits = step(logits)
            own = logits.gather(2, ids[None, :, None].expand(len(logits), -1, 1))
            copied.append(((logits > own).sum(-1) < top).float().mean(1))
            anti.append(((logits < own).sum(-1) < top).float().mean(1))
    return torch.stack(copied), torch.stack(anti)


def _kind(wiring: Wiring, reading: Any) -> str:
    kinds = {wiring.graph.readers[r].kind for r in reading.readers}
    return "v" if "v" in kinds else kinds.pop()


def _values(wiring: Wiring, reading: Any, x: Tensor) -> Tensor:
    if reading.chain:
        raise Refused("copying needs values that are one projection of the residual; this model's take several steps")
    weight, bias = reading.weights()
    own = [i for i, r in enumerate(reading.readers) if wiring.graph.readers[r].kind == "v"]
    x = x if reading.prefix is None else reading.prefix(x)
    values = torch.einsum("wd,hde->hwe", x, weight[own].to(x.dtype))
    return values if bias is None else values + bias[own][:, None]


def inhibition(wiring: Wiring, prompts: Prompts, scores: dict[str, Tensor], candidates: int) -> Tensor:
    """[layer, head] the fall of the copying heads' preference for IO; NaN for heads that were not tried."""
    graph, model = wiring.graph, wiring.model
    movers = torch.nonzero((scores["copy"] > 0.5) & (scores["to_io"] > 0.1)).tolist()
    made = torch.full(scores["copy"].shape, float("nan"))
    if not movers:
        return made
    queries = [graph.reader(f"{layer}.{head}.q") for layer, head in movers]
    inputs = model.inputs(prompts.clean)
    question = Asked(inputs, None, as_metric(lambda logits: logits.flatten(1)[:, 0]).bind(None, len(inputs)))
    runner = Runner(wiring, question, alternatives(wiring, inputs, "mean"))
    latest = max(layer for layer, _ in movers)
    order = scores["to_s2"].flatten().argsort(descending=True).tolist()
    tried = [divmod(i, made.shape[1]) for i in order if i // made.shape[1] < latest][:candidates]

    def preference(off: list[int]) -> float:
        mask = torch.zeros(1, *graph.possible.shape, dtype=runner.replacements.dtype)
        for s in off:
            mask[0, s, queries] = 1.0
        return _preference(runner, mask * graph.possible, movers, prompts)

    clean = preference([])
    for layer, head in tried:
        made[layer, head] = clean - preference([graph.source(f"{layer}.{head}")])
    return made


def _preference(runner: Runner, off: Tensor, movers: list[list[int]], prompts: Prompts) -> float:
    """Mean attention of some heads from the last token to IO minus S1 and S2, with some edges off."""
    anatomy, inputs = runner.wiring.model.anatomy, runner.question.inputs
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def handler(x: Tensor) -> None:
            kept[layer] = x.float()

        return handler

    blocks = anatomy.stacks[0].blocks
    taps = {blocks[layer].taps["attn.pattern"]: keep(layer) for layer, _ in movers}
    with torch.no_grad():
        forward(runner.wiring, inputs, Masked(runner, runner.wiring.graph.fold(off), 0), whole=False, also=taps)
    stream = inputs.stream("")
    total = 0.0
    for b in range(len(inputs)):
        start = int(stream.starts[b])
        last = start + int(stream.lengths[b]) + prompts.position
        for layer, head in movers:
            row = kept[layer][b, head, last]
            to = {n: float(row[slice(*(start + i for i in prompts.spans[n][b]))].sum()) for n in ("IO", "S1", "S2")}
            total += to["IO"] - to["S1"] - to["S2"]
    return total / (len(inputs) * len(movers))
