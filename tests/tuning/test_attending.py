"""Attention that is taught, and attention with exact zeros, against bisection, finite differences and sums written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import tuning as tu
from pellucid.errors import PellucidError
from pellucid.tuning.data import Encoded
from pellucid.tuning.measuring import precision
from pellucid.tuning.objective import Pass
from tests.tuning.test_fit import KINDS, QUICK, data, opened


def bisected(z: Tensor, power: float) -> Tensor:
    """p = max(z / power - t, 0)^power with t found by halving."""
    x = z / power
    low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
    for _ in range(200):
        t = (low + high) / 2
        much = (x - t).clamp_min(0).pow(power).sum(-1, keepdim=True) > 1
        low, high = torch.where(much, t, low), torch.where(much, high, t)
    return (x - t).clamp_min(0).pow(power)


@pytest.mark.parametrize(("ours", "power"), [(tu.sparsemax, 1.0), (tu.entmax15, 2.0)], ids=["sparsemax", "entmax15"])
def test_sparse_maps_are_exact_and_so_are_their_derivatives(ours: Any, power: float) -> None:
    z = 3 * torch.randn(400, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = ours(z)
    assert (p - bisected(z, power)).abs().max() < 1e-12 and (p.sum(-1) - 1).abs().max() < 1e-12
    assert float((p == 0).double().mean()) > 0.6
    assert torch.equal(ours(z.masked_fill(z < -1, -torch.inf)) == 0, (p == 0) | (z < -1)) or power == 2.0
    x = z[:3, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(ours, x) and torch.autograd.gradgradcheck(ours, x)
    assert torch.allclose(ours(torch.full((4,), -torch.inf)), torch.full((4,), 0.25))  # masked throughout


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_is_taught_and_made_sparse(family: str) -> None:
    model, given = opened(family), data(KINDS[family])
    objectives = [
        tu.Attend("rationale", weight=0.1),
        tu.AttentionEntropy(weight=0.1),
        tu.NeuronL1([1]),
        tu.SparseAttention("sparsemax", layers=[0]),
        tu.TopNeurons(5),
    ]
    made = tu.fit(model, given, objectives, control=False, **QUICK)
    assert "attention_plausibility" in made.result.data and not made.changed
    found = tu.sparsity(made.model, given, edits=made.edits).data
    plain = tu.sparsity(model, given).data
    assert float(found["zeros"][0]) > float(plain["zeros"].max()) == 0.0 and float(found["neuron_zeros"].min()) > 0.5
    assert float(found["support"][0]) < float(plain["support"][0])


def test_padding_is_untouched_by_sparse_attention() -> None:
    model = opened("bert-class")
    edits = tu.SparseAttention("entmax15").edits(model)
    alone = model.run(["he is in Rome"], edits=edits).logits
    beside = model.run(["he is in Rome", "The capital of France is the city of Paris in France"], edits=edits).logits
    assert torch.allclose(alone[0], beside[0], atol=1e-6)


def test_the_loss_is_the_divergence_written_out() -> None:
    model = opened("bert-class")
    given = data(n=3)
    two = tu.Rationales(
        given.texts, given.labels, dict(given.spans) | {"second": [text.split()[1] for text in given.texts]}
    )
    encoded = Encoded(model, two)
    batch = encoded.batch([0, 1, 2])
    objective = tu.Attend(["rationale", "second"], heads=["layers.1.attn.heads.0", "layers.0.attn.heads.1"])
    with torch.enable_grad():
        seen = Pass(model, batch, encoded, keep=objective.sites(model))
        found = float(objective.loss(seen, torch.Generator()).detach())
    total = 0.0
    for b in range(3):
        n = int(batch.inputs.stream("").lengths[b])
        q = sum(batch.masks[name][b].float() / batch.masks[name][b].sum() for name in ("rationale", "second")) / 2
        for layer, head in ((1, 0), (0, 1)):
            a = seen.run.tensor(f"layers.{layer}.attn.pattern").detach()[b, head, :n].mean(0)
            total += sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(q, a, strict=True) if x > 0)
    assert found == pytest.approx(total / 6, rel=1e-4)
    control = objective.control().target(batch)
    assert torch.allclose(control.sum(1), torch.ones(3)) and not (control * objective.target(batch)).any()


def test_teaching_moves_attention_and_the_control_does_not() -> None:
    made = tu.fit(
        opened("bert-class"), data(n=16), tu.Attend("rationale"), **QUICK | {"steps": 12, "learning_rate": 5e-3}
    )
    found = made.result.data
    ap = {a: float(found["attention_plausibility"].sel(arm=a)) for a in found["arm"].values.tolist()}
    assert ap["objective"] > max(ap["plain"], ap["control"]) + 0.1
    assert found["after"].sel(arm="objective").item() < found["after"].sel(arm="plain").item()


def test_heads_that_are_not_there_are_an_error() -> None:
    for heads in ("layers.0.attn.heads.99", "layers.9.attn.heads.0", "layers.0.mlp.out"):
        with pytest.raises(PellucidError):
            tu.fit(opened("bert-class"), data(), tu.Attend("rationale", heads=heads), **QUICK)


def test_average_precision_is_the_librarys_where_scores_are_equal_too() -> None:
    """Sparse attention gives many zeros: the order they stand in must not count."""
    from sklearn.metrics import average_precision_score

    drawn = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(4, (12,), generator=drawn).float()
        positive = torch.rand(12, generator=drawn) < 0.4
        if 0 < int(positive.sum()) < 12:
            assert precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
    assert math.isnan(precision(torch.ones(3), torch.zeros(3, dtype=torch.bool)))
