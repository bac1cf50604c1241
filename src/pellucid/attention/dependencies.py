"""Does a head look along a syntactic relation?

For every word with a relation to its head word, and every attention head: is the word it looks at most the right one
(Clark et al. 2019)? Two directions are scored, each as the share of words that are right (UAS):

    to head        from the dependent, is the head word looked at most?
    to dependent   from the head word, is the dependent looked at most?

Attention between tokens becomes attention between words: summed over the tokens of the word that is looked at,
averaged over those of the word that looks. Special tokens and the word itself are no candidates. Many relations have
a usual distance, which a head that simply looks to the left gets right: the control is the best fixed offset of each
relation and direction, chosen on the very same words (which flatters the baseline). In a causal model only pairs it
can see are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import xarray as xr

from pellucid.attention.heads import chosen
from pellucid.attention.patterns import attended, stacked
from pellucid.corpus import read_each
from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.tasks.tokens import covering, encode
from pellucid.technique import technique

DIRECTIONS = ("to head", "to dependent")
OFFSETS = tuple(o for o in range(-10, 11) if o)


class Word(Protocol):
    """A word: its characters in the text, the number of its head word (from 1; 0: none) and what it is to it."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def deprel(self) -> str: ...


class Sentence(Protocol):
    """A text with its words in order, such as those of `pellucid.probing.conllu.Treebank`."""

    @property
    def text(self) -> str: ...
    @property
    def words(self) -> Sequence[Word]: ...


@technique
def head_relations(
    model: Model,
    sentences: Iterable[Sentence],
    *,
    stack: str = "",
    subtypes: bool = False,
    least: int = 10,
    edits: Sequence[Edit] = (),
) -> Result:
    """How well each head finds dependency relations, beside the best fixed offset.

    Relations with fewer than `least` words are left out; "nsubj:pass" counts as "nsubj" unless `subtypes`. Gives `best`
    [relation, direction], the UAS of the best head, which `best_layer` and `best_head` name, `baseline` with its
    `offset`, `lead` = best - baseline, the number of words `n` and, over all heads, `uas` [relation, direction, layer,
    head]; the row "all" counts every relation. InputError for a slow tokenizer or no usable sentence.

    >>> head_relations(model, bank.sentences).top(5)
    relation direction best baseline lead n best_layer best_head offset
    ...
    """
    kind = chosen(model, stack)
    tally = Tally(causal=model.anatomy.stacks[[s.name for s in model.anatomy.stacks].index(kind.stack)].causal is True)
    count = 0
    sentences = list(sentences)
    if sentences:
        read_each(model, [sentence.text for sentence in sentences], what="sentence")
    for sentence in sentences:
        ids, offsets = encode(model.tokenizer, sentence.text)
        spans = [covering(offsets, word.start, word.stop) for word in sentence.words]
        if len(spans) < 2 or any(first == last for first, last in spans):
            continue
        found = attended(model, model.inputs([ids]), edits)
        looked = between_words(stacked(found.values[kind]).numpy(), spans)
        names = [w.deprel if subtypes else w.deprel.partition(":")[0] for w in sentence.words]
        tally.add(looked, [w.head for w in sentence.words], names)
        count += 1
    if not count:
        raise InputError("no sentence could be used: expected sentences of at least two words, each with its tokens")
    data = tally.table(least).assign_coords(layer=list(kind.layers))
    return Result(data, kind="head relations", title="Heads that look along a relation")


def between_words(patterns: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """[layer, head, word, word] from patterns [layer, head, query, key] and the tokens [first, last + 1) of words."""
    member = np.zeros((len(spans), patterns.shape[-1]), dtype=patterns.dtype)
    for row, (first, last) in enumerate(spans):
        member[row, first:last] = 1
    mean = member / member.sum(1, keepdims=True)
    return np.einsum("wq,lhqk,vk->lhwv", mean, patterns, member, optimize=True)


class Tally:
    """Counts of words whose relation was found, [direction, layer, head] and [direction, offset], per relation."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.right: dict[str, np.ndarray] = {}
        self.by_offset: dict[str, np.ndarray] = {}
        self.n: dict[str, np.ndarray] = {}

    def add(self, looked: np.ndarray, heads: Sequence[int], names: Sequence[str]) -> None:
        """One sentence: attention between words [layer, head, word, word] and its tree."""
        size = looked.shape[-1]
        looked = np.nan_to_num(looked, nan=-1.0)
        looked[..., range(size), range(size)] = -1.0
        most = looked.argmax(-1)  # [layer, head, word]
        for dependent, (head, name) in enumerate(zip(heads, names, strict=True)):
            if head == 0:
                continue
            for way, (here, there) in enumerate(((dependent, head - 1), (head - 1, dependent))):
                if self.causal and there > here:
                    continue
                for key in (name, "all"):
                    self.right.setdefault(key, np.zeros((2, *most.shape[:2]), int))[way] += most[..., here] == there
                    hits = self.by_offset.setdefault(key, np.zeros((2, len(OFFSETS)), int))
                    if there - here in OFFSETS:
                        hits[way, OFFSETS.index(there - here)] += 1
                    self.n.setdefault(key, np.zeros(2, int))[way] += 1

    def table(self, least: int) -> xr.Dataset:
        enough = [name for name, n in self.n.items() if name != "all" and n.max() >= least]
        if not enough:
            most = Counter({name: int(n.max()) for name, n in self.n.items() if name != "all"}).most_common(1)
            raise InputError(
                f"no relation has {least} words (the most frequent: {most}): give more sentences or least="
            )
        names = ["all", *sorted(enough, key=lambda name: (-self.n[name].max(), name))]
        n = np.stack([self.n[name] for name in names])
        many = np.where(n > 0, n, np.nan)
        uas = np.stack([self.right[name] for name in names]) / many[..., None, None]
        fixed = np.stack([self.by_offset[name] for name in names]) / many[..., None]
        flat = np.nan_to_num(uas, nan=-1.0).reshape(*uas.shape[:2], -1)
        layer, head = np.unravel_index(flat.argmax(-1), uas.shape[2:])
        best, baseline = np.nanmax(np.where(n[..., None] > 0, flat, np.nan), -1, initial=-np.inf), fixed.max(-1)
        best = np.where(n > 0, best, np.nan)
        two = ("relation", "direction")
        return xr.Dataset(
            {"best": (two, best), "baseline": (two, baseline), "lead": (two, best - baseline), "n": (two, n),
             "best_layer": (two, layer), "best_head": (two, head),
             "offset": (two, np.array(OFFSETS)[np.nan_to_num(fixed, nan=-1.0).argmax(-1)]),
             "uas": ((*two, "layer", "head"), uas)},
            {"relation": names, "direction": list(DIRECTIONS), "head": range(uas.shape[-1])},
        )  # fmt: skip
