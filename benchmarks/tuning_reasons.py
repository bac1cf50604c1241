"""Models that explain themselves: is the explanation what the answer passed through? Each bar beside its control, as lines of text.

    python benchmarks/tuning_reasons.py DATA [independent] [residual] [leak] [curve] [select] [masks]    DATA: imdb_counterfactual/sentiment/combined/paired

Reviews with counterfactual twins as in benchmarks/tuning.py: windows of 17 pieces, MiniLM cut to layers 0 and 1, 384 texts to learn from, 300
to test; three seeds where a gain is claimed. Eight lexical concepts: whether a window has a word of a list.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tuning import ABSENT, Setting, rationales
from pellucid import tuning

CONCEPTS = {
    "praise": "good great best excellent wonderful brilliant amazing fantastic superb enjoyable fun funny entertaining beautiful perfect love loved enjoyed "
    "interesting fascinating impressive hilarious touching memorable favorite masterpiece outstanding charming",
    "blame": "bad worst awful terrible boring poor horrible dull stupid lame waste ridiculous pathetic disappointing hate hated painful annoying weak "
    "mess predictable forgettable unfunny dreadful garbage cheap tedious disappointed",
    "negation": "not no never nothing none nobody neither nor without n't t cannot",
    "intensity": "very really so too extremely absolutely totally completely truly quite incredibly highly",
    "acting": "actor actors actress acting performance performances cast role roles played plays star stars character characters",
    "plot": "plot story script ending end scene scenes writing dialogue storyline twist",
    "viewing": "watch watched watching see seen saw recommend rent rented viewing buy",
    "genre": "comedy horror thriller drama action romance western documentary musical sci-fi",
}


def with_concepts(data: tuning.Rationales) -> tuning.Rationales:
    words = [set(re.findall(r"[a-z'-]+", text.lower())) for text in data.texts]
    return replace(
        data, properties={name: [bool(w & set(listed.split())) for w in words] for name, listed in CONCEPTS.items()}
    )


def numbers(made: tuning.Tuned, title: str) -> None:
    data = made.result.data
    print(f"\n## {title}\n{made.result.title}", *[f"- {s}" for s in data.attrs["verdict"][1:]], sep="\n")
    for arm in data["arm"].values.tolist():
        own = data.sel(arm=arm)
        first = own.isel(split=0)
        print(
            f"{arm}: accuracy {float(first.accuracy):.3f} [{float(first.low):.3f}, {float(first.high):.3f}], cost {float(own.cost):.2f}"
        )
        for name in data["measure"].values.tolist() if arm != "plain" else []:
            m = own.sel(measure=name)
            if m.measured.notnull():
                each = ", ".join(f"{v:.3f}" for v in m.measured_by_seed.values)
                print(
                    f"  {name:20} {float(m.measured):.3f} [{float(m.measured_low):.3f}, {float(m.measured_high):.3f}]  ({each})"
                )
    print("nothing changed outside the choice:", not made.changed, flush=True)


def main(path: Path, parts: set[str]) -> None:
    two = Setting(path)
    train, test = (with_concepts(rationales(rows, ABSENT)) for rows in (two.train, two.test))
    for name in CONCEPTS:
        print(f"{name}: in {sum(train.properties[name]) / len(train):.2f} of the texts")

    def fit(objective: Any, **more: Any) -> tuning.Tuned:
        options = {"layers": slice(None), "head_learning_rate": 1e-2, "test": test, "seeds": (0, 1, 2)} | more
        return tuning.fit(two.model, train, objective, **options)

    if "independent" in parts or "curve" in parts:
        made = fit(tuning.Bottleneck(kind="independent"), **({"seeds": (0,)} if "independent" not in parts else {}))
        numbers(made, "Bottleneck of eight concepts, independent, weight 10")
        for label, options in {"all": {}, "praise and blame flipped in half of the texts, these two set": {"flipped": ["praise", "blame"], "order": ["praise", "blame"]},
                               "flipped, all set, least sure first": {"flipped": ["praise", "blame"], "order": "uncertain"}}.items():  # fmt: skip
            found = tuning.interventions(made.model, test, made, **options)
            print(f"{label}: {found.title}")
            for source in found.data["source"].values.tolist():
                print(
                    f"  {source}: {[round(float(v), 3) for v in found.data['accuracy'].sel(source=source)]}", flush=True
                )
    if "residual" in parts:
        numbers(fit(tuning.Bottleneck(kind="joint", residual=8)), "Hard concepts beside a residual of 8")
    if "leak" in parts:
        for weight in (1e-6, 1.0):
            made = fit(tuning.Bottleneck(kind="joint", hard=False, weight=weight), seeds=(0,))
            numbers(made, f"Soft, joint, weight {weight:g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))
