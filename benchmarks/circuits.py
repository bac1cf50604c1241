"""What does finding a circuit cost, in forward-and-backward passes of the same batch on the plain module?

    python -m benchmarks.circuits [--repetitions 5] [--skip-acdc]

GPT-2-small's shape with random weights, 8 prompts of 15 tokens, one thread, process CPU time; the plain pass
is measured between the pieces. "naive" is the derivative of the metric by one mask per edge, every query, key
and value read apart.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pellucid as pl
from benchmarks.clock import beside, cpu
from pellucid import circuits
from pellucid.causal.contrast import ask
from tests.zoo.tokenizer import tokenizer

METRIC = pl.metrics.logit_difference(100, 200)


def gpt2(**config: int) -> pl.Model:
    torch.manual_seed(0)
    return pl.load(GPT2LMHeadModel(GPT2Config(**config)).eval(), tokenizer=tokenizer())


def attribution(repetitions: int) -> None:
    model = gpt2()
    ids, other = torch.randint(0, 50257, (2, 8, 15))
    same: dict[str, Any] = {"how": "resample", "reference": other}

    def plain() -> None:
        logits = model.module(ids).logits
        (logits[:, -1, 100] - logits[:, -1, 200]).mean().backward()
        model.module.zero_grad(set_to_none=True)

    print(f"{len(circuits.wire(model).graph)} edges; in forward-and-backward passes: median [lowest, highest]")
    for name, options in {"EAP": {}, "EAP-IG, 5 steps": {"method": "eap-ig-inputs", "steps": 5}}.items():
        cost = beside(
            plain,
            lambda options=options: circuits.edge_attribution(model, ids, METRIC, **same, **options),
            repetitions,
        )
        print(f"{name:20s} {cost}", flush=True)
    found = circuits.edge_attribution(model, ids, METRIC, **same)
    runner = circuits.Runner.of(circuits.wire(model), ask(model, ids, METRIC, other), "resample")
    mask = found.graph.possible.float().requires_grad_()
    start = cpu(plain)
    spent = cpu(lambda: mask.__setattr__("grad", torch.autograd.grad(runner.scores(mask).mean(), mask)[0]))
    assert mask.grad is not None
    gap = float((found.tensor + mask.grad * found.graph.possible).abs().max())
    print(
        f"{'naive, split q k v':20s} {spent / start:6.2f}    largest difference {gap:.1e} "
        f"(scores up to {float(found.tensor.abs().max()):.2g})"
    )


def cutting() -> None:
    """Counted as auto-circuit is: a run of the whole model on the prompts is 1, a run from block l of L on (L - l) / L,
    every variant of a batch counts, tried in vain or not, and so do the passes that record messages."""
    model = gpt2(n_layer=4, n_head=4, n_embd=64, vocab_size=300)
    ids, other = torch.randint(5, 300, (2, 8, 15))
    edges = len(circuits.wire(model).graph)
    print(f"\nACDC on 4 layers of 4 heads, in full-model-equivalent forwards (one per edge: {edges})")
    for batch in (1, 8):
        for threshold in (1e-4, 1e-3, 1e-2, 1e-1):
            found = circuits.acdc(model, ids, METRIC, threshold=threshold, how="resample", reference=other, batch=batch)
            print(
                f"  batch {batch}, threshold {threshold:g}: {found.attrs['forwards']:6.1f}, {len(found)} edges left",
                flush=True,
            )


def heads(repetitions: int) -> None:
    model = gpt2()
    ids, other = torch.randint(0, 50257, (2, 8, 15))
    clean = model.inputs(ids)
    source = model.run(other, keep="layers.*.attn.z_out")
    edits = [pl.Patch(site, source) for site in model.sites("layers.*.attn.heads.*")]
    with torch.no_grad():
        cost = beside(lambda: model.module(ids), lambda: model.sweep(clean, edits, METRIC), repetitions)
    print(
        f"\nexact patching of all {len(edits)} heads through the planner: {cost[0]:.1f} plain forwards "
        f"[{cost[1]:.1f}, {cost[2]:.1f}]",
        flush=True,
    )


def edges(repetitions: int, n: int = 64) -> None:
    """Exact patching of edges drawn at random, in plain forward passes an edge."""
    model = gpt2()
    ids, other = torch.randint(0, 50257, (2, 8, 15))
    graph = circuits.wire(model).graph
    every = list(graph.edges())
    rows = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:n].tolist()
    names = [graph.name(*every[i]) for i in rows]
    with torch.no_grad():
        cost = beside(
            lambda: model.module(ids),
            lambda: circuits.exact_patching(model, ids, METRIC, how="resample", reference=other, edges=names),
            repetitions,
        )
    print(f"exact patching of {n} edges drawn at random: {cost[0] / n:.2f} plain forwards each")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--skip-acdc", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    attribution(arguments.repetitions)
    if not arguments.skip_acdc:
        cutting()
    heads(arguments.repetitions)
    edges(1)
