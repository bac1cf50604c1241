"""Models that explain themselves: is the explanation what the answer passed through? Each bar beside its control, as lines of text.

    python benchmarks/tuning_reasons.py DATA KEPT PART ... [SEED ...]    DATA: imdb_counterfactual/sentiment/combined/paired
    python benchmarks/tuning_reasons.py DATA KEPT summary                 KEPT: a file of lines, one for each part, arm and seed

PARTs are independent, residual, soft, "no concept loss", top_k, sparsemax, entmax15, hard_kuma, cold, taught, whole (selects from
the place-holder in front too), slower; with DEV among the words the validation texts stand in for the test texts (to choose settings by).

Reviews with counterfactual twins as in benchmarks/tuning.py: windows of 17 pieces, MiniLM cut to layers 0 and 1, 384 texts to learn from, 300
to test; three seeds where a gain is claimed. Eight lexical concepts: whether a window has a word of a list.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tuning import ABSENT, Setting, rationales
from pellucid import tuning
from pellucid.statistics import interval

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


def kept(file: Path, part: str, made: tuning.Tuned) -> None:
    """One seed of one part, as a line of a file and on the screen: a run that is killed loses one seed."""
    data = made.result.data
    seed = int(data["seed"][0])
    print(f"\n## {part}, seed {seed}\n{made.result.title}", *[f"- {s}" for s in data.attrs["verdict"][1:]], sep="\n")
    with file.open("a") as lines:
        for arm in data["arm"].values.tolist():
            own = data.sel(arm=arm)
            told = {"arm accuracy": float(own.accuracy[0]), "cost": float(own.cost)}
            if arm != "plain":
                told |= {n: float(own.measured.sel(measure=n)) for n in data["measure"].values.tolist()}
            told = {n: round(v, 4) for n, v in told.items() if v == v}
            lines.write(json.dumps({"part": part, "arm": arm, "seed": seed, **told}) + "\n")
            print(arm, told)
    print("nothing changed outside the choice:", not made.changed, flush=True)


def summary(file: Path) -> None:
    """Mean over the seeds that are there, and its interval."""
    rows = list({(r["part"], r["arm"], r["seed"]): r for r in map(json.loads, file.read_text().splitlines())}.values())
    for part, arm in dict.fromkeys((r["part"], r["arm"]) for r in rows):
        own = [r for r in rows if (r["part"], r["arm"]) == (part, arm)]
        print(f"\n{part}: {arm}, seeds {[r['seed'] for r in own]}")
        for name in [n for n in own[0] if n not in ("part", "arm", "seed")]:
            values = np.array([r[name] for r in own if name in r])
            low, high = interval(values, 0) if len(values) > 1 else (np.nan, np.nan)
            print(f"  {name:22} {values.mean():.3f} [{low:.3f}, {high:.3f}]  {[round(float(v), 3) for v in values]}")


def main(path: Path, file: Path, parts: list[str], seeds: list[int]) -> None:
    if parts == ["summary"]:
        return summary(file)
    dev = "DEV" in parts
    parts = [part for part in parts if part != "DEV"]
    two = Setting(path, dev=dev)
    train, test = (with_concepts(rationales(rows, ABSENT)) for rows in (two.train, two.dev if dev else two.test))
    for name in CONCEPTS:
        print(f"{name}: in {sum(train.properties[name]) / len(train):.2f} of the texts")
    objectives: dict[str, tuple[Any, dict[str, Any]]] = {
        "independent": (tuning.Bottleneck(kind="independent"), {"head_learning_rate": 1e-2}),
        "residual": (tuning.Bottleneck(kind="joint", residual=8), {"head_learning_rate": 1e-2}),
        "soft": (tuning.Bottleneck(kind="joint", hard=False, weight=1.0), {"head_learning_rate": 1e-2}),
        "no concept loss": (tuning.Bottleneck(kind="joint", hard=False, weight=1e-6), {"head_learning_rate": 1e-2}),
        **{
            mask: (tuning.Select(mask=mask, within="window"), {"steps": 105})
            for mask in ("top_k", "sparsemax", "entmax15", "hard_kuma")
        },  # type: ignore[arg-type]
        "cold": (tuning.Select(warm=0, within="window"), {"steps": 60}),
        "taught": (tuning.Select(teach="rationale", within="window"), {"steps": 105}),
        "whole": (tuning.Select(), {"steps": 105}),
        "slower": (tuning.Select(within="window", slower=1 / 3), {"steps": 105}),
    }
    for seed in seeds:
        for part in parts:
            objective, more = objectives[part]
            options = {"layers": slice(None), "head_learning_rate": 3e-3, "test": test} | more
            made = tuning.fit(
                two.model,
                train,
                objective,
                seeds=(seed,),
                control=not dev
                and part not in ("soft", "no concept loss", "cold", "taught", "sparsemax", "entmax15", "hard_kuma"),
                **options,
            )
            kept(file, part, made)
            if part == "independent":
                curves(made, test)


def curves(made: tuning.Tuned, test: tuning.Rationales) -> None:
    told = {
        "all": {},
        "praise and blame flipped in half of the texts, these two set": {"flipped": ["praise", "blame"], "order": ["praise", "blame"]},
        "flipped, all set": {"flipped": ["praise", "blame"], "order": ["praise", "blame", *(n for n in CONCEPTS if n not in ("praise", "blame"))]},
    }  # fmt: skip
    for label, options in told.items():
        found = tuning.interventions(made.model, test, made, draws=1, **options)
        for source in found.data["source"].values.tolist():
            print(
                f"{label}; {source}: {[round(float(v), 3) for v in found.data['accuracy'].sel(source=source)]}",
                flush=True,
            )


if __name__ == "__main__":
    asked = [word for word in sys.argv[3:] if not word.isdigit()]
    main(Path(sys.argv[1]), Path(sys.argv[2]), asked, [int(w) for w in sys.argv[3:] if w.isdigit()] or [0, 1, 2])
