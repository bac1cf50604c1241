"""What do heads look at? Dependency relations in MiniLM, groups of its heads, and induction heads in SmolLM2.

python examples/attention_heads.py --data en_ewt-ud-dev.conllu [--sentences 500] [--no-decoder]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import pellucid
from pellucid.attention import head_clusters, head_relations, head_summaries
from pellucid.probing.conllu import Treebank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--no-decoder", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import minilm, smollm2

    bank = Treebank.read(options.data, options.sentences, words=(5, 60))
    model = pellucid.load(minilm())
    found = head_relations(model, bank.sentences, least=50)
    table = found.to_frame("best", "baseline", "lead", "n", "best_layer", "best_head", "offset")
    print(f"MiniLM, {len(bank)} sentences: share of words found by the best head and by the best fixed offset")
    print("| relation | direction | head | found | offset | found | words |\n|---|---|---|---|---|---|---|")
    for row in table.sort_values("lead", ascending=False).head(12).itertuples():
        print(f"| {row.relation} | {row.direction} | {row.best_layer}.{row.best_head} | {row.best:.2f} | {row.offset:+d} "
              f"| {row.baseline:.2f} | {row.n} |")  # fmt: skip
    beaten = (found.lead.drop_sel(relation="all") > 0).values
    print(f"a head beats the best offset in {beaten.sum()} of {beaten.size} relations and directions")

    texts = [s.text for s in bank.sentences[:40]]
    groups = head_clusters(model, texts, n=6)
    sizes = np.bincount(groups.cluster.values.ravel())
    print(f"groups of MiniLM's heads: {sizes.tolist()}, silhouette {float(groups.silhouette):.2f}, by chance "
          f"{float(groups.silhouette_chance):.2f}")  # fmt: skip
    habits = head_summaries(model, texts)
    _strongest(habits, ("previous", "next", "separator", "first", "duplicate"))
    print(f"({time.process_time():.0f} s of CPU)")

    if not options.no_decoder:
        habits = head_summaries(pellucid.load(smollm2()), texts[:10])
        print("SmolLM2")
        _strongest(habits, ("previous", "first", "duplicate", "induction"))
        print(f"({time.process_time():.0f} s of CPU)")


def _strongest(habits: pellucid.results.Result, names: tuple[str, ...]) -> None:
    for name in names:
        values, chance = habits[name].values, float(np.nanmean(habits[f"{name}_chance"].values))
        order = np.argsort(-np.nan_to_num(values), axis=None)[:4]
        places = [np.unravel_index(i, values.shape) for i in order]
        print(f"  {name:9} " + ", ".join(f"{a}.{b} {values[a, b]:.2f}" for a, b in places) + f" (chance {chance:.2f})")


if __name__ == "__main__":
    main()
