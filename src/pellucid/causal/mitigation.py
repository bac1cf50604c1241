"""Which edit makes the answer independent of a word, and what does it cost?

Given pairs of prompts that differ in one word (a profession and its counterpart), the bias is how far the word moves the
log odds of the answer that goes against the stereotype:

    bias = mean over pairs of log y[other word] - log y[word],      y = p(wrong) / p(right)

which does not depend on how likely " he" and " she" are by themselves. The mediators that carry most of it (by their
indirect effect in nats, see mediation.py), 1, 2, 4, ... of them, are held at their mean over both words and all pairs, so
that they no longer tell the two words apart. (Removing from each only the direction in which the words differ most was
tried and left out: on SmolLM2 it left nine tenths of the bias where the mean left a thirtieth.) Such an edit need not
know a stereotype from a definition: look at what it does to words that are gendered by themselves.

Mediators are ranked and means taken on one half of the pairs, the bias is measured on the other half. Its price is the
perplexity of texts that have nothing to do with it. The control edits as many randomly chosen mediators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.grid import Over, totals
from pellucid.causal.mediation import Mediators
from pellucid.engine.edits import Edit, Replace
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import pause
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks import Prompts
from pellucid.technique import technique


@technique
def mitigation(
    model: Model,
    prompts: Prompts,
    texts: Sequence[str],
    *,
    over: Over = "layers.*.attn.heads.*",
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """The `bias` that is left and the `perplexity` of `texts` when the strongest `size` mediators of `over` are edited.

    Gives both along `size`, with the bias's interval over held-out pairs, `random_bias` and `random_perplexity` (means of
    `draws` random choices), `price` (perplexity over that of the unedited model, minus 1), `kept` (the share of the bias
    that is left), and without edits `bias_before` and `perplexity_before`. `mediators` names them by rank: give the first
    ones to `mitigating_edits` for the edits themselves. InputError for fewer than four pairs.

    >>> mitigation(model, professions, texts, sizes=[1, 2])
    What is left of gendered_professions, and its price
    mitigation: bias, low, high, ... over size 2, rank ..., prompt 4...
    """
    if len(prompts) < 4:
        raise InputError(f"mitigation needs at least 4 pairs, half of them held out, and got {len(prompts)}")
    half = len(prompts) // 2
    fitted, held_out = prompts[:half], prompts[half:]
    mediators = Mediators.of(model, fitted, over)
    groups = mediators.grid.groups
    carried = np.log1p(mediators.indirect()).mean(1)  # nats, as the bias is counted
    null, set_ = mediators.scores()
    order = np.argsort(-np.sign((set_ - null).mean()) * carried, kind="stable")
    test = Mediators.of(model, held_out, [])
    sizes = list(dict.fromkeys(min(s, len(groups)) for s in sizes))
    rng = np.random.default_rng(seed)

    def measured(chosen: Sequence[int]) -> tuple[np.ndarray, float]:
        pause()
        edits = fit_edits(mediators, [site for i in chosen for site in groups[i]])
        return _bias(test, edits), perplexity(model, texts, edits)

    before, price = measured([])
    rows = [measured(order[:size].tolist()) for size in sizes]
    chance = [[measured(rng.permutation(len(groups))[:size].tolist()) for _ in range(draws)] for size in sizes]
    bias, cost = np.stack([b for b, _ in rows]), np.array([p for _, p in rows])
    low, high = interval(bias.T, seed)
    before_low, before_high = interval(before, seed)
    columns = {
        "bias": bias.mean(1), "low": low, "high": high, "kept": bias.mean(1) / before.mean(),
        "perplexity": cost, "price": cost / price - 1,
        "random_bias": np.array([np.mean([b.mean() for b, _ in row]) for row in chance]),
        "random_perplexity": np.array([np.mean([p for _, p in row]) for row in chance]),
    }  # fmt: skip
    scalars = {
        "bias_before": before.mean(), "bias_before_low": before_low, "bias_before_high": before_high,
        "perplexity_before": price,
    }  # fmt: skip
    names = [mediators.grid.names[i] for i in order]
    data = xr.Dataset(
        {name: ("size", value) for name, value in columns.items()} | scalars,
        {"size": sizes, "mediators": ("rank", names)},
    ).assign(totals(*test.scores(), seed))
    return Result(data, kind="mitigation", title=f"What is left of {prompts.name}, and its price")


def mitigating_edits(model: Model, prompts: Prompts, sites: Sequence[str | Site]) -> list[Edit]:
    """The edits themselves, fitted on `prompts`: give them to `model.run` or `model.generate`."""
    mediators = Mediators.of(model, prompts, list(sites))
    return fit_edits(mediators, mediators.grid.sites)


def fit_edits(mediators: Mediators, sites: Sequence[Site]) -> list[Edit]:
    """One edit per site: its mean over both sides of the pairs, at every position."""
    made: list[Edit] = []
    for site in sites:
        seen = [values[real] for values, real in (run.everywhere(site) for run in (mediators.null, mediators.set_))]
        made.append(Replace(site, function=_constant(torch.cat(seen).mean(0))))
    return made


def _constant(mean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: mean.to(x).expand_as(x)


def perplexity(model: Model, texts: Sequence[str], edits: Sequence[Edit] = ()) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token after the first of each text."""
    total, count = 0.0, 0
    for text in texts:
        inputs: Inputs = model.inputs(text)
        ids = inputs.stream("").ids
        with torch.no_grad():
            log_p = model.run(inputs, edits=edits).logits[:, :-1].float().log_softmax(-1)
        total -= float(log_p.gather(2, ids[:, 1:, None].to(log_p.device)).sum())
        count += ids.shape[1] - 1
    if count < 1:
        raise InputError(
            "perplexity needs texts of at least two tokens: give some that have nothing to do with the bias"
        )
    return float(np.exp(total / count))


def _bias(test: Mediators, edits: Sequence[Edit]) -> np.ndarray:
    """[pair] log y of the corrupted side minus that of the clean side, under edits."""
    asked, model = test.asked, test.model
    with torch.no_grad():
        null, set_ = (asked.score(model, model.run(side, edits=edits)) for side in asked.sides(denoise=False))
    return set_ - null
