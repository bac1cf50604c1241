"""What holds for every objective: in every kind of model, however a batch is split, in mixed precision, at weight 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError
from pellucid.tuning.data import Encoded
from pellucid.tuning.fit import Fit, Settings
from tests.tuning.test_fit import KINDS, data, equal, opened, weights


def told(labels: Any = True, n: int = 8) -> tu.Rationales:
    """A property of most texts, unknown of one; a span that one text has not."""
    given = data(labels, n=n)
    spans = {**given.spans, "rationale": [None, *given.spans["rationale"][1:]]}
    return replace(given, spans=spans, properties={"he": [*(t.startswith("he") for t in given.texts[:-1]), None]})


def fitted(model: pl.Model, given: tu.Rationales, objectives: Any, accumulate: int = 1, batch: int = 4) -> Fit:
    settings = Settings(model, Encoded(model, given), None, 1, batch, accumulate, 1e-2, None, 0.01, 0, 1.0)
    return Fit(settings, objectives, 0)


def site(model: pl.Model) -> str:
    return f"{s + '.' if (s := model.anatomy.stacks[0].name) else ''}layers.1.resid_post"


def beside(model: pl.Model) -> tu.Direction:
    given = told("text" if model.anatomy.answering.meaning == "tokens" else True)
    return tu.direction(model, given, [t.startswith("he") for t in given.texts], site(model))


@pytest.mark.parametrize("family", KINDS)
def test_objectives_in_every_kind_of_model_or_refused_by_name(family: str) -> None:
    """Those that no other file takes through all kinds; test_fit, test_attending, test_bottleneck and test_select have the others."""
    model, given = opened(family), told("text" if family == "gpt2" else KINDS[family])
    route = tu.Route("he", {True: tu.Only(neurons={1: range(8)}), False: tu.Only(neurons={1: range(8, 16)})})
    apart = [tu.Locality([1]), route]
    if family == "lora":
        for objective in apart:  # whose matrices are frozen there
            with pytest.raises(InputError, match="trained"):
                objective.check(model, Encoded(model, given))
        apart = []
    objectives = [
        *apart, tu.WeightL1(), tu.SparseWeights(0.5), tu.Augment("decoy", by="random"), tu.ProbePenalty(beside(model), where="rationale"), tu.ProbeTask("he", site(model)),
        tu.Unlearn("he", site(model)), tu.RightReasons("rationale", through="integrated", steps=1), tu.RightReasons("decoy", path="finite"),
    ]  # fmt: skip
    for each in objectives:
        each.check(model, Encoded(model, given))
    made = fitted(model, given, objectives)
    before = weights(made.chosen.model)
    (noted,) = made.train(None, family)
    assert all(torch.isfinite(torch.tensor(noted))) and not equal(before, weights(made.chosen.model))
    assert not made.chosen.changed(model)


def deterministic(model: pl.Model) -> list[tu.Objective]:
    return [
        tu.Consistency("rationale", by="Rome"), tu.RightReasons("decoy"), tu.RightReasons("rationale", form="outside", path="finite"),
        tu.Attend("rationale"), tu.AttentionEntropy(), tu.NeuronL1(), tu.SparseAttention("entmax15", layers=[0]), tu.TopNeurons(20),
        tu.ProbePenalty(beside(model), where="rationale"), tu.ProbeTask("he", site(model)), tu.Unlearn("he", site(model)), tu.Locality(),
        tu.WeightL1(),
    ]  # fmt: skip


def test_every_gradient_is_the_same_however_a_batch_is_split() -> None:
    """But of what is drawn, and of `Unlearn(how="means")` and hard Kumaraswamy masks, whose losses are squares of a pass's means."""
    model, given = opened("bert-class"), told(n=16)
    for objectives in (
        deterministic(model),
        [tu.Bottleneck(residual=1)],
        [tu.Select(warm=0, share=0.4, teach="rationale")],
    ):
        found: list[dict[str, torch.Tensor]] = []
        for k in (1, 4):
            made = fitted(model, given, objectives, k, 16)
            with torch.enable_grad():
                for p in made.parameters.values():
                    p.requires_grad_(True)
                made.step(torch.arange(16), 0)
            found.append({n: p.grad.double() for n, p in made.parameters.items() if p.grad is not None})
        whole, split = (torch.cat([g.flatten() for g in each.values()]) for each in found)
        assert found[0].keys() == found[1].keys() and len(whole) > 1000
        assert float((whole - split).norm() / whole.norm()) < 1e-5, objectives
        assert float(whole.norm() / split.norm()) == pytest.approx(1, rel=1e-6)


def test_every_objective_at_weight_zero_is_plain_training_and_all_of_them_train_in_mixed_precision() -> None:
    model, given = opened("bert-class"), told()
    every = [*deterministic(model), tu.Bottleneck(), tu.Select(warm=0)]
    plain, idle = fitted(model, given, []), fitted(model, given, [0.0 * each for each in every])
    for made in (plain, idle):
        made.train(None, "arm")
    assert (
        equal(weights(plain.chosen.model), weights(idle.chosen.model))
        and plain.parameters.keys() == idle.parameters.keys()
    )
    for objectives in (deterministic(model)[:2] + deterministic(model)[3:], [tu.Bottleneck()], [tu.Select(warm=0)]):
        with torch.autocast("cpu", torch.bfloat16):
            (noted,) = (made := fitted(model, given, objectives)).train(None, "arm")
        assert all(torch.isfinite(torch.tensor(noted)))
        assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in made.parameters.values())
