"""Is a selection the reason? What a fitted `Select` measures, on texts not trained on:

accuracy, hidden                   on the selection; with what was left out hidden from attention as well
full_text, complement              the same predictor on everything, on what was left out
random_tokens, rationale_tokens    on as many random tokens, on those that people marked
share, share_in_training           of tokens shown; of m > 0 in training: a mask that lets a tenth of a word through has let the word through
token_f1, token_f1_of_random       of the selection with the tokens that people marked
positions_only, chance             the label from the places alone, by logistic regression: above chance the selector writes a code
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded
from pellucid.tuning.masks import f1, soft
from pellucid.tuning.measuring import number_of, plain, shown
from pellucid.tuning.objective import generator


def measures(model: Model, select: Any, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
    """The numbers of the module, of a fitted `Select`."""

    def right(mask: Callable[[Batch, Tensor, Tensor], Tensor | None], hide: bool = False) -> float:
        found = []
        for batch in shown(model, test):
            free, own = select.candidates(model, batch, test), select.shown_tokens(model, batch, test)
            picked = mask(batch, free, own)
            given = batch if picked is None else select.masked(model, batch, free, picked.float(), hide)
            found.append(plain(model, given)[1])
        return float(np.concatenate(found).mean())

    drawn = generator(seed, "random tokens", 0)
    people = select.teach or ("rationale" if "rationale" in test.positions else None)
    found = {
        "accuracy": right(lambda batch, free, own: own), "hidden": right(lambda batch, free, own: own, True),
        "full_text": right(lambda batch, free, own: None), "complement": right(lambda batch, free, own: free & ~own),
        "random_tokens": right(lambda batch, free, own: select.drawn(free, drawn)),
    }  # fmt: skip
    if people is not None and any(test.positions.get(people, ())):
        found["rationale_tokens"] = right(lambda batch, free, own: batch.masks[people] & free)
    shares, f1s, through = [], [], []
    for batch in shown(model, test):
        free, own = select.candidates(model, batch, test), select.shown_tokens(model, batch, test)
        some = free.any(1)
        shares += (own.sum(1) / free.sum(1).clamp_min(1))[some].tolist()
        if not select.random:
            with torch.no_grad():
                m = soft(select.mask, select.scores(model, batch), free, select.share, select.temperature, drawn).cpu()
            through += (((m > 0) & free).sum(1) / free.sum(1).clamp_min(1))[some].tolist()
        if "rationale_tokens" in found:
            marked = batch.masks[str(people)] & free
            both = [f1(mask, marked)[marked.any(1)].tolist() for mask in (own, select.drawn(free, drawn))]
            f1s += list(zip(*both, strict=True))
    found["share"] = float(np.mean(shares))
    found |= {"share_in_training": float(np.mean(through))} if through else {}
    if f1s:
        found["token_f1"], found["token_f1_of_random"] = (float(x) for x in np.mean(f1s, 0))
    return found | _places(model, select, train, test)


def _places(model: Model, select: Any, train: Encoded, test: Encoded) -> dict[str, float]:
    """What the places alone tell of the label."""
    if train.labels is None or test.labels is None:
        return {}
    width = max(b.content.shape[1] for data in (train, test) for b in shown(model, data))
    x, y = [], []
    for data in (train, test):
        rows = [select.shown_tokens(model, b, data) for b in shown(model, data)]
        x.append(np.concatenate([np.pad(m.numpy().astype(float), ((0, 0), (0, width - m.shape[1]))) for m in rows]))
        y.append(np.asarray(data.labels).astype(str))
    if len(set(y[0])) < 2:
        return {}
    score = LogisticRegression(max_iter=1000).fit(x[0], y[0]).score(x[1], y[1])
    return {
        "positions_only": float(score),
        "chance": float(np.unique(y[1], return_counts=True)[1].max() / len(y[1])),
    }


def verdict(data: xr.Dataset, texts: int) -> list[str]:
    """Sentences about a result of `fit`, what was found in front."""
    of = partial(number_of, data)
    error, said = 2 * (0.25 / texts) ** 0.5, []
    own = of("accuracy")
    if of("full_text") <= of("chance") + error:
        said.append(
            f"the predictor never learnt the full text ({of('full_text'):.2f}), so nothing follows: raise warm, or steps"
        )
    elif of("random_tokens") >= own - error:
        said.append(
            f"as many random tokens do as well ({of('random_tokens'):.2f} against {own:.2f}): the selection is no reason"
        )
    if of("positions_only") > of("chance") + error:
        said.append(f"the places alone tell the label ({of('positions_only'):.2f}): the selection may be a code")
    plausible = (
        f"; token F1 {of('token_f1'):.2f} (random {of('token_f1_of_random'):.2f})"
        if "token_f1" in data["measure"]
        else ""
    )
    said.append(
        f"on {of('share'):.2f} of the tokens it answers {own:.2f} (full text {of('full_text'):.2f}, as many random tokens {of('random_tokens'):.2f}, "
        f"a predictor trained on such {of('accuracy', 'control'):.2f}, what was left out {of('complement'):.2f}){plausible}"
    )
    return said
