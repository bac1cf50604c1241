"""Which concepts does the middle of SmolLM2 write as features, and what happens when one is turned up?

Trains a top-k sparse autoencoder on layer 15 of 30, measures on held-out text how much of the model's loss goes through
it, and finds for each concept a feature by four of its words: of the 20 that go with these words, or with the text after
them, the one that raises their probability most at four prompts. It is then tried on four other words of the concept at
sixteen other prompts, beside the best of 20 random directions and the best of 20 random features, picked in the same way
and added at the same length. Run it as

    python examples/neurons_dictionary.py --data FOLDER --keep FOLDER [--steps 3000]

where --data holds ud_ewt and imdb_counterfactual; what is computed is kept in --keep, and continued from there.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional as F

import pellucid as pl
from pellucid.engine.edits import Steer
from pellucid.metrics import log_probability
from pellucid.neurons.dictionaries import Dictionary, SparseAutoencoder, TopKLoss, dictionary_quality
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.store import ActivationStore, store_activations

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.lenses_tuned import text
from scripts.demo_model import smollm2

SITE, FEATURES, K = "layers.15.resid_post", 6144, 48


class Concept(NamedTuple):
    """Words that find the feature, and other words that test it."""

    find: str
    test: str


CONCEPTS = {
    "food": Concept("food restaurant delicious pizza", "meal chicken lunch menu"),
    "war": Concept("war army soldiers military", "troops battle weapons enemy"),
    "family": Concept("mother father wife son", "daughter brother husband sister"),
    "money": Concept("money price dollars pay", "cost bank cash tax"),
    "animals": Concept("dog cat horse animal", "dogs cats animals bird"),
    "computing": Concept("computer software internet program", "computers web online files"),
    "music": Concept("music song songs band", "musical singing album sing"),
    "film": Concept("movie film movies films", "cinema scenes screen actors"),
    "religion": Concept("God religious church Christian", "Jesus faith religion Islam"),
    "medicine": Concept("doctor hospital medical patients", "health disease treatment drug"),
    "law": Concept("court law legal lawyer", "attorney judge laws justice"),
}
PROMPTS = [
    "I think that the", "She told me about her", "The most important thing is the", "Yesterday we talked about the",
    "There is a new", "He was looking for a", "Last year they had a", "We need to discuss the", "Everyone knows the",
    "It all started with a", "My friend has a", "The story is about a", "In the morning they saw the", "What I like is the",
    "People often ask about the", "The man went back to the",
]  # fmt: skip
PICKING = ["The people here like the", "When I came home I saw the", "You should think about a", "He wrote about the"]
CANDIDATES = 20  # features, random directions and random features to pick from
HEARD = 0.6
AFTER = 16  # tokens after one of the words that count as text about it


def reviews(path: Path) -> list[str]:
    """The original reviews of a table that has their rewritten twins beside them."""
    with path.open(newline="") as file:
        return [row[1].replace("<br />", " ") for row in list(csv.reader(file, delimiter="\t"))[1::2]]


def texts(data: Path, part: str) -> list[str]:
    paired = data / "imdb_counterfactual" / "sentiment" / "combined" / "paired" / f"{part}_paired.tsv"
    return text(data / "ud_ewt" / f"en_ewt-ud-{part}.conllu") + reviews(paired)


def trained(model: pl.Model, options: argparse.Namespace) -> tuple[Dictionary, ActivationStore]:
    began = time.process_time()
    rows = pl.Corpus(texts(options.data, "train"), context=128, packed=True)
    store = store_activations(model, rows, [SITE], options.keep / "store", compute=torch.bfloat16)
    print(f"{len(store)} tokens harvested, {time.process_time() - began:.0f} s of CPU", flush=True)
    began = time.process_time()
    sae = SparseAutoencoder(
        SITE, FEATURES, TopKLoss(K), steps=options.steps, learning_rate=options.rate, scan=torch.bfloat16
    )
    sae.fit(store, checkpoint=options.keep / "fit.safetensors")
    print(f"{sae.steps} steps of {sae.batch} rows, {time.process_time() - began:.0f} s of CPU", flush=True)
    sae.dictionary_.save(options.keep / "dictionary")
    return sae.dictionary_, store


def word_ids(model: pl.Model, words: str) -> list[int]:
    """The words, with the space before them, as single tokens."""
    ids = [model.tokenizer(" " + word)["input_ids"] for word in words.split()]
    return [i[0] for i in ids if len(i) == 1]


def candidates(d: Dictionary, store: ActivationStore, find: dict[str, list[int]], shards: int) -> dict[str, list[int]]:
    """Features whose activation correlates most with a concept's words, and with the text after them: half and half."""
    sums, squares = torch.zeros(2, len(d), dtype=torch.float64)
    inside = torch.zeros(2 * len(find), len(d), dtype=torch.float64)
    sizes, rows = torch.zeros(2 * len(find)), 0
    for number in range(min(shards, len(store.index.shards))):
        tokens = store.shards("tokens", [number])
        words = torch.stack([torch.isin(tokens, torch.tensor(ids)) for ids in find.values()]).float()
        after = F.max_pool1d(F.pad(words, (AFTER, 0)), AFTER + 1, stride=1)
        masks = torch.cat([words, after])
        for x, mask in zip(store.shards(SITE, [number]).split(4096), masks.split(4096, 1), strict=True):
            f = d.encode(x.float())
            sums += f.sum(0)
            squares += f.pow(2).sum(0)
            inside += mask @ f
            sizes += mask.sum(1)
            rows += len(f)
    share = sizes[:, None] / rows
    covariance = inside / rows - share * sums / rows
    r = covariance / ((squares / rows - (sums / rows) ** 2).clamp_min(1e-9).sqrt() * (share * (1 - share)).sqrt())
    best = r.topk(CANDIDATES).indices.tolist()
    found = {}
    for name, first, second in zip(find, best[: len(find)], best[len(find) :], strict=True):
        fresh = [i for i in second if i not in first[: CANDIDATES // 2]]
        found[name] = first[: CANDIDATES // 2] + fresh[: CANDIDATES // 2]
    return found


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    ranks, n = rankdata(values), labels.sum()
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def contexts(model: pl.Model, held: ActivationStore, f: torch.Tensor, best: int = 3) -> list[str]:
    """Where the feature is strongest, one place per row of text."""
    tokens, prompts, shown, seen = held.tokens, held["prompts"], [], set()
    for i in f.argsort(descending=True).tolist():
        if int(prompts[i]) in seen or f[i] <= 0:
            continue
        seen.add(int(prompts[i]))
        near = [j for j in range(max(0, i - 6), min(len(f), i + 3)) if prompts[j] == prompts[i]]
        words = [model.tokenizer.decode([int(tokens[j])]) for j in near]
        marked = "".join(f"[{w.strip()}]" if j == i else w for j, w in zip(near, words, strict=True))
        shown.append(f"{float(f[i]):.0f} {' '.join(marked.split())}")
        if len(shown) == best:
            break
    return shown


def effects(
    model: pl.Model, directions: torch.Tensor, strength: float, ids: list[int], prompts: list[str]
) -> np.ndarray:
    """[direction, prompt] change of log P(one of the words comes next) when a direction is added, in nats."""
    variants = [Steer(SITE + "@1:", way, strength) for way in directions]  # the first token is beyond the limit
    rows = []
    for prompt in prompts:
        sweep = model.sweep(prompt, variants, log_probability([ids]))
        rows.append((sweep.values - sweep.clean).numpy()[:, 0])
    return np.stack(rows, 1)


def picked(
    model: pl.Model, d: Dictionary, among: list[int], strength: float, find: list[int]
) -> tuple[int, torch.Tensor]:
    """The candidate feature that raises the finding words most, and the best random direction and random feature."""
    g = torch.Generator().manual_seed(among[0])
    random = F.normalize(torch.randn(CANDIDATES, d.decoder.shape[1], generator=g), dim=1)
    others = d.decoder[torch.randperm(len(d), generator=g)[:CANDIDATES]]
    pool = torch.stack([d.decoder[among], random, others])
    raised = effects(model, pool.flatten(0, 1), strength, find, PICKING).mean(1).reshape(3, CANDIDATES)
    best = raised.argmax(1)
    return among[best[0]], pool[torch.arange(3), torch.tensor(best)]


def shown_interval(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ud_ewt and imdb_counterfactual")
    parser.add_argument("--keep", type=Path, required=True, help="where activations and weights are kept")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--strength", type=float, default=0.5, help="of steering, in median lengths of the residual")
    parser.add_argument("--tokens", type=int, default=8_192, help="held-out tokens that the loss is measured on")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    model = pl.load(str(smollm2()))
    d, store = trained(model, options)

    held_out = texts(options.data, "dev")
    order = np.random.default_rng(0).permutation(len(held_out))  # web text and reviews mixed
    held_out = [held_out[i] for i in order]
    began, path = time.process_time(), options.keep / "quality.zip"
    if not path.exists():
        dictionary_quality(model, d, held_out, tokens=options.tokens).save(path)
    found = Result.load(path)
    losses = " ".join(f"{state} {float(found.loss.sel(state=state)):.3f}" for state in found.loss.state.values)
    print(f"held-out nats per token: {losses}")
    print(
        f"loss recovered {float(found.recovered):.3f} ({float(found.low):.3f} to {float(found.high):.3f}), from zero "
        f"{float(found.recovered_from_zero):.3f}; explained variance {float(found.explained):.3f}, L0 {float(found.l0):.1f}, "
        f"dead {float(found.dead):.3f}, tokens beyond the limit {float(found.beyond):.4f}; "
        f"{time.process_time() - began:.0f} s of CPU",
        flush=True,
    )
    concepts(model, d, store, held_out, options)


def concepts(
    model: pl.Model, d: Dictionary, store: ActivationStore, held_out: list[str], options: argparse.Namespace
) -> None:
    began = time.process_time()
    rows = pl.Corpus(held_out, context=128, packed=True)
    held = store_activations(model, rows, [SITE], options.keep / "held", compute=torch.bfloat16)
    x = held[SITE].float()
    strength = options.strength * float(x.norm(dim=1).median())
    find, test = ({name: word_ids(model, c[i]) for name, c in CONCEPTS.items()} for i in (0, 1))
    print(f"\nsteering by {strength:.0f}; change of log P(test words) at {len(PROMPTS)} prompts, in nats", flush=True)
    visible = both = 0
    for name, among in candidates(d, store, find, shards=10).items():
        feature, ways = picked(model, d, among, strength, find[name])
        mine, random, other = effects(model, ways, strength, test[name], PROMPTS)
        on = torch.cat([d.encode(part)[:, feature] for part in x.split(4096)])
        words = [torch.isin(held.tokens, torch.tensor(ids)).numpy() for ids in (find[name], test[name])]
        seen = [auroc(on.numpy(), labels) for labels in words]
        above = [interval(mine - control) for control in (random, other)]
        wins = min(low for low, _ in (interval(mine), *above)) > 0
        visible += wins
        both += wins and seen[1] > HEARD
        print(f"\n{name}: feature {feature}, on in {float((on > 0).float().mean()):.4f} of held-out tokens, AUROC "
              f"{seen[0]:.3f} for its words, {seen[1]:.3f} for the test words")  # fmt: skip
        for shown in contexts(model, held, on):
            print(f"    {shown}")
        print(f"    feature {shown_interval(mine)}; best random direction {random.mean():+.2f}, above it by {shown_interval(mine - random)}; "
              f"best random feature {other.mean():+.2f}, above it by {shown_interval(mine - other)}{'; VISIBLE' if wins else ''}")  # fmt: skip
        for prompt in PROMPTS[:2]:
            plain, moved = (
                model.generate(prompt, edits=e, max_new_tokens=14) for e in ([], d.edits(feature, "steer", strength))
            )
            print(
                f"    {prompt} |{' '.join(plain.text.split())}\n      steered: |{' '.join(moved.text.split())}",
                flush=True,
            )
    print(f"\n{visible} of {len(CONCEPTS)} concepts are steered above both controls, {both} of them by features that are also on "
          f"at the test words (AUROC above {HEARD}); {time.process_time() - began:.0f} s of CPU")  # fmt: skip


if __name__ == "__main__":
    main()
