"""Where in the model is the difference between two prompts carried?

Two prompts differ in one fact. At one site, the values of one run are put into the run of the other, and the
answer is read: a site that brings the answer over carries the fact there (Vig et al. 2020; Meng et al. 2022;
Wang et al. 2022).

    effect = m(patched) - m(unpatched)        share = effect / (m(source run) - m(unpatched))

`denoise` patches clean values into the corrupted run: a share of 1 where a site alone is enough for the clean answer.
Without it corrupted values go into the clean run: a share of 1 where the clean answer cannot do without the site. The
two disagree where there are backups (Heimersheim and Nanda 2024). Over several prompts the share is the ratio of means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pellucid.causal.contrast import Metrics, contrast
from pellucid.causal.grid import Grid, Over, effects
from pellucid.engine.edits import swaps
from pellucid.engine.run import stream_of
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def patching(
    model: Model,
    clean: Any,
    corrupted: Any = None,
    *,
    over: Over = "layers.*.resid_pre@*",
    metric: Metrics | Any = None,
    denoise: bool = True,
    decoder: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Patch every site that `over` names, one at a time, from one prompt's run into the other's.

    `over` is a pattern; several; `layers.*` for whole layers; or names with patterns that are patched together (see
    `pellucid.causal.grid`). `metric` may be several, a mapping by name: they share one sweep, and results gain `metric`.

    `clean` and `corrupted` are prompts, or lists of them, pair by pair of equal token length; or `clean` is a
    task (`pellucid.tasks.Prompts`), which brings both, the metric and its named spans. Gives over the
    selectors of `over` (layer x position, layer x head, ...) `effect` and `share` as above and, for several prompts,
    their 95 % intervals over prompts (`low` to `high`, `share_low` to `share_high`) and `p`, of a sign-flip test
    corrected for the number of cells; `value`, the metric of every prompt; `clean` and `corrupted`, the metric without
    patches, and `total_effect`, from the run that is patched to the one values come from, with its interval.
    `checkpoint` is a file that keeps what is done, so that an interrupted sweep goes on there.
    InputError where pairs do not align, or a metric does not tell them apart.

    >>> answers = pl.metrics.logit_difference(" Paris", " Rome")
    >>> patching(model, "The capital of France is", "The capital of Italy is", metric=answers)
    Patching layers.*.resid_pre@*: clean into corrupted
    patching: effect, share, value, clean, corrupted, total_effect over layer 10, position 5...
    """
    asked = contrast(model, clean, corrupted, metric, decoder)
    base, source = asked.sides(denoise)
    grid = Grid.of(model, over, base)
    with torch.no_grad():
        run = model.run(source, keep=grid.whole())
    values, unpatched = grid.sweep(model, base, lambda sites: swaps(sites, run), asked.metric, checkpoint)
    patched_from = asked.score(model, run)
    _check_apart(patched_from, unpatched, asked.names or (asked.metric.name,))
    data = effects(grid, asked, values, unpatched, patched_from, seed, denoise=denoise)
    tokens = [list(stream_of(each, grid.sites[0]).labels[0]) for each in asked.sides(denoise=False)]
    if "token" in grid.coords:
        data = data.assign_coords({"token": ("position", tokens[0])})
    if len(base) == 1:
        data.attrs["prompts"] = tokens  # what a view shows aligned
    title = f"Patching {grid.name}: {'clean into corrupted' if denoise else 'corrupted into clean'}"
    return Result(data, kind="patching", title=title)


def _check_apart(source: np.ndarray, base: np.ndarray, names: tuple[str, ...]) -> None:
    for name, theirs, ours in zip(names, source.T.reshape(len(names), -1), base.T.reshape(len(names), -1), strict=True):
        if abs(theirs.mean() - ours.mean()) <= 1e-6 * max(1.0, float(np.abs(theirs).max())):
            raise InputError(
                f"{name} is {theirs.mean():.4g} on the prompts that are patched from and {ours.mean():.4g} on those that "
                "are patched: it does not tell them apart, so there is nothing to bring over"
            )
