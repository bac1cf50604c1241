"""What does a training step of a top-k dictionary cost beside its dense form under autograd?

    python -m benchmarks.dictionaries [--repetitions 5] [--rows 2048] [--k 32]

768 x 12288, random rows and weights, one thread, process CPU time, Adam included on both sides. "dense" is the code
anyone would write: all features computed, the k largest scattered into zeros, decoded by a full product, autograd. The
others are `TopKLoss.step`, choosing features by a product in float32 or in bfloat16; with AuxK a quarter of the features
are dead. Dense is measured before and after each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.clock import beside
from pellucid.neurons.dictionaries import TopK, TopKLoss

D, FEATURES = 768, 12288


def parameters() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=g), dim=1)
    start = {"encoder": decoder.clone(), "encoder_bias": torch.zeros(FEATURES), "decoder": decoder, "decoder_bias": torch.zeros(D)}  # fmt: skip
    return {name: value.requires_grad_() for name, value in start.items()}


def dense(x: torch.Tensor, k: int) -> Callable[[], None]:
    p = parameters()
    adam = torch.optim.Adam(list(p.values()), fused=True)

    def step() -> None:
        f = TopK(k)(x @ p["encoder"].T + p["encoder_bias"])
        loss = (f @ p["decoder"] + p["decoder_bias"] - x).pow(2).sum(1).mean() / D
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def sparse(x: torch.Tensor, k: int, scan: torch.dtype, dead: int) -> Callable[[], None]:
    p, objective = parameters(), TopKLoss(k)
    adam = torch.optim.Adam(list(p.values()), fused=True)

    def step() -> None:
        objective.step(p, x, x, torch.arange(dead), 1.0, scan)
        adam.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(options.rows, D, generator=torch.Generator().manual_seed(1))
    plain = dense(x, options.k)
    for name, scan, dead in (
        ("sparse, float32", torch.float32, 0),
        ("sparse, bfloat16 scan", torch.bfloat16, 0),
        ("sparse, bfloat16 scan, AuxK", torch.bfloat16, FEATURES // 4),
    ):
        cost = beside(plain, sparse(x, options.k, scan, dead), options.repetitions)
        print(f"{name:30s}{cost} dense steps: {1 / cost.median:.1f}x faster", flush=True)


if __name__ == "__main__":
    main()
