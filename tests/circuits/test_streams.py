"""Streams with norms inside, two stacks, mixers; nodes by position and neurons: each equals the same thing by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pellucid as pl
from pellucid.causal.contrast import ask
from pellucid.circuits import Circuit, Runner, Split, acdc, edge_attribution, exact_patching, judge, wire
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.views import document
from tests.zoo.build import build
from tests.zoo.inputs import inputs
from tests.zoo.tokenizer import tokenizer

from . import slow
from .programs import random_model

METRIC = pl.metrics.logit_difference(7, 9)
Given = dict[str, Tensor]


def given(model: Model, seed: int = 0) -> tuple[Given, Given]:
    """Two prompts and two others, with decoder tokens where there is a decoder."""
    generator = torch.Generator().manual_seed(seed)
    names = {"input_ids": 7, "decoder_input_ids": 5} if model.module.config.is_encoder_decoder else {"input_ids": 7}
    one, other = (
        {n: torch.randint(5, 60, (2, length), generator=generator) for n, length in names.items()} for _ in "ab"
    )
    return one, other


def first_logits(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 9]


def runner_of(model: Model, split: Split | None = None) -> tuple[Runner, Given, Given]:
    one, other = given(model)
    wiring = wire(model, split)
    return Runner.of(wiring, ask(model, one, first_logits, other), "resample"), one, other


BY_HAND: dict[str, Callable[[Any, Given, slow.Slow], Tensor]] = {
    "bert": lambda m, x, s: slow.bert(m, x["input_ids"], s),
    "t5": lambda m, x, s: slow.t5(m, x["input_ids"], x["decoder_input_ids"], s),
    "gpt2": lambda m, x, s: slow.gpt2(m, x["input_ids"], s),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_circuit_run_equals_keeping_every_readers_stream_by_hand(kind: str) -> None:
    """Through the norms of post-norm blocks, and from encoder to decoder."""
    model = random_model(kind)
    runner, one, other = runner_of(model)
    graph = wire(model).graph
    theirs = slow.Slow(graph, lambda s, r: 0.0)
    with torch.no_grad():
        torch.testing.assert_close(
            BY_HAND[kind](model.module, other, theirs), model.module(**other).logits, atol=1e-5, rtol=1e-4
        )
        for seed in range(3):
            on = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(seed)) > 0.2 + 0.3 * seed
            hand = slow.Slow(graph, lambda s, r, on=on: 1.0 - float(on[graph.source(s), graph.reader(r)]), theirs.own)
            logits = runner.run(on)[1]
            assert logits is not None
            torch.testing.assert_close(logits, BY_HAND[kind](model.module, one, hand), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "mbart", "roberta", "distilbert", "jamba", "falcon_mamba", "olmo2"])
def test_every_edge_off_gives_the_corrupted_answer_and_every_edge_on_the_clean_one(kind: str) -> None:
    model = random_model(kind)
    runner, one, other = runner_of(model)
    graph = wire(model).graph
    both = runner.scores(torch.stack([graph.possible, torch.zeros_like(graph.possible)]))
    with torch.no_grad():
        for score, tokens in zip(both, (one, other), strict=True):
            torch.testing.assert_close(score, first_logits(model.module(**tokens).logits), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "bart", "t5", "jamba", "olmo2"])
@pytest.mark.parametrize("how", ["resample", "zero"])
def test_edge_attribution_is_the_derivative_by_each_edge(kind: str, how: Any) -> None:
    model = random_model(kind)
    one, other = given(model)
    scores = edge_attribution(model, one, METRIC, how=how, reference=other)
    runner = Runner.of(wire(model), ask(model, one, METRIC, other), how)
    mask = scores.graph.possible.float().requires_grad_()
    (naive,) = torch.autograd.grad(runner.scores(mask).mean(), mask)
    torch.testing.assert_close(scores.tensor, -naive * scores.graph.possible, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_late_edges_are_run_from_their_layer_on_with_the_same_scores(kind: str) -> None:
    model = random_model(kind)
    runner, *_ = runner_of(model)
    graph = wire(model).graph
    late = [r for r, reader in enumerate(graph.readers) if reader.depth == graph.depth - 1]
    masks = graph.possible.repeat(len(late), 1, 1)
    for i, r in enumerate(late):
        masks[i, graph.readers[r].first, r] = False
    together = runner.scores(masks)
    assert runner.forwards < len(late)
    torch.testing.assert_close(together, runner.scores(masks.float().requires_grad_()).detach(), atol=1e-5, rtol=1e-4)


def test_cross_attention_reads_the_encoder_by_its_keys_and_values_and_the_decoder_by_its_queries() -> None:
    graph = wire(random_model("t5")).graph
    assert graph.edge("encoder.layers.1.mlp -> decoder.layers.0.cross.heads.2.k")
    assert graph.edge("decoder.layers.0.attn.heads.1 -> decoder.layers.0.cross.heads.2.q")
    with pytest.raises(InputError, match="not in the stream"):
        graph.edge("encoder.embed -> decoder.layers.0.cross.heads.2.q")


def test_circuits_of_an_encoder_decoder_are_found_judged_shown_and_saved(tmp_path: Path) -> None:
    model = random_model("t5")
    one, other = given(model)
    circuit = acdc(model, one, METRIC, threshold=0.02, how="resample", reference=other)
    assert 0 < len(circuit) < len(circuit.graph)
    verdict = judge(model, circuit, one, METRIC, how="resample", reference=other, draws=2, greedy=1)
    assert float(verdict.difference) < 0.02 * len(circuit.graph)
    shown = document(Circuit.whole(circuit.graph)).data
    assert {"decoder.layers.1.cross.heads.3", "encoder.layers.1.mlp"} <= {node.component for node in shown.nodes}
    assert Circuit.load(circuit.save(tmp_path / "t5.json")).graph == circuit.graph


# ---- positions


def test_an_edge_off_at_one_position_is_off_there_alone() -> None:
    model, split = random_model("gpt2"), Split(positions=("1", "-1", "3:5"))
    runner, one, other = runner_of(model, split)
    graph, base = wire(model, split).graph, wire(model).graph
    places = ["rest", "1", "rest", "3:5", "3:5", "rest", "-1"]
    theirs = slow.Slow(base, lambda s, r: 0.0)
    with torch.no_grad():
        BY_HAND["gpt2"](model.module, other, theirs)
        on = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) > 0.4

        def weight(s: str, r: str) -> Tensor:
            edges = [on[graph.source(f"{s}@{p}"), graph.reader(f"{r}@{p}")] for p in places]
            return 1 - torch.stack(edges).float()[None, :, None]

        logits = runner.run(on)[1]
        assert logits is not None
        hand = BY_HAND["gpt2"](model.module, one, slow.Slow(base, weight, theirs.own))
    torch.testing.assert_close(logits, hand, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_attribution_by_position_adds_up_to_attribution(kind: str) -> None:
    model, split = random_model(kind), Split(positions=(0, "2:4", -1))
    one, other = given(model)
    options: dict[str, Any] = {"how": "resample", "reference": other}
    apart = edge_attribution(model, one, METRIC, split=split, **options)
    assert len(apart.graph) == 4 * len(wire(model).graph)
    together = edge_attribution(model, one, METRIC, **options)
    torch.testing.assert_close(apart.graph.fold(apart.tensor).sum(-1), together.tensor, atol=1e-6, rtol=1e-4)


def test_a_head_of_a_positional_graph_reads_keys_at_every_position_and_its_query_at_its_own() -> None:
    graph = wire(random_model("gpt2"), Split(positions=("S2",))).graph
    made = {graph.readers[r].name for r in graph.inputs_of(graph.source("1.2@S2"))}
    head = "layers.1.attn.heads.2"
    assert made == {f"{head}.q@S2", *(f"{head}.{port}@{p}" for port in "kv" for p in ("S2", "rest"))}
    assert graph.nodes(["1.2"]) == {graph.source("1.2@S2"), graph.source("1.2@rest")}


def test_positions_are_shown_and_saved(tmp_path: Path) -> None:
    graph = wire(random_model("llama"), Split(positions=("S2", "-1"))).graph
    circuit = Circuit.from_edges(
        graph, ["embed@S2 -> 0.1.k@S2", "0.1@-1 -> 1.2.q@-1", "1.2@-1 -> logits@-1", "embed@rest -> logits@rest"]
    )
    shown = document(circuit).data
    assert {node.position for node in shown.nodes} == {"S2", "-1", "rest"}
    assert any(node.component == "logits@-1" for node in shown.nodes)
    assert Circuit.load(circuit.save(tmp_path / "c.json")).edges == circuit.edges
    with pytest.raises(InputError, match="another position"):
        graph.edge("embed@S2 -> logits@-1")


def test_positions_are_those_of_each_prompt_and_must_not_overlap() -> None:
    model = random_model("gpt2")
    task = pl.tasks.Prompts.from_pairs(
        ["Mary gave John", "Mary gave John"], ["Mary gave Mary", "John gave John"], [" John"] * 2, [" Mary"] * 2,
        model.tokenizer,
    )  # fmt: skip
    scores = edge_attribution(model, task, how="resample", split=Split(positions=("changed",)))
    said = scores.graph.fold(scores.tensor)[0]  # by the embedding, which differs nowhere else
    assert float(said[:, 0].abs().sum()) > 0
    assert float(said[:, 1].abs().sum()) == 0
    with pytest.raises(InputError, match="name the same position"):
        edge_attribution(model, task, how="resample", split=Split(positions=("changed", "-1")))


# ---- neurons, mixers


def test_neurons_are_sources_of_their_own_and_the_mlp_is_the_rest() -> None:
    model, split = random_model("gpt2"), Split(neurons=("layers.0.mlp.neurons.3", "0.11", "m1.n0"))
    runner, one, other = runner_of(model, split)
    graph, neurons = wire(model, split).graph, {0: [3, 11], 1: [0]}
    theirs = slow.Slow(graph, lambda s, r: 0.0)
    with torch.no_grad():
        slow.gpt2(model.module, other["input_ids"], theirs, neurons)
        on = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(0)) > 0.5
        hand = slow.Slow(graph, lambda s, r: 1.0 - float(on[graph.source(s), graph.reader(r)]), theirs.own)
        logits = runner.run(on)[1]
        assert logits is not None
        made = slow.gpt2(model.module, one["input_ids"], hand, neurons)
    torch.testing.assert_close(logits, made, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_neurons_edge_to_the_logits_is_its_exact_effect(kind: str) -> None:
    """All edges from all neurons off are the MLP off; and attribution agrees with the masks' derivative."""
    model = random_model(kind)
    size = model.anatomy.stacks[0].blocks[0].sizes["neuron"]
    split = Split(neurons=[f"layers.1.mlp.neurons.{n}" for n in range(size)])
    one, other = given(model)
    options: dict[str, Any] = {"how": "zero", "reference": other}
    graph = wire(model, split).graph
    neurons = [f"layers.1.mlp.neurons.{n} -> logits" for n in range(size)]
    off = Circuit.whole(graph).on.clone()
    off[[graph.edge(e)[0] for e in [*neurons, "m1 -> logits"]], -1] = False
    runner = Runner.of(wire(model, split), ask(model, one, METRIC, other), "zero")
    whole = exact_patching(model, one, METRIC, edges=["m1 -> logits"], **options)
    clean = runner.scores(graph.possible)[0]
    assert float((runner.scores(off)[0] - clean).mean()) == pytest.approx(whole.of_edge("m1 -> logits"), abs=1e-5)
    scores = edge_attribution(model, one, METRIC, split=split, **options)
    mask = graph.possible.float().requires_grad_()
    (naive,) = torch.autograd.grad(runner.scores(mask).mean(), mask)
    torch.testing.assert_close(scores.tensor, -naive * graph.possible, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "why"), [("layers.0.mlp.neurons.999", "has 0 to"), ("m7.n0", "no neuron"), ("logits", "no neuron")]
)
def test_an_unknown_neuron_is_an_error_that_says_which_there_are(name: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        wire(random_model("gpt2"), Split(neurons=(name,)))


def test_a_mixer_without_heads_is_one_node() -> None:
    graph = wire(random_model("jamba")).graph
    assert {s.kind for s in graph.sources} == {"embed", "mixer", "head", "mlp"}
    assert graph.edge("embed -> layers.0.mixer")


# ---- models that are refused


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("deepseek_v3", "another projection or step before"),
        ("albert", "share columns"),
        ("gpt_neox_japanese", "trial run"),
        ("cpmant", "44 positions where the prompt has 12"),
        ("inkling_text", "no columns of a projection"),
        ("convbert", "trial run"),
        ("doge", "scales or drops"),
        ("rwkv", "also adds"),
        ("pegasus_x", "one stack, or an encoder and a decoder"),
    ],
)
def test_what_cannot_be_wired_is_refused_with_the_reason(kind: str, why: str) -> None:
    module = build(kind)
    model = pl.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    with pytest.raises(Refused, match=why):
        wire(model)
