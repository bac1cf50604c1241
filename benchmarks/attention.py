"""How fast are the methods on attention, in plain forward passes of the same model in the same process?

    python -m benchmarks.attention [--layers 12] [--tokens 32] [--published]

A random encoder of BERT base's width; CPU time, one thread, medians. Attention flow is also timed by the published
route, networkx's Edmonds-Karp on the same graph, for one sink: its 32 problems take half a minute, so only with
--published.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import pellucid
from pellucid.anatomy.loading import Loaded
from pellucid.attention import gradient_weighted, norm_weighted, patterns, relevance, rollout
from pellucid.attention.flow import Network
from pellucid.attention.rollout import mixed


def cost(work: Callable[[], Any], times: int = 5) -> float:
    """Median CPU seconds, after one call to warm up."""
    work()
    spent = []
    for _ in range(times):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def published(network: Network, sink: int) -> tuple[float, np.ndarray]:
    """CPU seconds and flows of networkx's Edmonds-Karp from every input token to one sink."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_weighted_edges_from(
        zip(network.from_.tolist(), network.to.tolist(), network.capacity.tolist(), strict=True), weight="capacity"
    )
    top, n = network.first["", network.depth[""]], network.sizes[""]
    start = time.process_time()
    flows = [
        nx.maximum_flow_value(graph, top + sink, key, flow_func=nx.algorithms.flow.edmonds_karp) for key in range(n)
    ]
    return time.process_time() - start, np.array(flows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--published", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    module = BertForSequenceClassification(BertConfig(num_hidden_layers=options.layers, vocab_size=1000)).eval()
    model = pellucid.Model(Loaded(module, None, "random BERT", None, torch.float32))
    ids = torch.randint(5, 1000, (1, options.tokens))

    with torch.no_grad():
        forward = cost(lambda: module(input_ids=ids))
    both = cost(lambda: module(input_ids=ids).logits[:, 0].sum().backward())
    print(
        f"{options.layers} layers x {options.tokens} tokens; plain forward {1000 * forward:.1f} ms, with backward {1000 * both:.1f} ms"
    )
    print("| method | CPU ms | plain forwards | forward + backwards |\n|---|---|---|---|")
    for name, work in {
        "patterns": lambda: patterns(model, ids),
        "rollout": lambda: rollout(model, ids),
        "norm-weighted": lambda: norm_weighted(model, ids),
        "gradient-weighted, target given": lambda: gradient_weighted(model, ids, 0),
        "relevance, target given": lambda: relevance(model, ids, 0),
    }.items():
        spent = cost(work)
        print(f"| {name} | {1000 * spent:.1f} | {spent / forward:.2f} | {spent / both:.2f} |")

    network = Network(mixed(model, model.inputs(ids), 0.5)[1])
    sink = cost(lambda: network.flows("", [0], ""))
    print(
        f"attention flow, {len(network.capacity)} edges: one sink, all {options.tokens} sources {1000 * sink:.1f} ms",
        end="; ",
    )
    every = cost(lambda: network.flows("", range(options.tokens), ""), 1)
    print(f"all sinks {1000 * every:.0f} ms; error bound {network.error_bound:.1e}")
    if options.published:
        slow, flows = published(network, 0)
        error = np.abs(flows - network.flows("", [0], "")[0]).max()
        print(f"networkx, one sink: {slow:.1f} s, {slow / sink:.0f} times as long; largest difference {error:.1e}")


if __name__ == "__main__":
    main()
