"""Does SmolLM2 use the reason that it gives? Trained to give it before the answer, after it, and on counterfactual rows.

    python benchmarks/tuning_explained.py DATA PART ... [SEED ...]      DATA: relations_lre/data/factual; PART: prompted, before, after, counterfactual

Cities, their countries and languages (country_capital_city joined with country_language, and some of our own: 47); two thirds of the cities to learn from, the others to
test, split by the seed. The last four blocks are trained for 30 steps of 8, on the answer and its reason alone. SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pellucid as pl
from pellucid import tuning
from scripts.demo_model import smollm2

OWN = """Brasilia Brazil Portuguese, Lisbon Portugal Portuguese, Athens Greece Greek, Warsaw Poland Polish, Budapest Hungary Hungarian, Helsinki Finland Finnish, Oslo Norway
Norwegian, Stockholm Sweden Swedish, Copenhagen Denmark Danish, Bucharest Romania Romanian, Sofia Bulgaria Bulgarian, Kyiv Ukraine Ukrainian, Ankara Turkey Turkish,
Tehran Iran Persian, Hanoi Vietnam Vietnamese, Bangkok Thailand Thai, Jakarta Indonesia Indonesian, Vilnius Lithuania Lithuanian, Vienna Austria German, Havana Cuba Spanish, Santiago
Chile Spanish, Bogota Colombia Spanish, Prague Czechia Czech, Dublin Ireland English, Riga Latvia Latvian, Zagreb Croatia Croatian, Belgrade Serbia Serbian, Tirana Albania Albanian"""


def cities(path: Path, seed: int) -> tuple[tuning.Explained, tuning.Explained]:
    """Explained questions to learn from and to test; mistakes are the same city in another country."""
    capital, language = (
        {s["subject"]: s["object"] for s in json.loads((path / f"country_{name}.json").read_text())["samples"]}
        for name in ("capital_city", "language")
    )
    known = {(capital[c], c, language[c]) for c in capital if c in language and c != "United States"}
    there = {c for _, c, _ in known}
    own = [tuple(row.split()) for row in OWN.replace("\n", " ").split(",")]
    known = sorted(known | {row for row in own if row[1] not in there})  # type: ignore[misc]
    drawn = random.Random(seed)
    drawn.shuffle(known)
    spoken = sorted({tongue for *_, tongue in known})
    half = len(known) - len(known) // 3

    def told(rows: list[tuple[str, str, str]]) -> tuning.Explained:
        wrong = [drawn.choice([k for k in known if k[2] != own[2]]) for own in rows]
        return tuning.Explained(
            [f"Question: Which language is spoken in the city of {city}?" for city, *_ in rows],
            [f" {tongue}" for *_, tongue in rows],
            [f" {city} is in {country}." for city, country, _ in rows],
            mistakes=[
                (f" {city} is in {other[1]}.", f" {other[2]}") for (city, *_), other in zip(rows, wrong, strict=True)
            ],
            paraphrases=[f" The country of {city} is {country}." for city, country, _ in rows],
            choices=[f" {tongue}" for tongue in spoken],
        )

    return told(known[:half]), told(known[half:])


def main(path: Path, parts: list[str], seeds: list[int]) -> None:
    model = pl.load(str(smollm2()))
    n = len(model.anatomy.stacks[0].blocks)
    for seed in seeds:
        train, test = cities(path, seed)
        print(
            f"seed {seed}: {len(train)} cities to learn from, {len(test)} to test, {len(test.choices or ())} languages",
            flush=True,
        )
        for part in parts:
            tuned: Any = model
            if part != "prompted":
                order = "after" if part == "after" else "before"
                rows = train.rows(order, counterfactual=0.6 if part == "counterfactual" else 0.0, seed=seed)  # type: ignore[arg-type]
                print(part, len(rows), "rows", flush=True)
                made = tuning.fit(
                    model,
                    rows,
                    (),
                    layers=tuning.Only(layers=range(n - 4, n), head=False),
                    seeds=(seed,),
                    steps=30,
                    batch=8,
                    control=False,
                )
                tuned = made.model
                print(f"loss on the training rows {float(made.result.data['loss'][0]):.3f}", flush=True)
            shots = train if part == "prompted" else None
            if shots is not None:
                shots = tuning.Explained(
                    *(list(x)[:4] for x in (train.prompts, train.answers, train.reasons)), choices=train.choices
                )  # type: ignore[misc]
            found = tuning.reason_tests(
                tuned, test, order="after" if part == "after" else "before", shots=shots, max_new_tokens=12
            )
            print(f"\n## {part}, seed {seed}\n{found.title}")
            for name in found.data["test"].values.tolist():
                own = found.data.sel(test=name)
                print(f"  {name:22} right {float(own.right):.3f} [{float(own.right_low):.2f}, {float(own.right_high):.2f}], follows {float(own.follows):.3f} "
                      f"[{float(own.follows_low):.2f}, {float(own.follows_high):.2f}], changed {float(own.changed):.3f}, support {float(own.support):.2f}")  # fmt: skip
            for name in found.data["beside"].values.tolist():
                own = found.data.sel(beside=name)
                print(
                    f"  {name:45} {float(own.share):.3f} [{float(own.low):.2f}, {float(own.high):.2f}] of {int(own['count'])}",
                    flush=True,
                )


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        [w for w in sys.argv[2:] if not w.isdigit()],
        [int(w) for w in sys.argv[2:] if w.isdigit()] or [0, 1, 2],
    )
