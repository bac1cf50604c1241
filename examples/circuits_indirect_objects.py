"""Which circuit in SmolLM2 finds the indirect object, how small is it, and does it hold for other names and
prompts?

    python examples/circuits_indirect_objects.py [--out circuit.html]

Edges are scored on prompts with one half of the names (EAP-IG, resampling from prompts in which the other
name is repeated); the size is chosen on those same prompts; everything reported is measured on prompts with
the other half.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd

import pellucid as pl
from pellucid import circuits
from pellucid.results import Result
from pellucid.tasks import indirect_objects
from pellucid.tasks.ioi import NAMES
from pellucid.tasks.prompts import Prompts
from scripts.demo_model import smollm2

SIZES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05)
JUDGED = 6  # prompts for completeness and minimality, which take hundreds of runs


def with_names(model: pl.Model, names: set[str], n: int, seed: int) -> Prompts:
    """Prompts whose two names are both among these."""
    made = indirect_objects(model.tokenizer, 400, seed)
    rows = [i for i in range(len(made)) if {str(made.answers[i]).strip(), str(made.wrong[i]).strip()} <= names][:n]
    chosen = {
        f.name: [getattr(made, f.name)[i] for i in rows]
        for f in fields(made)
        if isinstance(getattr(made, f.name), list)
    }
    return replace(made, **chosen, spans={k: [v[i] for i in rows] for k, v in made.spans.items()})


def main(out: Path, found_on: int, judged_on: int) -> None:
    started = time.process_time()
    model = pl.load(smollm2())
    known = with_names(model, set(NAMES[::2]), found_on, seed=0)
    held_out = with_names(model, set(NAMES[1::2]), judged_on, seed=1)
    print(f"found on {len(known)} prompts such as {known.clean[0]!r}")
    print(f"judged on {len(held_out)} prompts such as {held_out.clean[0]!r}", flush=True)

    scores = circuits.edge_attribution(model, known, how="resample", method="eap-ig-inputs")
    curve = circuits.faithfulness_curve(model, scores, known, how="resample", sizes=SIZES)
    size = next((float(s) for s, f in zip(SIZES, curve.sized.values, strict=True) if f >= 0.9), SIZES[-1])
    circuit = scores.circuit(fraction=size).pruned()
    print(
        f"{scores.graph}\nsmallest size with f >= .9 where it was found: {size:.2%}; pruned: {circuit}",
        flush=True,
    )

    held = circuits.faithfulness_curve(model, scores, held_out, how="resample", sizes=SIZES)
    print("size:        " + "  ".join(f"{s:7.2%}" for s in SIZES))
    for name in ("sized", "signed", "random"):
        print(f"f, {name:8s}  " + "  ".join(f"{f:7.3f}" for f in held[name].values))
    print(
        "held out: " + ", ".join(f"{k} {v:.4f}" for k, v in held.data.attrs.items() if k.startswith("C")),
        flush=True,
    )

    few = circuits.stability(scores, len(circuit))
    print(
        "stability: Jaccard {mean:.2f} [{low:.2f}, {high:.2f}] over bootstraps of the prompts".format(**few.data.attrs)
    )

    roles = circuits.head_roles(model, held_out, candidates=6)
    table = roles.to_frame()
    named = table.query("role != ''").sort_values(["role", "to_io"], ascending=False)
    print(f"\nheads by role ({circuits.__name__}.head_roles); to_io is attention, copy what OV alone predicts:")
    print(named.round(2).to_string(index=False), flush=True)

    classes = by_role(circuit, table)
    verdict = circuits.judge(
        model, circuit, held_out[:JUDGED], how="resample", classes=classes, draws=8, greedy=3, screen=6
    )
    show(verdict)
    pl.views.save_html(out, circuit, title="Indirect objects in SmolLM2-135M")
    circuit.save(out.with_suffix(".json"))
    print(f"\nwrote {out} and .json; {time.process_time() - started:.0f} s of CPU time in all")


def by_role(circuit: circuits.Circuit, roles: pd.DataFrame) -> dict[str, list[str]]:
    """The circuit's heads by what they do; those without a role by thirds of the depth."""
    role = {f"layers.{r.layer}.attn.heads.{r.head}": r.role for r in roles.itertuples()}
    depth = circuit.graph.depth
    found: dict[str, list[str]] = {}
    for head in circuit.heads:
        third = ("early", "middle", "late")[3 * int(head.split(".")[1]) // depth]
        found.setdefault(role[head] or f"no role, {third}", []).append(head)
    return found


def show(verdict: Result) -> None:
    print(f"\nheld out, {JUDGED} prompts: F(model) {float(verdict.model_score):.2f}, "
          f"F(circuit) {float(verdict.circuit_score):.2f}, "
          f"F(empty) {float(verdict.empty):.2f}; normalised faithfulness {float(verdict.normalised):.3f} "
          f"[{float(verdict.low):.3f}, {float(verdict.high):.3f}]")  # fmt: skip
    print(verdict.to_frame("control").round(3).to_string(index=False))
    removed = ["sort", "in_model", "in_circuit", "incompleteness", "incompleteness_low", "incompleteness_high"]
    print("\ncompleteness: |F(C without K) - F(M without K)|, with 95% intervals over prompts")
    print(verdict.to_frame(*removed).round(2).to_string(index=False))
    gaps = verdict.incompleteness.values[verdict.sort.values == "random"]
    print(f"mean over {len(gaps)} random K: {gaps.mean():.2f}, largest {gaps.max():.2f}")
    columns = ["minimality", "minimality_low", "minimality_high"]
    minimal = verdict.to_frame(*columns).sort_values("minimality", ascending=False)
    print(f"\nminimality of {len(minimal)} heads: |F(C without K and v) - F(C without K)|")
    print(minimal.round(3).to_string(index=False), flush=True)
    idle = (minimal.minimality_low < 0.01 * abs(float(verdict.circuit_score))).sum()
    print(f"{idle} heads may do less than 1% of F(circuit)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("circuit.html"))
    parser.add_argument("--found-on", type=int, default=12)
    parser.add_argument("--judged-on", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.out, arguments.found_on, arguments.judged_on)
