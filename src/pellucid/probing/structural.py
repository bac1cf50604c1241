"""Is the syntax tree there as geometry?

Structural probes (Hewitt and Manning 2019): a linear map B [rank, d] such that squared distances between the words of a
sentence are distances in its tree, or squared lengths are depths,

    d_B(i, j)^2 = |B (h_i - h_j)|^2   against   steps between i and j in the tree,
    |B h_i|^2                         against   steps from the root to i,

trained by the mean absolute error within each sentence (sum over pairs / n^2, over words / n). Judged on other sentences
by the undirected unlabelled attachment score of the minimum spanning tree of the predicted distances (UUAS) and the
Spearman correlation of true and predicted distances of each word's row; by the accuracy of the root (the word of least
length) and the Spearman correlation of depths. As in their code, punctuation is left out of trees and roots, and
correlations are averaged over sentences of one length, then over lengths of 5 to 50 words. Axes are standardised first,
and every layer is trained at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.conllu import Sentence, Treebank
from pellucid.probing.features import Features, Pool, features_of
from pellucid.probing.linear import standardised
from pellucid.probing.probe import result
from pellucid.probing.splits import held_out
from pellucid.results import Result
from pellucid.statistics import interval, spearman
from pellucid.technique import technique
from pellucid.training import draws, linear, train


def tree_distances(heads: Sequence[int]) -> np.ndarray:
    """[word, word] steps between words in the tree; `heads` count from 1, 0 for the root.

    >>> tree_distances([2, 0, 2]).tolist()
    [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    """
    n = len(heads)
    steps = np.where(np.eye(n, dtype=bool), 0, n * 2)
    for i, head in enumerate(heads):
        if head:
            steps[i, head - 1] = steps[head - 1, i] = 1
    for via in range(n):  # Floyd and Warshall
        steps = np.minimum(steps, steps[:, via, None] + steps[None, via])
    if steps.max() >= 2 * n and n > 1:
        raise InputError(f"the heads {list(heads)} are no tree: some words are not connected")
    return steps


def spanning_tree(distances: np.ndarray) -> set[tuple[int, int]]:
    """The edges (smaller, larger) of the minimum spanning tree, by Prim's algorithm.

    >>> sorted(spanning_tree(np.array([[0, 1, 4], [1, 0, 2], [4, 2, 0]])))
    [(0, 1), (1, 2)]
    """
    n = len(distances)
    nearest, source = distances[0].astype(float).copy(), np.zeros(n, dtype=int)
    outside, edges = set(range(1, n)), set()
    while outside:
        word = min(outside, key=lambda i: nearest[i])
        outside.remove(word)
        edges.add((min(word, int(source[word])), max(word, int(source[word]))))
        closer = distances[word] < nearest
        nearest[closer], source[closer] = distances[word][closer], word
    return edges


@technique
def structural(
    source: Model | Features,
    bank: Treebank,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    rank: int = 64,
    epochs: int = 20,
    test: float = 0.2,
    seed: int = 0,
) -> Result:
    """Train a distance and a depth probe on every layer; sentences of one word have no tree and are passed over.

    Over `layer`: `uuas` with its 95 % interval `uuas_low` to `uuas_high` (bootstrap of test sentences),
    `distance_spearman`, `root_accuracy`, `depth_spearman`; and the UUAS of joining neighbours, `neighbours`, which needs
    no model.

    >>> structural(model, bank, epochs=2).uuas
    <xarray.DataArray 'uuas' (layer: 3)>...
    """
    features = features_of(source, bank.tags(), sites, pool)
    chosen = [i for i, s in enumerate(bank.sentences) if len(s.words) > 1]
    held = held_out(np.arange(len(chosen)), test, seed)
    trained, judged = ([i for i, h in zip(chosen, held, strict=True) if h == side] for side in (False, True))
    trees = {i: tree_distances([w.head for w in bank.sentences[i].words]) for i in chosen}
    values = standardised(features.values)
    layers, _, d = values.shape
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, layers, d, min(rank, d), generator=generator) * 0.1 - 0.05
    train(
        {"maps": maps},
        draws(len(trained), 20, epochs, seed),
        lambda rows, step: _loss(values, bank, trees, [trained[i] for i in rows.tolist()], maps),
        partial(torch.optim.Adam, lr=2e-3),
        schedule=linear,
        what="structural probes",
    )
    scores = [_judge(values, bank, trees[i], i, maps) for i in judged]
    hits, edges = (np.array([s[name] for s in scores]) for name in ("hits", "edges"))  # [sentence, layer], [sentence]
    low, high = interval(hits, seed, over=edges, within=(0.0, 1.0))
    lengths = [len(bank.sentences[i].words) for i in judged]
    return result(
        "structural", "Structural probes", features, uuas=hits.sum(0) / edges.sum(), uuas_low=low, uuas_high=high,
        distance_spearman=_by_length([s["distance"] for s in scores], lengths),
        root_accuracy=np.mean([s["root"] for s in scores], 0),
        depth_spearman=_by_length([s["depth"] for s in scores], lengths),
        neighbours=np.sum([s["neighbours"] for s in scores]) / edges.sum(),
    )  # fmt: skip


def _loss(values: Tensor, bank: Treebank, trees: dict[int, np.ndarray], batch: list[int], maps: Tensor) -> Tensor:
    sizes = [len(trees[i]) for i in batch]
    longest = max(sizes)
    rows = torch.zeros(len(batch), longest, dtype=torch.long)
    gold = torch.zeros(len(batch), longest, longest)
    depth, real = torch.zeros(len(batch), longest), torch.zeros(len(batch), longest)
    for b, (i, n) in enumerate(zip(batch, sizes, strict=True)):
        rows[b, :n] = torch.arange(n) + int(bank.firsts[i])
        gold[b, :n, :n] = torch.as_tensor(trees[i], dtype=torch.float32)
        depth[b, :n], real[b, :n] = gold[b, _root(bank.sentences[i]), :n], 1
    near, deep = values[:, rows].flatten(1, 2) @ maps  # each [layer, batch * word, rank]
    near, deep = (x.unflatten(1, rows.shape) for x in (near, deep))
    predicted = (near[:, :, :, None] - near[:, :, None]).square().sum(-1)
    count = torch.tensor(sizes, dtype=torch.float32)
    pairs = real[:, :, None] * real[:, None]
    distance = ((predicted - gold).abs() * pairs).sum((2, 3)) / count.square()
    lengths = ((deep.square().sum(-1) - depth).abs() * real).sum(2) / count
    return distance.mean(1).sum() + lengths.mean(1).sum()


def _judge(values: Tensor, bank: Treebank, tree: np.ndarray, i: int, maps: Tensor) -> dict[str, np.ndarray]:
    """One sentence on every layer."""
    sentence, first = bank.sentences[i], int(bank.firsts[i])
    near, deep = values[:, first : first + len(tree)] @ maps
    predicted = torch.cdist(near, near).square().numpy()
    lengths = deep.square().sum(-1).numpy()
    words = [w for w, word in enumerate(sentence.words) if word.upos != "PUNCT"]
    gold = {(min(a, b), max(a, b)) for a in range(len(words)) for b in range(a) if tree[words[a], words[b]] == 1}
    root = _root(sentence)
    hits, roots = [], []
    for layer in range(len(values)):
        hits.append(len(gold & spanning_tree(predicted[layer][np.ix_(words, words)])) if words else 0)
        roots.append(bool(words) and words[int(lengths[layer][words].argmin())] == root)
    distance = [
        np.mean([spearman(p, t) for p, t in zip(predicted[layer], tree, strict=True)]) for layer in range(len(values))
    ]
    depth = [spearman(length, tree[root]) for length in lengths]
    chain = sum((a, a + 1) in gold for a in range(len(words) - 1))
    return {"hits": np.array(hits), "edges": np.array(len(gold)), "root": np.array(roots), "neighbours": np.array(chain),
            "distance": np.array(distance), "depth": np.array(depth)}  # fmt: skip


def _root(sentence: Sentence) -> int:
    return next(i for i, word in enumerate(sentence.words) if word.head == 0)


def _by_length(scores: list[np.ndarray], lengths: list[int]) -> np.ndarray:
    """[layer] the mean over lengths 5 to 50 of the mean over sentences of that length; NaN without any."""
    groups = defaultdict(list)
    for score, length in zip(scores, lengths, strict=True):
        if 5 <= length <= 50:
            groups[length].append(score)
    means = [np.nanmean(group, 0) for group in groups.values()]
    return np.mean(means, 0) if means else np.full_like(scores[0], np.nan)
