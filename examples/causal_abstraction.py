"""Is the variable where the program says, and does distributed search find it from a random start?

    python examples/causal_abstraction.py [--data FOLDER]

On a transformer with hand-set weights that answers whether (a = b) and (c = d) are alike (tests/causal/programs.py); and
with --data on the compiled program "hist" of FOLDER (reference.py, hist.npz, hist.json), which counts how often the
last token occurs: is the count in what its one head writes there?
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import pellucid as pl
from pellucid.causal import CausalModel, DistributedAlignment, Task, alignment_search, interchange
from tests.causal.programs import TASK, both_alike
from tests.zoo.tokenizer import tokenizer

LENGTH = 5


def study(model: pl.Model, task: Task, variable: str, sites: Sequence[str], over: Any, place: str) -> None:
    print(f"interchange-intervention accuracy of {variable!r}   [interval]  on changed pairs; no intervention")
    for site in sites:
        r = interchange(model, task, {variable: site})
        numbers = [r[name].item() for name in ("accuracy", "low", "high", "changed", "floor")]
        print("  {:28} {:.3f} [{:.3f}, {:.3f}] {:.3f}; {:.3f}".format(site, *numbers))
    search = alignment_search(model, task, variable, over=over)
    best = search.data.attrs["best"]
    print(f"best of {search.accuracy.size} sites: {best}, {search['held_out'].item():.3f} on held-out pairs")
    print(f"distributed search at {place}: accuracy [interval], chance, shuffled model, arbitrary labels")
    for name, size in (("one direction", 1), ("boundless", None)):
        for seed in range(5):
            print(f"  {name}, seed {seed}: {searched(model, task, variable, place, size, seed)}", flush=True)


def searched(model: pl.Model, task: Task, variable: str, place: str, size: int | None, seed: int) -> str:
    found = DistributedAlignment(task, variable, place, size=size, seed=seed).fit(model)
    names = ("accuracy", "low", "high", "chance", "shuffled_model", "arbitrary_labels")
    row = "{:.3f} [{:.3f}, {:.3f}]  {:.3f}  {:.3f}  {:.3f}".format(*(found.result_[name].item() for name in names))
    return row if size is not None else f"{row}, in {found.size_} of {len(found.rotation_)} directions"


def histogram(folder: Path) -> tuple[pl.Model, Task]:
    """The compiled program, and the same in Python: how many of the tokens are the last one?"""
    spec = importlib.util.spec_from_file_location("reference", folder / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    program = reference.Prog("hist")
    tokens, start = [program.meta["tokens"].index(t) for t in "abc"], program.meta["tokens"].index("BOS")
    names = [f"t{i}" for i in range(LENGTH)]
    count = CausalModel(
        dict.fromkeys(names, tokens),
        {"count": (tuple(names), lambda *t: t.count(t[-1])), "answer": (("count",), lambda n: n)},
    )

    def around(ids: torch.Tensor) -> dict[str, Any]:
        return {"attention_mask": reference.hf_mask(program, ids)}  # it looks ahead

    task = Task(
        count,
        encode=lambda setting: [start, *(setting[name] for name in names)],
        decode=lambda n: program.meta["outputs"].index(str(n)),
        around=around,
    )
    ids = program.all_ids[:: max(1, len(program.all_ids) // 4)][:4]
    return pl.load(reference.to_hf(program), tokenizer=tokenizer(), probe={"input_ids": ids, **around(ids)}), task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    heads = [f"layers.{layer}.attn.heads.{head}@-1" for layer in range(2) for head in range(2)]
    print("(a = b) = (c = d), by hand")
    sites = [*heads, "layers.0.mlp.out@0"]
    study(both_alike(), TASK, "same", sites, "layers.*.attn.heads.*@-1", "layers.0.resid_post@-1")
    if options.data:
        print("hist, compiled")
        model, task = histogram(options.data)
        sites = ["layers.0.attn.heads.0@-1", "layers.0.attn.heads.0@2", "layers.0.resid_pre@-1", "layers.0.resid_pre@1",
                 "layers.0.mlp.out@2"]  # fmt: skip
        over = ["layers.0.attn.heads.0@*", "layers.0.resid_pre@*"]
        study(model, task, "count", sites, over, "layers.0.resid_mid@-1")


if __name__ == "__main__":
    main()
