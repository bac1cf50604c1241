"""The verdict tells a circuit that does the work from one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid import circuits
from pellucid.circuits import (
    Circuit,
    edge_attribution,
    exact_patching,
    faithfulness_curve,
    judge,
    stability,
    wire,
)
from pellucid.errors import InputError

from .programs import LENGTH, PREVIOUS_TOKEN_EDGES, VOCABULARY, previous_token, random_model
from .test_discovery import METRIC
from .test_execution import prompts


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    model = previous_token()
    ids = torch.randint(0, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(2))
    answer = ids[:, -2:-1]
    return {"model": model, "prompts": ids, "metric": lambda logits: logits[:, -1].gather(1, answer)[:, 0]}


def verdict(program: dict[str, Any], edges: set[str]) -> Any:
    circuit = Circuit.from_edges(wire(program["model"], "parts").graph, edges)
    return judge(program["model"], circuit, program["prompts"], program["metric"], ablation="zero", samples=3)


def test_the_true_circuit_is_faithful_complete_and_minimal(program: dict[str, Any]) -> None:
    right = verdict(program, PREVIOUS_TOKEN_EDGES)
    assert float(right.normalised) == pytest.approx(1.0)
    assert float(right.difference) == pytest.approx(0.0, abs=1e-6)
    assert float(right.incompleteness.max()) < 1e-6
    assert float(right.minimality.sel(node="layers.0.attn.heads.1")) == pytest.approx(10.0, abs=0.1)
    assert float(right.control.max()) < 0.5


def test_a_circuit_without_its_value_edge_is_not_faithful(program: dict[str, Any]) -> None:
    wrong = verdict(program, PREVIOUS_TOKEN_EDGES - {"embed.tokens -> layers.0.attn.heads.1.v"})
    assert float(wrong.normalised) < 0.5


def test_a_hypothesis_of_heads_is_tested_and_misspelt_heads_are_errors(program: dict[str, Any]) -> None:
    rest = {"ablation": "zero", "samples": 2}
    right = circuits.test(program["model"], ["0.1"], program["prompts"], program["metric"], **rest)
    wrong = circuits.test(program["model"], ["0.0"], program["prompts"], program["metric"], **rest)
    assert float(right.normalised) == pytest.approx(1.0)
    assert float(wrong.normalised) < 0.5
    with pytest.raises(InputError, match=r"no source '0\.7'"):
        circuits.test(program["model"], ["0.7"], program["prompts"], program["metric"], **rest)


def test_exact_scores_give_a_better_curve_than_random_edges(program: dict[str, Any]) -> None:
    scores = exact_patching(program["model"], program["prompts"], program["metric"], ablation="zero", embedding="parts")
    curve = faithfulness_curve(program["model"], scores, program["prompts"], program["metric"], ablation="zero")
    assert float(curve.signed[-1]) == pytest.approx(1.0)
    assert curve.data.attrs["CPR"] > curve.data.attrs["CPR_random"]
    assert curve.data.attrs["CMD"] < curve.data.attrs["CMD_random"]


def test_stability_is_the_overlap_of_circuits_from_resampled_prompts() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    scores = edge_attribution(model, ids, METRIC, ablation="resample", reference=other)
    scores.each = scores.each[:1].repeat(5, 1, 1)
    same = edge_attribution(model, ids[:1], METRIC, ablation="resample", reference=other[:1])
    same.each = same.each.repeat(5, 1, 1)
    assert stability(same, 10, samples=20).data.attrs["mean"] == 1.0
    found = stability(edge_attribution(model, ids, METRIC, ablation="resample", reference=other), 10, samples=20)
    assert 0 < found.data.attrs["low"] <= found.data.attrs["mean"] <= found.data.attrs["high"] <= 1.0


def test_a_circuit_of_another_model_is_refused(program: dict[str, Any]) -> None:
    circuit = Circuit.whole(wire(random_model("llama")).graph)
    with pytest.raises(InputError, match="belongs to another model"):
        judge(program["model"], circuit, program["prompts"], program["metric"], ablation="zero")
