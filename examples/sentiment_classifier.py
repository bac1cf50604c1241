"""Fine-tune all-MiniLM-L6-v2 to tell good film reviews from bad ones, in less than three minutes of one core.

    python examples/sentiment_classifier.py --data DATA [--model DIRECTORY] [--out sentiment-minilm]

DATA is the folder `sentiment/combined/paired` of the counterfactually augmented reviews (Kaushik et al. 2020), or one
above it: every review comes with a minimal edit that turns its sentiment, so the edited words are the known causes of
the label. The lower blocks stay as they are and are run once; the last two, the pooler and the classifier are trained
on what they give. Reviews are cut after 128 tokens.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

TOKENS = 128
TUNED = 2  # blocks
LABELS = ("Negative", "Positive")


def reviews(data: Path, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels of a split; a review (even) stands before its counterfactual (odd)."""
    found = next(data.rglob(f"{split}_paired.tsv"), None)
    if found is None:
        sys.exit(f"{str(data)!r} has no {split}_paired.tsv below it: give the folder of the paired reviews")
    with found.open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return [" ".join(r["Text"].replace("<br />", " ").split()) for r in rows], [
        LABELS.index(r["Sentiment"]) for r in rows
    ]


class Classifier:
    """A BERT classifier whose lower blocks are frozen: `states` runs them, `finish` the rest."""

    def __init__(self, directory: Path) -> None:
        names = dict(enumerate(LABELS))
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.module = BertForSequenceClassification.from_pretrained(
            directory, id2label=names, label2id={v: k for k, v in names.items()}, attn_implementation="eager"
        )
        bert = self.module.bert
        self.lower, self.upper = bert.encoder.layer[:-TUNED], bert.encoder.layer[-TUNED:]
        self.trained = nn.ModuleList([*self.upper, bert.pooler, self.module.classifier])

    def states(self, texts: list[str]) -> list[Tensor]:
        """Per text, what the last frozen block gives, [token, d]; the longest texts come out of the largest batches."""
        rows = self.tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
        made: dict[int, Tensor] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with torch.no_grad():
            for start in range(0, len(order), 32):
                here = order[start : start + 32]
                batch = self.tokenizer.pad({"input_ids": [rows[i] for i in here]}, return_tensors="pt")
                x, mask = self.module.bert.embeddings(batch["input_ids"]), _additive(batch["attention_mask"])
                for block in self.lower:
                    x = block(x, mask)
                made |= {i: x[n, : len(rows[i])].clone() for n, i in enumerate(here)}
        return [made[i] for i in range(len(rows))]

    def finish(self, states: list[Tensor]) -> Tensor:
        """Logits [text, class]."""
        x = nn.utils.rnn.pad_sequence(states, batch_first=True)
        real = torch.tensor([[1] * len(s) + [0] * (x.shape[1] - len(s)) for s in states])
        for block in self.upper:
            x = block(x, _additive(real))
        return self.module.classifier(self.module.bert.pooler(x))

    def fit(self, texts: list[str], labels: list[int], epochs: int, rate: float, seed: int) -> None:
        states, y = self.states(texts), torch.tensor(labels)
        generator = torch.Generator().manual_seed(seed)
        steps = epochs * -(-len(y) // 32)
        optimiser = torch.optim.AdamW(self.trained.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
        self.module.train()
        for epoch in range(epochs):
            total = 0.0
            for part in torch.randperm(len(y), generator=generator).split(32):
                loss = nn.functional.cross_entropy(self.finish([states[i] for i in part]), y[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += float(loss.detach()) * len(part)
            print(f"epoch {epoch + 1}: loss {total / len(y):.3f}, {time.process_time():.0f} s of CPU", flush=True)
        self.module.eval()

    def accuracy(self, texts: list[str], labels: list[int]) -> tuple[float, float]:
        """Share of texts classified right, and of pairs of which both are."""
        with torch.no_grad():
            states = self.states(texts)
            guess = torch.cat([self.finish(states[i : i + 32]).argmax(1) for i in range(0, len(states), 32)])
        right = guess == torch.tensor(labels)
        return float(right.float().mean()), float((right[::2] & right[1::2]).float().mean())

    def save(self, directory: Path) -> None:
        self.module.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def _additive(mask: Tensor) -> Tensor:
    """A padding mask [batch, key] as what is added to the scores, [batch, 1, 1, key]."""
    return (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an all-MiniLM-L6-v2 directory; default: the installed package's")
    parser.add_argument("--out", type=Path, default=Path("sentiment-minilm"))
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs, the shortest first")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import minilm

    torch.manual_seed(options.seed)
    classifier = Classifier(options.model or minilm())
    texts, labels = reviews(options.data, "train")
    shortest = sorted(range(0, len(texts), 2), key=lambda i: len(texts[i]))[: options.pairs]
    kept = [j for i in shortest for j in (i, i + 1)]
    classifier.fit([texts[i] for i in kept], [labels[i] for i in kept], options.epochs, options.rate, options.seed)
    single, both = classifier.accuracy(*reviews(options.data, "test"))
    classifier.save(options.out)
    spent = time.process_time()
    print(f"test accuracy {single:.3f} of reviews, {both:.3f} of pairs; {spent:.0f} s of CPU; saved in {options.out}")


if __name__ == "__main__":
    main()
