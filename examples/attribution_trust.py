"""How far can attributions be trusted? Every method on models whose reasons are known, and on three that were trained.

    python examples/attribution_trust.py --data DATA --classifier sentiment-minilm [--out DIRECTORY] [--only PART]

1. truth       classifiers whose every weight was set by hand, so that the responsible tokens are known
2. classifier  a sentiment classifier (examples/sentiment_classifier.py makes it) on film reviews with their counterfactual
               edits (DATA): the edited words are the known causes of the label
3. decoder     SmolLM2 on capitals: the country is what the answer must rest on
4. seq2seq     a small T5, trained here to translate the one word that is marked

Each of 2 to 4 is a comparison (`pellucid benchmark` makes the same of a file): random scores are among the methods and
should come last. Rows are kept in DIRECTORY, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from pellucid.attribution.evaluation import (
    compare,
    known_truth,
)
from pellucid.attribution.evaluation.data import edited
from pellucid.attribution.evaluation.page import page
from pellucid.results import Result
from pellucid.statistics import spearman

TOKENS = 48  # of a review
SHOWN = ("faithfulness", "comprehensiveness", "sufficiency", "infidelity", "token F1", "AUPRC", "average precision")
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NOMBRES = ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze"]


# ---- 1. hand-made models


def truth() -> None:
    found = known_truth(texts=20)
    print("\n## Known truth: average precision (1: the responsible tokens come first; 20 texts)\n")
    print("| method | " + " | ".join(map(str, found.rule.values)) + " |\n|---" * 1 + "|---" * len(found.rule) + "|")
    for method in found.technique.values:
        cells = [
            "refused" if np.isnan(v) else f"{v:.2f}"
            for v in found.value.sel(technique=method, measure="average precision").values
        ]
        print(f"| {method} | " + " | ".join(cells) + " |")


# ---- 2. a classifier of film reviews


def reviews(data: Path, model: Any, n: int) -> list[dict[str, Any]]:
    """Beginnings of the shortest test reviews that are classified right, their counterfactuals too, with an edited word."""
    file = next(data.rglob("test_paired.tsv"), None)
    if file is None:
        sys.exit(f"{str(data)!r} has no test_paired.tsv below it")
    with file.open(newline="") as lines:
        rows = [
            (r["Sentiment"], " ".join(r["Text"].replace("<br />", " ").split()))
            for r in csv.DictReader(lines, delimiter="\t")
        ]
    found: list[dict[str, Any]] = []
    pairs = sorted(zip(rows[::2], rows[1::2], strict=True), key=lambda pair: len(pair[0][1]))
    for (label, text), (other_label, other) in pairs:
        text, other = (
            t[
                : model.tokenizer(t, return_offsets_mapping=True, truncation=True, max_length=TOKENS)["offset_mapping"][
                    -2
                ][1]
            ]
            for t in (text, other)
        )
        with torch.no_grad():
            said = [model.module.config.id2label[int(model.run(t).logits[0].argmax())] for t in (text, other)]
        if said == [label, other_label] and edited(text, other) and len(found) < n:
            found.append({"text": text, "target": label, "counterfactual": other})
    return found


def classifier(data: Path, directory: Path, out: Path, n: int) -> None:
    model = pl.load(directory)
    examples = reviews(data, model, n)
    first = show(
        "A sentiment classifier (MiniLM)",
        compare(model, examples, checkpoint=out / "classifier.jsonl"),
        out / "classifier.html",
    )
    judge_again(model, examples, first, out / "classifier.jsonl", ("pad", "remove"))


def judge_again(model: Any, examples: list[dict[str, Any]], first: Result, rows: Path, ways: tuple[str, ...]) -> None:
    """The same scores, judged by other ways of taking tokens away."""
    texts = [example["text"] for example in examples]
    methods = as_before(rows, texts, first)
    for how in ways:
        again = compare(model, examples, methods=methods, metrics=[], replacement=how, reference=texts)
        column = [r.value.sel(metric="faithfulness").values for r in (first, again)]
        order = [f"{again.technique.values[i]} {column[1][i]:.2f}" for i in np.argsort(-column[1])]
        print(f"\nThe same scores judged by {how}: {', '.join(order)}")
        print(f"Spearman with the order above: {spearman(*column):.2f}")


def as_before(rows: Path, texts: list[str], found: Result) -> dict[str, Any]:
    """The methods of a comparison, their scores read from its rows, which come text by text."""
    names = [str(name) for name in found.technique.values if name != "random"]
    kept = [json.loads(line) for line in rows.read_text().splitlines()[1:]]
    text = dict(zip(dict.fromkeys(row["example"] for row in kept), texts, strict=False))  # the file may have more
    scores = {(row["method"], text.get(row["example"])): row.get("scores") for row in kept}

    def again(name: str) -> Any:
        return lambda model, prompt, target, *, against, players: scores[name, prompt]

    return {name: again(name) for name in names}


# ---- 3. a language model


def decoder(out: Path, n: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pl.load(smollm2())
    countries = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
                 "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna", "Sweden": "Stockholm", "Norway": "Oslo",
                 "Ireland": "Dublin", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo",
                 "England": "London", "Cuba": "Havana", "Iran": "Tehran", "Peru": "Lima", "Kenya": "Nairobi"}  # fmt: skip
    known = [
        (c, f" {capital}") for c, capital in countries.items() if len(model.tokenizer(f" {capital}")["input_ids"]) == 1
    ]
    pairs = zip(known, known[1:] + known[:1], strict=True)
    examples = [
        {
            "text": f"The capital of {country} is the city of",
            "target": capital,
            "against": other,
            "rationale": [country],
        }
        for (country, capital), (_, other) in pairs
    ][:n]
    # Attention sinks make the paths here rough: refined to completeness, one prompt takes about 550 gradients.
    even = partial(pl.attribution.integrated_gradients, steps=64)
    methods = {**pl.attribution.METHODS, "integrated_gradients": even}
    first = show(
        "A language model (SmolLM2-135M-Instruct)",
        compare(model, examples, methods=methods, checkpoint=out / "decoder.jsonl"),
        out / "decoder.html",
    )
    judge_again(model, examples, first, out / "decoder.jsonl", ("remove",))


# ---- 4. an encoder-decoder


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict.fromkeys(["<pad>", "</s>", "<unk>", "<mask>", "this", *NUMBERS, *(f"{w}_" for w in NOMBRES)])
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def marked(rng: np.random.Generator, words: int = 8) -> dict[str, Any]:
    """A text with "this" before one number, and its French name."""
    chosen = rng.integers(0, len(NUMBERS), words)
    place = int(rng.integers(words))
    parts = [NUMBERS[i] for i in chosen]
    start = len("".join(f"{p} " for p in parts[:place]))
    text = " ".join([*parts[:place], "this", *parts[place:]])
    stop = start + len(f"this {parts[place]}")
    return {"text": text, "target": f"{NOMBRES[chosen[place]]}_", "rationale": [[start, stop]]}


def translator(seed: int = 0, steps: int = 700) -> Any:
    """A T5 of two layers that says the marked number in French."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    words, rng = tokenizer(), np.random.default_rng(seed)
    config = T5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)  # fmt: skip
    module = T5ForConditionalGeneration(config)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = [marked(rng) for _ in range(64)]
        ids = torch.tensor(words([b["text"] for b in batch])["input_ids"])
        labels = torch.tensor([words.convert_tokens_to_ids([b["target"]]) for b in batch])
        loss = module(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return pl.load(module.eval(), tokenizer=words)


def seq2seq(out: Path, n: int) -> None:
    model, rng = translator(), np.random.default_rng(1)
    examples = [marked(rng) for _ in range(200)]
    with torch.no_grad():
        said = [int(model.run(e["text"]).logits[0, -1].argmax()) for e in examples]
    right = [e for e, i in zip(examples, said, strict=True) if i == model.tokenizer.convert_tokens_to_ids(e["target"])]
    print(f"\nThe translator is right on {len(right)} of {len(examples)} new texts.")
    show("An encoder-decoder (a T5 trained here)", compare(model, right[:n]), out / "seq2seq.html")


# ---- showing


def show(title: str, found: Result, file: Path) -> Result:
    metrics = [m for m in SHOWN if m in found.metric.values]
    arrows = [{"more": "↑", "less": "↓"}[str(found.better.sel(metric=m).values)] for m in metrics]
    print(f"\n## {title}: {found.data.sizes['example']} prompts\n")
    heads = [f"{m} {a}" for m, a in zip(metrics, arrows, strict=True)]
    print("| method | " + " | ".join(heads) + " | forward passes |\n|---" + "|---" * (len(heads) + 1) + "|")
    order = np.argsort(-found.value.sel(metric="faithfulness").values)
    for i in order:
        cells = []
        for m in metrics:
            value, low, high = (float(found[k].sel(metric=m)[i]) for k in ("value", "low", "high"))
            cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {found.technique.values[i]} | " + " | ".join(cells) + f" | {float(found.cost[i]):.0f} |")
    print(f"\n{found.data.attrs['sentence']}")
    last = str(found.technique.values[order[-1]])
    gap = float(found.value.sel(metric="faithfulness")[order[-2]] - found.value.sel(metric="faithfulness")[order[-1]])
    print(f"Last in faithfulness: {last}, {gap:.2f} below the one before it.")
    print(
        f"Kendall's W of the methods without random: {float(found.concordance):.2f} [{float(found.concordance_low):.2f}, {float(found.concordance_high):.2f}]"
    )
    names = [str(found.technique.values[i]) for i in order]
    pairs = found.agreement.sel(measure="spearman", technique=names, other=names).values
    off = np.where(np.eye(len(names), dtype=bool), np.nan, pairs)
    least, most = (
        np.unravel_index(np.nanargmin(off[:-1, :-1]), off[:-1, :-1].shape),
        np.unravel_index(np.nanargmax(off), off.shape),
    )
    for what, (a, b) in (("most alike", most), ("least alike", least)):
        print(f"The two {what}: {names[a]} and {names[b]}, Spearman {off[a, b]:.2f}")
    refused = json.loads(found.data.attrs["refused"])
    for name, why in refused.items():
        print(f"Left out: {name} ({why})")
    file.write_text(page(found), encoding="utf-8")
    sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the paired reviews, or one above it")
    parser.add_argument("--classifier", type=Path, help="the directory examples/sentiment_classifier.py saved to")
    parser.add_argument("--out", type=Path, default=Path("trust"))
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--only", choices=["truth", "classifier", "decoder", "seq2seq"])
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    if options.only in (None, "truth"):
        truth()
    if options.only in (None, "seq2seq"):
        seq2seq(options.out, options.examples)
    if options.only == "classifier" or (options.only is None and options.data and options.classifier):
        if not (options.data and options.classifier):
            parser.error("the classifier needs --data and --classifier")
        classifier(options.data, options.classifier, options.out, options.examples)
    if options.only in (None, "decoder"):
        decoder(options.out, min(options.examples, 20))


if __name__ == "__main__":
    main()
