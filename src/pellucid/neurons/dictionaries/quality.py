"""How much of what the model does goes through a dictionary?

On held-out text, over the tokens within the dictionary's limit:

    explained   1 - sum |y - y^|^2 / sum |y - mean|^2
    l0          features on per token
    dead        share of features that were on nowhere
    recovered   (loss_mean - loss_spliced) / (loss_mean - loss_clean)

where a loss is the model's own next-token cross-entropy with the reconstruction, or the mean, in place of the site.
Published numbers often take zero in place of the mean, which is further from anything the model knows and flatters the
dictionary: that loss is given beside it. So is that of a dictionary nobody trained: as many directions, drawn at random,
of which as many are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from pellucid.anatomy.sites import Site
from pellucid.controls import random_directions
from pellucid.corpus import Corpus, batches, inputs, longest
from pellucid.engine.inputs import Inputs, Stream
from pellucid.engine.pausing import progress, quiet
from pellucid.engine.watching import run_until
from pellucid.errors import InputError, at_least
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.dictionaries.functions import TopK
from pellucid.neurons.dictionaries.rows import CONTEXT
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

STATES = ("clean", "spliced", "mean", "zero", "untrained")


@technique
def dictionary_quality(
    model: Model,
    dictionary: Dictionary,
    texts: Any,
    *,
    tokens: int = 20_000,
    context: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> Result:
    """Explained variance, L0, dead share and loss recovered of a dictionary, on the first `tokens` tokens of held-out text.

    `loss` over `state` (clean, spliced, mean, zero, untrained) in nats per token; `recovered`, its 95 % interval `low` to
    `high` over rows of text and `recovered_from_zero`; `explained`, `l0`, `dead`, and `beyond`, the share of tokens
    over the limit. InputError for a model that does not predict next tokens, or other weights than the dictionary's.

    >>> dictionary_quality(model, dictionary, held_out).recovered
    <xarray.DataArray 'recovered' ()>...
    """
    dictionary.check(model)
    context = min(CONTEXT, longest(model)) if context is None else context
    at_least(1, tokens=tokens, batch=batch)
    at_least(2, context=context)
    if not model.anatomy.stacks[-1].causal or model.anatomy.head is None or len(model.anatomy.stacks) > 1:
        raise InputError("loss recovered is measured on next tokens: give a causal language model")
    corpus = Corpus.of(texts, context=context, tokens=tokens, long="windows")
    groups = [inputs(model, rows) for rows in batches(corpus.rows(model), batch)]
    if not groups:
        raise InputError(
            f"there is not one row of {corpus.context} tokens in these texts: give more text, or a smaller context="
        )
    held = _Sums.over(model, dictionary, groups)
    mean = held.mean.float()
    variants = [
        dictionary.splice(),
        dictionary.splice(constant=mean),
        dictionary.splice(constant=torch.zeros_like(mean)),
        untrained(dictionary, round(held.l0), seed).splice(),
    ]
    losses = []
    for group in progress(groups, "batches of held-out text"):
        with quiet():
            sweep = model.sweep(group, variants, NextToken(group.stream("")))
        losses.append(torch.cat([sweep.clean[None], sweep.values]).double().cpu().numpy())
    loss = np.concatenate(losses, 1)  # [state, row]
    clean, spliced, gone, zero, _ = loss.mean(1)
    low, high = interval(loss[2] - loss[1], seed, over=loss[2] - loss[0])
    data = xr.Dataset(
        {"loss": ("state", loss.mean(1)), "recovered": (gone - spliced) / (gone - clean), "low": low, "high": high,
         "recovered_from_zero": (zero - spliced) / (zero - clean), "explained": held.explained, "l0": held.l0,
         "dead": held.dead, "beyond": held.beyond},
        coords={"state": list(STATES)}, attrs={"unit": "nats", "tokens": sum(int(group.stream("").mask.sum()) for group in groups)},
    )  # fmt: skip
    return Result(data, kind="dictionary quality", title=f"{dictionary!r} in {model.name}")


@technique
def untrained(dictionary: Dictionary, k: int, seed: int = 0) -> Dictionary:
    """A dictionary of as many random directions, the k that point most along a row being on: the control."""
    decoder, same = (
        random_directions(len(dictionary), dictionary.decoder, seed=seed),
        dictionary.site == dictionary.writes,
    )
    encoder = decoder.T if same else random_directions(len(dictionary), dictionary.encoder.T, seed=seed + 1).T
    bias = -dictionary.decoder_bias @ encoder if same else torch.zeros_like(dictionary.encoder_bias)
    return replace(dictionary, encoder=encoder, encoder_bias=bias, decoder=decoder, activation=TopK(max(1, k)))


@dataclass(frozen=True, eq=False)
class NextToken:
    """The mean over a prompt's tokens of -log p(next token), in nats."""

    stream: Stream
    name: str = "next_token_loss"

    def bind(self, tokenizer: Any, batch: int) -> BoundMetric:
        ids, mask = self.stream.ids, self.stream.mask[:, 1:].bool() & self.stream.mask[:, :-1].bool()

        def loss(logits: Tensor) -> Tensor:
            each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none")
            real = mask.to(each)
            return (each * real).sum(1) / real.sum(1)

        return BoundMetric(self.name, None, None, loss)


@dataclass(frozen=True, eq=False)
class _Sums:
    """What one pass over held-out text finds out about the site."""

    mean: Tensor  # [d_out]
    explained: float
    l0: float
    dead: float
    beyond: float

    @classmethod
    def over(cls, model: Model, d: Dictionary, groups: Sequence[Inputs]) -> _Sums:
        total = torch.zeros(d.decoder.shape[1], dtype=torch.float64)
        square = error = on = 0.0
        rows = seen = 0
        lit = torch.zeros(len(d), dtype=torch.bool)
        for group in progress(groups, "batches read"):
            run = run_until(model.anatomy, group, dict.fromkeys((d.site, d.writes)))
            (x, real), (y, _) = (run.everywhere(Site.parse(s)) for s in (d.site, d.writes))
            x, y = x[real], y[real]
            within = d.within(x)
            x, y = x[within], y[within]
            f = d.encode(x)
            rows, seen = rows + len(within), seen + len(x)
            total += y.double().sum(0).cpu()
            square += float(y.double().pow(2).sum())
            error += float((y - d.decode(f).to(y)).double().pow(2).sum())
            on += float((f > 0).sum())
            lit |= (f > 0).any(0).cpu()
        mean = total / seen
        variance = square - seen * float(mean.pow(2).sum())
        return cls(mean, 1 - error / variance, on / seen, float((~lit).float().mean()), 1 - seen / rows)
