"""Does it say the same again when asked again, and can that be read before it answers?

Semantic entropy (Farquhar et al. 2024): several answers are drawn, those that mean the same are put together, and the
entropy of the shares of these groups is the uncertainty, in nats. What means the same is `same(a, b)`; by default it is the
same words, without case and punctuation, which is enough for short answers; give a model of entailment for longer ones.

`ConfidenceProbe` reads the residual where the question is answered and learns which answers will be right (SAPLMA, Azaria and
Mitchell 2023; P(IK), Kadavath et al. 2022), or which have little semantic entropy (Kossen et al. 2024): `right` is any truth
value. Its trap: it learns which *topics* are easy. So it is judged with whole topics held out, beside folds that leak them and
beside shuffled labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.corpus import read_each
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.lenses.lens import last_residual
from pellucid.model import Model
from pellucid.probing.linear import STRENGTHS, LogisticProbe
from pellucid.probing.roc import area, area_interval
from pellucid.probing.splits import folds
from pellucid.results import Result
from pellucid.safety.calibrating import several
from pellucid.safety.uncertainty import asked, at_answer
from pellucid.technique import technique

KEY = "pellucid_confidence"


def same_words(a: str, b: str) -> bool:
    """Whether two answers have the same words.

    >>> same_words(" Paris.", "paris")
    True
    """
    return re.findall(r"\w+", a.lower()) == re.findall(r"\w+", b.lower())


@technique
def semantic_entropy(
    model: Model,
    prompts: Sequence[Any],
    *,
    draws: int = 10,
    same: Callable[[str, str], bool] | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 8,
    stop: Any = (),
    seed: int = 0,
) -> Result:
    """`entropy` [prompt] of the meanings of `draws` answers, in nats, 0 where all mean the same, ln(draws) at most.

    `meanings` [prompt] how many there are; `answer` and `meaning` [prompt, draw]. An answer joins the first group whose first
    member is the `same`. Options are those of `model.generate`.
    """
    at_least(2, draws=draws)
    alike, entropies, said, which = same or same_words, [], [], []
    prompts = several("prompts", prompts)
    read_each(model, prompts, max_new_tokens)
    for i, prompt in enumerate(progress(prompts, "questions asked again")):
        texts = model.generate(
            [prompt], num_return_sequences=draws, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop, seed=seed + i,
        ).texts  # fmt: skip
        firsts: list[str] = []
        groups = []
        for text in texts:
            at = next((g for g, first in enumerate(firsts) if alike(first, text)), len(firsts))
            firsts += [text] if at == len(firsts) else []
            groups.append(at)
        p = np.bincount(groups) / draws
        entropies.append(-(p * np.log(p)).sum())
        said.append(texts)
        which.append(groups)
    data = xr.Dataset(
        {
            "entropy": ("prompt", np.array(entropies) + 0.0, {"unit": "nats"}),
            "meanings": ("prompt", np.array(which).max(1) + 1),
            "answer": (("prompt", "draw"), np.array(said, dtype=str)), "meaning": (("prompt", "draw"), np.array(which)),
        }
    )  # fmt: skip
    return Result(data, kind="semantic entropy", title=f"Semantic entropy of {model.name}")


@dataclass(eq=False)
class ConfidenceProbe:
    """A probe of being right, read at `site` (the last residual by default) where the question is answered.

    After `fit`: `probe_`, and `result_`: `area` with whole topics held out, `leaking`, with random folds, each with its
    interval, and `shuffled`, the mean over `draws` of topics held out with labels dealt anew. It is a reader, too: a monitor with
    rule="first" reads it before the first token.
    """

    site: str | None = None
    folds: int = 5
    draws: int = 5
    l2: float | Sequence[float] = STRENGTHS
    seed: int = 0
    probe_: LogisticProbe = field(init=False, repr=False)
    site_: str = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)
    result_: Result = field(init=False, repr=False)
    asked_: frozenset[str] = field(init=False, repr=False)

    @technique
    def fit(
        self, model: Model, prompts: Sequence[Any], right: Any, *, topics: Sequence[Any] | None = None, decoder: Any = None, batch: int = 8
    ) -> ConfidenceProbe:  # fmt: skip
        """Fit on questions and whether each was answered `right` (see `answered_right`). InputError for one class, fewer than
        four of either, fewer topics than folds. Without `topics` nothing can be held out but the question."""
        prompts, truth = several("prompts", prompts), np.asarray(right).astype(bool)
        if len(truth) != len(prompts) or min(truth.sum(), (~truth).sum()) < 4:
            raise InputError(
                f"{len(prompts)} questions, {int(truth.sum())} right and {int((~truth).sum())} not: expected 4 of each, one label for each"
            )
        named = np.arange(len(truth)) if topics is None else np.unique(np.asarray(topics), return_inverse=True)[1]
        if len(named) != len(truth) or len(set(named.tolist())) < self.folds:
            raise InputError(
                f"{len(set(named.tolist()))} topics for {self.folds} folds: expected as many at least, one for each question"
            )
        self.site_, self.digest_ = self.site or last_residual(model), model.digest
        x = self._values(model, prompts, decoder, batch)
        held, leaks = folds(named, self.folds, self.seed), folds(np.arange(len(truth)), self.folds, self.seed)
        rng = np.random.default_rng(self.seed)
        found: dict[str, float] = {}
        for name, fold in (("area", held), ("leaking", leaks)):
            scores = self._held_out(x, truth, fold)
            low, high = area_interval(scores, truth, named, self.seed)
            found |= {name: area(scores, truth), f"{name}_low": float(low), f"{name}_high": float(high)}
        deals = [rng.permutation(truth) for _ in range(self.draws)]
        found["shuffled"] = (
            float(np.mean([area(self._held_out(x, deal, held), deal) for deal in deals])) if deals else np.nan
        )
        self.probe_ = LogisticProbe(self.l2, 3, self.seed).fit(x, truth, named)
        self.asked_ = frozenset(map(repr, prompts))
        title = f"Probe of being right at {self.site_}: area {found['area']:.3f} with topics held out"
        title += f" ({found['leaking']:.3f} where they leak)" if found["leaking"] - found["area"] > 0.05 else ""
        title += ", not told from chance" if found["area_low"] <= 0.5 else ""
        self.result_ = Result(xr.Dataset(found), kind="confidence probe", title=title)
        return self

    def _values(self, model: Model, prompts: list[Any], decoder: Any, batch: int) -> Tensor:
        return torch.cat(
            [
                at_answer(q, model.run(q.inputs, keep=self.site_), self.site_).float().cpu()
                for q, _ in asked(model, prompts, None, decoder, batch)
            ]
        )

    def _held_out(self, x: Tensor, truth: np.ndarray, fold: np.ndarray) -> np.ndarray:
        scores = np.zeros(len(truth))
        for k in range(self.folds):
            rest = fold != k
            if len(set(truth[rest].tolist())) < 2:
                raise InputError("without one fold all answers are alike: give more questions, or fewer folds")
            logits = (
                LogisticProbe(float(np.atleast_1d(self.l2)[-1]), 3, self.seed)
                .fit(x[rest], truth[rest])
                .decision_function(x[~rest])
            )
            scores[~rest] = (logits[:, 1] - logits[:, 0]).numpy()
        return scores

    # ---- as a score, and as a reader

    @property
    def digest(self) -> str:
        return getattr(self, "digest_", "")

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was on other weights."""
        if not hasattr(self, "probe_"):
            raise InputError("this probe is not fitted: call fit(model, prompts, right)")
        check_weights(model, self.digest_, "this probe of being right")

    def __call__(self, values: Tensor) -> Tensor:
        logits = self.probe_.decision_function(values.reshape(-1, values.shape[-1]))
        return (logits[:, 1] - logits[:, 0]).reshape(values.shape[:-1])

    def confidence(self, model: Model, prompts: Sequence[Any], *, decoder: Any = None, batch: int = 8) -> np.ndarray:
        """[prompt] log odds of being right. InputError for a question that it was fitted on: that would be no test."""
        self.check(model)
        seen = sum(repr(p) in self.asked_ for p in prompts)
        if seen:
            raise InputError(
                f"{seen} of these {len(prompts)} questions are among those the probe was fitted on: ask others"
            )
        return self(self._values(model, list(prompts), decoder, batch)).numpy()

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights' digest."""
        about = {"site": self.site_, "digest": self.digest_, "asked": sorted(self.asked_)}
        return write_tensors(path, KEY, about, {"weight": self.probe_.weight_, "bias": self.probe_.bias_})

    @classmethod
    def load(cls, path: str | Path) -> ConfidenceProbe:
        """What `save` wrote; `check(model)` says whether it belongs to a model."""
        with reading_tensors(
            path, KEY, "holds no probe of being right: expected a file that ConfidenceProbe.save wrote"
        ) as (about, kept):
            made = cls(about["site"])
            made.site_, made.digest_, made.asked_ = about["site"], about["digest"], frozenset(about["asked"])
            made.probe_ = LogisticProbe()
            made.probe_.weight_, made.probe_.bias_ = kept["weight"], kept["bias"]
            made.probe_.classes_ = np.array([False, True])
        return made
