"""What splices, stitches, exits and drafts say of SmolLM2, each bar beside its control; costs in plain forwards.

    python -m benchmarks.surgery_states [splice|cost|stitch|self|exits|draft|guarantee ...] [--texts paired.tsv]

`--texts` is a file of lines `label <tab> text <tab> ...` with ordinary text (IMDB's paired reviews, as measured); CPU time, one
thread. The bars are those of section 6 of the evidence on surgery that issue 14 names.
"""

from __future__ import annotations

import argparse
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


def self_stitch(model: pl.Model, path: str) -> None:
    """Bar 13, second half: one model's own depths; the penalty grows with the distance."""
    layers = [3, 9, 15, 21, 27]
    found = pl.surgery.stitching(model, model, reviews(path, 100), after=layers, into=layers, tokens=1400, held_out=96,
                                 kinds=["identity", "affine"], controls=["tokens"])  # fmt: skip
    for name in found.data["map"].values:
        penalty = found.data.penalty.sel(map=name).values
        print(name, "rows after, columns into\n", penalty.round(2))
        apart = np.abs(np.subtract.outer(np.arange(len(layers)), np.arange(len(layers))))
        print(name, "by distance", {6 * int(d): round(float(penalty[apart == d].mean()), 2) for d in range(len(layers))}, "Spearman with the distance", round(pl.statistics.spearman(apart.ravel(), penalty.ravel()), 2), flush=True)  # fmt: skip
    print("tokens alone, affine\n", found.data.control_penalty.sel(map="affine").values[0].round(2))


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
    """Learn then Test: the threshold that agrees in nine of ten cases, by saturation and by a trained head."""
    texts, every = reviews(path, 240), tuple(range(12, 29, 3))
    head = pl.surgery.ExitHead(layers=every, tokens=4000, context=64).fit(model, texts[120:])
    for policy in (pl.surgery.Exit("cosine", layers=every), pl.surgery.Exit("head", layers=every, head=head)):
        safe = pl.surgery.calibrate(
            model, pl.Corpus(texts[:120], packed=False, long="cut"), policy, delta=0.1, epsilon=0.05, context=48
        )
        print(policy.by, "|", safe.title, "|", int(safe.data.cases), "cases")


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
