"""What does a hidden state already know of the tokens after the next one?

For a causal model, the residual h_l at position t is mapped linearly to the last residual at position t + k and read
through the model's own head (Pal et al. 2023, "linear model approximation"):

    p(token t+k+1 | h_l[t]) = softmax(unembed(W_k h_l[t] + c_k)),   W_k, c_k by ridge regression on text

k = 0 is the next token. Two controls stand beside it: the same map fitted to the token's own embedding, which has seen
no context (a bigram model k + 1 steps on), and the most frequent token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused
from pellucid.lenses.chunks import chunks
from pellucid.lenses.logit_lens import lens_sites, unembed
from pellucid.lenses.tuned_lens import last_residual, states
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.statistics import interval

Map = tuple[Tensor, Tensor]  # W [d, d], c [d]


@dataclass(eq=False)
class FutureLens:
    """Maps from the residuals at `sites` to the last residual 0 .. `ahead` positions on; `fit`, then `read` or `score`.

    >>> lens = FutureLens(ahead=3).fit(model, texts)  # doctest: +SKIP
    >>> lens.read(model, "Marty McFly, from Back to the").top_token  # doctest: +SKIP
    """

    sites: str | Sequence[str] = "layers.*.resid_post"
    ahead: int = 3
    ridge: float = 1e-3  # times the mean square of the residuals
    digest: str = ""
    maps: dict[tuple[str, int], Map] = field(default_factory=dict)

    def fit(
        self,
        model: Model,
        texts: Sequence[str],
        *,
        tokens: int = 100_000,
        context: int = 256,
        batch: int = 8,
        progress: bool = True,
    ) -> FutureLens:
        """Fit by ridge regression on the first `tokens` tokens of `texts`; sums are kept, not states.

        Refused where the model looks ahead, InputError without text.
        """
        if not model.anatomy.stacks[-1].causal or len(model.anatomy.stacks) > 1:
            raise Refused(f"{model.name} does not read from left to right: there is no future to foresee")
        names = self._names(model)
        sums = {(name, k): Moments(model.anatomy.stacks[-1].d_model) for name in names for k in range(self.ahead + 1)}
        data = chunks(model, texts, tokens, context, batch)
        if not data:
            raise InputError("there is no text to fit the lens on: give more of it, or a shorter context=")
        for inputs in tqdm(data, unit="batch", disable=not progress):
            run = states(model, inputs, names)
            final = run.tensor(last_residual(model))
            for (name, k), moments in sums.items():
                x, y = run.tensor(name)[:, : final.shape[1] - k], final[:, k:]
                moments.add(x.flatten(0, 1), y.flatten(0, 1))
        self.maps, self.digest = {key: moments.solve(self.ridge) for key, moments in sums.items()}, model.digest
        return self

    def _names(self, model: Model) -> list[str]:
        return list(dict.fromkeys(["embed", *lens_sites(model, self.sites)]))

    def logits(self, model: Model, site: str, k: int, x: Tensor) -> Tensor:
        """[cell, vocabulary] foreseen k positions on, from residuals [cell, d]."""
        if self.digest != model.digest:
            raise InputError(f"this lens was not fitted on the weights of {model.name}: call fit(model, texts)")
        weight, constant = self.maps[site, k]
        return unembed(model, (x.float() @ weight.T + constant).to(x.dtype)[None])[0].float()

    @torch.no_grad()
    def read(self, model: Model, prompt: Any, *, position: int | str = -1, top: int = 5) -> Result:
        """What every layer foresees at one position: `probability` and `top_token` over layer x ahead x top."""
        names = self._names(model)
        run = model.run(prompt, keep=names)
        at = position if isinstance(position, int) else repr(position)
        rows = [
            [
                self.logits(model, name, k, run.tensor(f"{name}@{at}")[0]).softmax(-1)[0].topk(top)
                for k in range(self.ahead + 1)
            ]
            for name in names
        ]
        decode = model.tokenizer.decode
        data = xr.Dataset(
            {
                "probability": (("layer", "ahead", "top"), np.array([[p.values.tolist() for p in row] for row in rows])),
                "top_token": (("layer", "ahead", "top"), np.array(
                    [[[decode([i]) for i in p.indices.tolist()] for p in row] for row in rows], dtype=object)),
            },
            coords={"layer": names, "ahead": range(self.ahead + 1)},
        )  # fmt: skip
        provenance = Provenance(
            "future_lens",
            model.name,
            digest=model.digest,
            inputs=list(run.inputs.texts),
            arguments={"position": position},
        )
        return Result(data, kind="future lens", title=f"Future lens of {model.name}", provenance=provenance)

    @torch.no_grad()
    def score(
        self, model: Model, texts: Sequence[str], *, tokens: int = 10_000, context: int = 256, seed: int = 0
    ) -> Result:
        """Precision on held-out text: how often the token the model really goes on with is foreseen first.

        Gives `precision` over layer x ahead, with its 95 % bootstrap interval `low` to `high` over chunks (1000 draws by
        `seed`), and `most_frequent` [ahead], the share of the commonest token; the row "embed" is the bigram control.
        """
        names = self._names(model)
        rows = list(self._hits(model, names, chunks(model, texts, tokens, context, 1)))
        if not rows:
            raise InputError("there is no text to score the lens on: give more of it, or a shorter context=")
        hits = np.stack([row for row, _ in rows])  # [chunk, layer, ahead]
        low, high = interval(hits, seed, within=(0.0, 1.0))
        followed = torch.cat([ids for _, ids in rows])
        commonest = float(torch.bincount(followed).max()) / len(followed)
        dims = ("layer", "ahead")
        data = xr.Dataset(
            {"precision": (dims, hits.mean(0)), "low": (dims, low), "high": (dims, high), "most_frequent": commonest},
            coords={"layer": names, "ahead": range(self.ahead + 1)},
        )
        provenance = Provenance(
            "future_lens_score", model.name, digest=model.digest, inputs=f"{len(rows)} chunks", seed=seed,
            arguments={"tokens": tokens, "context": context},
        )  # fmt: skip
        return Result(
            data, kind="future lens score", title=f"How far ahead {model.name} is read", provenance=provenance
        )

    def _hits(self, model: Model, names: list[str], data: list[Inputs]) -> Iterator[tuple[np.ndarray, Tensor]]:
        for inputs in data:
            run = states(model, inputs, names)
            said = unembed(model, run.tensor(last_residual(model)))[0].argmax(
                -1
            )  # by the model itself, at each position
            found = np.zeros((len(names), self.ahead + 1))
            for i, name in enumerate(names):
                for k in range(self.ahead + 1):
                    x = run.tensor(name)[0, : len(said) - k]
                    found[i, k] = float((self.logits(model, name, k, x).argmax(-1) == said[k:]).float().mean())
            yield found, said


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

    def solve(self, ridge: float) -> Map:
        mx, my = self.x / self.rows, self.y / self.rows
        xx = self.xx / self.rows - mx[:, None] * mx
        xy = self.xy / self.rows - mx[:, None] * my
        size = ridge * float(xx.diagonal().mean())
        weight = torch.linalg.solve(xx + size * torch.eye(len(mx), dtype=torch.float64), xy).T
        return weight.float(), (my - weight @ mx).float()
