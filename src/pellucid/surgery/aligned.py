"""One text read by two models: which position of the one stands for which of the other, and what they have there.

Models with one vocabulary read the same token ids. Otherwise each tokenizer cuts the text in its own way, and a position of the
receiver goes with the last token of the sender that ends where it ends, or before: so the sender has read no character that
the receiver has not. Only positions that end at the same character are `exact`, and only from these is anything learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.corpus import Corpus, longest
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model


@dataclass(frozen=True, eq=False)
class Pair:
    """One text as both models read it; [n] over the receiver's positions, `columns` are the sender's."""

    sender: Inputs
    receiver: Inputs
    columns: Tensor
    exact: Tensor
    seen: Tensor  # the sender has read nothing that the receiver has not
    inner: Tensor  # neither model's first position, which is often an attention sink

    def __len__(self) -> int:
        return len(self.columns)


def pairs(sender: Model, receiver: Model, texts: Any, tokens: int, context: int) -> list[Pair]:
    """Texts of at most `context` of the receiver's tokens, `tokens` in all, one a row. InputError where there are none."""
    context = min(context, longest(sender), longest(receiver))
    found = list(
        _same(sender, receiver, texts, tokens, context)
        if alike(sender, receiver)
        else _by_text(sender, receiver, texts, tokens, context)
    )
    found = [pair for pair in found if len(pair) > 1 and bool(pair.exact[1:].any())]
    if not found:
        raise InputError(
            "there is no text of two tokens or more that both models cut at one place: give some ordinary text"
        )
    return found


def alike(sender: Model, receiver: Model) -> bool:
    """Whether two models read the same token ids."""
    if sender is receiver or (sender.tokenizer is None and receiver.tokenizer is None):
        return True
    both = [m.tokenizer for m in (sender, receiver)]
    return None not in both and (both[0] is both[1] or (both[0].get_vocab() == both[1].get_vocab() and
           [both[0](t)["input_ids"] for t in PROBES] == [both[1](t)["input_ids"] for t in PROBES]))  # fmt: skip


PROBES = ("The 12 cafés, really?", " don't")


def _same(sender: Model, receiver: Model, texts: Any, tokens: int, context: int) -> Iterator[Pair]:
    for row in Corpus.of(texts, context=context, tokens=tokens, packed=False, long="windows").rows(receiver):
        if len(row.ids) > 1:
            mine, yours = (model.inputs([list(row.ids)]) for model in (sender, receiver))
            n = torch.arange(len(row.ids))
            yield Pair(mine, yours, n, torch.ones_like(n).bool(), torch.ones_like(n).bool(), n > 0)


def _by_text(sender: Model, receiver: Model, texts: Any, tokens: int, context: int) -> Iterator[Pair]:
    total = 0
    for text in Corpus.of(texts).read():
        if not text.strip():
            continue
        mine, yours = (model.inputs([text], truncate=("right", context)) for model in (sender, receiver))
        pair = _laid(mine, yours)
        total += len(pair)
        if total > tokens:
            return
        yield pair


def _laid(mine: Inputs, yours: Inputs) -> Pair:
    a, b = (each.streams.get("encoder", each.stream("")).maps[0].offsets for each in (mine, yours))
    columns, exact, seen = [], [], []
    reached = max((stop for _, stop in a), default=0)
    for number, (start, stop) in enumerate(b):
        if start == stop:  # a mark: with the sender's mark in the same place, else with what it has read so far
            same = number < len(a) and a[number][0] == a[number][1]
            columns.append(number if same else max((i for i, (_, end) in enumerate(a) if end <= stop), default=0))
            exact.append(False)
            seen.append(True)
            continue
        before = [i for i, (first, end) in enumerate(a) if first < end <= stop]
        columns.append(before[-1] if before else 0)
        exact.append(bool(before) and a[before[-1]][1] == stop)
        if stop > reached:  # the sender's text was cut before
            columns, exact = columns[:-1], exact[:-1]
            break
        seen.append(bool(before))
    n = torch.tensor(columns)
    return Pair(
        mine,
        yours,
        n,
        torch.tensor(exact, dtype=torch.bool),
        torch.tensor(seen, dtype=torch.bool),
        (torch.arange(len(n)) > 0),
    )


def states(model: Model, inputs: Sequence[Inputs], sites: Sequence[str], what: str) -> list[dict[str, Tensor]]:
    """For each text [position, d_model] at every site, float32 on the host, of one run that ends at the last of them."""
    kept = list(dict.fromkeys(sites))
    found = []
    for each in progress(list(inputs), what):
        with torch.no_grad():
            run = model.run(each, keep=kept, logits=False)
        found.append({site: run.tensor(site)[0].float().cpu() for site in kept})
    return found


def rows(
    pairs: Sequence[Pair], mine: Sequence[dict[str, Tensor]], yours: Sequence[dict[str, Tensor]], site: str, other: str
) -> tuple[Tensor, Tensor]:
    """[row, d] of both at the exact positions but the first: what a map is fitted on, or a similarity taken of."""
    which = [pair.exact & pair.inner for pair in pairs]
    x = [a[site][pair.columns[w]] for pair, a, w in zip(pairs, mine, which, strict=True)]
    y = [b[other][: len(w)][w] for b, w in zip(yours, which, strict=True)]
    return torch.cat(x), torch.cat(y)


def residuals(model: Model, layers: Sequence[int]) -> dict[int, str]:
    """The site after each layer of the stack that reads the text."""
    prefix = model.anatomy.stacks[0].prefix
    return {i: str(model.sites(f"{prefix}layers.{i}.resid_post")[0]) for i in layers}
