"""What does it cost to watch a generation? In plain `transformers.generate` of the same module, in one process, by turns.

    python -m benchmarks.generation [--trained] [--rounds 5] [--seconds 100] [--batches 1 8] [--tokens 30] [--only one]

SmolLM2's shape with random weights (or the trained file), prompts of 15 tokens, one thread, process CPU time: in each
round every kind of generation runs between two plain ones, and the median ratio counts; rounds end after --seconds of CPU. All write the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import pellucid as pl
from benchmarks.clock import cpu
from benchmarks.workloads import SHAPES, tokenizer

LAYER = 14
SITE = f"layers.{LAYER}.resid_post"


def kinds(model: pl.Model, ids: torch.Tensor, tokens: int) -> dict[str, Callable[[], Any]]:
    """By name: what is compared with plain generation."""
    vector = torch.randn(model.module.config.hidden_size, generator=torch.Generator().manual_seed(4)) / 5

    def said(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(ids, max_new_tokens=tokens, **options)

    def score(step: Any) -> None:
        step.record(step[SITE] @ vector)

    gate = pl.Watch(SITE, lambda step: step[SITE] @ vector > 0)
    after = f"layers.{LAYER + 1}.resid_post"
    return {
        "nothing": said(),
        "one site kept": said(keep=SITE),
        "one site watched": said(when=pl.Watch(SITE, score)),
        "all layers watched": said(when=pl.Watch("layers.*.resid_post", lambda step: None)),
        "one steering edit": said(edits=[pl.Steer(after, vector)]),
        "a conditional edit": said(edits=[pl.Steer(after, vector, when=gate)]),
        "scores kept": said(scores=True),
        "sampled": said(temperature=0.8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=100, help="of CPU for each batch: no round begins after them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--only", nargs="+", help="the kinds that are asked about, by the beginning of their names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES["smollm2-trained" if options.trained else "smollm2"]
    model = pl.load(shape.model(), tokenizer=tokenizer(shape.vocabulary))
    for batch in options.batches:
        ids = shape.tokens(batch, 15, 1)
        greedy = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": options.tokens}

        def plain(sample: bool = False, given: dict[str, Any] = greedy) -> torch.Tensor:
            drawn = {"temperature": 0.8} if sample else {}
            return model.module.generate(**given, do_sample=sample, **drawn)  # type: ignore[no-any-return]

        works = kinds(model, ids, options.tokens)
        assert torch.equal(works["nothing"]().tokens, plain()[:, 15:])
        asked = [n for n in works if not options.only or n.startswith(tuple(options.only))]
        ratios: dict[str, list[float]] = {name: [] for name in asked}
        plains: list[float] = []
        started = time.process_time()
        for turn in range(options.rounds):
            if time.process_time() - started > options.seconds:
                break
            for sample in (False, True):  # every kind between two plain ones, which its neighbours share
                mine = [n for n in asked if (n == "sampled") == sample]
                times = [cpu(lambda s=sample: plain(s))] if mine else []  # type: ignore[misc]
                for name in mine[turn % max(1, len(mine)) :] + mine[: turn % max(1, len(mine))]:
                    spent = cpu(works[name])
                    times.append(cpu(lambda s=sample: plain(s)))  # type: ignore[misc]
                    ratios[name].append(2 * spent / (times[-1] + times[-2]))
                plains += times
            said = ", ".join(f"{name} {found[-1]:.3f}" for name, found in ratios.items())
            print(f"  batch {batch}, round {turn + 1}: {said}", flush=True)
        print(f"batch {batch}: {options.tokens} tokens cost {statistics.median(plains):.2f} CPU s plainly")
        for name, found in ratios.items():
            print(
                f"  {name:20} {statistics.median(found):.3f} [{min(found):.3f}, {max(found):.3f}] of {len(found)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
