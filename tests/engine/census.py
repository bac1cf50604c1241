"""Which ways of running a sweep serve each model type, and are they right on a mixed bag of edits?

python -m tests.engine.census [TYPE ...]        every type of the zoo: some minutes; 0 wrong is the only good answer
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import torch

import pellucid
from pellucid.engine.run import execute
from pellucid.engine.rungs import LADDER
from pellucid.engine.trial import certified
from pellucid.errors import PellucidError
from tests.engine.bag import Bag, batches, one_by_one, scores
from tests.zoo import UNBUILDABLE, Entry, build, inputs, model_types, tokenizer


def examine(entry: Entry, variants: int = 20) -> tuple[list[str], list[str]]:
    """The rungs that serve a type, and every disagreement with plain runs."""
    module = build(entry)
    model = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    may = [rung.name for rung in LADDER if not certified(model.anatomy).refused(rung)]
    wrong = []
    for name, (given, other) in batches(model).items():
        bag = []
        for edits in Bag(model, given, other, seed=len(name)).variants(variants):
            try:
                execute(model.anatomy, given, edits=edits)
                bag.append(edits)
            except PellucidError:  # refused here, and so everywhere
                continue
        logits = model.run(given).logits
        kinds = scores(logits, given.stream("").padded)
        metric = kinds[random.Random(entry.model_type + name).choice(sorted(kinds))]
        truth = one_by_one(model, given, bag, metric) if bag else torch.zeros(0, 1)
        for rung in may if bag else ():
            try:
                made = model.sweep(given, bag, metric, executor=rung).values
            except PellucidError:  # not for these edits or this metric
                continue
            error = float((made - truth).abs().max() / truth.abs().max().clamp_min(1))
            if not error < 2e-4:
                wrong.append(f"{name}, {rung}: off by {error:.1e}")
    return may, wrong


def main() -> None:
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for entry in model_types():
        if entry.model_type in UNBUILDABLE or (sys.argv[1:] and entry.model_type not in sys.argv[1:]):
            continue
        try:
            may, wrong = examine(entry)
        except PellucidError as error:
            may, wrong = [], []
            print(f"{entry.model_type}: {error}")
        counts.update([*may, "types", *(["wrong"] if wrong else [])])
        print(f"{entry.model_type:28} {may[0] if may else 'none':16}", *wrong, sep="  ", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
