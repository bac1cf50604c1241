"""Stopping early while generating: the policy decides at every token of every row, and the cache stays right (`surgery.walk`).

What was paid is counted in blocks a token: blocks that ran, checks, what was made up for, projections of propagated states.
Whether time was gained is measured beside it, not inferred: for one row on a CPU or a card a block is a matter of its weights,
passing many tokens at once costs little more than one, and a block that one row of a batch needs is read for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pellucid.engine.pausing import progress
from pellucid.engine.sampling import sampling
from pellucid.errors import InputError, at_least, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.walk import States, begun, ends, plainly
from pellucid.technique import technique

GRID = ("row", "position")


@technique
def generate_early(
    model: Model,
    prompt: Any,
    policy: Exit,
    *,
    states: States = "recompute",
    max_new_tokens: int = 40,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Continue prompts, each token by as many blocks as its policy wants. The prompts themselves are read by all of them.

    Greedily, or drawn as transformers does with `options` by its names: `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty` (those of the model's own config are not taken); the draws are those of `seed`, of each row as if it were alone.

    Several prompts are one batch, whose rows exit each where they are sure: the same tokens and layers as one by one. Gives over
    `position` (of several prompts over `row` x `position`, NaN behind a row's end; the tokens written, `token`) `layer`, the
    blocks after which each was chosen, `agrees`, whether the full model says the same after the same text (one pass over it,
    afterwards; of drawn tokens, with the same draw), and `blocks` paid, with checks and what was made up for; `share_agreeing`,
    `blocks_full`, what the whole model pays a token, and `time`, seconds over those of the whole model's greedy generation of as
    many tokens of the same batch, cached too. `attrs["text"]` is the text (of several prompts a list). Refused for encoders, encoder-decoders,
    shared layers, batches that cannot be padded on the left or taken apart; InputError for other options.

    >>> generate_early(model, "The capital of France is", Exit("margin", 0.9), max_new_tokens=8).layer
    <xarray.DataArray 'layer' (position: 8)>...
    """
    at_least(1, max_new_tokens=max_new_tokens)
    walk, texts = begun(model, prompt, policy, states)
    choices, end = [_Choice.of(options, seed) for _ in texts], ends(model)
    started = time.perf_counter()
    rows, said = walk.begin(texts)
    live, paid, layers = [*rows], [list[float]() for _ in rows], [list[int]() for _ in rows]
    for step in progress(range(max_new_tokens), "tokens"):
        for row, logits in zip(live, said, strict=True):
            whole = row.exited is None or not step
            paid[row.number].append(row.blocks + walk.n * (not step) + walk.unembedding * (whole or not policy.reads))
            layers[row.number].append(walk.n if whole else row.exited + 1)  # type: ignore[operator]
            row.ids.append(choices[row.number](row.ids, logits[None]))
            row.blocks = 0.0
        live = [row for row in live if row.ids[-1] not in end]
        if not live or step == max_new_tokens - 1:
            break
        said = walk.step(live)
    seconds = time.perf_counter() - started
    new = [row.ids[len(ids) :] for row, ids in zip(rows, texts, strict=True)]
    started = time.perf_counter()
    width = max(map(len, new))
    plainly(model, texts, width)
    full_seconds = time.perf_counter() - started
    told = {"layer": (GRID, _filled(layers, np.nan, width)), "blocks": (GRID, _filled(paid, np.nan, width))}
    written = _written(model, texts, new, choices, width)
    data = xr.Dataset(told, attrs=written.attrs).merge(written)
    data = data.assign(blocks_full=walk.n + walk.unembedding, time=seconds / full_seconds)
    data = data.assign_attrs(states=states)
    depth, cost, full = np.nanmean(data.layer), np.nanmean(data.blocks), float(data.blocks_full)
    note = f"{depth:.1f} of {walk.n} blocks a token, {cost:.1f} paid where the whole model pays {full:.1f}"
    note += f", {float(data.share_agreeing):.0%} of tokens are the whole model's" + (
        ": dearer than it" if cost >= full else ""
    )
    if len(rows) == 1:
        data = data.isel(row=0, drop=True).assign_attrs(text=data.attrs["text"][0])
        data = data.assign(layer=data.layer.astype(int), agrees=data.agrees.astype(bool))
    return Result(data, kind="early exit", title=note)


def _written(
    model: Model, texts: list[list[int]], new: list[list[int]], choices: list[_Choice], width: int
) -> xr.Dataset:
    """What was written, and whether the whole model says the same after the same text."""
    words, agrees = model.tokenizer, []
    for ids, own, choice in zip(texts, new, choices, strict=True):
        with torch.no_grad():
            truth = choice.again(ids, own, model.run([[*ids, *own][:-1]]).logits[0, len(ids) - 1 :])
        agrees.append([float(a == b) for a, b in zip(own, truth, strict=True)])
    named = [[f"#{i}" if words is None else words.decode([i]) for i in own] for own in new]
    said = [" ".join(map(str, ids)) if words is None else words.decode(ids) for ids in texts]
    coords: dict[str, Any] = {"row": [f"{i}: {text[-24:]}" for i, text in enumerate(said)], "position": range(width),
                              "token": (GRID, _filled(named, "", width)), "id": (GRID, _filled(new, -1, width))}  # fmt: skip
    right = _filled(agrees, np.nan, width)
    return xr.Dataset({"agrees": (GRID, right), "share_agreeing": np.nanmean(right)}, coords,
                      {"text": ["" if words is None else words.decode(own) for own in new]})  # fmt: skip


def _filled(values: Sequence[Sequence[Any]], empty: Any, width: int) -> np.ndarray:
    return np.array([[*v, *[empty] * (width - len(v))] for v in values])


@dataclass
class _Choice:
    """The next token from logits [1, token]: the most probable, or drawn from what transformers' processors leave."""

    processors: LogitsProcessorList
    generator: torch.Generator | None
    states: list[Tensor] = field(default_factory=list)  # of the generator, before each draw

    @classmethod
    def of(cls, options: dict[str, Any], seed: int) -> _Choice:
        known = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
        if unknown := sorted({*options} - known):
            raise InputError(
                f"generate_early() takes no {unknown[0]}={nearest(unknown[0], known)}: a token is chosen greedily or drawn"
            )
        asked = sampling(**options)
        made: dict[str, Any] = {"repetition_penalty": RepetitionPenaltyLogitsProcessor}
        made |= {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}  # fmt: skip
        off = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        chosen = [make(asked[k]) for k, make in made.items() if asked.get(k) is not None and asked[k] != off[k]]
        return cls(LogitsProcessorList(chosen), torch.Generator().manual_seed(seed) if asked["do_sample"] else None)

    def __call__(self, ids: list[int], said: Tensor) -> int:
        if self.generator is not None:
            self.states.append(self.generator.get_state())
        return self._chosen(ids, said)

    def again(self, ids: list[int], new: list[int], said: Tensor) -> list[int]:
        """What logits [step, token] say at every step after the same text, with the same draws."""
        found = []
        for step, row in enumerate(said):
            if self.generator is not None:
                self.generator.set_state(self.states[step])
            found.append(self._chosen([*ids, *new[:step]], row[None]))
        return found

    def _chosen(self, ids: list[int], said: Tensor) -> int:
        left = self.processors(torch.tensor([ids]), said.float().cpu())
        return int(left.argmax() if self.generator is None else torch.multinomial(left.softmax(-1), 1, generator=self.generator))  # fmt: skip
