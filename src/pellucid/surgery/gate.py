"""Which of several variants of a span will say the next token better? A logistic probe of the residual before it, fitted on texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.corpus import inputs
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.lenses.lens import Layers
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.surgery.abreast import Seen, Span
from pellucid.technique import technique


@dataclass(eq=False)
class Gate:
    """For each token, from the residual before the span, which variant will say the next token better: a logistic probe.

    After `fit`: `weights_` [variant, d], `biases_` [variant], `names_` of the variants, `right_`, how often it names the better one of
    the texts of the fit, weighted by what is at stake, and `digests_` of the model and the variants.

    >>> gate = Gate().fit(model, {"a": one, "b": other}, texts, layers=slice(2, 6))
    """

    tokens: int = 4096
    context: int | None = 64
    penalty: float = 1.0
    weights_: Tensor = field(init=False, repr=False)
    biases_: Tensor = field(init=False, repr=False)
    names_: tuple[str, ...] = field(init=False)
    right_: float = field(init=False)
    digests_: tuple[str, ...] = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, variants: Mapping[str, Model], texts: Any, *, layers: Layers) -> Gate:
        """Learn which variant loses less, token by token. The frozen blocks run once for each row of text."""
        from sklearn.linear_model import LogisticRegression

        span = Span.of(model, variants, layers)
        xs, losses = [], []
        for row in progress(corpus_rows(model, texts, self.tokens, self.context), "gate"):
            seen = Seen.of(span, inputs(model, [row]))
            xs.append(seen.before[0, :-1].float().cpu())
            losses.append(torch.stack([span.nll(seen, state) for state in seen.states]))
        x, loss = torch.cat(xs).double().numpy(), torch.cat(losses, 1).double().numpy()
        best, stake = loss.argmin(0), loss.max(0) - loss.min(0)
        self.names_, self.digests_ = tuple(variants), digests(model, variants)
        if len(np.unique(best[stake > 0])) < len(variants):
            raise InputError("one of the variants is never the better one on these texts: there is nothing to choose")
        mean, size = x.mean(0), x.std(0) + 1e-6
        solved = LogisticRegression(C=1 / (self.penalty * len(x) ** 0.5), max_iter=500).fit(
            (x - mean) / size, best, sample_weight=stake / stake.mean()
        )
        w = solved.coef_ / size
        b = solved.intercept_ - w @ mean
        w, b = (np.concatenate([-w / 2, w / 2]), np.concatenate([-b / 2, b / 2])) if len(w) == 1 else (w, b)
        self.weights_, self.biases_ = torch.tensor(w, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
        self.right_ = float(((self.scores(torch.tensor(x)).argmax(-1).numpy() == best) * stake).sum() / stake.sum())
        return self

    def scores(self, state: Tensor) -> Tensor:
        """[..., variant] log odds from states [..., d] before the span."""
        return state.float() @ self.weights_.T.to(state.device) + self.biases_.to(state.device)

    def check(self, model: Model, variants: Mapping[str, Model]) -> None:
        """InputError if it is not fitted, or was fitted on other weights or variants."""
        if not hasattr(self, "digests_"):
            raise InputError("this gate is not fitted: call fit(model, variants, texts, layers=...)")
        if tuple(variants) != self.names_:
            raise InputError(f"this gate chooses between {list(self.names_)}, not {list(variants)}")
        for each, digest in zip((model, *variants.values()), self.digests_, strict=True):
            check_weights(each, digest, "this gate")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digests of the model and of every variant. InputError before `fit`."""
        if not hasattr(self, "digests_"):
            raise InputError("this gate is not fitted: call fit(model, variants, texts, layers=...)")
        about = {"tokens": self.tokens, "context": self.context, "penalty": self.penalty, "names_": list(self.names_), "right_": self.right_,
                 "digests_": list(self.digests_)}  # fmt: skip
        return write_tensors(path, "pellucid_gate", about, {"weights": self.weights_, "biases": self.biases_})

    @classmethod
    @technique
    def load(cls, path: str | Path) -> Self:
        """A gate that was saved; `check(model, variants)` says whether it belongs to them. InputError if it is none."""
        said = "is no Gate: expected a file that Gate.save wrote"
        with reading_tensors(path, "pellucid_gate", said) as (about, kept):
            made = cls(int(about["tokens"]), about["context"], float(about["penalty"]))
            made.weights_, made.biases_ = kept["weights"], kept["biases"]
            made.names_, made.digests_ = tuple(about["names_"]), tuple(about["digests_"])
            made.right_ = float(about["right_"])
        return made


def digests(model: Model, variants: Mapping[str, Model]) -> tuple[str, ...]:
    return (model.digest, *(each.digest for each in variants.values()))
