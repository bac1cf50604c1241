"""Every attribution method, one call each, on a decoder, a classifier and an encoder-decoder: one page of comparison.

    python examples/attribution_methods.py [--classifier sentiment-minilm] [--only decoder|classifier|translator]

decoder     SmolLM2-135M-Instruct: why " Paris" rather than " Rome" after "The Eiffel Tower is located in the city of"?
classifier  the directory that examples/sentiment_classifier.py made: why is this review called positive?
translator  a T5 of two layers, trained here in under a minute to say English number words in French: where does each
            French word come from? All outputs are attributed at once, [output, position].

For each model: every method's scores token by token (scaled to a largest size of 1), what they add up to beside the change
of the score they should explain, the rows that were run, how alike the methods are, and how far the answer follows the
tokens they name (area under insertion minus area under deletion). One prompt proves nothing: examples/attribution_trust.py measures
over many, with intervals and controls.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from pellucid.attribution import METHODS, continuation
from pellucid.attribution.evaluation import compare
from pellucid.results import Result
from pellucid.statistics import spearman

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NOMBRES = ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze"]


def attributed(model: Any, prompt: str, target: Any, players: str = "token", **options: Any) -> dict[str, Result]:
    """What every method says; one that is refused is named with the reason."""
    found: dict[str, Result] = {}
    for name, method in METHODS.items():
        start = time.process_time()
        try:
            found[name] = method(model, prompt, target, players=players, **options)
        except pl.errors.PellucidError as error:
            print(f"left out: {name} ({error})")
            continue
        found[name].data.attrs["seconds"] = time.process_time() - start
    return found


def page(title: str, found: dict[str, Result]) -> None:
    """Scores of one output, token by token, and what they add up to."""
    first = next(iter(found.values()))
    labels = [str(t).strip() or "␣" for t in first[("token" if "token" in first.data else "text")].values]
    shown = (
        [i for i, special in enumerate(first.special.values) if not special]
        if "special" in first.data
        else [*range(len(labels))]
    )
    print(f"\n## {title}\n")
    print("| method | " + " | ".join(labels[i] for i in shown) + " | sum | change of the score | rows run | CPU s |")
    print("|---" * (len(shown) + 5) + "|")
    for name, result in found.items():
        values = result.values
        scaled = values / max(np.abs(values).max(), 1e-12)
        change = f"{float(result.score - result.baseline_score):.2f}" if "baseline_score" in result.data else ""
        rows = " + ".join(
            f"{int(result[n])} {what}" for n, what in (("evaluations", "forward"), ("gradients", "with gradient"))
            if n in result.data
        )  # fmt: skip
        cells = " | ".join(f"{scaled[i]:+.2f}" for i in shown)
        print(f"| {name} | {cells} | {values.sum():.2f} | {change} | {rows} | {result.data.attrs['seconds']:.1f} |")
    names = list(found)
    alike = np.array([[spearman(found[a].values[shown], found[b].values[shown]) for b in names] for a in names])
    others = (alike.sum(1) - 1) / (len(names) - 1)
    print("\nRank correlation with the other methods, on average: " + ", ".join(
        f"{names[i]} {others[i]:.2f}" for i in np.argsort(-others)))  # fmt: skip


def trust(model: Any, examples: list[dict[str, Any]], methods: Iterable[str] = METHODS) -> None:
    """Faithfulness of the methods, on average over these examples; random scores too where there are several."""
    found = compare(model, examples, methods=list(methods), metrics=["comprehensiveness"])
    values = found.value.sel(metric="faithfulness")
    order = [i for i in np.argsort(-values.values) if len(examples) > 1 or found.technique.values[i] != "random"]
    print(f"Faithfulness (insertion minus deletion; prompts: {len(examples)}): " + ", ".join(
        f"{found.technique.values[i]} {float(values[i]):.2f}" for i in order))  # fmt: skip


# ---- the three models


def decoder() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model, prompt = pl.load(smollm2()), "The Eiffel Tower is located in the city of"
    found = attributed(model, prompt, " Paris", against=" Rome")
    page('SmolLM2, "The Eiffel Tower is located in the city of": " Paris" rather than " Rome"', found)
    quick = [name for name in found if name != "exact_shapley"]
    trust(model, [{"text": prompt, "target": " Paris", "against": " Rome"}], quick)
    words = METHODS["shapley"](
        model, prompt, " Paris", against=" Rome", players=["The Eiffel Tower", "located in the city of"]
    )
    print(
        "As two players: " + ", ".join(f"{t!r} {v:+.2f}" for t, v in zip(words.text.values, words.values, strict=True))
    )
    inside = METHODS["integrated_gradients"](
        model, prompt, " Paris", against=" Rome", at="layers.15.resid_pre", steps=32, tolerance=1
    )
    print("Integrated gradients at layer 15: " + ", ".join(f"{t} {v:+.2f}" for t, v in zip(inside.token.values, inside.values, strict=True)))  # fmt: skip


def classifier(directory: Path) -> None:
    model, text = pl.load(directory), "A slow start, but the acting is wonderful."
    found = attributed(model, text, "Positive", against="Negative", players="word")
    page(f'A sentiment classifier on MiniLM, "{text}": "Positive" rather than "Negative"', found)
    trust(model, [{"text": text, "target": "Positive", "against": "Negative"}])


def translator(seed: int = 0, steps: int = 600, words: int = 4) -> Any:
    """A T5 that says number words in French, one for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    vocabulary = ["<pad>", "</s>", "<unk>", "<mask>", *NUMBERS, *(f"{w}_" for w in NOMBRES)]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)  # fmt: skip
    module = T5ForConditionalGeneration(config)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        source = torch.randint(len(NUMBERS), (64, words))
        ends = torch.ones(64, 1, dtype=torch.long)
        loss = module(
            input_ids=torch.cat([source + 4, ends], 1), labels=torch.cat([source + 4 + len(NUMBERS), ends], 1)
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    print(f"\nThe translator's loss after {steps} steps: {float(loss.detach()):.4f}")
    return pl.load(module.eval(), tokenizer=tokenizer)


def translation() -> None:
    model, text, said = translator(), "seven two nine four", "sept_ deux_ neuf_ quatre_"
    found = attributed(model, text, continuation(said))
    source = found["saliency"].stream.values == "source"
    words = [i for i in np.flatnonzero(source) if not found["saliency"].special.values[i]]
    print(f"\n## A T5 that translates {text!r} to {said!r}: the source word each French word rests on most\n")
    print("| method | " + " | ".join(said.split()) + " | all right |\n|---|---|---|---|---|---|")
    for name, result in found.items():
        best = [int(np.argmax(row[words])) for row in result.values]
        right = sum(i == n for n, i in enumerate(best))
        print(f"| {name} | " + " | ".join(text.split()[i] for i in best) + f" | {right} of 4 |")
    matrix = found["integrated_gradients"]
    print("\nIntegrated gradients, [output, position], nats of log-probability:\n")
    print(
        "| | " + " | ".join(f"{t} ({s})" for t, s in zip(matrix.token.values, matrix.stream.values, strict=True)) + " |"
    )
    print("|---" * (len(matrix.token) + 1) + "|")
    for token, row in zip(matrix.output_token.values, matrix.values, strict=True):
        print(f"| {token} | " + " | ".join(f"{v:+.2f}" for v in row) + " |")
    one = attributed(model, text, "sept_")
    page('The first French word alone, "sept_", over the source', one)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(NUMBERS), size=(20, 4))
    trust(model, [{"text": " ".join(NUMBERS[i] for i in row), "target": f"{NOMBRES[row[0]]}_"} for row in drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", type=Path, help="the directory examples/sentiment_classifier.py saved to")
    parser.add_argument("--only", choices=["decoder", "classifier", "translator"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.only in (None, "translator"):
        translation()
    if options.classifier and options.only in (None, "classifier"):
        classifier(options.classifier)
    if options.only in (None, "decoder"):
        decoder()


if __name__ == "__main__":
    main()
