"""Attention flow equals networkx's maximum flow within its stated bound, and says when it is degenerate."""

from __future__ import annotations

import warnings

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.attention import flow, patterns
from pellucid.attention.flow import Network
from pellucid.attention.patterns import Kind
from pellucid.attention.rollout import Step
from pellucid.errors import InputError
from tests.attention.opening import PROMPT, TARGET, opened


def published(matrices):
    """[query, key] after Abnar and Zuidema: a directed graph from each layer's nodes to those below."""
    graph, n = nx.DiGraph(), len(matrices[0])
    for layer, m in enumerate(matrices, start=1):
        for q in range(n):
            for k in range(n):
                if m[q, k] > 0:
                    graph.add_edge((layer, q), (layer - 1, k), capacity=float(m[q, k]))
    search = nx.algorithms.flow.edmonds_karp
    top = len(matrices)
    graph.add_nodes_from((0, k) for k in range(n))
    return np.array(
        [[nx.maximum_flow_value(graph, (top, q), (0, k), flow_func=search) for k in range(n)] for q in range(n)]
    )


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return flow(*args, **kwargs)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_flow_equals_the_published_route(family):
    model = opened(family, layers=3)
    found = quietly(model, PROMPT)
    mixed = [(a.mean(0) + np.eye(a.shape[-1])) / 2 for a in patterns(model, PROMPT).values]
    np.testing.assert_allclose(found.values, published(mixed), atol=1e-5)
    assert float(found.error_bound) < 1e-5


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), n=st.integers(2, 5), causal=st.booleans())
def test_any_network_of_mixing_steps_is_solved_within_the_bound(seed, depth, n, causal):
    rng = np.random.default_rng(seed)
    steps, kind = [], Kind("", "attn", tuple(range(depth)))
    for layer in range(depth):
        a = rng.random((n, n)) ** 4
        a = np.tril(a) if causal else a
        a /= a.sum(1, keepdims=True)
        share = torch.from_numpy(rng.random(n) * 0.9)
        steps.append(Step(kind, layer, share, torch.from_numpy(a), torch.from_numpy(a > 0)))
    network = Network(steps)
    expected = published([step.mixing.numpy() for step in steps])
    assert np.abs(network.flows("", range(n), "") - expected).max() <= network.error_bound + 1e-12


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoders_flow_equals_the_published_algorithm_on_its_graph(family):
    model = opened(family)
    found = flow(model, PROMPT, decoder=TARGET, queries=[-1])
    seen = patterns(model, PROMPT, decoder=TARGET)
    graph, n = nx.DiGraph(), len(seen["query"])
    for layer, a in enumerate(seen.encoder.values.mean(1)):
        for (q, k), weight in np.ndenumerate((a + np.eye(len(a))) / 2):
            graph.add_edge(("e", layer + 1, q), ("e", layer, k), capacity=float(weight))
    depth = len(seen.encoder)
    for layer, (a, x) in enumerate(zip(seen.decoder.values.mean(1), seen.cross.values.mean(1), strict=True)):
        for (q, k), weight in np.ndenumerate((a + np.eye(n)) / 2):
            graph.add_edge(("d", 2 * layer + 1, q), ("d", 2 * layer, k), capacity=float(weight))
        for q in range(n):
            graph.add_edge(("d", 2 * layer + 2, q), ("d", 2 * layer + 1, q), capacity=0.5)
            for k, weight in enumerate(x[q]):
                graph.add_edge(("d", 2 * layer + 2, q), ("e", depth, k), capacity=float(weight) / 2)
    top = ("d", 2 * len(seen.layer), n - 1)
    for name, end, count in (("flow", "d", n), ("source", "e", len(seen.source_key))):
        expected = [nx.maximum_flow_value(graph, top, (end, 0, k)) for k in range(count)]
        np.testing.assert_allclose(found[name].values[0], expected, atol=1e-5)


def test_an_encoders_degenerate_flow_is_warned_about():
    model = opened("bert", layers=6)
    with pytest.warns(UserWarning, match="what the token gives to layer 1"):
        found = flow(model, PROMPT, queries=0)
    first = (patterns(model, PROMPT).values[0].mean(0) + np.eye(len(found.key))) / 2
    np.testing.assert_allclose(found.values[0], np.minimum(1, first.sum(0)), atol=1e-3)


def test_flows_that_are_all_alike_are_warned_about():
    n, kind = 6, Kind("", "attn", (0, 1))
    even = torch.full((n, n), 1 / n).double()
    share = torch.tensor([0.9] + [0.1] * (n - 1)).double()  # little reaches query 0 but its own
    step = Step(kind, 0, share, even, even > 0)
    network = Network([step, step])
    flows = network.flows("", [0], "")
    assert "all tokens but the query itself are alike" in network.empty("", [0], flows)
    assert network.empty("", [0], np.linspace(0, 1, n)[None]) == ""
    assert network.empty("", [0], np.eye(n)[:1]) == ""  # nothing else is seen


def test_a_causal_models_flow_is_not_degenerate():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow(opened("gpt2"), PROMPT)


def test_queries_are_chosen_and_labelled():
    model = opened("gpt2")
    every, last = flow(model, PROMPT), flow(model, PROMPT, queries=-1)
    np.testing.assert_array_equal(last.values[0], every.values[-1])
    assert last["query"].values.tolist() == [len(every["query"]) - 1]
    assert last.query_token.values.tolist() == [every.query_token.values[-1]]
    with pytest.raises(InputError, match="no query 99"):
        flow(model, PROMPT, queries=99)
