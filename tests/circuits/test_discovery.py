"""Discovery finds what was built in; estimates are the derivatives they claim to be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.causal.contrast import ask
from pellucid.circuits import EdgeScores, Runner, Split, acdc, acdc_scores, edge_attribution, exact_patching, wire
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result

from .programs import LENGTH, PREVIOUS_TOKEN_EDGES, VOCABULARY, previous_token, random_model
from .test_execution import prompts

METRIC = pl.metrics.logit_difference(7, 9)


@pytest.fixture(scope="module")
def program() -> tuple[Model, Tensor, Tensor, Any]:
    model = previous_token()
    generator = torch.Generator().manual_seed(1)
    ids, other = (torch.randint(0, VOCABULARY, (8, LENGTH), generator=generator) for _ in "ab")
    clean = model.run(ids).logits.detach()
    assert torch.equal(clean[:, 1:].argmax(-1), ids[:, :-1])
    return model, ids, other, lambda logits: -(logits - clean)[:, 1:].abs().amax((1, 2))


def true_edges(how: str) -> set[str]:
    """Positions say the same in every prompt: only when they are zeroed or moved does it matter."""
    return {e for e in PREVIOUS_TOKEN_EDGES if how == "zero" or "positions" not in e}


@pytest.mark.parametrize("how", ["resample", "position_mean", "zero"])
def test_exact_patching_finds_the_programs_edges_and_no_other(program: Any, how: Any) -> None:
    model, ids, other, metric = program
    scores = exact_patching(model, ids, metric, how=how, reference=other, split=Split("parts"))
    assert set(scores.above(1e-6).edges) == true_edges(how)


@pytest.mark.parametrize("how", ["resample", "zero"])
def test_acdc_ranks_the_programs_edges_above_all_others(program: Any, how: Any) -> None:
    model, ids, other, metric = program
    thresholds = [1e-4, 1e-1, 1.0]
    found = [acdc(model, ids, metric, threshold=t, how=how, reference=other, split=Split("parts")) for t in thresholds]
    scores, true = acdc_scores(thresholds, found), torch.zeros_like(found[0].on)
    for edge in true_edges(how):
        true[found[0].graph.edge(edge)] = True
    assert scores[true].min() > scores[~true].max()


def test_acdc_in_batches_cuts_what_it_cuts_one_by_one() -> None:
    model = random_model("llama")
    ids, other = prompts()
    one, many = (acdc(model, ids, METRIC, threshold=0.02, how="resample", reference=other, batch=b) for b in (1, 8))
    assert torch.equal(one.on, many.on)
    assert 0 < len(one) < len(one.graph)
    assert one.attrs["forwards"] < 0.85 * len(one.graph)


def test_a_threshold_must_be_positive() -> None:
    with pytest.raises(InputError, match="must be positive"):
        acdc(random_model("gpt2"), prompts()[0], METRIC, threshold=0.0, how="zero")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gemma2", "falcon"])
@pytest.mark.parametrize("how", ["resample", "zero"])
def test_edge_attribution_is_the_derivative_of_the_metric_by_each_edge(kind: str, how: Any) -> None:
    """Naively: every query, key and value read apart, and one mask per edge to differentiate by."""
    model = random_model(kind)
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, how=how, reference=other)
    runner = Runner.of(wire(model), ask(model, ids, METRIC, other), how)
    mask = scores.graph.possible.float().requires_grad_()
    (naive,) = torch.autograd.grad(runner.scores(mask).mean(), mask)
    torch.testing.assert_close(scores.tensor, -naive * scores.graph.possible, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "eap-ig-activations"])
def test_a_model_in_bfloat16_has_its_edges(method: Any) -> None:
    """B16: a raw TypeError."""
    model = random_model("gpt2")
    ids, other = prompts()
    half = pl.load(copy.deepcopy(model.module).bfloat16(), tokenizer=model.tokenizer)
    scores = [edge_attribution(m, ids, METRIC, how="resample", reference=other, method=method) for m in (model, half)]
    exact, rough = (s.tensor.nan_to_num().flatten() for s in scores)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.98


def test_edge_attribution_approaches_exact_patching_for_small_changes() -> None:
    model = random_model("llama").module
    model = pl.load(model.double(), tokenizer=random_model("llama").tokenizer)
    ids = prompts()[0]
    near = ids.clone()
    with torch.no_grad():  # token 61 is nearly token 60
        table = model.module.get_input_embeddings().weight
        ids[:, 2], near[:, 2] = 60, 61
        table[61] = table[60] + 1e-4 * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    exact, rough = (f(model, ids, METRIC, how="resample", reference=near) for f in (exact_patching, edge_attribution))
    size = float(exact.tensor.abs().max())
    assert size > 0
    assert float((exact.tensor - rough.tensor).abs().max()) < 1e-2 * size


@pytest.mark.parametrize(("method", "steps"), [("eap-ig-inputs", 200), ("eap-ig-activations", 60)])
def test_integrated_scores_of_the_embeddings_edges_add_up_to_the_whole_effect(method: Any, steps: int) -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, how="resample", reference=other, method=method, steps=steps)
    with torch.no_grad():
        clean, corrupted = (float(model.score(model.run(x), METRIC).mean()) for x in (ids, other))
    assert float(scores.tensor[0].sum()) == pytest.approx(corrupted - clean, rel=0.05)


def test_one_step_of_integrated_inputs_is_the_gradient_at_the_replaced_embedding() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    at_other = edge_attribution(model, other, METRIC, how="resample", reference=ids)
    one = edge_attribution(model, ids, METRIC, how="resample", reference=other, method="eap-ig-inputs", steps=1)
    torch.testing.assert_close(one.tensor, -at_other.tensor, atol=1e-6, rtol=1e-5)


def test_scores_cut_into_circuits_of_the_asked_size() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, how="resample", reference=other)
    assert len(scores.circuit(10)) == 10
    assert len(scores.circuit(fraction=0.5)) == 55
    assert (scores.tensor[scores.circuit(5, by="sign").on] < 0).all()
    assert np.isnan(scores.result["effect"].values[~scores.graph.possible.numpy()]).all()
    with pytest.raises(InputError, match="either n=100 edges or fraction"):
        scores.circuit()


def test_a_task_brings_its_metric_and_its_corrupted_prompts() -> None:
    model = random_model("gpt2")
    with pytest.raises(InputError, match="needs a metric"):
        edge_attribution(model, "The capital of France", how="zero")
    with pytest.raises(InputError, match="expected one of eap"):
        edge_attribution(model, "The capital", METRIC, how="zero", method="ig")  # type: ignore[arg-type]


def test_scores_come_back_from_their_file_as_what_they_were(tmp_path: Path) -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, how="resample", reference=other)
    again = EdgeScores.load(scores.save(tmp_path / "scores.zip"))
    assert again.result == Result.load(tmp_path / "scores.zip") == scores.result
    assert again.graph == scores.graph
    assert again.how == "resample"
    assert torch.equal(again.each, scores.each)
    assert torch.equal(again.circuit(7).on, scores.circuit(7).on)
    assert scores.result.provenance.method == "edge_attribution"
    assert scores.circuit(7).provenance.code().endswith(".circuit(7)")
    with pytest.raises(InputError, match="holds no scores of edges"):
        EdgeScores.load(scores.tested().save(tmp_path / "tested.zip"))


def test_tested_edges_have_an_interval_and_a_corrected_p() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, how="resample", reference=other)
    found = scores.tested()
    there = scores.graph.possible.numpy()
    np.testing.assert_allclose(found.effect.values[there], scores.tensor[scores.graph.possible], atol=1e-6)
    assert (found.low.values[there] <= found.effect.values[there] + 1e-6).all()
    assert (found.p.values[there] >= 2.0 ** (1 - len(ids))).all()
    assert np.isnan(found.p.values[~there]).all()
