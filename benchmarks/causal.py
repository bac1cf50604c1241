"""What does causal intervention on nodes cost, in forward passes of the same batch on the plain module?

    python -m benchmarks.causal [--repetitions 5]

GPT-2-small's shape with random weights, one thread, process CPU time; the plain pass is measured between the
pieces. "one by one" is what the same sweep costs with a plain forward for every edit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.circuits import METRIC, gpt2  # the same model
from benchmarks.clock import beside
from pellucid import causal

HEADS, RESIDUALS = "layers.*.attn.heads.*", "layers.*.resid_pre@*"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    model = gpt2()
    ids, other = torch.randint(0, 50257, (2, 8, 15), generator=torch.Generator().manual_seed(0))
    quiet: dict[str, Any] = {"metric": METRIC}

    def forward(x: torch.Tensor) -> Callable[[], None]:
        def plain() -> None:
            with torch.no_grad():
                model.module(x)

        return plain

    def backward() -> None:
        logits = model.module(ids).logits
        (logits[:, -1, 100] - logits[:, -1, 200]).sum().backward()
        model.module.zero_grad(set_to_none=True)

    one, eight = forward(ids[:1]), forward(ids)
    estimate = {"over": HEADS, "check": 0, **quiet}
    keys = {"over": "layers.*.attn.heads.*.k", "check": 0, **quiet}
    cases: list[tuple[str, str, Callable[[], None], Callable[[], Any]]] = [
        ("patching 12 x 15 residuals, 1 prompt", "180", one,
         lambda: causal.patching(model, ids[:1], other[:1], over=RESIDUALS, **quiet)),
        ("patching 144 heads, 8 prompts", "144", eight, lambda: causal.patching(model, ids, other, over=HEADS, **quiet)),
        ("mean ablation of 144 heads, 8 prompts", "144", eight,
         lambda: causal.ablation(model, ids, how="mean", reference=other, **quiet)),
        ("attribution patching, 144 heads", "-", eight, lambda: causal.attribution_patching(model, ids, other, **estimate)),
        ("the same, of a forward and backward", "-", backward,
         lambda: causal.attribution_patching(model, ids, other, **estimate)),
        ("144 keys with the QK fix, likewise", "-", backward, lambda: causal.attribution_patching(model, ids, other, **keys)),
        ("144 keys with QK fix and GradDrop, likewise", "-", backward,
         lambda: causal.attribution_patching(model, ids, other, grad_drop=True, **keys)),
    ]  # fmt: skip
    print(f"{'':46s}{'median':>8s}  lowest, highest    one by one")
    for name, naive, plain, work in cases:
        cost = beside(plain, work, repetitions)
        print(f"{name:46s}  {cost}    {naive:>8s}", flush=True)


if __name__ == "__main__":
    main()
