"""Where in the model is the difference between two prompts carried?

Two prompts differ in one fact. At one site, the values of one run are put into the run of the other, and the
answer is read: a site that brings the answer over carries the fact there (Vig et al. 2020; Meng et al. 2022;
Wang et al. 2022).

    effect = (m(patched) - m(corrupted)) / (m(clean) - m(corrupted))

`denoise` patches clean values into the corrupted run: 1 where a site alone is enough for the clean answer.
Without it corrupted values go into the clean run: 0 where the clean answer cannot do without the site. The
two disagree where there are backups (Heimersheim and Nanda 2024). Over several prompts the effect is the
ratio of means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.causal.contrast import check_aligned as check_aligned  # where others look for it
from pellucid.causal.contrast import sides, summary
from pellucid.causal.grid import Grid, Over, dataset, with_interval
from pellucid.engine.edits import Patch
from pellucid.engine.run import stream_of
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Provenance, Result


def patching(
    model: Model,
    clean: Any,
    corrupted: Any = None,
    *,
    over: Over = "layers.*.resid_pre@*",
    metric: Metric | Any = None,
    denoise: bool = True,
    target: Any = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:
    """Patch every site that `over` names, one at a time, from one prompt's run into the other's.

    `over` is a pattern; several; `layers.*` for whole layers; or names with patterns that are patched together.

    `clean` and `corrupted` are prompts, or lists of them, pair by pair of equal token length; or `clean` is a
    task (`pellucid.tasks.Prompts`), which brings both, the metric and its named spans. Gives over the
    selectors of `over` (layer x position, layer x head, ...) `effect` as above and, for several prompts, its
    95 % bootstrap interval `low` to `high` over prompts (1000 draws by `seed`); `value`, the metric of every
    prompt; `clean` and `corrupted`, the metric without patches, and `total_effect`, from clean to corrupted,
    with its interval. `checkpoint` is a file that keeps what is done, so that an interrupted sweep goes on there.
    InputError where pairs do not align, or the metric does not tell them apart.

    >>> patching(model, "... Rome", "... Paris", metric=logit_difference(" A", " B"))  # doctest: +SKIP
    """
    *pair, metric = sides(model, clean, corrupted, metric, target)
    base, source = reversed(pair) if denoise else pair
    metric = model.bind(metric, len(base))
    grid = Grid.of(model, over, base)
    with torch.no_grad():
        run = model.run(source, keep=grid.whole())
    other = model.score(run, metric).double().cpu()
    values, unpatched = grid.scores(model, base, lambda site: Patch(site, run), metric, progress, checkpoint)
    good, bad = (other, unpatched) if denoise else (unpatched, other)
    _check_apart(good, bad)

    def effect(weights: Tensor) -> Tensor:
        return (weights @ (values - bad).T) / (weights @ (good - bad))[:, None]

    variables = with_interval(grid, effect, len(base), seed)
    variables["value"] = ((*grid.dims, "prompt"), grid.place(values))
    variables |= summary(good.numpy(), bad.numpy(), seed)
    data = dataset(grid, variables, pair[0])
    tokens = [list(stream_of(each, grid.sites[0]).labels[0]) for each in pair]
    if "token" in grid.coords:
        data = data.assign_coords({"token": ("position", tokens[0])})
    if len(base) == 1:
        data.attrs["prompts"] = tokens  # what a view shows aligned
    provenance = Provenance(
        "patching", model.name, digest=model.digest, seed=seed,
        inputs={"clean": list(pair[0].texts), "corrupted": list(pair[1].texts)},
        arguments={"over": over, "metric": metric.name, "denoise": denoise, "target": target},
    )  # fmt: skip
    title = f"Patching {grid.name}: {'clean into corrupted' if denoise else 'corrupted into clean'}"
    return Result(data, kind="patching", title=title, provenance=provenance)


def _check_apart(good: Tensor, bad: Tensor) -> None:
    gap = float((good.mean() - bad.mean()).abs())
    if gap <= 1e-6 * max(1.0, float(good.abs().max())):
        raise InputError(
            f"the metric is {float(good.mean()):.4g} on the clean prompts and {float(bad.mean()):.4g} on "
            "the corrupted ones: "
            "it does not tell them apart, so no effect can be measured"
        )
