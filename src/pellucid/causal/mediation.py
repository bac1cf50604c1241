"""Through which parts does a word in the prompt act on the answer?

Causal mediation analysis (Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis").
With u a prompt ("The nurse said that"), set its intervention ("The man said that") and y the odds of the answer that goes
against the stereotype,

    y = p(" he" | u) / p(" she" | u)

    total effect              TE     = y[set] / y[null] - 1
    natural indirect effect   NIE(z) = y[null, z as under set] / y[null] - 1       the part that goes through z
    natural direct effect     NDE(z) = y[set, z as under null] / y[null] - 1       the part that does not

for a mediator z: a neuron, a head, a layer, or a set of them. Effects are means over prompts, with their intervals. As
odds are ratios, NIE and NDE need not add up to TE. What the paper does with profession lists works with any
`tasks.Prompts`: clean is u, corrupted its intervention, `wrong` the answer whose odds are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Asked, beside, contrast, numbers
from pellucid.causal.grid import Grid, Over, described, over_prompts, totals
from pellucid.engine.edits import swaps
from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.metrics import logit_difference
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks import Prompts
from pellucid.technique import technique


@technique
def mediation(
    model: Model,
    prompts: Prompts,
    *,
    over: Over = "layers.*.attn.heads.*",
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Result:
    """Natural indirect and direct effects of every mediator, and the total effect.

    `over` names mediators one by one (`layers.*.attn.heads.*`, `layers.*.mlp.neurons.*@profession`, `layers.*`), or maps
    names to patterns for sets that act together. Gives `nie` and `nde` with their intervals over prompts and sign-flip
    tests (`nie_low`, `nie_high`, `nie_p`) and those of every prompt (`nie_value`, `nde_value`), the same in nats of log odds (`log_nie`, `log_nde`: odds grow exponentially, so
    few prompts or parts can outweigh all others), `total_effect` with its own and per prompt (`total`), and `clean` and
    `corrupted`, log y under null and set. With `checkpoint`, a path, what is done is kept in two files that begin with it,
    and interrupted effects go on there.

    >>> mediation(model, pl.tasks.gendered_professions(model.tokenizer, 4))
    What mediates the effect of gendered_professions
    mediation: nie, nie_low, nie_high, nie_p, log_nie, nde, ...
    """
    mediators = Mediators.of(model, prompts, over)
    columns: dict[str, Any] = {}
    grid, each = mediators.grid, {}
    for name, measure in (("nie", mediators.indirect), ("nde", mediators.direct)):
        effect = measure(checkpoint=beside(checkpoint, name))
        columns |= described(name, effect.T, seed, f"{name}_", test=True)
        columns[f"log_{name}"] = np.log1p(effect).mean(1)
        each[f"{name}_value"] = ((*grid.dims, "prompt"), grid.place(effect))
    data = grid.data(columns).assign(each).assign(mediators.summary(seed))
    data = over_prompts(data, mediators.asked)
    return Result(data, kind="mediation", title=f"What mediates the effect of {prompts.name}")


@dataclass(frozen=True, eq=False)
class Mediators:
    """Prompts scored by log y, the runs mediators are taken from, and the grid of mediators."""

    model: Model
    asked: Asked
    grid: Grid
    null: Run
    set_: Run

    @classmethod
    def of(cls, model: Model, prompts: Prompts, over: Over) -> Mediators:
        if not isinstance(prompts, Prompts):
            raise InputError("mediation needs a task (pellucid.tasks.Prompts), whose prompts come in pairs")
        if not prompts.single_token:
            raise InputError(f"{prompts.name}: mediation needs answers of one token each")
        right = [[ids[0] for ids in each] for each in prompts.answer_ids]
        wrong = [[ids[0] for ids in each] for each in prompts.wrong_ids]
        asked = contrast(model, prompts, metric=logit_difference(wrong, right, position=prompts.place))
        grid = Grid.of(model, over, asked.inputs)
        with torch.no_grad():
            null, set_ = (model.run(side, keep=grid.whole()) for side in asked.sides(denoise=False))
        return cls(model, asked, grid, null, set_)

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """log y [prompt] under null and under set."""
        return self.asked.score(self.model, self.null), self.asked.score(self.model, self.set_)

    def indirect(
        self, sets: Sequence[Sequence[Site]] | None = None, checkpoint: str | Path | None = None
    ) -> np.ndarray:
        """NIE [mediator, prompt] of the mediators, or of other sets of their sites."""
        return self._effects(self.asked.inputs, sets, self.set_, checkpoint)

    def direct(self, checkpoint: str | Path | None = None) -> np.ndarray:
        """NDE [mediator, prompt]."""
        return self._effects(self.asked.sides(denoise=True)[0], None, self.null, checkpoint)

    def _effects(
        self, inputs: Inputs, sets: Sequence[Sequence[Site]] | None, source: Run, checkpoint: str | Path | None
    ) -> np.ndarray:
        edits = [swaps(sites, source) for sites in (self.grid.groups if sets is None else sets)]
        swept = self.model.sweep(inputs, edits, self.asked.metric, checkpoint=checkpoint)
        return ratio(numbers(swept.values), self.scores()[0])

    def summary(self, seed: int) -> dict[str, Any]:
        """Both sides in log y, and the total effect on the odds."""
        null, set_ = self.scores()
        sides = {name: totals(null, set_, seed)[name] for name in ("clean", "corrupted")}
        effect = ratio(set_, null)
        return sides | {"total": ("prompt", effect)} | described("total_effect", effect, seed, "total_")


def ratio(log_odds: np.ndarray, null: np.ndarray) -> np.ndarray:
    """y / y[null] - 1 from log odds [..., prompt] and [prompt]."""
    return np.expm1(log_odds - null)


# ---- how many matter


@technique
def concentration(result: Result, variable: str = "nie") -> Result:
    """How concentrated effects are: `held` [rank], the share of the sum of sizes that the strongest so many hold.

    With `half` (how many hold half of it), `effective` ((sum of sizes)^2 / sum of squares: how many equal ones would look
    alike) and `gini` (0: all alike, near 1: one holds all).
    """
    sizes = np.sort(np.abs(result[variable].values[~np.isnan(result[variable].values)]))[::-1]
    n, total = len(sizes), sizes.sum()
    if total == 0:
        raise InputError(f"all effects {variable!r} are 0, so nothing is concentrated")
    held = np.cumsum(sizes) / total
    scalars = {
        "half": int(np.searchsorted(held, 0.5)) + 1,
        "effective": total**2 / (sizes**2).sum(),
        "gini": float((n + 1 - 2 * np.cumsum(sizes[::-1]).sum() / total) / n),
    }
    data = xr.Dataset({"held": ("rank", held)} | scalars, {"rank": np.arange(1, n + 1)})
    return Result(data, kind="concentration", title=f"How few hold how much of {variable}")


@technique
def interaction(
    model: Model,
    prompts: Prompts,
    *,
    over: Over = "layers.*.attn.heads.*",
    k: int = 10,
    pool: int = 40,
    draws: int = 5,
    seed: int = 0,
) -> Result:
    """The joint NIE of growing sets [k]: chosen `greedy` (each step adds what raises the joint effect most), the `strongest` k by
    their single effects, and `random` (mean of `draws` sets), with `together`, the NIE of all. Beside `total_effect`.

    Greedy steps choose among the `pool` strongest single mediators. Where `greedy` grows faster than `summed` (the sum of those
    k single effects) mediators work together, where slower they share work. `chosen` names the greedy ones in order.
    """
    mediators = Mediators.of(model, prompts, over)
    names, sets = mediators.grid.names, mediators.grid.groups
    single = mediators.indirect().mean(1)
    null, set_ = mediators.scores()
    towards = float(np.sign(ratio(set_, null).mean())) or 1.0
    order = np.argsort(-towards * single, kind="stable")
    k, left = min(k, len(names)), order[:pool].tolist()
    chosen: list[int] = []
    greedy: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    for _ in range(min(k, len(left))):
        joint = mediators.indirect([_joined(sets, [*chosen, i]) for i in left])
        best = int(np.argmax(towards * joint.mean(1)))
        greedy.append(joint[best])
        chosen.append(left.pop(best))
    top = mediators.indirect([_joined(sets, order[: i + 1]) for i in range(len(chosen))])
    shuffled = [rng.permutation(len(names)) for _ in range(draws)]
    chance = mediators.indirect([_joined(sets, p[: i + 1]) for p in shuffled for i in range(len(chosen))])
    low, high = interval(np.stack(greedy, 1), seed)
    curves = {
        "greedy": np.mean(greedy, 1), "low": low, "high": high, "strongest": top.mean(1),
        "random": chance.mean(1).reshape(draws, -1).mean(0), "summed": np.cumsum(single[order])[: len(chosen)],
    }  # fmt: skip
    together = float(mediators.indirect([_joined(sets, range(len(sets)))]).mean())
    data = xr.Dataset({name: ("k", value) for name, value in curves.items()}, {"k": np.arange(1, len(chosen) + 1)})
    data = data.assign_coords(chosen=("k", [names[i] for i in chosen])).assign(
        together=together, **mediators.summary(seed)
    )
    return Result(data, kind="mediation sets", title="Joint indirect effects of growing sets")


def _joined(sets: Sequence[Sequence[Site]], which: Iterable[int]) -> list[Site]:
    return list(dict.fromkeys(site for i in which for site in sets[i]))
