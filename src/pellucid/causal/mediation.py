"""Through which parts does a word in the prompt act on the answer?

Causal mediation analysis (Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis").
With u a prompt ("The nurse said that"), set its intervention ("The man said that") and y the odds of the answer that goes
against the stereotype,

    y = p(" he" | u) / p(" she" | u)

    total effect              TE     = y[set] / y[null] - 1
    natural indirect effect   NIE(z) = y[null, z as under set] / y[null] - 1       the part that goes through z
    natural direct effect     NDE(z) = y[set, z as under null] / y[null] - 1       the part that does not

for a mediator z: a neuron, a head, a layer's output, or a set of them. Effects are means over prompts, with bootstrap
intervals. As odds are ratios, NIE and NDE need not add up to TE. What the paper does with profession lists works with any
`tasks.Prompts`: clean is u, corrupted its intervention, `wrong` the answer whose odds are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import (
    Contrast,
    beside,
    bootstrap,
    contrast,
    lay_out,
    numbers,
    one_by_one,
    provenance,
    swaps,
)
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.metrics import logit_difference
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks import Prompts

Over = str | Site | Iterable[str | Site] | Mapping[str, str | Iterable[str]]


def mediation(
    model: Model, prompts: Prompts, *, over: Over = "layers.*.attn.heads.*", seed: int = 0, progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Result:  # fmt: skip
    """Natural indirect and direct effects of every mediator, and the total effect.

    `over` names mediators one by one (`layers.*.attn.heads.*`, `layers.*.mlp.neurons.*@profession`, `layers.*.mlp.out`), or
    maps names to patterns for sets that act together. Gives `nie` and `nde` with their intervals over prompts, the same in
    nats of log odds (`log_nie`, `log_nde`: odds grow exponentially, so few prompts or parts can outweigh all others),
    `total_effect` with its own and per prompt (`total`), and `clean` and `corrupted`, log y under null and set. With
    `checkpoint`, a path, what is done is kept in two files that begin with it, and interrupted effects go on there.

    >>> mediation(model, pl.tasks.gendered_professions(model.tokenizer, 40))                         # doctest: +SKIP
    """
    mediators = Mediators.of(model, prompts, over)
    variables: dict[str, Any] = {}
    for name, measure in (("nie", mediators.indirect), ("nde", mediators.direct)):
        effect = measure(progress=progress, checkpoint=beside(checkpoint, name))
        low, high = bootstrap(effect.T, seed)
        variables |= {name: effect.mean(1), f"{name}_low": low, f"{name}_high": high}
        variables[f"log_{name}"] = np.log1p(effect).mean(1)
    data = mediators.laid_out(variables).assign(mediators.summary(seed))
    about = provenance(
        model, "mediation", mediators.pair.clean, seed, task=prompts.name, over=over,
        corrupted=list(mediators.pair.corrupted.texts),
    )  # fmt: skip
    return Result(data, kind="mediation", title=f"What mediates the effect of {prompts.name}", provenance=about)


@dataclass(frozen=True, eq=False)
class Mediators:
    """A contrast scored by log y, the runs mediators are taken from, and the mediators: named sets of sites."""

    pair: Contrast
    null: Run
    set_: Run
    sets: dict[str, list[Site]]
    single: bool

    @classmethod
    def of(cls, model: Model, prompts: Prompts, over: Over) -> Mediators:
        if not prompts.single_token:
            raise InputError(f"{prompts.name}: mediation needs answers of one token each")
        right = [[ids[0] for ids in each] for each in prompts.answer_ids]
        wrong = [[ids[0] for ids in each] for each in prompts.wrong_ids]
        odds = logit_difference(wrong, right, position=prompts.position)
        clean, corrupted = (model.inputs(side, spans=prompts.spans) for side in (prompts.clean, prompts.corrupted))
        pair = contrast(model, clean, corrupted, odds)
        if isinstance(over, Mapping):
            sets = {name: one_by_one(model, pair.clean, each) for name, each in over.items()}
        else:
            sets = {str(site): [site] for site in one_by_one(model, pair.clean, over)}
        keep = list(dict.fromkeys(site.whole for sites in sets.values() for site in sites))
        null, set_ = (pair.run(side, keep) for side in (clean, corrupted))
        return cls(pair, null, set_, sets, not isinstance(over, Mapping))

    def indirect(self, sets: Sequence[Sequence[Site]] | None = None, **options: Any) -> np.ndarray:
        """NIE [mediator, prompt] of the mediators, or of other sets of their sites; options of `sweep`."""
        return self._effects(self.pair.clean, sets, self.set_, options)

    def direct(self, **options: Any) -> np.ndarray:
        """NDE [mediator, prompt]."""
        return self._effects(self.pair.corrupted, None, self.null, options)

    def _effects(
        self, inputs: Any, sets: Sequence[Sequence[Site]] | None, source: Run, options: dict[str, Any]
    ) -> np.ndarray:
        chosen = list(self.sets.values()) if sets is None else sets
        model = self.pair.model
        edits = [swaps(model, sites, source) for sites in chosen]
        sweep = model.sweep(inputs, edits, self.pair.metric, **options)
        return ratio(sweep.values, self.pair.clean_scores)

    def laid_out(self, variables: Mapping[str, Any]) -> xr.Dataset:
        if self.single:
            return lay_out([sites[0] for sites in self.sets.values()], variables)
        return xr.Dataset({k: ("mediator", v) for k, v in variables.items()}, {"mediator": list(self.sets)})

    def summary(self, seed: int) -> dict[str, Any]:
        total = ratio(self.pair.corrupted_scores[None], self.pair.clean_scores)[0]
        low, high = bootstrap(total, seed)
        effect = {"total": ("prompt", total), "total_effect": total.mean(), "total_low": low, "total_high": high}
        return self.pair.summary(seed) | effect


def ratio(log_odds: Tensor, null: Tensor) -> np.ndarray:
    """y / y[null] - 1 from log odds [mediator, prompt] and [prompt]."""
    return np.expm1(numbers(log_odds) - numbers(null))


# ---- how many matter


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
    gini = float((n + 1 - 2 * np.cumsum(sizes[::-1]).sum() / total) / n)
    data = xr.Dataset(
        {"held": ("rank", held), "half": int(np.searchsorted(held, 0.5)) + 1, "effective": total**2 / (sizes**2).sum(),
         "gini": gini},
        {"rank": np.arange(1, n + 1)},
    )  # fmt: skip
    about = Provenance("concentration", result.provenance.model, digest=result.provenance.digest,
                       inputs=result.provenance.inputs, arguments={"variable": variable, "of": result.provenance.method})  # fmt: skip
    return Result(data, kind="concentration", title=f"How few hold how much of {variable}", provenance=about)


def interaction(
    model: Model, prompts: Prompts, *, over: Over = "layers.*.attn.heads.*", k: int = 10, pool: int = 40,
    draws: int = 5, seed: int = 0, progress: bool = True,
) -> Result:  # fmt: skip
    """The joint NIE of growing sets [k]: chosen `greedy` (each step adds what raises the joint effect most), the `strongest` k by
    their single effects, and `random` (mean of `draws` sets), with `together`, the NIE of all. Beside `total_effect`.

    Greedy steps choose among the `pool` strongest single mediators. Where `greedy` grows faster than `summed` (the sum of those
    k single effects) mediators work together, where slower they share work. `chosen` names the greedy ones in order.
    """
    mediators = Mediators.of(model, prompts, over)
    names, sets = list(mediators.sets), list(mediators.sets.values())
    single = mediators.indirect(progress=progress).mean(1)
    towards = float(np.sign(ratio(mediators.pair.corrupted_scores[None], mediators.pair.clean_scores).mean())) or 1.0
    order = np.argsort(-towards * single, kind="stable")
    k, left = min(k, len(names)), order[:pool].tolist()
    chosen: list[int] = []
    greedy: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    for _ in range(min(k, len(left))):
        joint = mediators.indirect([_joined(sets, [*chosen, i]) for i in left], progress=progress)
        best = int(np.argmax(towards * joint.mean(1)))
        greedy.append(joint[best])
        chosen.append(left.pop(best))
    top = mediators.indirect([_joined(sets, order[: i + 1]) for i in range(len(chosen))], progress=progress)
    shuffled = [rng.permutation(len(names)) for _ in range(draws)]
    chance = mediators.indirect(
        [_joined(sets, p[: i + 1]) for p in shuffled for i in range(len(chosen))], progress=progress
    )
    low, high = bootstrap(np.stack(greedy, 1), seed)
    curves = {
        "greedy": np.mean(greedy, 1), "low": low, "high": high, "strongest": top.mean(1),
        "random": chance.mean(1).reshape(draws, -1).mean(0), "summed": np.cumsum(single[order])[: len(chosen)],
    }  # fmt: skip
    together = float(mediators.indirect([_joined(sets, range(len(sets)))], progress=progress).mean())
    data = xr.Dataset({name: ("k", value) for name, value in curves.items()}, {"k": np.arange(1, len(chosen) + 1)})
    data = data.assign_coords(chosen=("k", [names[i] for i in chosen])).assign(
        together=together, **mediators.summary(seed)
    )
    about = provenance(
        model, "interaction", mediators.pair.clean, seed, task=prompts.name, over=over, k=k, pool=pool, draws=draws
    )
    return Result(data, kind="mediation sets", title="Joint indirect effects of growing sets", provenance=about)


def _joined(sets: Sequence[Sequence[Site]], which: Iterable[int]) -> list[Site]:
    return list(dict.fromkeys(site for i in which for site in sets[i]))
