"""How many of the attended tokens must be taken away before the decision changes?

Serrano and Smith (2019), "Is Attention Interpretable?": attention weights are set to zero one after the other, highest
first, and the rest of each row is scaled up again, until the decision flips. If attention says what matters, its order
should need few tokens: fewer than a random order, and no more than the order of the gradients.

    fraction[order] = tokens zeroed at the first flip / tokens that could be        (1 where it never flips)

Their model has one attention layer. Here a token is zeroed as a key, in every row and head of `layers` (all by
default), and is ranked by

    attention    mean over layers and heads of what it gets from the rows the output reads (`comparing.rows_read`)
    gradient     sum of dy/dA over its column, y the predicted class's logit, or the token's
    product      sum of A * dy/dA over its column
    random       the mean of `draws` random orders

Special tokens are tokens too (much attention goes there) unless `keep_special`. At least one token is left; a row
whose visible keys are all gone passes nothing on. Attention that was never seen in training is out of its
distribution, for every order alike: read the orders against each other, not the fractions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import choose
from pellucid.attention.comparing import last_residual, rows_read
from pellucid.attention.patterns import asked, attended, single, special
from pellucid.corpus import read_each
from pellucid.engine.edits import Edit, Replace
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

ORDERS = ("attention", "gradient", "product", "random")


@technique
def attention_erasure(
    model: Model, prompts: Sequence[Any] | str, *, layers: int | str = "*", points: int = 32, draws: int = 3,
    keep_special: bool = False, edits: Sequence[Edit] = (), seed: int = 0,
) -> Result:  # fmt: skip
    """The fraction of keys to zero before the decision flips, by order, for each prompt of a one-stack model.

    Up to `points` numbers of tokens are tried, evenly spaced from 1 to all but one; all of them go through the planner.
    Gives `fraction` [order] with its interval over prompts `low`, `high`, `by_prompt` [order, prompt], `never` [order],
    the share of prompts that never flip, and `margin` [order, prompt, point], the probability of the decision minus
    that of its strongest rival. InputError for a prompt with fewer than two tokens to choose from.

    >>> attention_erasure(classifier, ["A dull and lifeless film."]).fraction
    <xarray.DataArray 'fraction' (order: 4)>...
    """
    texts = read_each(model, prompts)
    if points < 1 or draws < 1:
        raise InputError(f"points={points}, draws={draws}: expected at least 1 of each")
    if len(model.anatomy.stacks) > 1:
        raise InputError("erasure is for models of one stack: this one has several")
    rng = np.random.default_rng(seed)
    margins = np.full((len(ORDERS), len(texts), points), np.nan)
    fractions = np.full((len(ORDERS), len(texts)), np.nan)
    never = np.zeros((len(ORDERS), len(texts)))
    for b, text in enumerate(texts):
        inputs = single(model, text)
        ranked, usable = rankings(model, inputs, layers, keep_special, edits)
        if len(usable) < 2:
            raise InputError(f"prompt {b} has {len(usable)} tokens that could be zeroed: expected at least 2")
        counts = np.unique(np.linspace(1, len(usable) - 1, min(points, len(usable) - 1)).round().astype(int))
        orders = [usable[np.argsort(-ranked[name][usable], kind="stable")] for name in ORDERS[:-1]]
        orders += [rng.permutation(usable) for _ in range(draws)]
        found = _margins(model, inputs, layers, orders, counts, edits)
        flips = found < 0
        flipped: np.ndarray = np.asarray(flips.any(1))
        fraction = np.where(flipped, counts[flips.argmax(1)] / len(usable), 1.0)
        own = len(ORDERS) - 1
        fractions[:, b] = [*fraction[:own], fraction[own:].mean()]
        never[:, b] = [*~flipped[:own], 1 - flipped[own:].mean()]
        margins[:, b, : len(counts)] = [*found[:own], found[own:].mean(0)]
    intervals = np.array([interval(row, seed) for row in fractions])
    data = xr.Dataset(
        {
            "fraction": ("order", fractions.mean(1)), "low": ("order", intervals[:, 0]), "high": ("order", intervals[:, 1]),
            "never": ("order", never.mean(1)), "by_prompt": (("order", "prompt"), fractions),
            "margin": (("order", "prompt", "point"), margins),
        },
        {"order": list(ORDERS)},
    )  # fmt: skip
    return Result(data, kind="attention erasure", title="Tokens to zero before the decision flips")


def rankings(
    model: Model, inputs: Inputs, layers: int | str = "*", keep_special: bool = False, edits: Sequence[Edit] = ()
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """How much each key matters by attention, gradient and product, [key] each; and the keys that may be zeroed."""
    last = last_residual(model)
    found = attended(model, inputs, edits, grad_of=asked(model, inputs).metric, keep=[last] if last else [])
    kind, read = found.main, rows_read(model, found.run)
    rows = [kind.layers.index(i) for i in choose(layers, max(kind.layers) + 1, "layer", "layers") if i in kind.layers]
    pairs = [(found.values[kind][r].double(), found.gradients[kind][r].double()) for r in rows]
    ranked = {
        "attention": sum(torch.einsum("q,hqk->k", read.double(), a) / len(a) for a, _ in pairs),
        "gradient": sum(g.sum((0, 1)) for _, g in pairs),
        "product": sum((a * g).sum((0, 1)) for a, g in pairs),
    }
    marks = special(model, inputs.stream(""))
    usable = np.flatnonzero(~marks) if keep_special else np.arange(len(marks))
    return {name: x.numpy() for name, x in ranked.items() if isinstance(x, Tensor)}, usable


def _margins(
    model: Model,
    inputs: Inputs,
    layers: int | str,
    orders: Sequence[np.ndarray],
    counts: np.ndarray,
    edits: Sequence[Edit] = (),
) -> np.ndarray:
    """[order, count] the probability of the decision minus its strongest rival's, with so many keys zeroed."""
    site = f"layers.{layers}.attn.pattern"
    variants = [[*edits, Replace(site, without(order[:n]))] for order in orders for n in counts]
    sweep = model.sweep(inputs, variants, decision(model, inputs, edits))
    return np.asarray(sweep.values)[:, 0].reshape(len(orders), len(counts))


def without(keys: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Patterns [batch, query, head, key] with some keys zeroed and every row scaled to what it summed to."""
    gone = torch.as_tensor(np.asarray(keys).copy())

    def function(x: Tensor) -> Tensor:
        left = x.index_fill(-1, gone.to(x.device), 0.0)
        total = left.sum(-1, keepdim=True)
        return left * torch.where(total > 0, x.sum(-1, keepdim=True) / total.clamp_min(1e-30), torch.zeros_like(total))

    return function


def decision(model: Model, inputs: Inputs, edits: Sequence[Edit] = ()) -> BoundMetric:
    """The probability of the model's decision on this prompt minus the strongest rival's: negative once it flips."""
    question = asked(model, inputs)
    with torch.no_grad():
        answer = question.distribution(model.run(inputs, edits=edits)).argmax(-1)[..., None]

    def margin(z: Tensor) -> Tensor:
        p = question.probabilities(z)
        own = answer.to(p.device).expand(*p.shape[:-1], 1)
        lead = p.gather(-1, own)[..., 0] - p.scatter(-1, own, -1.0).amax(-1)
        return lead if lead.ndim == 1 else lead.flatten(1).amin(1)  # of several decisions the first that flips

    return question.whole("margin", margin)
