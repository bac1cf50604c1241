"""Which heads of SmolLM2 carry the gender of a profession, how few are they, and what does it cost to remove it?

    python examples/causal_mediation.py [--model MODEL] [--professions FILE] [--n 24] [--texts FILE]

Without a file the professions are those of tasks.gendered_professions (swapped for one of the opposite stereotype); with a
JSON list of professions each is swapped for "man" or "woman" as by Vig et al. (2020). --texts names a text file to measure
perplexity on, one text a line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pellucid
from pellucid.causal.mediation import concentration, interaction, mediation
from pellucid.causal.mitigation import mitigation
from pellucid.causal.professions import profession_prompts
from pellucid.tasks import gendered_professions

TEXTS = [
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface there.",
    "The library opens at nine in the morning and closes late in the evening, except on Sundays and holidays.",
    "To bake bread you need flour, water, salt and yeast. Mix them, let the dough rise and bake it in a hot oven.",
    "The river flows from the hills in the north through three large lakes before it reaches the sea.",
    "A triangle with two equal sides has two equal angles, and a triangle with three equal sides has three.",
    "After the war the town was rebuilt, but the old bridge and most of the houses near the harbour were lost.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--professions", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--n", type=int, default=24)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    if options.professions:
        prompts = profession_prompts(model.tokenizer, options.professions, options.n)
    else:
        prompts = gendered_professions(model.tokenizer, options.n)
    texts = options.texts.read_text().splitlines() if options.texts else TEXTS
    print(f"{len(prompts)} pairs such as {prompts.clean[0]!r} / {prompts.corrupted[0]!r}")

    for name, over in (("heads", "layers.*.attn.heads.*"), ("MLPs", "layers.*.mlp.out")):
        result = mediation(model, prompts, over=over)
        low, high = result["total_low"].item(), result["total_high"].item()
        if name == "heads":
            print(f"total effect on the odds {result['total_effect'].item():.2f} [{low:.2f}, {high:.2f}]")
        few = concentration(result)
        print(
            f"{name}: half of all indirect effect in {few['half'].item()} of {few.held.size}, "
            f"effective number {few['effective'].item():.1f}, gini {few['gini'].item():.2f}; strongest:"
        )
        for row in result.top(6).itertuples():
            where = f"layer {row.layer}" + (f" head {row.head}" if name == "heads" else "")
            print(f"  {where}: NIE {row.nie:+.3f} [{row.nie_low:+.3f}, {row.nie_high:+.3f}], NDE {row.nde:+.3f}")

    curve = interaction(model, prompts[: max(4, len(prompts) // 4)], k=5, pool=10, draws=2)
    print("heads together, NIE by k (a quarter of the pairs): greedy, strongest, random, sum of single effects")
    for k in curve.k.values:
        row = [float(curve[name].sel(k=k)) for name in ("greedy", "strongest", "random", "summed")]
        print(f"  {k}: " + ", ".join(f"{x:+.3f}" for x in row) + f"  + {curve.chosen.sel(k=k).item()}")
    print(f"  all heads: {curve['together'].item():+.3f} of {curve['total_effect'].item():+.3f}")

    result = mitigation(model, prompts, texts, sizes=(1, 2, 4, 8, 16, 32), draws=2)
    before = result["bias_before"].item()
    print(
        f"strongest heads held at their mean: held-out bias {before:.2f} nats, perplexity {result['perplexity_before'].item():.2f}"
    )
    for size in result.size.values:
        here = {
            name: float(result[name].sel(size=size))
            for name in map(str, result.data.data_vars)
            if "size" in result[name].dims
        }
        print(
            f"  {size}: bias {here['bias']:.2f} [{here['low']:.2f}, {here['high']:.2f}], {100 * here['kept']:.0f} % kept, "
            f"price {100 * here['price']:+.1f} %; random {here['random_bias']:.2f} at "
            f"{100 * (here['random_perplexity'] / result['perplexity_before'].item() - 1):+.1f} %"
        )


if __name__ == "__main__":
    main()
