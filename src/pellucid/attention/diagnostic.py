"""Do the attention weights know something, or would any weights do?

The diagnostic of Wiegreffe and Pinter (2019), "Attention is not not Explanation", section 4.2: a small model that
cannot attend classifies from a weighted average of single tokens, with weights that somebody gives it,

    h_t = tanh(W e_t + b),   logits = U sum over t of w_t h_t + c,     e_t the model's own input embedding (no context)

once with each guide:

    attention   the weights of the trained model, as they are
    uniform     all tokens alike
    permuted    the model's weights, shuffled among the tokens of each text
    learnt      weights of its own, softmax over t of v . h_t, trained with the rest

If the model's attention guides this stranger better than uniform and permuted weights, it holds information about the
tokens that is not bound to the model it comes from. Everything but the weights is the same; seeds give the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.attention.correlation import MEASURES, token_scores
from pellucid.attention.patterns import special
from pellucid.corpus import read_each
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.training import draws, train

GUIDES = ("attention", "uniform", "permuted", "learnt")


@technique
def attention_diagnostic(
    model: Model, texts: Sequence[str], labels: Sequence[int], test_texts: Sequence[str], test_labels: Sequence[int],
    *, measure: str = "last layer", guides: Mapping[str, Sequence[Any]] | None = None, epochs: int = 40, seeds: int = 5,
    seed: int = 0,
) -> Result:  # fmt: skip
    """Test accuracy of the token classifier under each guide.

    `measure` is one of `correlation.MEASURES`; its weights on ordinary tokens are scaled to sum to 1. `guides` adds
    weights of your own: name -> one array [token] per text, training texts first (adversarial attention, for instance).
    Gives `accuracy` [guide] with `low`, `high` over seeds and `by_seed` [guide, seed], `lead` [guide] over uniform,
    paired by seed, with its interval, and `majority`. InputError where numbers do not match.

    >>> attention_diagnostic(classifier, texts, labels, test_texts, test_labels).accuracy
    <xarray.DataArray 'accuracy' (guide: 4)>...
    """
    if len(texts) != len(labels) or len(test_texts) != len(test_labels) or not len(texts) or not len(test_texts):
        raise InputError(
            f"{len(texts)} texts with {len(labels)} labels, {len(test_texts)} test texts with {len(test_labels)}: "
            "expected one label for each"
        )
    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}{nearest(measure, MEASURES)}")
    read = [_read(model, inputs, measure) for inputs in read_each(model, [*texts, *test_texts], what="text")]
    weights: dict[str, Sequence[Any]] = {"attention": [w for _, w in read], **(guides or {})}
    for name, rows in weights.items():
        if len(rows) != len(read) or any(len(r) != len(x) for r, (x, _) in zip(rows, read, strict=False)):
            raise InputError(f"the guide {name!r} must have one weight per token of each of the {len(read)} texts")
    y = torch.as_tensor([*labels, *test_labels])
    names = [*GUIDES, *(guides or {})]
    scores = np.zeros((len(names), seeds))
    for s in progress(range(seeds), "attention diagnostic"):
        generator = torch.Generator().manual_seed(seed + s)
        shuffled = [torch.as_tensor(w)[torch.randperm(len(w), generator=generator)] for _, w in read]
        here = {**weights, "uniform": [torch.ones(len(x)) for x, _ in read], "permuted": shuffled, "learnt": None}
        for i, name in enumerate(names):
            x, w, mask = _padded([x for x, _ in read], here[name])
            classifier = TokenClassifier(epochs=epochs, seed=seed + s)
            n = len(texts)
            classifier.fit(x[:n], y[:n], None if w is None else w[:n], mask[:n])
            scores[i, s] = classifier.score(x[n:], y[n:], None if w is None else w[n:], mask[n:])
    uniform = scores[names.index("uniform")]
    intervals = np.array([[interval(row, seed, within=(0.0, 1.0)), interval(row - uniform, seed)] for row in scores])
    data = xr.Dataset(
        {
            "accuracy": ("guide", scores.mean(1)), "low": ("guide", intervals[:, 0, 0]), "high": ("guide", intervals[:, 0, 1]),
            "lead": ("guide", (scores - uniform).mean(1)), "lead_low": ("guide", intervals[:, 1, 0]),
            "lead_high": ("guide", intervals[:, 1, 1]), "by_seed": (("guide", "seed"), scores),
            "majority": np.bincount(np.asarray(test_labels)).max() / len(test_labels),
        },
        {"guide": names, "seed": range(seed, seed + seeds)},
    )  # fmt: skip
    return Result(data, kind="attention diagnostic", title="Do attention weights guide a stranger?")


def _read(model: Model, inputs: Inputs, measure: str) -> tuple[Tensor, np.ndarray]:
    """Context-free embeddings [token, d] of the ordinary tokens, and the attention they get, summing to 1."""
    usable = np.flatnonzero(~special(model, inputs.stream("")))
    if not len(usable):
        raise InputError(f"the text {inputs.texts[0]!r} has no ordinary token")
    with torch.no_grad():
        x = model.module.get_input_embeddings()(inputs.stream("").ids)[0]  # type: ignore[operator]
    w = token_scores(model, inputs, [measure])[measure][usable]
    return x[torch.as_tensor(usable)].detach().float().cpu(), w / max(float(w.sum()), 1e-30)


def _padded(x: Sequence[Tensor], w: Sequence[Any] | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Texts as one batch [text, token, d], their weights [text, token], and which tokens are real."""
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in x], batch_first=True)
    given = w if w is None else [torch.as_tensor(np.asarray(row), dtype=torch.float32) for row in w]
    weights = None if given is None else nn.utils.rnn.pad_sequence(given, batch_first=True)
    if weights is not None:
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    return nn.utils.rnn.pad_sequence(list(x), batch_first=True), weights, mask


@dataclass(eq=False)
class TokenClassifier:
    """The model that cannot attend, in scikit-learn's manner: `fit`, `predict`, `score`.

    x [text, token, d], weights [text, token] summing to 1 or None (it learns its own), mask [text, token] 1 on real
    tokens.
    """

    width: int = 64
    epochs: int = 40
    learning_rate: float = 3e-3
    decay: float = 1e-3
    seed: int = 0
    hidden_: nn.Linear = field(init=False, repr=False)
    output_: nn.Linear = field(init=False, repr=False)
    scorer_: nn.Linear = field(init=False, repr=False)
    scale_: Tensor = field(init=False, repr=False)

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None, mask: Tensor) -> TokenClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.hidden_ = nn.Linear(x.shape[-1], self.width)
            self.output_ = nn.Linear(self.width, int(y.max()) + 1)
            self.scorer_ = nn.Linear(self.width, 1, bias=False)
        self.scale_ = x[mask.bool()].std()

        def loss(rows: Tensor, step: int) -> Tensor:
            z = self.logits(x[rows], None if weights is None else weights[rows], mask[rows])
            return nn.functional.cross_entropy(z, y[rows])

        used = {"hidden": self.hidden_, "output": self.output_} | ({"scorer": self.scorer_} if weights is None else {})
        train(
            {f"{name}.{key}": p for name, module in used.items() for key, p in module.named_parameters()},
            draws(len(x), 32, self.epochs, self.seed),
            loss,
            partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=self.decay),
            what="token classifier",
        )
        return self

    def logits(self, x: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
        h = self.hidden_(x / self.scale_).tanh()
        if weights is None:
            weights = self.scorer_(h)[..., 0].masked_fill(mask == 0, -torch.inf).softmax(1)
        made: Tensor = self.output_(torch.einsum("bt,bth->bh", weights, h))
        return made

    def predict(self, x: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return self.logits(x, weights, mask).argmax(1)

    def score(self, x: Tensor, y: Tensor, weights: Tensor | None, mask: Tensor) -> float:
        return float((self.predict(x, weights, mask) == y).float().mean())
