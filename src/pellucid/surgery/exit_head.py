"""Will the answer that is read after a layer stay? A probe of the residual, fitted on texts: the cheapest check of an early exit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.exit_reading import passed
from pellucid.technique import technique


@dataclass(eq=False)
class ExitHead:
    """For each layer a logistic probe of the residual: will the first choice read here be the model's? d + 1 weights a layer.

    >>> head = ExitHead(layers=(2, 4, 6)).fit(model, texts)
    """

    layers: tuple[int, ...] | None = None
    tokens: int = 10_000
    context: int | None = None
    penalty: float = 1.0
    lens: Any = None
    weights_: dict[int, Tensor] = field(init=False, repr=False)
    biases_: dict[int, float] = field(init=False, repr=False)
    digest_: str = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, texts: Any) -> ExitHead:
        """Learn the probes. InputError where a layer always agrees, or never."""
        from sklearn.linear_model import LogisticRegression

        policy = Exit(layers=self.layers, lens=self.lens)
        policy.check(model)
        made = [
            passed(model, row, [policy], states=True)
            for row in progress(corpus_rows(model, texts, self.tokens, self.context), "exit head")
        ]
        self.weights_, self.biases_ = {}, {}
        for number, layer in enumerate(policy.checked(model)):
            x = torch.cat([m.states[layer] for m in made]).double().numpy()
            y = np.concatenate([(m.read[0].said[number] == m.final).numpy() for m in made])
            if y.all() or not y.any():
                raise InputError(
                    f"after layer {layer} the answer is {'always' if y.all() else 'never'} the model's: leave it out, or give more text"
                )
            mean, size = x.mean(0), x.std(0) + 1e-6
            solved = LogisticRegression(C=1 / (self.penalty * len(x) ** 0.5), max_iter=500).fit((x - mean) / size, y)
            w = solved.coef_[0] / size
            self.weights_[layer], self.biases_[layer] = (
                torch.tensor(w, dtype=torch.float32),
                float(solved.intercept_[0] - w @ mean),
            )
        self.digest_ = model.digest
        return self

    def confidence(self, layer: int, state: Tensor) -> Tensor:
        """[row] the probability that the answer stays."""
        if layer not in self.weights_:
            raise InputError(f"this head was not fitted after layer {layer}: it knows {sorted(self.weights_)}")
        return (state.float().cpu() @ self.weights_[layer] + self.biases_[layer]).sigmoid()

    def check(self, model: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights."""
        if not hasattr(self, "digest_"):
            raise InputError("this head is not fitted: call fit(model, texts)")
        check_weights(model, self.digest_, "this exit head")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digest of the model's weights. InputError before `fit`."""
        if not hasattr(self, "digest_"):
            raise InputError("this head is not fitted: call fit(model, texts)")
        about = {
            "layers": [*self.weights_], "tokens": self.tokens, "context": self.context, "penalty": self.penalty,
            "biases_": [*self.biases_.values()], "digest_": self.digest_, "lens": self.lens is not None,
        }  # fmt: skip
        return write_tensors(path, "pellucid_exit_head", about, {str(i): w for i, w in self.weights_.items()})

    @classmethod
    @technique
    def load(cls, path: str | Path, lens: Any = None) -> Self:
        """A head that was saved; `check(model)` says whether it belongs to a model. InputError if it is none.

        `lens` is the one through which it was fitted, which has a file of its own.
        """
        said = "is no ExitHead: expected a file that ExitHead.save wrote"
        with reading_tensors(path, "pellucid_exit_head", said) as (about, kept):
            layers = tuple(int(i) for i in about["layers"])
            made = cls(layers, int(about["tokens"]), about["context"], float(about["penalty"]), lens)
            made.weights_ = {i: kept[str(i)] for i in layers}
            made.biases_ = {i: float(b) for i, b in zip(layers, about["biases_"], strict=True)}
            made.digest_ = str(about["digest_"])
            through = bool(about["lens"])
        if through != (lens is not None):
            raise InputError(
                f"this head was fitted through {'a lens: give it, lens=' if through else 'no lens: leave lens= out'}"
            )
        return made
