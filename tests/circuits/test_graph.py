"""Graphs and circuits: their names, their sizes, their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pellucid.circuits import Circuit, Graph, Split, wire
from pellucid.circuits.nodes import graph_of
from pellucid.errors import InputError, PellucidError

from .programs import previous_token, random_model


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(random_model("llama").anatomy)


def test_the_graph_has_one_reader_per_query_head_and_one_key_and_value_per_group(graph: Graph) -> None:
    heads, groups, layers = 4, 2, 2
    assert len(graph.sources) == 1 + layers * (heads + 1)
    assert len(graph.readers) == layers * (heads + 2 * groups + 1) + 1
    per_layer = [(1 + 5 * layer) * (heads + 2 * groups) + 1 + 5 * layer + heads for layer in range(layers)]
    assert len(graph) == sum(per_layer) + len(graph.sources)


def test_gpt2_small_has_32491_edges() -> None:
    model = random_model("gpt2", n_layer=12, n_head=12, n_embd=24)
    assert len(graph_of(model.anatomy)) == 32491


def test_parallel_blocks_have_no_edge_from_a_layers_heads_to_its_mlp() -> None:
    graph = graph_of(random_model("gptj").anatomy)
    with pytest.raises(InputError, match="comes after"):
        graph.edge("0.1 -> m0")


def test_token_and_position_embeddings_can_be_two_sources() -> None:
    assert [s.name for s in wire(previous_token(), Split("parts")).graph.sources[:2]] == [
        "embed.tokens",
        "embed.positions",
    ]


def test_short_names_mean_the_long_ones(graph: Graph) -> None:
    assert graph.edge("a0.h3 -> 1.2.q") == graph.edge("layers.0.attn.heads.3 -> layers.1.attn.heads.2.q")
    assert graph.edge("m0 -> 1.3.k") == graph.edge("layers.0.mlp -> layers.1.attn.kv_heads.1.k")
    assert graph.nodes(["a1"]) == graph.nodes([f"1.{h}" for h in range(4)])


@pytest.mark.parametrize(
    ("edge", "advice"),
    [("embed -> logit", "did you mean 'logits'"), ("embed", "expected 'source -> reader'"),
     ("0.9 -> logits", "no source"),
     ("1.0 -> 0.0.q", "comes after")],
)  # fmt: skip
def test_an_unknown_edge_is_an_error_that_names_the_nearest(graph: Graph, edge: str, advice: str) -> None:
    with pytest.raises(PellucidError, match=advice):
        Circuit.from_edges(graph, [edge])


def test_a_circuit_is_saved_and_loaded(graph: Graph, tmp_path: Path) -> None:
    circuit = Circuit.from_edges(graph, ["embed -> 0.1.q", "0.1 -> logits"], how="zero")
    circuit.scores[graph.edge("0.1 -> logits")] = -2.5
    again = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert again.graph == graph
    assert again.how == "zero"
    assert again.provenance == circuit.provenance
    assert torch.equal(again.on, circuit.on)
    assert torch.equal(again.scores, circuit.scores)
    assert again.edges[0] == "layers.0.attn.heads.1 -> logits"


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"format": "pellucid-circuit", "version": 1}), "[1]"])
def test_another_file_is_no_circuit(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="no readable pellucid circuit"):
        Circuit.load(tmp_path / "x.json")


def test_pruning_keeps_only_paths_from_the_embedding_to_the_logits(graph: Graph) -> None:
    path = ["embed -> 0.1.v", "0.1 -> 1.2.q", "1.2 -> logits"]
    dangling = ["embed -> 1.0.q", "0.3 -> logits", "0.1 -> 0.9.q".replace("0.9", "1.0")]
    circuit = Circuit.from_edges(graph, path + dangling)
    assert set(circuit.pruned().edges) == set(Circuit.from_edges(graph, path).edges)


def test_networkx_has_a_port_for_every_edge_and_an_edge_for_every_head_of_a_group(graph: Graph) -> None:
    made = Circuit.from_edges(graph, ["embed -> 0.1.k", "0.1 -> logits"]).to_networkx()
    ports = {(a, b): data["port"] for a, b, data in made.edges(data=True)}
    assert ports["embed", "layers.0.attn.heads.0"] == ports["embed", "layers.0.attn.heads.1"] == "k"
    assert ports["layers.0.attn.heads.1", "logits"] == "logits"


def test_overlap_is_shared_edges_over_all_edges(graph: Graph) -> None:
    a, b = (Circuit.from_edges(graph, e) for e in (["embed -> m0", "m0 -> logits"], ["embed -> m0"]))
    assert a.jaccard(b) == 0.5
    assert a.jaccard(a) == 1.0
