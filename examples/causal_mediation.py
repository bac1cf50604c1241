"""Which parts of SmolLM2 carry the gender of a profession, how few are they, and what does it cost to remove it?

    python examples/causal_mediation.py [--data FOLDER] [--n 24] [--texts FILE] [--model MODEL]

Mediation after Vig et al. (2020): "The nurse slept well because" against "The man slept well because", by heads, layers
and neurons. Mitigation on pairs of professions of opposite stereotype. --data FOLDER takes the professions of
causal_mediation/experiment_data there, and sentences of ud_ewt for the perplexity; else both are our own lists.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

import pellucid
from pellucid import Model
from pellucid.causal import (
    attribution_patching,
    concentration,
    interaction,
    mediation,
    mitigating_edits,
    mitigation,
    profession_prompts,
)
from pellucid.metrics import logit_difference
from pellucid.results import Result
from pellucid.tasks import Prompts, gendered_professions
from pellucid.tasks.professions import EVENTS, STEREOTYPES

TEXTS = [
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface there.",
    "The library opens at nine in the morning and closes late in the evening, except on Sundays and holidays.",
    "To bake bread you need flour, water, salt and yeast. Mix them, let the dough rise and bake it in a hot oven.",
    "The river flows from the hills in the north through three large lakes before it reaches the sea.",
    "A triangle with two equal sides has two equal angles, and a triangle with three equal sides has three.",
    "After the war the town was rebuilt, but the old bridge and most of the houses near the harbour were lost.",
]


def sentences(path: Path, n: int = 40) -> list[str]:
    """Sentences of 10 to 40 words of a CoNLL-U file, spread over it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")]
    texts = [text for text in texts if 10 <= len(text.split()) <= 40]
    return texts[:: max(1, len(texts) // n)][:n]


def shown(result: Result, name: str, rows: int) -> None:
    for variable, unit in (("nie", "odds"), ("log_nie", "log odds")):
        few = concentration(result, variable)
        counts = [f"{share:.0%} in {int(np.searchsorted(few.held.values, share)) + 1}" for share in (0.5, 0.8, 0.9)]
        print(f"{name}, {unit}: of the summed sizes of {few.held.size} indirect effects {', '.join(counts)}; effective "
              f"number {few['effective'].item():.1f}, gini {few['gini'].item():.2f}")  # fmt: skip
    print("  strongest:")
    for row in result.top(rows).itertuples():
        labels = [f"{dim} {getattr(row, str(dim))}" for dim in result.main.dims]
        print(f"  {' '.join(labels)}: NIE {row.nie:+.3f} [{row.nie_low:+.3f}, {row.nie_high:+.3f}], NDE {row.nde:+.3f} "
              f"[{row.nde_low:+.3f}, {row.nde_high:+.3f}]; in nats {row.log_nie:+.2f} and {row.log_nde:+.2f}")  # fmt: skip


def effects(model: Model, prompts: Prompts) -> None:
    heads = mediation(model, prompts)
    ends = [heads[name].item() for name in ("total_effect", "total_low", "total_high")]
    nats = float((heads.corrupted - heads.clean).mean())
    print("total effect on the odds {:.2f} [{:.2f}, {:.2f}]".format(*ends), f"= {nats:+.2f} nats of log odds")
    shown(heads, "heads", 8)
    shown(mediation(model, prompts, over="layers.*.mlp.out"), "MLPs", 5)
    shown(mediation(model, prompts, over="layers.*.attn.out"), "attentions", 5)
    shown(mediation(model, prompts, over="layers.*"), "layers (attention and MLP together)", 5)


def neurons(model: Model, prompts: Prompts, checked: int) -> None:
    """All of them estimated by one gradient, the strongest and as many random ones measured."""
    right, wrong = ([[ids[0] for ids in each] for each in side] for side in (prompts.answer_ids, prompts.wrong_ids))
    odds = logit_difference(wrong, right)
    found = attribution_patching(model, prompts.clean, prompts.corrupted, over="layers.*.mlp.neurons.*", metric=odds,
                                 denoise=False, check=checked)  # fmt: skip
    sizes = np.sort(np.abs(found.estimate.values).ravel())[::-1]
    counts = [int(np.searchsorted(sizes.cumsum() / sizes.sum(), share)) + 1 for share in (0.5, 0.8, 0.9)]
    print(f"neurons: {sizes.size} estimates of the change of the log odds; of their summed sizes half in {counts[0]}, 80% "
          f"in {counts[1]}, 90% in {counts[2]}; against exact patches of {checked} top and {checked} random ones: rank "
          f"correlation {found['spearman'].item():.2f}, largest random effect {found['missed'].item():.2f} of the largest")  # fmt: skip
    top = [str(name) for name in found.checked.values[found.ranked_high.values]]
    for row in mediation(model, prompts, over=top).top(6).itertuples():
        print(f"  {row.site}: NIE {row.nie:+.3f} [{row.nie_low:+.3f}, {row.nie_high:+.3f}], "
              f"NDE {row.nde:+.3f}; {row.log_nie:+.2f} nats")  # fmt: skip
    together = mediation(model, prompts, over={"top": top})
    print(f"  these {len(top)} neurons together: NIE {together.nie.item():+.3f}")


def sets(model: Model, prompts: Prompts) -> None:
    curve = interaction(model, prompts, k=8, pool=16, draws=3)
    print(
        f"heads together on {len(prompts)} pairs, NIE by k: greedy [interval], strongest, random, sum of single effects"
    )
    for k in curve.k.values:
        names = ("greedy", "low", "high", "strongest", "random", "summed")
        row = [float(curve[name].sel(k=k)) for name in names]
        print(
            "  {}: {:+.3f} [{:+.3f}, {:+.3f}], {:+.3f}, {:+.3f}, {:+.3f}".format(k, *row),
            f" + {curve.chosen.sel(k=k).item()}",
        )
    print(f"  all heads: {curve['together'].item():+.3f} of {curve['total_effect'].item():+.3f}")


def remedy(model: Model, prompts: Prompts, texts: list[str]) -> None:
    found = mitigation(model, prompts, texts, sizes=(1, 2, 4, 8, 16), draws=2)
    half = len(prompts) // 2
    named = known_gender(model)
    before = named([])
    ends = [found[f"bias_before{end}"].item() for end in ("", "_low", "_high")]
    print("strongest heads held at their mean: held-out bias {:.2f} [{:.2f}, {:.2f}] nats,".format(*ends),
          f"perplexity {found['perplexity_before'].item():.2f}, 'woman' against 'man' {before:.2f} nats")  # fmt: skip
    for size in found.size.values:
        row = {str(name): float(value) for name, value in found.data.sel(size=size).data_vars.items() if not value.dims}
        edits = mitigating_edits(model, prompts[:half], [str(s) for s in found.mediators.values[:size]])
        print(f"  {size}: bias {row['bias']:.2f} [{row['low']:.2f}, {row['high']:.2f}], {row['kept']:.0%} kept, price "
              f"{row['price']:+.1%}; 'woman' against 'man' {named(edits) / before:.0%} kept; random heads: "
              f"{row['random_bias'] / row['bias_before']:.0%} kept, price {row['random_perplexity'] / row['perplexity_before'] - 1:+.1%}")  # fmt: skip


def known_gender(model: Model) -> Any:
    """What should stay: how far 'woman' in place of 'man' moves the log odds of "she" over "he", under edits."""
    metric = logit_difference(" she", " he")

    def measured(edits: list[Any]) -> float:
        sides = [[f"The {word} {event} because" for event in EVENTS] for word in ("woman", "man")]
        woman, man = (model.score(model.run(side, edits=edits), metric).mean().item() for side in sides)
        return woman - man

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=Path, help="perplexity is measured on its lines")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--checked", type=int, default=40, help="how many neurons are measured")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    professions: Any = {name: pronoun for pronoun, names in STEREOTYPES.items() for name in names}
    texts, opposite = TEXTS, gendered_professions(model.tokenizer, 2 * options.n)
    if options.data:
        professions = options.data / "causal_mediation/experiment_data/professions.json"
        texts = sentences(options.data / "ud_ewt/en_ewt-ud-dev.conllu")
        opposite = profession_prompts(model.tokenizer, professions, 2 * options.n, swap="opposite")
    texts = options.texts.read_text(encoding="utf-8").splitlines() if options.texts else texts
    prompts = profession_prompts(model.tokenizer, professions, options.n)
    print(f"{len(prompts)} pairs such as {prompts.clean[0]!r} / {prompts.corrupted[0]!r}")
    effects(model, prompts)
    neurons(model, prompts, options.checked)
    sets(model, prompts[:12])
    print(f"{len(opposite)} pairs such as {opposite.clean[0]!r} / {opposite.corrupted[0]!r}; {len(texts)} texts")
    remedy(model, opposite, texts)


if __name__ == "__main__":
    main()
