"""At which layer can the answer to a yes/no question be read off the frozen activations?

Statements that are true or false are read at one token (by default the last), and on every layer a linear probe is
trained on some topics and judged on others, so that what it finds is no property of a topic's words. The control trains
and judges the same probe on labels shuffled within each topic: what a probe of this capacity finds in nothing.
(Azaria and Mitchell 2023; Marks and Tegmark 2023, who also propose the difference of the class means, `kind="mean"`.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pellucid.errors import InputError, one_of
from pellucid.model import Model
from pellucid.probing.examples import Examples, Spans, known
from pellucid.probing.features import Features, features_of
from pellucid.probing.linear import STRENGTHS, LogisticProbe, features
from pellucid.probing.probe import result
from pellucid.probing.splits import Scores
from pellucid.results import Result
from pellucid.technique import technique

Kind = Literal["logistic", "mean"]


@dataclass
class MeanDifference:
    """The direction between the two class means, through their middle: `weight_` [d], `bias_`, after `fit`."""

    weight_: torch.Tensor = field(init=False, repr=False)
    bias_: float = field(init=False, repr=False)
    classes_: np.ndarray = field(init=False, repr=False)

    def fit(self, x: torch.Tensor, labels: np.ndarray) -> MeanDifference:
        """`x` [n, d], `labels` [n] with two values; the later in order is where the score is positive."""
        x = features(x)
        self.classes_ = np.unique(known(labels))
        if len(self.classes_) != 2:
            raise InputError(f"the labels have {len(self.classes_)} values: a difference of means needs two")
        low, high = (x[torch.as_tensor(labels == c)].mean(0) for c in self.classes_)
        self.weight_ = high - low
        self.bias_ = -float(self.weight_ @ (high + low)) / 2
        return self

    def predict(self, x: torch.Tensor) -> np.ndarray:
        """[n]"""
        return self.classes_[((features(x) @ self.weight_ + self.bias_) > 0).long().numpy()]


def statements(texts: Sequence[str], truth: Sequence[bool], topics: Sequence[str]) -> Examples:
    """Whole statements as examples: labels "true" and "false", types the topics.

    >>> asked = statements(["Rome is in Italy.", "Rome is in Peru."], [True, False], ["cities", "cities"])
    >>> asked.labels.tolist(), asked.types.tolist()
    (['true', 'false'], ['cities', 'cities'])
    """
    labels = ["true" if t else "false" for t in known(truth)]
    return Examples(Spans.whole(texts), labels, types=list(topics), name="truth")


def relation_statements(folder: str | Path, relations: Sequence[str], n: int = 60, seed: int = 0) -> Examples:
    """True and false statements in equal numbers from relation files (JSON: `prompt_templates` with one {} and `samples`
    of subject and object, as the LRE data have them); a false one takes the object of another subject that does not have
    it. At most `n` of each relation; the topic is the relation."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, bool, str]] = []
    for name in relations:
        path = Path(folder) / f"{name}.json"
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            template, samples = given["prompt_templates"][0], given["samples"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"cannot read {str(path)!r} as a relation with templates and samples: {error}") from None
        held: dict[str, set[str]] = {}
        for sample in samples:
            held.setdefault(sample["subject"], set()).add(sample["object"])
        objects = [sample["object"] for sample in samples]
        for i in rng.permutation(len(samples))[: n // 2]:
            subject = samples[i]["subject"]
            wrong = [o for o in objects if o not in held[subject]]
            if wrong:
                for answer, true in ((samples[i]["object"], True), (str(rng.choice(wrong)), False)):
                    rows.append((f"{template.format(subject)} {answer}.", true, name))
    if not rows:
        raise InputError("no statement could be made: every subject of these relations has every object")
    texts, truth, topics = zip(*rows, strict=True)
    return statements(texts, truth, topics)


@technique
def questions(
    source: Model | Features,
    asked: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    kind: Kind = "logistic",
    l2: float | Sequence[float] = STRENGTHS,
    draws: int = 5,
    seed: int = 0,
) -> Result:
    """Leave one topic out at a time, on every layer; `asked` are two-class examples whose types are topics.

    Over `layer`: `accuracy` on held-out topics with its 95 % interval `low` to `high` (bootstrap of statements);
    `shuffled`, the mean over `draws` shufflings of the labels within topics, and `shuffled_low` to `shuffled_high`, the range of
    them; `by_topic` [layer, topic]. Among the strengths `l2` the choice is by leaving out further topics. From a model,
    the last token is read.

    >>> questions(model, statements(texts, truth, topics)).accuracy
    <xarray.DataArray 'accuracy' (layer: 3)>...
    """
    one_of(kind, Kind, "cannot probe by ")
    topics, topic = np.unique(asked.types, return_inverse=True)
    if len(asked.classes) != 2 or len(topics) < 3:
        raise InputError(
            f"{len(asked.classes)} kinds of answer on {len(topics)} topics: expected two answers, and at least 3 topics"
        )
    read_ = features_of(source, asked, sites, "last")
    rng = np.random.default_rng(seed)
    deals = []
    for _ in range(draws):
        labels = asked.labels.copy()
        for t in range(len(topics)):
            rows = np.flatnonzero(topic == t)
            labels[rows] = labels[rng.permutation(rows)]
        deals.append(replace(asked, labels=labels))
    strengths = [float(v) for v in np.atleast_1d(l2)]
    own = Scores(_left_out(read_, asked, topic, kind, strengths, seed)[None], np.arange(len(asked)))
    placebo = np.array([_left_out(read_, d, topic, kind, strengths, seed).mean(1) for d in deals])
    low, high = own.interval(seed, within=(0.0, 1.0))
    by_topic = np.stack([own.values[0][:, topic == t].mean(1) for t in range(len(topics))], 1)
    return result("questions", "Yes/no questions", read_, accuracy=own.mean(), low=low, high=high, shuffled=placebo.mean(0),
                  shuffled_low=placebo.min(0), shuffled_high=placebo.max(0), by_topic=(("layer", "topic"), by_topic),
                  topic=("topic", topics))  # fmt: skip


def _left_out(
    read_: Features, asked: Examples, topic: np.ndarray, kind: Kind, l2: list[float], seed: int
) -> np.ndarray:
    """[layer, n] whether each statement is judged right by the probe that has not seen its topic."""
    right = np.zeros((len(read_.sites), len(asked)))
    for layer in range(len(read_.sites)):
        x = read_.of(asked, layer)
        for t in np.unique(topic):
            out = topic == t
            if kind == "mean":
                fitted: MeanDifference | LogisticProbe = MeanDifference().fit(x[~out], asked.labels[~out])
            else:
                parts = min(3, len(np.unique(topic[~out])))
                fitted = LogisticProbe(l2, parts, seed).fit(x[~out], asked.labels[~out], topic[~out])
            right[layer, out] = fitted.predict(x[out]) == asked.labels[out]
    return right
