"""What does the model lose without this part?

Each site a pattern names is removed alone, and the answer is read again:

    effect = m(ablated) - m(intact)

Negative where the part helped. `how` says what removed means: zero is simple but takes the model where it has
never been; the mean over a reference keeps what is always there; resampling puts in another prompt's value
(Chan et al. 2022). What later parts make up for does not show. The total effect is that of removing all the
sites at once, each as it would be alone: of an intact reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import summary
from pellucid.causal.grid import Grid, Over, dataset, with_interval
from pellucid.engine.edits import Ablate, How
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks import Prompts


def ablation(
    model: Model,
    prompts: Any,
    *,
    over: Over = "layers.*.attn.heads.*",
    how: How = "zero",
    reference: Any = None,
    metric: Metric | Any = None,
    target: Any = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """Remove every site that `over` names, one at a time; `how` and `reference` are those of
    `pellucid.Ablate`.

    `over` is a pattern; several; `layers.*` for whole layers; or names with patterns that are removed together.
    (Edges are ablated by `edge_ablation`.)

    `prompts` is a prompt, a list of them, or a task (`pellucid.tasks.Prompts`: its clean prompts, with their
    metric and spans). `reference` is prompts, or a run that kept the sites; by default the prompts
    themselves. Gives over the selectors of `over` `effect`, the mean change of the metric and, for several
    prompts, its 95 % bootstrap interval `low` to `high` over prompts (1000 draws by `seed`, which also draws
    the resampled prompts); `value`, the metric of every prompt; `clean`, the metric of the intact model,
    `corrupted`, with all sites removed, and `total_effect`, from one to the other, with its interval.
    `checkpoint` is a file that keeps what is done, so that an interrupted sweep goes on there.

    >>> ablation(model, "The capital of France is", metric=logit(" Paris")).top(3)  # doctest: +SKIP
    """
    spans = None
    if isinstance(prompts, Prompts):
        metric = prompts.metric() if metric is None else metric
        prompts, spans = prompts.clean, prompts.spans
    if metric is None:
        raise InputError("ablation needs a metric, such as metric=pellucid.metrics.logit(' Paris')")
    inputs = model.inputs(prompts, decoder=target, spans=spans)
    bound = model.bind(metric, len(inputs))
    grid = Grid.of(model, over, inputs)
    named = reference if isinstance(reference, str | list | tuple) else None
    removing = partial(removal, how, seed, intact(model, inputs, how, reference, grid.whole()), reference is None)
    values, clean = grid.scores(model, inputs, removing, bound, progress, checkpoint)
    with torch.no_grad():
        everything = [removing(site) for site in dict.fromkeys(grid.sites)]
        corrupted = model.score(model.run(inputs, edits=everything), bound).double().cpu()

    def effect(weights: Tensor) -> Tensor:
        return weights @ (values - clean).T

    variables = with_interval(grid, effect, len(inputs), seed)
    variables["value"] = ((*grid.dims, "prompt"), grid.place(values))
    variables |= summary(clean.numpy(), corrupted.numpy(), seed)
    provenance = Provenance(
        "ablation", model.name, digest=model.digest, seed=seed, inputs=list(inputs.texts),
        arguments={"over": over, "how": how, "reference": named, "metric": bound.name, "target": target},
    )  # fmt: skip
    data = dataset(grid, variables, inputs)
    return Result(data, kind="ablation", title=f"Ablating {grid.name} by {how}", provenance=provenance)


class Another(Ablate):
    """Resampled from an intact run of the very prompts: never a prompt's own value."""

    def _draw(self, pool: int, batch: int) -> Tensor:
        return Ablate(self.site, "resample", seed=self.seed)._draw(pool, batch)


def removal(how: How, seed: int, reference: Any, own: bool, site: Site) -> Ablate:
    """The edit that removes a site; `own` says that the reference are the prompts themselves."""
    return (Another if own and how == "resample" else Ablate)(site, how, reference, seed)


def intact(model: Model, inputs: Inputs, how: How, reference: Any, sites: Sequence[Site]) -> Any:
    """What is put in place of the sites is taken from: a run of the reference, or of the prompts themselves."""
    if how == "zero" or hasattr(reference, "everywhere"):
        return reference
    prompts = inputs if reference is None else list(reference) if isinstance(reference, tuple) else reference
    with torch.no_grad():
        return model.run(prompts, keep=sites)
