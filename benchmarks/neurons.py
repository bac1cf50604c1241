"""How much of the plain forward pass's throughput is left when every neuron of every layer is harvested?

    python -m benchmarks.neurons [--repetitions 5] [--data FOLDER_OF_ud_ewt]

SmolLM2-135M (30 layers of 1536 neurons), batches of like length of about 2,000 tokens, one thread, process CPU time. "plain"
is the model's own forward over the same batches, all logits; "without logits" computes only the last one. The harvest keeps
the 20 largest activations, moments and a uniform sample of 1,024 tokens for each of the 46,080 neurons, and ends each pass
with the last layer's neurons. "whole pass" is a harvest that also reads the last residual, so that no block is left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import pellucid as pl
from benchmarks.clock import cpu
from pellucid.corpus import Corpus, by_length, inputs
from pellucid.neurons import harvest

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

BATCH, TEXTS = 2048, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--data", type=Path, help="sentences of a treebank instead of random tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = pl.load(str(smollm2()))
    texts = _texts(options.data)
    rows = list(Corpus(texts, context=256, packed=False, long="windows").rows(model))
    prepared = [inputs(model, group) for group in by_length(rows, BATCH)]
    tokens = sum(len(row.ids) for row in rows)

    def plain(**forward: int) -> None:
        with torch.no_grad():
            for given in prepared:
                model.module(**given.tensors, **forward)

    def gather(*more: str) -> None:
        harvest(model, texts, ["layers.*.mlp.neurons", *more], batch_tokens=BATCH)

    works = {
        "without logits": lambda: plain(logits_to_keep=1),
        "harvest": gather,
        "harvest, whole pass": lambda: gather("layers.29.resid_post"),
    }
    plain(), gather()
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.repetitions):
        for name, work in works.items():
            before = cpu(plain)
            spent = cpu(work)
            ratios[name].append((before + cpu(plain)) / 2 / spent)
    print(f"{len(texts)} texts, {tokens} tokens, {len(prepared)} batches; throughput, the plain forward's being 1")
    for name, found in ratios.items():
        found.sort()
        print(f"{name:22s}{found[len(found) // 2]:6.2f} [{found[0]:.2f}, {found[-1]:.2f}]")


def _texts(data: Path | None) -> list[list[int]] | list[str]:
    if data is not None:
        lines = (data / "en_ewt-ud-train.conllu").read_text(encoding="utf-8").splitlines()
        return [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")][:TEXTS]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 49_000, (n,), generator=generator).tolist() for n in range(16, 16 + TEXTS // 2)]


if __name__ == "__main__":
    main()
