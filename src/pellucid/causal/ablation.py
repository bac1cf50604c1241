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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Metrics, ask
from pellucid.causal.grid import Grid, Over, effects
from pellucid.engine.edits import Ablate, How
from pellucid.engine.inputs import Inputs
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def ablation(
    model: Model,
    prompts: Any,
    *,
    over: Over = "layers.*.attn.heads.*",
    how: How = "zero",
    reference: Any = None,
    metric: Metrics | Any = None,
    decoder: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Remove every site that `over` names, one at a time; `how` and `reference` are those of
    `pellucid.Ablate`.

    `over` is a pattern; several; `layers.*` for whole layers; or names with patterns that are removed together.
    (Edges are ablated by `edge_ablation`.) `metric` may be several, a mapping by name, that share one sweep.

    `prompts` is a prompt, a list of them, or a task (`pellucid.tasks.Prompts`: its clean prompts, with their
    metric and spans). `reference` is prompts, or a run that kept the sites; by default the prompts
    themselves. Gives over the selectors of `over` `effect`, the mean change of the metric and, for several
    prompts, its 95 % interval `low` to `high` over prompts and `p`, of a sign-flip test corrected for the number of
    cells (`seed` draws for both, and the resampled prompts); `value`, the metric of every prompt; `clean`, the metric
    of the intact model, `corrupted`, with all sites removed, and `total_effect`, from one to the other.
    `checkpoint` is a file that keeps what is done, so that an interrupted sweep goes on there.

    >>> ablation(model, "The capital of France is", metric=pl.metrics.logit(" Paris")).top(3)
    layer head effect value clean corrupted total_effect
    ...
    """
    asked = ask(model, prompts, metric, decoder=decoder, several=True)
    inputs = asked.inputs
    grid = Grid.of(model, over, inputs)
    removing = Removing.of(model, inputs, how, reference, grid.whole(), seed)
    values, intact = grid.sweep(model, inputs, removing.edits, asked.metric, checkpoint)
    with torch.no_grad():
        without = asked.score(model, model.run(inputs, edits=removing.edits(grid.sites)))
    data = effects(grid, asked, values, intact, without, seed, share=False)
    return Result(data, kind="ablation", title=f"Ablating {grid.name} by {how}")


class Another(Ablate):
    """Resampled from an intact run of the very prompts: never a prompt's own value."""

    def _draw(self, pool: int, batch: int) -> Tensor:
        return Ablate(self.site, "resample", seed=self.seed)._draw(pool, batch)


class Removing:
    """Takes sites out, each of an intact run: of the reference, or of the prompts themselves."""

    def __init__(self, how: How, reference: Any, own: bool, seed: int) -> None:
        self.how, self.reference, self.seed = how, reference, seed
        self.kind = Another if own and how == "resample" else Ablate

    @classmethod
    def of(cls, model: Model, inputs: Inputs, how: How, reference: Any, sites: Sequence[Site], seed: int) -> Removing:
        own = reference is None
        if how != "zero" and not hasattr(reference, "everywhere"):
            prompts = inputs if own else list(reference) if isinstance(reference, tuple) else reference
            with torch.no_grad():
                reference = model.run(prompts, keep=sites)
        return cls(how, reference, own, seed)

    def edits(self, sites: Sequence[Site]) -> list[Ablate]:
        return [self.kind(site, self.how, self.reference, self.seed) for site in dict.fromkeys(sites)]
