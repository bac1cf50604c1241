"""What did the training, or the adapter, change? Two models of one shape side by side, site by site.

At each site the two values a (base) and b (model), of the same prompt at the same place, are compared, and exchanged
(Prakash et al. 2024, cross-model activation patching):

    distance = |b - a| / |a|        cosine = a b / |a| |b|            over all real tokens of a prompt
    effect   = m(base with b there) - m(base)            share         = effect / (m(model) - m(base))
    without  = m(model with a there) - m(model)

The effect says where what was learnt is enough alone, `without` where the model cannot do without it. The control puts
random changes of the same norm at the same tokens into the base: how much the metric moves by any change as large.
Distance alone says little: values that differ much may not be read.

By default the metric is KL(model || .), in nats, of the next token: an effect below 0 brings the base nearer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Metrics, ask
from pellucid.causal.grid import Grid, Over, described, effects
from pellucid.changed import AdaptersOff
from pellucid.engine.edits import Swap, left_aligned, swaps
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.metrics import kl_divergence
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def model_difference(
    model: Model,
    prompts: Any,
    base: Model | None = None,
    *,
    over: Over = "layers.*",
    metric: Metrics | Any = None,
    decoder: Any = None,
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """Compare a model with the one it came from, over the sites that `over` names (as in `pellucid.causal.patching`).

    `base` is another model of the same shape and tokens (before fine-tuning); by default the model itself with its
    adapters off. Gives over the selectors of `over` `distance`, `cosine`, `effect` and `share` with their intervals over
    prompts, `without`, and `control`, the mean size of the effect of `draws` random changes of the same norm; `value`, the
    metric of the base with each site; `corrupted`, of the base, and `clean`, of the model; `divergence` [prompt],
    KL(model || base) of the token predicted next, in nats.
    InputError for models that do not fit one another, or where they answer alike, so that there is nothing to explain.

    >>> model_difference(tuned, prompts, model)
    LlamaForCausalLM against LlamaForCausalLM: layers.*
    model_difference: effect, low, high, ... over layer 10, prompt 4...
    """
    base = model.changed(AdaptersOff()) if base is None else base
    _check(model, base)
    inputs = ask(model, prompts, metric if metric is not None else _any, decoder=decoder, several=True).inputs
    grid = Grid.of(model, over, inputs)
    with torch.no_grad():
        ours, theirs = (each.run(inputs, keep=grid.whole()) for each in (model, base))
    logits = _last(ours)
    divergence = kl_divergence(logits).bind(None, len(inputs)).score(_last(theirs)).detach().cpu().numpy()
    if metric is None:
        metric = kl_divergence(logits)
        inputs = model.inputs(inputs)
    asked, of_base = (ask(each, prompts, metric, decoder=decoder, several=True) for each in (model, base))
    values, unchanged = grid.sweep(base, inputs, lambda sites: swaps(sites, ours), of_base.metric)
    reverse, native = grid.sweep(model, inputs, lambda sites: swaps(sites, theirs), asked.metric)
    if np.abs(native - unchanged).max() <= 1e-7 * max(1.0, float(np.abs(native).max())) and not divergence.any():
        raise InputError(f"{model.name} and {base.name} give the same answers here: there is no difference to explain")
    data = effects(grid, asked, values, unchanged, native, seed, denoise=True)
    axis = ("metric",) if asked.names else ()
    moved = []
    for d in range(draws):
        put = partial(_random, ours=ours, theirs=theirs, seed=seed + d)
        moved.append(np.abs(grid.sweep(base, inputs, put, of_base.metric)[0] - unchanged))
    columns = {"without": np.moveaxis(reverse - native, 0, 1).mean(0), "control": np.mean(moved, 0).mean(1)}
    data = data.assign(grid.data(columns, *axis).data_vars)
    apart = np.array([[_apart(site, ours, theirs) for site in group] for group in grid.groups], dtype=object)
    pairs = np.array(
        [np.sum([np.array(part) for part in group], 0) for group in apart], dtype=float
    )  # [cell, 3, prompt]
    change, dot, size, other = np.moveaxis(pairs, 1, 0)
    distance = np.sqrt(change / np.maximum(size, 1e-30)).T
    cosine = (dot / np.maximum(np.sqrt(size * other), 1e-30)).T
    data = data.assign(grid.data(described("distance", distance, seed, "distance_")).data_vars)
    data = data.assign(grid.data({"cosine": cosine.mean(0)}).data_vars)
    data = data.assign(divergence=("prompt", divergence) if len(inputs) > 1 else float(divergence[0]))
    return Result(data, kind="model_difference", title=f"{model.name} against {base.name}: {grid.name}")


def _any(logits: Tensor) -> Tensor:
    """Stands for a metric while the prompts are read."""
    return logits.flatten(1).sum(1)


def _check(model: Model, base: Model) -> None:
    """InputError unless the two have the same stacks of the same sizes, and read tokens alike."""
    ours, theirs = (
        [(s.name, s.d_model, [sorted(b.sizes.items()) for b in s.blocks]) for s in each.anatomy.stacks]
        for each in (model, base)
    )
    if ours != theirs:
        raise InputError(
            f"{model.name} and {base.name} are not of one shape: compare models of the same stacks and sizes"
        )
    words = [each.tokenizer.get_vocab() for each in (model, base) if each.tokenizer is not None]
    if len(words) == 2 and words[0] != words[1]:
        raise InputError(f"{model.name} and {base.name} have different tokens: their positions do not correspond")


def _last(run: Run) -> Tensor:
    """[prompt, 1, output] what is said last: at each prompt's last real token, or of the whole text."""
    logits = run.logits.detach()
    if logits.ndim != 3:
        return logits[:, None]
    stream = run.inputs.stream("")
    last = (stream.starts + stream.lengths - 1).to(logits.device)
    return logits[torch.arange(len(logits), device=logits.device), last][:, None]


def _both(site: Site, ours: Run, theirs: Run) -> tuple[Tensor, Tensor, Tensor]:
    """What both met at a site's unit, [prompt, position, ...] with 0 at padding, and which positions are real."""
    b, mask = ours.everywhere(site)
    a, _ = theirs.everywhere(site)
    where = mask.to(a.device)
    if site.at is not None:
        chosen = torch.zeros_like(where)
        columns = ours.stream(site).find(site.at)
        if columns is not None:
            where = where & chosen.scatter(1, columns.to(chosen.device), True)
    keep = where.view(*where.shape, *[1] * (a.ndim - 2))
    return a.float() * keep, b.float() * keep, where


def _apart(site: Site, ours: Run, theirs: Run) -> np.ndarray:
    """[4, prompt]: |b - a|^2, a b, |a|^2 and |b|^2 over all real tokens."""
    a, b, _ = (x.flatten(1).double() for x in _both(site, ours, theirs))
    return np.stack([x.sum(1).cpu().numpy() for x in ((b - a) ** 2, a * b, a**2, b**2)])


def _random(sites: list[Site], ours: Run, theirs: Run, seed: int) -> list[Swap]:
    """Edits that move the base's values at each token as far as the model's are away, into a random direction."""
    made = []
    for i, site in enumerate(sites):
        a, b, mask = _both(site, ours, theirs)
        noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed * 1000 + i)).to(a)
        flat = noise.flatten(2)
        norm = (b - a).flatten(2).norm(dim=2, keepdim=True) / flat.norm(dim=2, keepdim=True).clamp_min(1e-30)
        new = a + (flat * norm).view_as(a)
        made.append(Swap(site, left_aligned(new, ours.inputs.stream(site.stack).mask.bool().to(mask.device))[0]))
    return made
