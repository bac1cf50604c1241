"""Several prompts in one call against a loop over them: every attribution method on MiniLM, 32 sentences of mixed length.

    python -m benchmarks.attribution_batch [method ...]

Prints CPU seconds of both, their ratio, the ratio at the machine's limit, and how far the numbers are apart, relative to the
largest. A loop over a method that perturbs is batched already, prompt by prompt: `rows` is how many rows its passes had on
average. The limit is what the passes of the loop cost as bare ones: the same rows of the same lengths, forward (and
backward where there was a graph), in batches of one length and up to 512, 1,024 or 2,048 tokens, whichever is quickest, and
nothing else: no padding, no edits, no Python of a method. More than loop / limit no way of batching can gain.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import numpy as np
import torch

import pellucid as pl
from benchmarks.measuring import cpu
from tests.models import minilm_path

WORDS = [
    "a",
    "man",
    "is",
    "eating",
    "food",
    "in",
    "the",
    "park",
    "while",
    "two",
    "dogs",
    "run",
    "after",
    "an",
    "old",
    "red",
    "ball",
    "that",
    "nobody",
    "threw",
    "and",
    "it",
    "rains",
]
LENGTHS = [3, 5, 4, 8, 6, 12, 5, 22, 7, 4, 9, 15, 6, 5, 11, 18] * 2
SENTENCES = [" ".join(WORDS[(3 * i) % 11 :][:n] or WORDS[:n]).capitalize() + "." for i, n in enumerate(LENGTHS)]
TARGET = "Someone is having a meal outdoors."
OPTIONS: dict[str, dict[str, object]] = {
    "smoothgrad": {"draws": 8},
    "lime": {"draws": 64},
    "integrated_gradients": {"steps": 8},
    "expected_gradients": {"references": SENTENCES[:4], "draws": 8},
    "kernel_shap": {"draws": 64},
    "shapley": {"draws": 4},
    "exact_shapley": {"players": [(1, 2), (2, 3), (3, 4)]},
    "owen": {"draws": 2},
    "partition": {"evaluations": 40},
}


class Passes:
    """What went through the first block: rows and lengths, and whether with a graph."""

    def __init__(self, model: pl.Model) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.block = model.module.get_submodule(model.anatomy.stacks[-1].blocks[0].module)

    def __enter__(self) -> Passes:
        def note(module: object, args: object, kwargs: object) -> None:
            x = args[0] if args else kwargs["hidden_states"]  # type: ignore[index]
            self.seen.append((x.shape[0], x.shape[1], x.requires_grad))

        note.__module__ = "pellucid.benchmark"  # no user's hook: a planner would run every variant by itself for it
        self.handle = self.block.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()


def limit(model: pl.Model, seen: list[tuple[int, int, bool]]) -> float:
    """Seconds of CPU of these rows through the bare model, in the batches that are quickest."""
    rows: Counter[tuple[int, bool]] = Counter()
    for n, length, graph in seen:
        rows[length, graph] += n
    table = model.module.get_input_embeddings().weight

    def bare(size: int) -> None:
        for (length, graph), n in rows.items():
            for start in range(0, n, max(1, size // length)):
                x = table[: length * min(n - start, max(1, size // length))].detach().view(-1, length, table.shape[1])
                with torch.set_grad_enabled(graph):
                    made = model.module(inputs_embeds=x.requires_grad_(graph)).last_hidden_state
                    if graph:
                        torch.autograd.grad(made[:, 0].sum(), x)

    return min(cpu(lambda size=size: bare(size))[0] for size in (512, 1024, 2048))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    model = pl.load(minilm_path())
    target = pl.attribution.similarity(TARGET)
    for p in model.module.parameters():
        p.requires_grad_(False)
    print(f"{'method':22} {'loop':>7} {'one call':>9} {'ratio':>6} {'limit':>6} {'rows':>6} {'apart':>9}")
    for name in names or pl.attribution.METHODS:
        method, options = pl.attribution.METHODS[name], OPTIONS.get(name, {})

        def loop(method=method, options=options):  # type: ignore[no-untyped-def]
            return [method(model, text, target, **options) for text in SENTENCES]

        with pl.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps are enough to time them
            try:
                method(model, SENTENCES[:2], target, **options)
            except pl.errors.Refused as why:
                print(f"{name:22} refused: {why}")
                continue
            with Passes(model) as passes:
                loop()
            slow, alone = cpu(loop)
            fast, together = cpu(lambda: method(model, SENTENCES, target, **options))  # noqa: B023
        pairs = [(a.data.attribution.values, b.data.attribution.values) for a, b in zip(alone, together, strict=True)]
        apart = max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs)
        most, rows = slow / limit(model, passes.seen), sum(n for n, *_ in passes.seen) / len(passes.seen)
        print(f"{name:22} {slow:7.2f} {fast:9.2f} {slow / fast:6.2f} {most:6.2f} {rows:6.1f} {apart:9.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
