"""Run by torchrun: a model split over two processes beside the same one as a whole. Writes a file of JSON for each process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pellucid as pl

METRIC = pl.metrics.logit_difference(3, 5)
IDS, OTHER = torch.randint(97, (2, 2, 7), generator=torch.Generator().manual_seed(1)).unbind()


def compared(whole: pl.Model, split: pl.Model) -> dict[str, Any]:
    kept = OTHER.tolist()

    def edited(site: str, at: str = "") -> Callable[[pl.Model], Any]:
        return lambda m: m.run(IDS, edits=[pl.Patch(site + at, m.run(kept, keep=[site]))]).logits

    heads = [pl.Ablate(f"layers.{i}.attn.heads.{h}") for i in range(2) for h in range(4)]
    asked: dict[str, Callable[[pl.Model], Any]] = {
        "logits": lambda m: m.run(IDS).logits,
        "z": lambda m: m.run(IDS, keep=["layers.1.attn.z"]).tensor("layers.1.attn.z"),
        "pattern": lambda m: m.run(IDS, keep=["layers.1.attn.pattern"]).tensor("layers.1.attn.pattern"),
        "head 3 off": lambda m: m.run(IDS, edits=[pl.Ablate("layers.0.attn.heads.3")]).logits,
        "head 0 patched": edited("layers.1.attn.heads.0", "@3"),
        "what a head writes": lambda m: m.run(IDS, keep=["layers.1.attn.heads.2.out"]).tensor("layers.1.attn.heads.2.out"),
        "gradient": lambda m: m.run(IDS, keep=["layers.*.resid_post", "layers.0.attn.z"], grad_of=METRIC).grad("layers.0.attn.z"),
        "sweep": lambda m: m.sweep(IDS, heads, METRIC).values,
        "EAP": lambda m: pl.circuits.edge_attribution(m, IDS, METRIC, how="resample", reference=OTHER).each,
    }  # fmt: skip
    if "mlp.neurons" in whole.anatomy.stacks[0].blocks[0].taps:
        unit = "layers.0.mlp.neurons"
    else:
        unit = "layers.0.mlp.experts.2.neurons"
        for port in ("experts.2", "router"):
            site = f"layers.0.mlp.{port}"
            asked[port] = lambda m, site=site: m.run(IDS, keep=[site]).tensor(site)
            asked[f"{port} scaled"] = lambda m, site=site: m.run(IDS, edits=[pl.Scale(site, 0.5)]).logits
            asked[f"gradient at {port}"] = lambda m, site=site: m.run(IDS, keep=[site], grad_of=METRIC).grad(site)
    asked["neurons"] = lambda m: m.run(IDS, keep=[unit]).tensor(unit)
    off = f"{unit}.41" if "experts" not in unit else unit
    asked["neurons off"] = lambda m: m.run(IDS, edits=[pl.Ablate(off)]).logits
    asked["neuron patched"] = edited(unit, ".41@3") if "experts" not in unit else edited(unit)
    asked["gradient at neurons"] = lambda m: m.run(IDS, keep=[unit, "layers.0.resid_pre"], grad_of=METRIC).grad(unit)
    asked["gradient below"] = lambda m: m.run(IDS, keep=[unit, "layers.0.resid_pre"], grad_of=METRIC).grad(
        "layers.0.resid_pre"
    )
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            a, b = ask(whole), ask(split)
            found[name] = float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))
        except pl.errors.PellucidError as error:
            found[name] = str(error)
    return found


def main(*folders: str) -> None:
    torch.set_num_threads(1)
    for folder in folders:
        whole = pl.load(folder, tokenizer=False)
        split = pl.load(folder, tokenizer=False, tp_plan="auto")
        proofs = {
            p.name: [p.holds, q.holds, q.detail]
            for p, q in zip(whole.anatomy.proofs, split.anatomy.proofs, strict=True)
        }
        own = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in split.module.parameters())
        share = own / sum(p.numel() for p in whole.module.parameters())
        found = {"share": share, "proofs": proofs, "compared": compared(whole, split)}
        rank = dist.get_rank()  # a file for each: what two processes print can run together
        Path(folder, f"rank{rank}.json").write_text(json.dumps({"rank": rank, **found}))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
