"""What splices, stitches, exits and drafts say of SmolLM2, each bar beside its control; costs in plain forwards.

    python -m benchmarks.surgery_states [splice|cost|stitch|identity|self|exits|draft|guarantee ...] [--texts paired.tsv]

`--texts` is a file of lines `label <tab> text <tab> ...` with ordinary text (IMDB's paired reviews, as measured); CPU time, one
thread; `CASES` and `BY` in the environment: how many texts the guarantee rests on, and which policies. The bars are those of section 6 of the evidence on surgery that issue 14 names.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from scripts.demo_model import smollm2
from tests.surgery.test_stitch import rotated

COUNTRIES = [("France", "Italy"), ("Japan", "Egypt"), ("Spain", "Greece"), ("Germany", "Russia")]
PAIRED = "/work/shared/data/imdb_counterfactual/sentiment/combined/paired/dev_paired.tsv"


def cpu(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    made = work()
    return made, time.process_time() - start


def reviews(path: str, n: int) -> list[str]:
    rows = [line.split("\t") for line in Path(path).read_text().splitlines()[1:]]
    return [re.sub(r"<br ?/?>", " ", row[1]) for row in rows if len(row) > 1][: 2 * n : 2]  # one of each pair


def capitals() -> tuple[list[str], list[str], tuple[list[str], list[str]]]:
    pairs = [*COUNTRIES, *((b, a) for a, b in COUNTRIES)]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    return [f"The capital of {x} is" for x in a], [f"The capital of {y} is" for y in b], (a, b)


def _margin(model: pl.Model, a: list[str], b: list[str]) -> Any:
    """The logit of what is said to a less that of what is said to b."""
    said = [[model.run(p).logits[0, -1].argmax().item() for p in prompts] for prompts in (a, b)]
    return pl.metrics.logit_difference(*said)


def splice(model: pl.Model, path: str) -> None:
    """Bar 12: the subject's position until 22, the last from 24; and what removing the same blocks does."""
    a, b, subject = capitals()
    found = pl.surgery.splice(model, a, b, positions={"subject": subject, "last": -1, "both": [subject, -1]})
    removed = pl.surgery.layer_importance(model, reviews(path, 8), {"capitals": (a, _margin(model, a, b))}, tokens=512)  # fmt: skip
    print(
        "| depth or block | subject | last | both | another pair's subject | removal: loss (nats) | removal: capitals' margin |"
    )
    print("|---|---|---|---|---|---|---|")
    for n in (0, 8, 16, 20, 22, 23, 24, 25, 28, 30):
        share = found.data.sel(depth=n)
        values = [float(share.share.sel(set=s)) for s in ("subject", "last", "both")] + [
            float(share.control.sel(set="subject"))
        ]
        out = removed.data.isel(part=0).sel(layer=min(n, 29))
        last = (
            ["", ""] if n == 30 else [f"{float(out.loss):+.2f}", f"{float(out.effect.sel(capability='capitals')):+.1f}"]
        )
        print(f"| {n} | " + " | ".join([*(f"{v + 0.0:.2f}" for v in values), *last]) + " |")
    print("blocks that hand over:", dict(zip(found.data["set"].values, found.data.block.values, strict=True)))


def cost(model: pl.Model, path: str) -> None:
    """Bar 16: a splice over 31 depths at one position, in plain forwards of the same prompts."""
    a, b, subject = capitals()
    inputs = model.inputs(b)
    for name, positions in (("subject", {"subject": subject}), ("last", {"last": -1})):
        for draws in (0, 1):
            pl.surgery.splice(model, a, b, positions=positions, draws=draws)
            pairs = [(cpu(lambda p=positions, d=draws: pl.surgery.splice(model, a, b, positions=p, draws=d))[1],  # type: ignore[misc]
                      cpu(lambda: [model.run(inputs) for _ in range(5)])[1] / 5) for _ in range(5)]  # fmt: skip
            print(
                f"31 depths at the {name} position, {draws} other pairs: {np.median([s / f for s, f in pairs]):.1f} forwards (bar: 8, without)"
            )


def stitch(model: pl.Model, path: str) -> None:
    """Bar 13: a rotated copy is the same language in another basis."""
    other, _ = rotated(model)
    gap = (other.run("The capital of France is").logits - model.run("The capital of France is").logits).abs().max()
    print(f"rotated copy: logits apart by {float(gap):.1e}")
    found = pl.surgery.stitching(model, other, reviews(path, 120), after=[6, 15, 25], into=[6, 15, 25], tokens=2560, held_out=192,
                                 kinds=["identity", "orthogonal", "affine", "ridge"], controls=["shuffled", "tokens", "permuted"])  # fmt: skip
    print(found.title)
    for name in found.data["map"].values:
        own = [f"{float(found.data.penalty.sel(map=name, after=i, into=i)):+.4f}" for i in (6, 15, 25)]
        control = {str(c): [f"{float(found.data.control_penalty.sel(control=c, map=name, after=i, into=i)):+.2f}" for i in (6, 15, 25)] for c in found.data["control"].values}  # fmt: skip
        print(f"{name}: after 6, 15, 25: {own}; controls {control}")
    print(
        "sink lengths",
        found.data.sink_after.values.round(1),
        "sink error",
        found.data.sink_error.sel(map="affine").values.diagonal(),
    )


def identity(model: pl.Model, path: str) -> None:
    """Bar 13, what the identity stitch costs: the evidence counts blocks (after 6, 15, 25 of them), `after` names one (6 is the seventh)."""
    texts, layers = reviews(path, 24), [5, 6, 14, 15, 24, 25]
    for seed in range(3):
        other, _ = rotated(model, seed)
        made = {
            i: pl.surgery.Stitch("identity", after=i, into=i, tokens=64).fit(model, other, texts[:2]) for i in layers
        }
        found = {i: s.penalty(model, other, texts[2:], tokens=768).data for i, s in made.items()}
        print(f"rotation {seed}, after block:", {i: f"{float(d.penalty):+.2f} [{float(d.low):.2f}, {float(d.high):.2f}]" for i, d in found.items()}, flush=True)  # fmt: skip


def self_stitch(model: pl.Model, path: str) -> None:
    """Bar 13, second half: one model's own depths, beside what knows nothing, and beside similarity of the same states."""
    layers, texts = [3, 15, 27], reviews(path, 60)
    apart = np.abs(np.subtract.outer(np.arange(len(layers)), np.arange(len(layers))))

    def told(name: str, values: np.ndarray) -> None:
        by = {12 * int(d): round(float(values[apart == d].mean()), 2) for d in range(len(layers))}
        print(f"{name}: by distance {by}; Spearman with the distance {pl.statistics.spearman(apart.ravel(), values.ravel()):.2f}\n", values.round(2), flush=True)  # fmt: skip

    like = pl.surgery.similarity(model, model, texts[:12], tokens=600, layers=layers, other_layers=layers)
    print(like.title)
    for name in like.data["measure"].values:
        told(str(name), like.data.similarity.sel(measure=name).values)
        told(f"  rows in another order, {name}", like.data.control.sel(measure=name).values)
    for controls in (["permuted"], ["redrawn receiver"], ["redrawn"]):
        found = pl.surgery.stitching(model, model, texts, after=layers, into=layers, tokens=640, held_out=64, kinds=["identity", "ridge"], controls=controls)  # fmt: skip
        print(found.title)
        for name in found.data["map"].values:
            told(f"{name}, rows after, columns into", found.data.penalty.sel(map=name).values)
            for control in found.data["control"].values:
                known = found.data.control_penalty.sel(map=name, control=control).values
                if np.isfinite(known).all():
                    told(f"  control {control}, {name}", known)


def exits(model: pl.Model, path: str) -> None:
    """Bar 14: every policy with its checks paid; what is really gained while generating."""
    every = tuple(range(12, 29, 3))
    policies = {f"{by} >= {t:g}": pl.surgery.Exit(by, t, layers=every) for by, t in  # type: ignore[arg-type]
                (("margin", 0.9), ("margin", 0.97), ("probability", 0.9), ("entropy", -1.0), ("cosine", 0.99), ("stable", 3.0))}  # fmt: skip
    found = pl.surgery.exits(model, reviews(path, 4), policies, tokens=256)
    print(found.title)
    print(found.to_frame().round(3).to_string())
    for states in ("recompute", "propagate"):
        made = pl.surgery.generate_early(
            model, "The capital of France is", policies["margin >= 0.97"], states=states, max_new_tokens=10
        )  # type: ignore[arg-type]
        print(
            states,
            "|",
            made.title,
            "| agrees",
            round(float(made.data.share_agreeing), 2),
            "| time",
            round(float(made.data.time), 2),
            "of the whole model's",
        )


def guarantee(model: pl.Model, path: str) -> None:
    """Learn then Test at delta .1, epsilon .05: the curve, the threshold, whether fresh texts keep it, and what time it takes."""
    several, every = int(os.environ.get("CASES", 300)), tuple(range(12, 29, 3))
    names = os.environ.get("BY", "cosine margin head").split()
    texts = reviews(path, several + several // 2 + 60)
    texts, fresh, fitted = texts[:several], texts[several : several + several // 2], texts[several + several // 2 :]
    made = {n: pl.surgery.Exit(n, layers=every) for n in names if n != "head"}  # type: ignore[arg-type]
    if "head" in names:
        head = pl.surgery.ExitHead(layers=every, tokens=2000, context=48).fit(model, fitted)
        made["head"] = pl.surgery.Exit("head", layers=every, head=head)
    for name, policy in made.items():
        found, again = (pl.surgery.calibrate(model, pl.Corpus(t, packed=False, long="cut"), policy, delta=0.1, epsilon=0.05, context=32)
                        for t in (texts, fresh))  # fmt: skip
        print(f"{name}: {found.title}; {int(found.data.cases)} cases")
        chosen = float(found.data.chosen)
        for i in range(0, found.data.sizes["threshold"], 4):
            at = found.data.isel(threshold=i)
            print(f"| {name} >= {float(at.threshold):.4f} | agrees {float(at.agreement):.3f} | p {float(at.p):.3f} | blocks {float(at['layer']):.1f} | fresh {float(again.data.agreement[i]):.3f} |")  # fmt: skip
        if np.isfinite(chosen):
            kept = again.data.sel(threshold=chosen)
            print(f"chosen {chosen:.4f}: blocks {float(found.data['layer'].sel(threshold=chosen)):.2f}; {int(again.data.cases)} fresh texts agree {float(kept.agreement):.3f} (promised .9)", flush=True)  # fmt: skip
        prompts = [" ".join(t.split()[:8]) for t in fresh[:4]]
        for threshold in dict.fromkeys([chosen, 0.95, 0.9]):
            for given in (prompts[0], prompts):
                at = pl.surgery.generate_early(
                    model, given, pl.surgery.Exit(name, threshold, every, head=policy.head), max_new_tokens=10
                ).data  # type: ignore[arg-type]
                print(f"| {name} >= {threshold:.4f} | {1 if isinstance(given, str) else 4} rows | blocks {np.nanmean(at['layer']):.1f} | paid {np.nanmean(at.blocks):.1f} of {float(at.blocks_full):.1f} | agrees {float(at.share_agreeing):.2f} | time {float(at.time):.2f} |", flush=True)  # fmt: skip


def draft(model: pl.Model, path: str, n: int = 20) -> None:
    """Bar 7: greedy token for token on 20 prompts, and the time it takes."""
    same, times, right = [], [], []
    for text in reviews(path, n):
        prompt = " ".join(text.split()[:8])
        made = pl.surgery.draft_and_verify(model, prompt, layers=26, ahead=3, max_new_tokens=8)
        same.append(
            made.data.id.values.tolist() == model.generate(prompt, max_new_tokens=8, repetition_penalty=1.0).ids(0)
        )
        times.append(float(made.data.time))
        right.append(float(made.data.accepted))
        print(f"equal on {sum(same)} of {len(same)} prompts; {np.mean(right):.0%} of drafts accepted; {np.median(times):.2f} of greedy's time", flush=True)  # fmt: skip


WORK = {
    "splice": splice,
    "cost": cost,
    "stitch": stitch,
    "identity": identity,
    "self": self_stitch,
    "exits": exits,
    "draft": draft,
    "guarantee": guarantee,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", default=[*WORK])
    parser.add_argument("--texts", default=PAIRED)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = pl.load(str(smollm2()))
    with pl.quiet():
        for name in given.work:
            print(f"\n== {name}: {(WORK[name].__doc__ or '').splitlines()[0]}")
            _, seconds = cpu(lambda name=name: WORK[name](model, given.texts))  # type: ignore[misc]
            print(f"({seconds:.0f} CPU seconds)", flush=True)


if __name__ == "__main__":
    main()
