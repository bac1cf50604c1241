"""Do discovery methods find the circuits of compiled transformers, edge for edge?

    python examples/circuits_known_programs.py --data PATH

PATH holds `reference.py` (`Prog`, `to_hf`, `hf_mask`) and the programs as NAME.npz and NAME.json, which list
the causal edges under every ablation. Prompts of all lengths are run, since some edges matter only for short
ones: an edge counts by its largest effect at any length. "mean" in the files is the mean at each position.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import pellucid as pl
from pellucid import circuits
from pellucid.engine.inputs import Inputs
from tests.zoo.tokenizer import tokenizer

ABLATIONS = {"resample": "resample", "zero": "zero", "position_mean": "mean", "roll": "posroll"}
THRESHOLDS = [float(t) for t in np.logspace(-5, 0.3, 12)]
ESTIMATES = ("eap", "eap-ig-inputs", "eap-ig-activations")


def reference(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", data / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edge(source: str, reader: str, port: str) -> str:
    """The name of an edge here: `tok`, `pos` are the two embeddings, `a1.h0` and `m0` are understood as they
    are."""
    long = {"tok": "embed.tokens", "pos": "embed.positions"}.get(source, source)
    return f"{long} -> {reader}{port and '.' + port}"


def asked(ref: ModuleType, program: Any, model: pl.Model, ids: Tensor) -> Inputs:
    """The prompts with the mask their program needs: a 4-D one where attention looks ahead."""
    inputs, mask = model.inputs(ids), ref.hf_mask(program, ids)
    return inputs if mask is None else dataclasses.replace(inputs, tensors={**inputs.tensors, "attention_mask": mask})


def study(ref: ModuleType, program: Any, ablation: str, lengths: list[int], size: int) -> dict[str, Any]:
    """exact: the edges with an effect; acdc and the estimates: a score for each edge."""
    found: dict[str, list[Tensor]] = {}
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        every = program.all_ids[:, :length].unique(dim=0)
        ids, other = (every[torch.randperm(len(every), generator=generator)[:size]] for _ in "ab")
        module, mask = ref.to_hf(program), ref.hf_mask(program, ids)
        probe = {"input_ids": ids[:4], **({} if mask is None else {"attention_mask": mask[:4]})}
        model = pl.load(module, tokenizer=tokenizer(), probe=probe)
        inputs, other_inputs = (asked(ref, program, model, x) for x in (ids, other))
        with torch.no_grad():
            clean = module(**inputs.tensors).logits
        same: dict[str, Any] = {"how": ablation, "reference": other_inputs, "split": circuits.Split("parts")}

        def gap(logits: Tensor, clean: Tensor = clean) -> Tensor:
            return -(logits - clean)[:, 1:].abs().amax((1, 2))  # position 0 is not read

        exact = circuits.exact_patching(model, inputs, gap, **same)
        found.setdefault("exact", []).append(exact.tensor)
        cuts = [circuits.acdc(model, inputs, gap, threshold=t, **same) for t in THRESHOLDS]
        found.setdefault("acdc", []).append(circuits.acdc_scores(THRESHOLDS, cuts))
        best = clean.argmax(-1, keepdim=True)

        def answer(logits: Tensor, best: Tensor = best) -> Tensor:
            return logits.gather(2, best)[:, 1:, 0].abs().sum(1)

        for method in ESTIMATES:
            scores = circuits.edge_attribution(model, inputs, answer, method=method, **same)  # type: ignore[arg-type]
            found.setdefault(method, []).append(scores.each.abs().mean(0))
    return {"graph": exact.graph, **{name: torch.stack(each).abs().amax(0) for name, each in found.items()}}


def main(data: Path, size: int) -> int:
    ref, wrong = reference(data), 0
    print(
        f"{'program':22s}{'ablation':15s}{'edges':>6s}{'true':>5s}  {'exact':24s}"
        + "".join(f"{n:>20s}" for n in ("acdc", *ESTIMATES))
    )
    for path in sorted(data.glob("*.npz")):
        program = ref.Prog(path.stem)
        for ablation, kind in ABLATIONS.items():
            found = study(ref, program, ablation, list(range(3, program.meta["n_ctx"] + 1)), size)
            graph, true = found["graph"], torch.zeros(found["graph"].possible.shape, dtype=torch.bool)
            for each in program.meta["causal_edges"][kind]:
                true[graph.edge(edge(*each))] = True
            got = found["exact"] > 1e-5
            missed, extra = int((true & ~got).sum()), int((got & ~true).sum())
            wrong += missed + extra
            verdict = "exactly these" if not missed + extra else f"{missed} missed, {extra} extra"
            areas = [roc_auc_score(true[graph.possible], found[n][graph.possible]) for n in ("acdc", *ESTIMATES)]
            print(
                f"{path.stem:22s}{ablation:15s}{len(graph):6d}{int(true.sum()):5d}  {verdict:24s}"
                + "".join(f"{a:20.3f}" for a in areas),
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64, help="of each length")
    arguments = parser.parse_args()
    sys.exit(main(arguments.data, arguments.prompts))
