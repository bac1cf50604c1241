"""What does a hidden state already know of the tokens after the next one?

For a causal model, the residual h_l at position t is mapped linearly to the last residual at position t + k and read
through the model's own head (Pal et al. 2023, "linear model approximation"):

    p(token t+k+1 | h_l[t]) = softmax(unembed(W_k h_l[t] + c_k)),   W_k, c_k by ridge regression on text

k = 0 is the next token. Two controls stand beside it: the same map fitted to the token's own embedding, which has seen
no context (a bigram model k + 1 steps on), and the most frequent token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.corpus import Row, batches
from pellucid.corpus import inputs as as_inputs
from pellucid.engine.edits import Edit
from pellucid.engine.pausing import progress
from pellucid.errors import Refused
from pellucid.lenses.lens import (
    Affine,
    Positions,
    last_residual,
    layer_coords,
    lens_sites,
    logits,
    one_column,
    states,
)  # fmt: skip
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.tasks.tokens import texts as as_texts
from pellucid.technique import technique


@dataclass(eq=False)
class FutureLens(Affine):
    """Maps from the residuals at `sites` to the last residual 0 .. `ahead` positions on; `fit`, then `read` or `score`.

    Fitted by ridge regression (`ridge` times the mean square of the residuals) on the first `tokens` tokens of some texts, rows
    of `context`, `batch` at a time. `at(k)` is the lens of one distance, for `logit_lens(..., through=lens.at(0))`.

    >>> lens = FutureLens(ahead=3).fit(model, texts)
    >>> lens.read(model, "Marty McFly, from Back to the").top_token
    <xarray.DataArray 'top_token' (layer: 25, ahead: 4, top: 5)>...
    """

    sites: str | Sequence[str] = "layers.*.resid_post"
    ahead: int = 3
    tokens: int = 100_000
    context: int | None = None
    batch: int = 8
    ridge: float = 1e-3
    residual = False

    @technique
    def fit(self, model: Model, texts: Any) -> FutureLens:
        """Fit on texts, read as `Corpus` does; sums are kept, not states.

        Refused where the model looks ahead, InputError without text.
        """
        if not model.anatomy.stacks[-1].causal or len(model.anatomy.stacks) > 1:
            raise Refused(f"{model.name} does not read from left to right: there is no future to foresee")
        names = list(dict.fromkeys(["embed", *lens_sites(model, self.sites)]))
        sums = {(name, k): Moments(model.anatomy.stacks[-1].d_model) for name in names for k in range(self.ahead + 1)}
        rows = corpus_rows(model, texts, self.tokens, self.context)
        for group in progress(list(batches(rows, self.batch)), "future lens"):
            run = states(model, as_inputs(model, group), names)
            final = run.tensor(last_residual(model))
            for (name, k), moments in sums.items():
                x, y = run.tensor(name)[:, : final.shape[1] - k], final[:, k:]
                moments.add(x.flatten(0, 1), y.flatten(0, 1))
        solved = {f"{name}+{k}": moments.solve(self.ridge) for (name, k), moments in sums.items()}
        self.weights_, self.biases_ = ({key: maps[i] for key, maps in solved.items()} for i in (0, 1))
        self.digest_, self.losses_ = model.digest, []
        return self

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(key.rpartition("+")[0] for key in self.biases_))

    def at(self, ahead: int) -> Affine:
        """The lens of one distance."""
        lens = _Ahead()
        lens.weights_, lens.biases_ = (
            {k.rpartition("+")[0]: v for k, v in group.items() if k.endswith(f"+{ahead}")}
            for group in (self.weights_, self.biases_)
        )
        lens.digest_, lens.losses_ = self.digest_, []
        return lens

    @technique
    @torch.no_grad()
    def read(
        self, model: Model, prompt: Any, *, positions: Positions = -1, top: int = 5, edits: Sequence[Edit] = ()
    ) -> Result:
        """What every layer foresees at one position: `probability` and `top_token` over layer x ahead x top."""
        self.check(model)
        run = model.run(prompt, keep=self._names, edits=edits)
        column = one_column(run.inputs, positions, "a future lens")[:1]
        best = [
            [
                logits(model, run.tensor(name)[:1, column[0]], f"{name}+{k}", self)[0].softmax(-1).topk(top)
                for k in range(self.ahead + 1)
            ]
            for name in self._names
        ]
        ids = np.array([[p.indices.tolist() for p in row] for row in best])
        dims = ("layer", "ahead", "top")
        data = xr.Dataset(
            {"probability": (dims, np.array([[p.values.tolist() for p in row] for row in best])),
             "top_token": (dims, as_texts(model.tokenizer, ids))},
            coords={**layer_coords(self._names), "ahead": range(self.ahead + 1)},
        )  # fmt: skip
        return Result(data, kind="future lens", title=f"Future lens of {model.name}")

    @technique
    @torch.no_grad()
    def score(
        self, model: Model, texts: Any, *, tokens: int = 10_000, context: int | None = None, seed: int = 0
    ) -> Result:
        """Precision on held-out text: how often the token the model really goes on with is foreseen first.

        Gives `precision` over layer x ahead, with its 95 % interval `low` to `high` over rows of text, and `most_frequent`,
        the share of the commonest token; the row "embed" is the bigram control.
        """
        self.check(model)
        rows = list(self._hits(model, corpus_rows(model, texts, tokens, context)))
        hits = np.stack([row for row, _ in rows])  # [row, layer, ahead]
        low, high = interval(hits, seed, within=(0.0, 1.0))
        followed = torch.cat([ids for _, ids in rows])
        commonest = float(torch.bincount(followed).max()) / len(followed)
        dims = ("layer", "ahead")
        data = xr.Dataset(
            {"precision": (dims, hits.mean(0)), "low": (dims, low), "high": (dims, high), "most_frequent": commonest},
            coords={**layer_coords(self._names), "ahead": range(self.ahead + 1)}, attrs={"rows": len(rows)},
        )  # fmt: skip
        return Result(data, kind="future lens score", title=f"How far ahead {model.name} is read")

    def _hits(self, model: Model, rows: list[Row]) -> Iterator[tuple[np.ndarray, Tensor]]:
        for row in progress(rows, "future lens"):
            run = states(model, as_inputs(model, [row]), self._names)
            said = logits(model, run.tensor(last_residual(model))[0]).argmax(
                -1
            )  # by the model itself, at each position
            found = np.zeros((len(self._names), self.ahead + 1))
            for i, name in enumerate(self._names):
                for k in range(self.ahead + 1):
                    x = run.tensor(name)[0, : len(said) - k]
                    seen = logits(model, x, f"{name}+{k}", self).argmax(-1)
                    found[i, k] = float((seen == said[k:]).float().mean())
            yield found, said


class _Ahead(Affine):
    residual = False


class Moments:
    """The sums ridge regression needs, of inputs x [row, d] and outputs y [row, d]."""

    def __init__(self, d: int) -> None:
        self.xx, self.xy = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        self.x, self.y, self.rows = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), 0

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.float().cpu(), y.float().cpu()
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y).double()
        self.x += x.double().sum(0)
        self.y += y.double().sum(0)
        self.rows += len(x)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """W [d, d] and c [d]."""
        mx, my = self.x / self.rows, self.y / self.rows
        xx = self.xx / self.rows - mx[:, None] * mx
        xy = self.xy / self.rows - mx[:, None] * my
        size = ridge * float(xx.diagonal().mean())
        weight = torch.linalg.solve(xx + size * torch.eye(len(mx), dtype=torch.float64), xy).T
        return weight.float(), (my - weight @ mx).float()
