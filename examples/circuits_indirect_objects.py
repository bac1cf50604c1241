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

import pellucid as pl
from pellucid import circuits
from pellucid.tasks import indirect_objects
from pellucid.tasks.ioi import NAMES
from pellucid.tasks.prompts import Prompts
from scripts.demo_model import smollm2

SIZES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05)


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
    started = time.perf_counter()
    model = pl.load(smollm2())
    known = with_names(model, set(NAMES[::2]), found_on, seed=0)
    held_out = with_names(model, set(NAMES[1::2]), judged_on, seed=1)
    print(f"found on {len(known)} prompts such as {known.clean[0]!r}")
    print(f"judged on {len(held_out)} prompts such as {held_out.clean[0]!r}", flush=True)

    scores = circuits.edge_attribution(model, known, ablation="resample", method="eap-ig-inputs")
    curve = circuits.faithfulness_curve(model, scores, known, ablation="resample", sizes=SIZES)
    size = next((float(s) for s, f in zip(SIZES, curve.sized.values, strict=True) if f >= 0.9), SIZES[-1])
    circuit = scores.circuit(fraction=size).pruned()
    print(
        f"{scores.graph}\nsmallest size with f >= .9 where it was found: {size:.2%}; pruned: {circuit}",
        flush=True,
    )

    held = circuits.faithfulness_curve(model, scores, held_out, ablation="resample", sizes=SIZES)
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
    named = roles.to_frame().query("role != ''").sort_values(["role", "to_io"], ascending=False)
    print(f"\nheads by role ({circuits.__name__}.head_roles):")
    print(named.round(2).to_string(index=False), flush=True)

    verdict = circuits.judge(model, circuit, held_out[:6], ablation="resample", samples=5, greedy=1)
    print(f"\nheld out, 6 prompts: F(model) {float(verdict.model_score):.2f}, "
          f"F(circuit) {float(verdict.circuit_score):.2f}, "
          f"F(empty) {float(verdict.empty):.2f}; normalised faithfulness {float(verdict.normalised):.3f} "
          f"[{float(verdict.low):.3f}, {float(verdict.high):.3f}]")  # fmt: skip
    print(verdict.to_frame("control").round(3).to_string(index=False))
    print(verdict.to_frame("in_model", "in_circuit", "incompleteness").round(2).to_string(index=False))
    print(verdict.to_frame("minimality").sort_values("minimality", ascending=False).round(3).to_string(index=False))
    circuits.draw(circuit, title="Indirect objects in SmolLM2-135M").save(out)
    circuit.save(out.with_suffix(".json"))
    print(f"\nwrote {out} and {out.with_suffix('.json')} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("circuit.html"))
    parser.add_argument("--found-on", type=int, default=12)
    parser.add_argument("--judged-on", type=int, default=10)
    arguments = parser.parse_args()
    main(arguments.out, arguments.found_on, arguments.judged_on)
