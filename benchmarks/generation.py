"""What does it cost to watch a generation? In plain `transformers.generate` of the same module, in one process, by turns.

    python -m benchmarks.generation [--trained] [--rounds 7] [--batches 1 8] [--tokens 30]

SmolLM2's shape with random weights (or the trained file), prompts of 15 tokens, one thread, process CPU time: in each
round every kind of generation runs between two plain ones, and the median ratio counts. All write the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=30)
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
        ratios: dict[str, list[float]] = {name: [] for name in works}
        plains: list[float] = []
        for _ in range(options.rounds):
            for name, work in works.items():
                before = cpu(lambda name=name: plain(name == "sampled"))  # type: ignore[misc]
                spent = cpu(work)
                after = cpu(lambda name=name: plain(name == "sampled"))  # type: ignore[misc]
                plains.append(before)
                ratios[name].append(2 * spent / (before + after))
        print(f"batch {batch}: {options.tokens} tokens cost {statistics.median(plains):.2f} CPU s plainly")
        for name, found in ratios.items():
            print(f"  {name:20} {statistics.median(found):.3f} [{min(found):.3f}, {max(found):.3f}]")


if __name__ == "__main__":
    main()
