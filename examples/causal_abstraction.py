"""Is the variable where the program says, and does distributed search find it from a random start?

    python examples/causal_abstraction.py

On a transformer with hand-set weights that answers whether (a = b) and (c = d) are alike (tests/causal/programs.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pellucid.causal.abstraction import alignment_search, interchange
from pellucid.causal.alignment import DistributedAlignment
from tests.causal.programs import TASK, both_alike


def main() -> None:
    model = both_alike()
    print("interchange-intervention accuracy of 'same' = (a = b)   [interval]  on changed pairs")
    for site in (
        "layers.0.attn.heads.0@-1",
        "layers.0.attn.heads.1@-1",
        "layers.1.attn.heads.0@-1",
        "layers.0.mlp.out@0",
    ):
        r = interchange(model, TASK, {"same": site})
        numbers = [r[name].item() for name in ("accuracy", "low", "high", "changed")]
        print("  {:28} {:.3f} [{:.3f}, {:.3f}] {:.3f}".format(site, *numbers))
    search = alignment_search(model, TASK, "same", over="layers.*.attn.heads.*@-1")
    print(f"best of all heads: {search.data.attrs['best']}, {search['held_out'].item():.3f} on held-out pairs\n")
    print("distributed search at layers.0.resid_post@-1: accuracy, chance, shuffled model, arbitrary labels")
    for seed in range(5):
        r = DistributedAlignment(TASK, "same", "layers.0.resid_post@-1", size=1, seed=seed).fit(model).result_
        row = [r[name].item() for name in ("accuracy", "chance", "shuffled_model", "arbitrary_labels")]
        print(f"  seed {seed}: " + "  ".join(f"{x:.3f}" for x in row))
    free = DistributedAlignment(TASK, "same", "layers.0.resid_post@-1", size=None).fit(model)
    row = [free.result_[name].item() for name in ("accuracy", "shuffled_model", "arbitrary_labels")]
    print(f"boundless: {free.size_} of 16 directions: " + "  ".join(f"{x:.3f}" for x in row))


if __name__ == "__main__":
    main()
