"""What would the model answer if it stopped after each layer, read in that layer's own basis?

Every residual gets an affine translator into the basis of the last one, before the model's own head reads it:

    q_l = softmax(unembed(final_norm(h_l + A_l h_l + b_l))),    A_l, b_l = argmin E KL(p_model || q_l)

(Belrose et al. 2023). A = b = 0 is the logit lens, where training starts. The optimiser is the paper's: SGD with
Nesterov momentum .9, learning rate 1 times (1 - .9), weight decay 1e-3, gradients clipped to norm 1 per translator,
linear decay. The paper's code computes the loss at every position; the vocabulary products are then seven eighths of
a step. Here a random `share` of the positions of every row is read, the same for all layers, and the model's own
logits only there: more text for the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.corpus import Corpus, Row, batches, digest
from pellucid.corpus import inputs as as_inputs
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.lenses.lens import Affine, last_residual, layer_coords, lens_sites, logits, states
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.training import Keeper, linear, train

EVERY = 20  # steps between two checkpoints
MOMENTUM, DECAY = 0.9, 1e-3


@dataclass(eq=False)
class TunedLens(Affine):
    """A translator for every residual of the last stack but the last, which is its own.

    `fit` trains them on the first `tokens` tokens of some texts, rows of `context` tokens, `batch` in a step; `translate`
    applies one; `logit_lens(model, prompt, through=lens)` reads a prompt with them. `bias_only` leaves A out: how much of the
    gain is a constant shift? `sites` may also name heads' outputs (`layers.*.attn.heads.*.out`): then each head has a
    translator (the attention lens of Sakarvadia et al. 2023). After `fit`: `weights_` and `biases_` by site, `losses_`
    [step][site], KL in nats, `digest_` of the model's weights.

    >>> lens = TunedLens(tokens=20_000).fit(model, texts)
    >>> lens.save("lens.safetensors")
    PosixPath('lens.safetensors')
    """

    sites: str | Sequence[str] = ("embed", "layers.*.resid_post")
    tokens: int = 200_000
    context: int | None = None
    batch: int = 8
    bias_only: bool = False
    learning_rate: float = 1.0
    share: float = 0.1
    seed: int = 0

    @technique
    def fit(self, model: Model, texts: Any, *, checkpoint: str | Path | None = None) -> TunedLens:
        """Train on texts, or pairs of source and target for an encoder-decoder, read as `Corpus` does; one pass.

        With a `checkpoint` (a .safetensors file) an interrupted fit continues where it stopped and ends with the same lens.
        Refused for a model without a head to read with; InputError without text, and for the checkpoint of another fit.
        """
        names = [s for s in lens_sites(model, self.sites) if s != last_residual(model)]
        rows = corpus_rows(model, texts, self.tokens, self.context)
        like = next(p for p in model.module.parameters() if p.is_floating_point())
        d = model.anatomy.stacks[-1].d_model
        zeros = partial(torch.zeros, device=like.device, dtype=torch.float32)
        self.digest_ = model.digest
        self.biases_ = {name: zeros(d) for name in names}
        self.weights_ = {} if self.bias_only else {name: zeros(d, d) for name in names}
        of = self.settings | {"sites": names, "weights": self.digest_, "corpus": digest(rows)}
        self.losses_ = train(
            {f"b/{k}": v for k, v in self.biases_.items()} | {f"A/{k}": v for k, v in self.weights_.items()},
            list(batches(rows, self.batch)),
            lambda group, step: self._step(model, as_inputs(model, group), names, step),
            partial(
                torch.optim.SGD,
                lr=self.learning_rate * (1 - MOMENTUM),
                momentum=MOMENTUM,
                nesterov=True,
                weight_decay=DECAY,
            ),
            schedule=linear,
            keeper=None if checkpoint is None else Keeper(Path(checkpoint), of, EVERY),
            what="tuned lens",
        )
        return self

    def _step(self, model: Model, inputs: Inputs, names: list[str], number: int) -> list[float]:
        """Clipped gradients of every translator on one batch; returns the KL of each. One layer's logits are held at a time."""
        run = states(model, inputs, names)
        cells = _cells(inputs, self.share, self.seed + number)
        with torch.no_grad():
            log_p = logits(model, run.tensor(last_residual(model))[cells]).log_softmax(-1)
            p = log_p.exp()
        losses = []
        for name in names:
            log_q = logits(model, run.tensor(name)[cells], name, self).log_softmax(-1)
            loss = (p * (log_p - log_q)).sum(-1).mean()
            mine = [group[name] for group in (self.biases_, self.weights_) if group]
            for parameter, gradient in zip(mine, torch.autograd.grad(loss, mine), strict=True):
                parameter.grad = gradient / gradient.norm().clamp_min(1.0)
            losses.append(float(loss.detach()))
        return losses


def corpus_rows(model: Model, texts: Any, tokens: int, context: int | None) -> list[Row]:
    """The rows a lens is fitted or judged on: packed for a causal model, else texts (long ones in windows) or pairs."""
    rows = [r for r in Corpus.of(texts, tokens=tokens, context=context, long="windows").rows(model) if r.ids]
    if not rows:
        raise InputError("there is no text to fit or judge the lens on: give more of it, or a shorter context")
    if len(model.anatomy.stacks) > 1 and any(row.decoder is None for row in rows):
        raise InputError("an encoder-decoder reads pairs: give a list of (source, target)")
    return rows


def _cells(inputs: Inputs, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) of a random share of a batch's real tokens."""
    real = inputs.stream("").mask.bool().cpu().nonzero()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(real), generator=generator)[: max(1, round(share * len(real)))]
    rows, columns = real[chosen].unbind(1)
    return rows, columns


# ---- how good is it


@technique
def lens_quality(
    model: Model,
    texts: Any,
    lens: Affine,
    *,
    tokens: int = 20_000,
    context: int | None = None,
    share: float = 1.0,
    seed: int = 0,
) -> Result:
    """KL(model || layer) in nats on held-out text, of a fitted lens and of the logit lens beside it.

    Gives over `layer` (with its `site`) `tuned` and `logit`, the mean over the positions read, `gain` = logit - tuned with
    its 95 % interval `low` to `high` over rows of text, and `agreement`, the share of positions where the tuned lens already
    has the model's own first choice.
    """
    lens.check(model)
    names = list(lens.biases_)
    rows = list(_measured(model, corpus_rows(model, texts, tokens, context), lens, share, seed, names))
    counts = np.array([n for n, _ in rows], dtype=float)
    sums = np.stack([values for _, values in rows])  # [row, 3, site]
    low, high = interval(sums[:, 1] - sums[:, 0], seed, over=counts)
    tuned, plain, agreement = sums.sum(0) / counts.sum()
    data = xr.Dataset(
        {"tuned": ("layer", tuned), "logit": ("layer", plain), "gain": ("layer", plain - tuned),
         "low": ("layer", low), "high": ("layer", high), "agreement": ("layer", agreement)},
        coords=layer_coords(names), attrs={"unit": "nats", "tokens": int(counts.sum()), "rows": len(rows)},
    )  # fmt: skip
    return Result(data, kind="lens quality", title=f"Tuned and logit lens of {model.name}")


@torch.no_grad()
def _measured(
    model: Model, rows: list[Row], lens: Affine, share: float, seed: int, names: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """For every row the positions read and the sums [3, site] of KL tuned, KL logit, and agreement."""
    for number, row in enumerate(progress(rows, "lens quality")):
        inputs = as_inputs(model, [row])
        run = states(model, inputs, names)
        cells = _cells(inputs, share, seed + number)
        log_p = logits(model, run.tensor(last_residual(model))[cells]).log_softmax(-1)
        p, best = log_p.exp(), log_p.argmax(-1)
        found = np.zeros((3, len(names)))
        for i, name in enumerate(names):
            h = run.tensor(name)[cells]
            tuned, plain = (logits(model, h, name, each).log_softmax(-1) for each in (lens, None))
            found[:2, i] = [float((p * (log_p - q)).sum()) for q in (tuned, plain)]
            found[2, i] = float((tuned.argmax(-1) == best).sum())
        yield len(cells[0]), found
