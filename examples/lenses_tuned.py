"""Does a tuned lens read SmolLM2 better than the logit lens, at every layer, on held-out text?

Trains translators on at most 200,000 tokens of UD English (or any text files), measures both lenses on other text,
and asks where the capital-city facts surface. Run it as

    python examples/lenses_tuned.py --data PATH_TO_ud_ewt [--tokens 200000] [--keep lens.safetensors]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import pellucid as pl
from pellucid.lenses import TunedLens, lens_quality, logit_lens, patchscope, prediction_depth

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.demo_model import smollm2

CAPITALS = {
    "France": " Paris",
    "Italy": " Rome",
    "Japan": " Tokyo",
    "Germany": " Berlin",
    "Spain": " Madrid",
    "Russia": " Moscow",
}


def text(path: Path) -> list[str]:
    """The sentences of a CoNLL-U file, joined document by document."""
    documents: list[list[str]] = [[]]
    for line in path.read_text().splitlines():
        if line.startswith("# newdoc"):
            documents.append([])
        elif line.startswith("# text = "):
            documents[-1].append(line.removeprefix("# text = "))
    return [" ".join(sentences) for sentences in documents if sentences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with en_ewt-ud-{train,dev}.conllu")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--keep", type=Path, help="where to save the lens (and to continue an interrupted fit)")
    options = parser.parse_args()
    model = pl.load(str(smollm2()))
    train, held_out = (text(options.data / f"en_ewt-ud-{part}.conllu") for part in ("train", "dev"))

    began = time.process_time()
    unfinished = options.keep and options.keep.with_suffix(".fit.safetensors")
    lens = TunedLens(tokens=options.tokens, context=128).fit(model, train, checkpoint=unfinished)
    if options.keep:
        lens.save(options.keep)
    print(f"{len(lens.losses_)} steps, {time.process_time() - began:.0f} s of CPU")
    found = lens_quality(model, held_out, lens, tokens=8192, context=128, share=0.25).data
    print("KL(model || layer) in nats, held-out text")
    for row in range(found.sizes["layer"]):
        at = found.isel(layer=row)
        print(
            f"{at.site.item():24s} tuned {at.tuned.item():6.3f}  logit {at.logit.item():7.3f}  gain {at.gain.item():7.3f} "
            f"[{at.low.item():.3f}, {at.high.item():.3f}]  same first choice {at.agreement.item():.2f}"
        )
    print("better at every layer:", bool((found.low > 0).all()))

    print("\nwhere the capital becomes the first choice")
    for country, capital in CAPITALS.items():
        prompt = f"The capital of {country} is"
        rows = [logit_lens(model, prompt, targets=[capital], positions=-1, through=through) for through in (None, lens)]
        first = [_first(r.data.target_rank.values[:, 0, 0]) for r in rows]
        depth = int(prediction_depth(rows[1]).values[0])
        print(
            f"{prompt:28s}{capital:9s} logit lens row {first[0]}, tuned lens row {first[1]} of 30; settled at row {depth}"
        )

    print("\na patchscope: what the state of the last word of a name says of itself, by layer")
    scope = patchscope(model, "The president of the country France", "France", layers=slice(12), max_new_tokens=6)
    for layer, said in zip(scope.data.layer.values, scope.data.text.values, strict=True):
        print(f"  layer {layer}: {said!r}")


def _first(rank: np.ndarray) -> int | None:
    """The first row where the rank is 0; 0 is the embedding."""
    found = np.flatnonzero(rank == 0)
    return int(found[0]) if len(found) else None


if __name__ == "__main__":
    main()
