"""Is the truth of a simple statement readable from SmolLM2's residual stream, at which layers, on topics never seen?

    python examples/probing_truth.py --data FOLDER [--model MODEL] [--n 80] [--draws 5]

FOLDER holds relation files of the LRE data (factual/country_capital_city.json, ...). Each topic gives true statements and as
many false ones, which take another subject's answer; probes are trained on all topics but one and judged on that one. The
control does the same with labels shuffled within each topic.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import pellucid
from pellucid.probing import questions, read, relation_statements

TOPICS = (
    "factual/country_capital_city",
    "factual/country_language",
    "factual/country_largest_city",
    "factual/city_in_country",
    "factual/landmark_in_country",
    "factual/food_from_country",
    "factual/person_plays_pro_sport",
    "commonsense/object_superclass",
    "commonsense/work_location",
    "linguistic/adj_antonym",
    "linguistic/verb_past_tense",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--n", type=int, default=80)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    asked = relation_statements(options.data, TOPICS, options.n)
    print(
        f"{len(asked)} statements on {len(TOPICS)} topics, such as {asked.spans.texts[0]!r} ({asked.labels[0]})",
        flush=True,
    )
    sites = ["embed", *(f"layers.{i}.resid_post" for i in range(2, len(model.anatomy.stacks[-1].blocks), 3))]
    features = read(model, asked, sites=sites, pool="last")
    for kind in ("mean", "logistic"):
        found = questions(features, asked, kind=kind, draws=options.draws)
        print(f"\n{kind}: layer, accuracy on held-out topics [95 % interval], labels shuffled [range]")
        for layer in range(found.layer.size):
            here = found.data.isel(layer=layer)
            print(
                f"  {here.layer.item():>5}  {here.accuracy.item():.3f} [{here.low.item():.3f}, {here.high.item():.3f}]   "
                f"{here.shuffled.item():.3f} [{here.shuffled_low.item():.3f}, {here.shuffled_high.item():.3f}]"
            )
        best = int(np.argmax(found.accuracy.values))
        topics = sorted(zip(found.by_topic.values[best], found.topic.values, strict=True), reverse=True)
        print(
            f"  by topic at layer {found.layer.values[best]}: "
            + ", ".join(f"{t.split('/')[1]} {a:.2f}" for a, t in topics),
            flush=True,
        )


if __name__ == "__main__":
    main()
