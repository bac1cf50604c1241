"""What a tuned model does, and what its explanations say, on texts that it was not trained on; and one sentence about both.

swap_effect          mean |l(x) - l(x')|, nats: how far the answer's log odds go when words that must not matter are exchanged
gradient_share       what these words have of the squared gradient of l. After a penalty on gradients that is a training loss
                     and no evidence
plausibility         mean average precision of |gradient| for the tokens that people call reasons. Random scores have more than the
                     share of such tokens: theirs stands beside it
comprehensiveness    l(x) - l(x without the fifth of the tokens with the largest gradients), for the predicted answer; sufficiency
                     the same with these tokens alone. Both fall with the model's confidence: read them against those of as
                     many random tokens, and beside `confidence`, the mean |l|

Measuring saves and restores the random state, so training with it and without it ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.attribution.evaluation.data import average_precision
from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded
from pellucid.tuning.objective import NONE, Beside, Objective, Pass, generator, log_odds
from pellucid.tuning.reasons import Augment, Consistency, random_mask

BATCH = 32
TOP = 0.2  # of the tokens


@dataclass(eq=False)
class Measures:
    """Of one arm at one seed."""

    right: dict[str, np.ndarray] = field(default_factory=dict)
    loss: float = math.nan
    after: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    confidence: float = math.nan
    swap_effect: float = math.nan
    gradient_share: float = math.nan
    plausibility: float = math.nan
    plausibility_of_random: float = math.nan
    attention_plausibility: float = math.nan
    comprehensiveness: float = math.nan
    comprehensiveness_of_random: float = math.nan
    sufficiency: float = math.nan
    sufficiency_of_random: float = math.nan


def number_of(data: xr.Dataset, measure: str, arm: str = "objective") -> float:
    """What an objective measured of an arm, in the result of a fit; NaN where there is no such number."""
    known = arm in data["arm"] and measure in data["measure"]
    return float(data["measured"].sel(arm=arm, measure=measure)) if known else math.nan


NUMBERS = tuple(f.name for f in fields(Measures) if f.name not in ("right", "loss", "after", "own"))


def measured(
    model: Model, train: Encoded, splits: Mapping[str, Encoded], given: Sequence[Objective], own: Sequence[Objective], seed: int,
    beside: Beside = MappingProxyType({}),
) -> Measures:  # fmt: skip
    """Everything about one arm; `own` are the objectives it was trained with, which say what it is given and runs under,
    `beside` what was trained with it."""
    own = [each for each in own if each.weight > 0]
    made = Measures()
    with torch.random.fork_rng():
        made.loss = float(np.mean([x for b in shown(model, train, own, beside) for x in plain(model, b)[0]]))
        for name, split in splits.items():
            made.right[name] = np.concatenate([plain(model, b)[1] for b in shown(model, split, own, beside)])
        first = next(iter(splits.values()))
        made.after = term_values(model, first, given, own, seed, beside)
        for each in own:
            made.own |= each.numbers(model, train, first, seed)
        found: dict[str, list[float]] = {}
        for batch in shown(model, first, own, beside):
            for key, values in _explained(model, batch, first, given, seed).items():
                found.setdefault(key, []).extend(values)
    for key, values in found.items():
        setattr(made, key, float(np.nanmean(values)) if not np.isnan(values).all() else math.nan)
    return made


def term_values(
    model: Model, data: Encoded, given: Sequence[Objective], own: Sequence[Objective], seed: int,
    beside: Beside = MappingProxyType({}),
) -> dict[str, float]:  # fmt: skip
    """Each objective's own loss on some texts, unweighted; those whose spans or properties the texts have not, or whose tensors
    were not trained with this model, are left out."""
    found: dict[str, list[tuple[float, int]]] = {}
    for each in given:
        known = all(name in data.positions for name in each.spans)
        if not known or any(name not in data.data.properties for name in each.properties):
            continue
        if type(each).begun is not Objective.begun:  # it measures itself
            continue
        if each.name not in beside and each.beside(model, data, seed):
            continue
        for k, batch in enumerate(shown(model, data, own, beside)):
            with torch.enable_grad():
                seen = Pass(
                    model,
                    batch,
                    data,
                    keep=each.sites(model),
                    gradients=each.second_order,
                    create_graph=False,
                    beside=beside,
                )
                value = each.loss(seen, generator(seed, each.name, k))
            if value is not None:
                found.setdefault(each.name, []).append((float(value.detach()), len(batch)))
    return {name: float(np.average([v for v, _ in x], weights=[n for _, n in x])) for name, x in found.items()}


def _batches(data: Encoded) -> list[Batch]:
    return [data.batch(range(a, min(a + BATCH, len(data)))) for a in range(0, len(data), BATCH)]


def shown(
    model: Model, data: Encoded, own: Sequence[Objective] = (), beside: Beside = MappingProxyType({})
) -> Iterator[Batch]:
    """The rows in batches, as a model trained with these objectives is given them."""
    for batch in _batches(data):
        for each in own:
            with torch.no_grad():
                batch = each.shown(model, batch, data, None, beside.get(each.name, NONE))
        yield batch


@torch.no_grad()
def plain(model: Model, batch: Batch) -> tuple[list[float], np.ndarray]:
    """The loss of each answer, and for each text whether every answer is the likeliest."""
    z = batch.read(model.run(batch.inputs, edits=batch.edits).logits)
    y = batch.answers.to(z.device)
    wrong = batch.by_row((z.argmax(-1) != y).float())
    return torch.nn.functional.cross_entropy(z, y, reduction="none").tolist(), (wrong == 0).cpu().numpy().astype(float)


def _explained(
    model: Model, batch: Batch, data: Encoded, given: Sequence[Objective], seed: int
) -> dict[str, list[float]]:  # fmt: skip
    forbidden = [name for each in given for name in each.forbidden if name in batch.masks]
    reasons = list(dict.fromkeys([*(n for each in given for n in each.reasons), "rationale"]))
    reasons = [name for name in reasons if name in batch.masks]
    drawn = generator(seed, "measures", batch.rows[0])
    keep = [site for each in given for site in each.sites(model)]
    with torch.enable_grad():
        seen = Pass(model, batch, data, keep=keep, gradients=True, create_graph=False)
        sizes = seen.slopes.detach().square().sum(-1).cpu()[:, : batch.content.shape[1]]
    found: dict[str, list[float]] = {"confidence": seen.log_odds.detach().abs().tolist()}
    content = batch.content
    if forbidden:
        mask = torch.stack([batch.masks[name] for name in forbidden]).any(0)
        shared = (sizes * mask).sum(1) / (sizes * (content | mask)).sum(1).clamp_min(1e-30)
        found["gradient_share"] = _where(shared, mask.any(1))
        swap: Any = next((each for each in given if isinstance(each, Consistency | Augment)), None) or Consistency(
            forbidden[0]
        )
        if any(data.positions[swap.where]):
            with torch.no_grad():
                other = Pass(model, swap.exchanged(batch, data, batch.masks[swap.where], drawn), data)
                found["swap_effect"] = _where((seen.log_odds - other.log_odds).abs().detach().cpu(), mask.any(1))
    if reasons:
        mask = torch.stack([batch.masks[name] for name in reasons]).any(0)
        chance_scores = torch.rand(sizes.shape, generator=drawn)
        found["plausibility"] = [precision(s[c], m[c]) for s, m, c in zip(sizes, mask, content, strict=True)]
        found["plausibility_of_random"] = [
            precision(s[c], m[c]) for s, m, c in zip(chance_scores, mask, content, strict=True)
        ]
    for each in given:
        scores = each.attributed(seen)
        if scores is not None:
            mask = torch.stack([batch.masks[name] for name in each.reasons]).any(0)
            kept = scores.detach().float().cpu()
            found["attention_plausibility"] = [
                precision(s[c], m[c]) for s, m, c in zip(kept, mask, content, strict=True)
            ]
    fill = next(
        (
            i
            for role in ("mask", "unk", "pad", "eos")
            if (i := getattr(model.tokenizer, f"{role}_token_id", None)) is not None
        ),
        0,
    )
    count = (content.sum(1) * TOP).ceil().long()
    top = torch.zeros_like(content)
    for b, n in enumerate(count.tolist()):
        top[b, sizes[b].masked_fill(~content[b], -1).topk(n).indices] = True
    chance = random_mask(top, content, drawn)
    z = seen.logits.detach()
    y = z.argmax(-1)
    whole = batch.by_row(log_odds(z, y))
    for ending, mask in (("", top), ("_of_random", chance)):
        for name, gone in (("comprehensiveness", mask), ("sufficiency", content & ~mask)):
            with torch.no_grad():
                cut = batch.with_ids(torch.where(gone.to(batch.ids.device), fill, batch.ids))
                run = model.run(cut.inputs, edits=cut.edits)
                left = batch.by_row(log_odds(cut.read(run.logits), y))
            found[name + ending] = (whole - left).tolist()
    return found


def _where(values: Tensor, some: Tensor) -> list[float]:
    return torch.where(some, values, torch.nan).tolist()


def precision(scores: Tensor, positive: Tensor) -> float:
    """Average precision (equal scores together); NaN where none or all are positive.

    >>> precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    0.8333333333333333
    """
    if not bool(positive.any()) or bool(positive.all()):
        return math.nan
    return average_precision(scores.double().numpy(), positive.numpy())


def verdict(data: xr.Dataset, given: Sequence[Objective], texts: int) -> list[str]:
    """Sentences about a result, the one to be read first in front: read off behaviour, never off a penalty's value."""
    splits = data["split"].values.tolist()
    accuracy, plain = data["accuracy"], data["accuracy"].sel(arm="plain")
    if "objective" not in data["arm"]:
        return [f"Plain training: {', '.join(f'{s} {float(plain.sel(split=s)):.2f}' for s in splits)}"]
    far = splits[int(plain.values.argmin())] if len(splits) > 1 else splits[0]
    at = {a: float(accuracy.sel(arm=a, split=far)) for a in data["arm"].values.tolist()}
    error = math.sqrt(max(at["objective"] * (1 - at["objective"]), 0.04) / texts)
    cost = {a: float(data["cost"].sel(arm=a)) for a in at}
    dead = [a for a in at if bool(data["untrained"].sel(arm=a))]
    own = [s for each in given if each.weight > 0 for s in each.said(data, texts)]
    beside = f", control {at['control']:.2f}" if "control" in at else ""
    main = f"{far}: {at['plain']:.2f} -> {at['objective']:.2f}{beside}, at {cost['objective']:.1f} x the cost of plain training"
    said: list[str] = own
    if dead:
        rights = ", ".join(f"{a} (right on {at[a]:.2f})" for a in dead)
        said.append(
            f"untrained, so no point: the loss of {rights} on its training texts never left the constant prediction's"
        )
    if "objective" not in dead and not own:
        if "augmented" in at and "augmented" not in dead and at["augmented"] >= at["objective"] - error:
            said.append(
                f"exchanging the words in the texts does as well ({at['augmented']:.2f} at {cost['augmented']:.1f} x), so the penalty bought nothing more"
            )
        if (
            "control" in at
            and "control" not in dead
            and at["control"] >= at["objective"] - error
            and at["objective"] - at["plain"] > error
        ):
            said.append(f"the control does as well ({at['control']:.2f}): what the objective knows bought nothing")
        gap = float(accuracy.sel(arm="objective", split=splits[0])) - at["objective"]
        for name in data["term"].values.tolist() if "after" in data else []:
            mine, theirs = (float(data["after"].sel(arm=a, term=name)) for a in ("objective", "plain"))
            if len(splits) > 1 and mine < theirs / 5 and gap > 2 * error + 0.05:
                said.append(
                    f"{name} was met ({theirs:.2g} -> {mine:.2g}) and not un-taught: {gap:.2f} of accuracy still hang on it"
                )
        if abs(at["objective"] - at["plain"]) <= error:
            said.append("no accuracy was bought")
        for each, name in (("plausibility", "gradients"), ("attention_plausibility", "attention")):
            if each in data:
                before, after = (float(data[each].sel(arm=a)) for a in ("plain", "objective"))
                if after - before > 0.04:
                    said.append(f"bought: plausibility of {name}, {before:.2f} -> {after:.2f}")
    return [". ".join([*(s[0].upper() + s[1:] for s in said[:1]), main[0].upper() + main[1:]]), *said[1:]]
