"""The verdict tells a circuit that does the work from one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pellucid import circuits
from pellucid.circuits import (
    Circuit,
    EdgeScores,
    Split,
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
    circuit = Circuit.from_edges(wire(program["model"], Split("parts")).graph, edges)
    return judge(program["model"], circuit, program["prompts"], program["metric"], how="zero", draws=3)


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
    rest = {"how": "zero", "draws": 2}
    right = circuits.test(program["model"], ["0.1"], program["prompts"], program["metric"], **rest)
    wrong = circuits.test(program["model"], ["0.0"], program["prompts"], program["metric"], **rest)
    assert float(right.normalised) == pytest.approx(1.0)
    assert float(wrong.normalised) < 0.5
    with pytest.raises(InputError, match=r"no source '0\.7'"):
        circuits.test(program["model"], ["0.7"], program["prompts"], program["metric"], **rest)


def test_a_hypothesis_may_name_classes_or_edges_but_says_what_it_is(program: dict[str, Any]) -> None:
    model, given = program["model"], (program["prompts"], program["metric"])
    rest: dict[str, Any] = {"how": "zero", "draws": 2}
    classes = circuits.test(model, {"back": ["a0.h1"], "idle": ["1.0"]}, *given, **rest)
    assert {"back", "idle"} <= set(classes.removed.values.tolist())
    assert float(classes.minimality.sel(node="layers.1.attn.heads.0")) == pytest.approx(0.0, abs=1e-9)
    edges = ["embed -> 0.1.q", "embed -> 0.1.k", "embed -> 0.1.v", "0.1 -> logits"]
    assert float(circuits.test(model, edges, *given, **rest).normalised) == pytest.approx(1.0)
    assert float(circuits.test(model, "0.1", *given, **rest).normalised) == pytest.approx(1.0)
    for wrong, why in (
        ([], "at least one head"),
        (["0.1", "0.1 -> logits"], "either heads or edges"),
        ({"a": ["0.1 -> logits"]}, "classes are of heads"),
        (["5.1"], "did you mean 'layers.1.attn.heads.1'"),
        (["0.1 -> logit"], "did you mean 'logits'"),
        (["m0.q -> logits"], "no source"),
    ):
        with pytest.raises(InputError, match=why):
            circuits.test(model, wrong, *given, **rest)


@pytest.mark.parametrize("greedy", [1, 2])
def test_greedy_search_by_first_order_finds_what_trying_every_head_finds(greedy: int) -> None:
    model = random_model("gpt2", n_layer=3)
    ids, other = prompts()
    circuit = edge_attribution(model, ids, METRIC, how="resample", reference=other).circuit(fraction=0.6)
    full, quick = (
        judge(model, circuit, ids, METRIC, how="resample", reference=other, draws=1, greedy=greedy, screen=n)
        for n in (99, 4)
    )
    assert full.removed.values[-1] == quick.removed.values[-1]
    assert float(full.incompleteness[-1]) == pytest.approx(float(quick.incompleteness[-1]), abs=1e-6)


def test_every_number_comes_with_its_interval(program: dict[str, Any]) -> None:
    right = verdict(program, PREVIOUS_TOKEN_EDGES)
    for name in ("incompleteness", "minimality"):
        assert (right[f"{name}_low"] <= right[name] + 1e-9).all()
        assert (right[name] <= right[f"{name}_high"] + 1e-9).all()


def test_heads_that_share_a_key_with_a_heard_head_are_no_nodes_of_the_circuit() -> None:
    graph = wire(random_model("llama")).graph
    circuit = Circuit.from_edges(graph, ["embed -> 0.1.k", "embed -> 0.1.v", "embed -> 0.1.q", "0.1 -> logits"])
    assert circuit.heads == ["layers.0.attn.heads.1"]


def test_exact_scores_give_a_better_curve_than_random_edges(program: dict[str, Any]) -> None:
    scores = exact_patching(program["model"], program["prompts"], program["metric"], how="zero", split=Split("parts"))
    curve = faithfulness_curve(program["model"], scores, program["prompts"], program["metric"], how="zero")
    assert float(curve.signed[-1]) == pytest.approx(1.0)
    assert curve.data.attrs["CPR"] > curve.data.attrs["CPR_random"]
    assert curve.data.attrs["CMD"] < curve.data.attrs["CMD_random"]


def test_stability_is_the_overlap_of_circuits_from_resampled_prompts() -> None:
    model = random_model("gpt2")
    ids, other = prompts()
    one = edge_attribution(model, ids[:1], METRIC, how="resample", reference=other[:1])
    same = EdgeScores.of(one.graph, one.each.repeat(5, 1, 1), "the same five times", "resample")
    assert stability(same, 10, draws=20).data.attrs["mean"] == 1.0
    found = stability(edge_attribution(model, ids, METRIC, how="resample", reference=other), 10, draws=20)
    assert 0 < found.data.attrs["low"] <= found.data.attrs["mean"] <= found.data.attrs["high"] <= 1.0


def test_a_circuit_of_another_model_is_refused(program: dict[str, Any]) -> None:
    circuit = Circuit.whole(wire(random_model("llama")).graph)
    with pytest.raises(InputError, match="belongs to another model"):
        judge(program["model"], circuit, program["prompts"], program["metric"], how="zero")
