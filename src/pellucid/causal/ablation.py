"""What does the model lose without this part?

Each site a pattern names is removed alone, and the answer is read again:

    effect = m(ablated) - m(intact)

Negative where the part helped. `how` says what removed means: zero is simple but takes the model where it has
never been; the mean over a reference keeps what is always there; resampling puts in another prompt's value
(Chan et al. 2022). What later parts make up for does not show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.causal.grid import Grid, dataset, with_interval
from pellucid.engine.edits import Ablate, How
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks import Prompts


def ablation(
    model: Model,
    prompts: Any,
    *,
    over: str = "layers.*.attn.heads.*",
    how: How = "zero",
    reference: Any = None,
    metric: Metric | Any = None,
    target: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Remove every site that `over` names, one at a time; `how` and `reference` are those of
    `pellucid.Ablate`.

    `prompts` is a prompt, a list of them, or a task (`pellucid.tasks.Prompts`: its clean prompts, with their
    metric and spans). `reference` is prompts, or a run that kept the sites; by default the prompts
    themselves. Gives over the selectors of `over` `effect`, the mean change of the metric and, for several
    prompts, its 95 % bootstrap interval `low` to `high` over prompts (1000 draws by `seed`, which also draws
    the resampled prompts); `value`, the metric of every prompt; `clean`, the metric of the intact model.

    >>> ablation(model, "The capital of France is", metric=logit(" Paris")).top(3)  # doctest: +SKIP
    """
    spans = None
    if isinstance(prompts, Prompts):
        metric = prompts.metric() if metric is None else metric
        prompts, spans = prompts.clean, prompts.spans
    if metric is None:
        raise InputError("ablation needs a metric, such as metric=pellucid.metrics.logit(' Paris')")
    inputs = model.inputs(prompts, target=target, spans=spans)
    bound = model.bind(metric, len(inputs))
    grid = Grid.of(model, over, inputs)
    named = reference if isinstance(reference, str | list | tuple) else None
    if named is not None:  # run once for all sites
        with torch.no_grad():
            reference = model.run(list(named) if isinstance(named, tuple) else named, keep=grid.whole())
    values, clean = grid.scores(model, inputs, lambda site: Ablate(site, how, reference, seed), bound, progress)

    def effect(weights: Tensor) -> Tensor:
        return weights @ (values - clean).T

    variables = with_interval(grid, effect, len(inputs), seed)
    variables["value"] = ((*grid.dims, "prompt"), grid.place(values))
    variables["clean"] = (("prompt",), clean.numpy())
    provenance = Provenance(
        "ablation", model.name, digest=model.digest, seed=seed, inputs=list(inputs.texts),
        arguments={"over": over, "how": how, "reference": named, "metric": bound.name, "target": target},
    )  # fmt: skip
    data = dataset(grid, variables, inputs)
    return Result(data, kind="ablation", title=f"Ablating {over} by {how}", provenance=provenance)
