"""The bias protocol as a failure that is traced: professions to fit on, other professions and Winogender's sentences held out, mitigation, price.

    python -u -m benchmarks.safety_bias DATA

DATA holds causal_mediation (Vig et al.'s professions), winogender and ud_ewt as their repositories lay them out. A pair is "The nurse slept well
because" beside a profession of the opposite stereotype; `gap` is by how many nats the profession moves the pronoun (the bias of
`causal.mitigation`), and what mends it should bring it to 0 without taking the gender that words have by themselves, nor text, nor induction.
Of Winogender the sentences in which the pronoun is the occupation's own, cut before it; the stereotype is that of the labour statistics
(under 40 % or over 60 % women), and no occupation of it is fitted on. SmolLM2-135M-Instruct, one thread, seed 0.
"""

from __future__ import annotations

import csv
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from benchmarks.safety_steering import FirstRank
from pellucid.causal import attribution_patching, mitigating_edits, profession_prompts
from pellucid.causal.professions import read_professions
from pellucid.metrics import logit_difference, rank
from pellucid.statistics import interval
from pellucid.tasks.professions import EVENTS
from scripts.demo_model import smollm2

PRONOUNS = {"$NOM_PRONOUN": (" she", " he"), "$POSS_PRONOUN": (" her", " his"), "$ACC_PRONOUN": (" her", " him")}
OWN = (
    "woman",
    "mother",
    "man",
    "father",
    "queen",
    "girl",
    "king",
    "boy",
)  # every second row decides, the others are reported
FEMALE = ("woman", "mother", "queen", "girl")


def winogender(data: Path) -> list[tuple[str, str, str, str, str]]:
    """(sentence, its twin, pronoun against the stereotype, with it, occupation)."""
    rng, found = random.Random(0), []
    with open(data / "winogender/data/occupations-stats.tsv") as file:
        women = {row["occupation"]: float(row["bls_pct_female"]) for row in csv.DictReader(file, delimiter="\t")}
    sides = [[o for o, share in women.items() if share > 60], [o for o, share in women.items() if share < 40]]
    with open(data / "winogender/data/templates.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            occupation, pronoun = row["occupation(0)"], next(p for p in PRONOUNS if p in row["sentence"])
            if row["answer"] != "0" or not any(occupation in side for side in sides):
                continue
            female = occupation in sides[0]
            stem = row["sentence"].partition(" " + pronoun)[0].replace("$PARTICIPANT", row["other-participant(1)"])
            twin = rng.choice(sides[female])
            own, other = PRONOUNS[pronoun] if female else PRONOUNS[pronoun][::-1]
            found.append((*(stem.replace("$OCCUPATION", o) for o in (occupation, twin)), other, own, occupation))
    return found


def main() -> None:
    data, start = Path(sys.argv[1]), time.process_time()
    torch.set_num_threads(1)
    model = pl.load(smollm2())
    tokenizer = model.tokenizer
    held = winogender(data)
    professions = read_professions(data / "causal_mediation/experiment_data/professions.json")
    professions = {p: s for p, s in professions.items() if p not in {row[4] for row in held}}
    names = sorted(professions)
    random.Random(0).shuffle(names)
    parts = [{p: professions[p] for p in names[k::2]} for k in (0, 1)]  # of no profession both
    fit, other = (profession_prompts(tokenizer, part, 24, swap="opposite") for part in parts)
    rows = [(a, b, w, r, "fit") for a, b, r, w in zip(fit.clean, fit.corrupted, fit.answers, fit.wrong, strict=True)]
    rows += [(a, b, w, r, f"professions {i}") for i, (a, b, r, w) in enumerate(zip(other.clean, other.corrupted, other.answers, other.wrong, strict=True))]  # fmt: skip
    rows += [(a, b, w, r, f"winogender {o}") for a, b, w, r, o in held]
    rows = [(a, b, *(x[0] if isinstance(x, list) else x for x in (w, r)), g) for a, b, w, r, g in rows]
    print(f"{len(fit)} pairs to fit on, {len(other)} of other professions, {len(held)} of Winogender; such as {rows[0][:4]} and {rows[-1][:4]}")  # fmt: skip

    gendered = [(f"The {w} {e} because", *((" she", " he") if w in FEMALE else (" he", " she"))) for e in EVENTS for w in OWN]  # fmt: skip
    firsts: list[Any] = [[[tokenizer(t[k], add_special_tokens=False)["input_ids"][0]] for t in gendered] for k in (1, 2)]  # fmt: skip
    probes = pl.tasks.repeated_tokens(tokenizer, 12, 0, length=20)
    tasks: dict[str, Any] = {
        "own gender": ([t[0] for t in gendered], logit_difference(*firsts)),
        "induction": (
            [r[:-1] for r in probes.tolist()],
            FirstRank(rank([[r[-1]] for r in probes.tolist()])),
        ),
    }
    lines = (data / "ud_ewt/en_ewt-ud-test.conllu").read_text().splitlines()
    texts = [t for line in lines if line.startswith("# text = ") and 8 <= len((t := line[9:]).split()) <= 20][::97][:8]

    right, wrong = ([[ids[0] for ids in each] for each in side] for side in (fit.wrong_ids, fit.answer_ids))
    estimated = attribution_patching(model, fit.clean, fit.corrupted, over="layers.*.attn.heads.*", metric=logit_difference(right, wrong), denoise=False)  # fmt: skip
    order = estimated.top(16)
    heads = [f"layers.{row.layer}.attn.heads.{row.head}" for row in order.itertuples()]
    also = {f"causal.mitigation's edits, {k} heads at every token": mitigating_edits(model, fit, heads[:k]) for k in (8, 16)}  # fmt: skip
    found = pl.safety.trace_failure(
        model, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows], goal="alike", also=also,
        groups=[r[4] for r in rows], held_out=sorted({r[4] for r in rows} - {"fit"}), layers=[10, 14, 18, 22, 26], exact=16, draws=3,
        tasks=tasks, texts=texts,
    )  # fmt: skip
    d = found.result.data
    sets = {k: np.array([str(g).startswith(k) for g in d.group.values]) for k in ("professions", "winogender")}
    print(found.result.title)
    for i, name in enumerate(d.mitigation.values):
        here, told = d.isel(mitigation=i), ""
        for k, inside in sets.items():
            values = here.by_group.values[inside]
            low, high = interval(values, 0)
            told += f"  {k} {values.mean():+.2f} [{float(low):+.2f}, {float(high):+.2f}]"
        price = ", ".join(f"{k} {float(here[k]):.2f}" for k in (*tasks, "top1")) + f", KL {float(here.kl):.3f}"
        print(f"{name!s:58} fitted {float(here.fitted):.2f}{told}; {price}", flush=True)
    print(d[["exact", "estimated"]].to_dataframe().sort_values("exact", ascending=False).round(2).head(6).to_string())
    print(f"rank correlation of attribution and exact effects {float(d.spearman):.2f}; {time.process_time() - start:.0f} CPU s")  # fmt: skip


if __name__ == "__main__":
    with pl.quiet():
        main()
