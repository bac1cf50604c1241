"""Which few directions, out of thousands, add up to what a site holds? Learnt from activations, and kept as a dictionary.

Adam on the objectives of `objectives.py`, decoder rows held at length 1 (the part of their gradient along them is taken
out), encoder started as the decoder's transpose, learning rate and sparsity raised over the first `warm` share of the
steps and the rate lowered to 0 over the last fifth. Data are centred and scaled first: x' = s (x - mean) with
E |x'|^2 = d; rows longer than `limit` times the median are left out (see `dictionary.py`). Both are folded into the
finished weights. A bias taken off the input before encoding, as in Bricken et al. 2023, would only be another way to
write the encoder's bias, and is not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.corpus import digest
from pellucid.engine.checkpoint import fingerprint
from pellucid.errors import InputError, at_least
from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.dictionaries.objectives import Objective, Parameters, TopKLoss
from pellucid.neurons.dictionaries.rows import Stream, batches, blocks
from pellucid.store import ActivationStore
from pellucid.technique import technique
from pellucid.training import Keeper, train

COOLING = 0.2  # share of the steps over which the learning rate falls to 0
SAMPLE = 100_000  # rows that scale and limit are taken from


@dataclass(eq=False)
class SparseAutoencoder:
    """Trains a dictionary of `features` features for a site; with `writes` another site, a transcoder.

    After `fit` it is in `dictionary_`, and `history_` has for every step the loss, the unexplained share of the variance,
    L0 and the share of dead features. A feature is dead that was off for `dead_after` rows. Rows longer than `limit`
    medians are left out. `scan` may be bfloat16, which is faster on processors that have it: see `sparse.py`.

    >>> rows = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    >>> sae = SparseAutoencoder("layers.0.resid_post", features=16, objective=TopKLoss(4), steps=20, batch=256)
    >>> sae.fit(rows).dictionary_
    <Dictionary of 16 features at layers.0.resid_post (sparse autoencoder, TopK)>
    """

    site: str
    features: int = 4096
    objective: Objective = field(default_factory=TopKLoss)
    writes: str = ""
    steps: int = 2000
    batch: int = 2048
    learning_rate: float = 1e-3
    warm: float = 0.05
    limit: float = 5.0
    dead_after: int = 100_000
    scan: torch.dtype = torch.float32
    seed: int = 0
    dictionary_: Dictionary = field(init=False, repr=False)
    history_: list[list[float]] = field(init=False, repr=False)

    @technique
    def fit(
        self, data: Any, y: None = None, *, checkpoint: str | Path | None = None, every: int = 200
    ) -> SparseAutoencoder:
        """Train on rows: a tensor [rows, d] (or a pair of them), an ActivationStore that holds the sites, or a Stream.

        With a `checkpoint` (a .safetensors file, written `every` so many steps) an interrupted fit continues where it
        stopped and ends with the same weights. InputError for data of other shapes or too few rows, and for the checkpoint
        of a fit that anything else has shaped, the data included.
        """
        at_least(1, features=self.features, steps=self.steps, batch=self.batch, every=every)
        keeper = None if checkpoint is None else Keeper(Path(checkpoint), self._shaped_by(data), every)
        fit = _Fit.begin(self, data)
        self.history_ = train(
            fit.parameters,
            lambda start: fit.batches(data, start),
            fit.step,
            fit.optimizer,
            steps=self.steps,
            schedule=fit.schedule,
            after=fit.after,
            beside=fit.beside,
            keeper=keeper,
            seed=self.seed,
            what="steps of the dictionary",
        )
        self.dictionary_ = fit.finished(*_origin(data))
        return self

    def transform(self, rows: Tensor) -> Tensor:
        """Activations [rows, features], as `dictionary_.encode` gives them."""
        if not hasattr(self, "dictionary_"):
            raise InputError("this autoencoder was not fitted: call fit(data) first")
        return self.dictionary_.encode(rows)

    def _shaped_by(self, data: Any) -> dict[str, Any]:
        """What two fits must have in common for one to continue the other."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("objective", "scan")}
        rule = {"objective": type(self.objective).__name__, **asdict(self.objective)}  # type: ignore[call-overload]
        return {**own, **rule, "scan": str(self.scan), "weights": _origin(data)[1], "data": _identity(data)}


@dataclass(eq=False)
class _Fit:
    """A fit under way: its parameters, and `beside` them what else it has come to (see `train`)."""

    of: SparseAutoencoder
    parameters: Parameters
    beside: dict[
        str, Tensor
    ]  # mean_in, mean_out; norms: scale_in, scale_out, limit; idle [features] rows since each was on
    now: tuple[Tensor, Tensor, Tensor] = field(
        init=False
    )  # the batch of the step, and in how many rows features were on

    @classmethod
    def begin(cls, sae: SparseAutoencoder, data: Any) -> _Fit:
        generator = torch.Generator().manual_seed(sae.seed)
        writes = sae.writes or sae.site
        x, y = next(iter(blocks(data, sae.site, writes, torch.Generator().manual_seed(sae.seed))))
        rows = torch.randperm(len(x), generator=generator)[:SAMPLE]
        x, y = x[rows].float(), y[rows].float()
        wrong = next((i for i, row in enumerate(x.isfinite().all(1) & y.isfinite().all(1)) if not row), None)
        if wrong is not None or not len(x):
            raise InputError(
                "there are no rows" if wrong is None else f"row {int(rows[wrong])} is not finite: leave it out"
            )
        lengths = x.norm(dim=1)
        limit = sae.limit * float(lengths.median()) if math.isfinite(sae.limit) else float("inf")
        x, y = x[lengths <= limit], y[lengths <= limit]
        means = x.mean(0), y.mean(0)
        scales = [
            math.sqrt(t.shape[1] / float((t - m).pow(2).sum(1).mean().clamp_min(1e-12)))
            for t, m in zip((x, y), means, strict=True)
        ]
        decoder = F.normalize(torch.randn(sae.features, y.shape[1], generator=generator), dim=1)
        encoder = decoder.clone()
        if writes != sae.site:
            encoder = F.normalize(torch.randn(sae.features, x.shape[1], generator=generator), dim=1)
        parameters = {
            "encoder": encoder,
            "encoder_bias": torch.zeros(sae.features),
            "decoder": decoder,
            "decoder_bias": torch.zeros(y.shape[1]),
            **sae.objective.own(sae.features),
        }
        beside = {"mean_in": means[0], "mean_out": means[1].clone(), "norms": torch.tensor([*scales, limit]).double()}
        beside["idle"] = torch.zeros(sae.features, dtype=torch.long, device=x.device)
        return cls(sae, {name: value.to(x.device) for name, value in parameters.items()}, beside)

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        self.adam = torch.optim.Adam(parameters, lr=self.of.learning_rate, fused=True)
        return self.adam

    def schedule(self, done: float) -> float:
        return self.warm(done) * min(1.0, (1 - done) / max(1 / self.of.steps, COOLING))

    def warm(self, done: float) -> float:
        return min(1.0, (done + 1 / self.of.steps) / max(1 / self.of.steps, self.of.warm))

    def batches(self, data: Any, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from a step on, the same ones whenever the fit was interrupted."""
        sae, number = self.of, 0
        writes, (s_in, s_out, limit) = sae.writes or sae.site, self.beside["norms"].tolist()
        for epoch in range(sae.steps):
            generator = torch.Generator().manual_seed(sae.seed + 1_000_003 * epoch)
            before = number
            for x, y in batches(data, sae.site, writes, sae.batch, limit, generator):
                if number >= start:
                    x = (x - self.beside["mean_in"]) * s_in
                    yield x, x if writes == sae.site else (y - self.beside["mean_out"]) * s_out
                number += 1
            if number == before:
                raise InputError(f"there are fewer rows than one batch of {sae.batch}: give more, or a smaller batch=")

    def step(self, batch: tuple[Tensor, Tensor], step: int) -> list[float]:
        """Puts the gradients of a batch on the parameters, of the decoder only what is across its rows."""
        x, y = batch
        dead = (self.beside["idle"] >= self.of.dead_after).nonzero()[:, 0]
        found = self.of.objective.step(self.parameters, x, y, dead, self.warm(step / self.of.steps), self.of.scan)
        rows = self.parameters["decoder"].detach()
        gradient = self.parameters["decoder"].grad
        assert gradient is not None
        gradient -= (gradient * rows).sum(1, keepdim=True) * rows
        self.now = x, y, found.on
        return [found.loss, float(found.error.mean()), float(found.on.sum()) / len(x), len(dead) / self.of.features]

    def after(self, step: int) -> None:
        x, y, on = self.now
        F.normalize(self.parameters["decoder"], dim=1, out=self.parameters["decoder"])
        self.beside["idle"].copy_(torch.where(on > 0, 0, self.beside["idle"] + len(x)))
        every, done = self.of.objective.resample, step + 1
        if every and done % every == 0 and done <= (1 - COOLING) * self.of.steps:
            self._resample(x, y, done)

    def _resample(self, x: Tensor, y: Tensor, done: int) -> None:
        """Dead features start anew on rows drawn by the square of their loss, with a quiet encoder, as if Adam never saw them."""
        idle = self.beside["idle"]
        dead = (idle >= self.of.dead_after).nonzero()[:, 0]
        if not len(dead):
            return
        p = self.parameters
        f = self.of.objective.activation(p, 1.0)(x @ p["encoder"].T + p["encoder_bias"])
        e = y - f @ p["decoder"] - p["decoder_bias"]
        generator = torch.Generator().manual_seed(self.of.seed + done)
        weight = e.pow(2).sum(1).cpu() ** 2 + 1e-12
        drawn = torch.multinomial(weight, len(dead), len(dead) > len(x), generator=generator)
        alive = idle < self.of.dead_after
        size = p["encoder"][alive].norm(dim=1).mean() if bool(alive.any()) else 1.0
        starts = {name: value.to(x)[dead] for name, value in self.of.objective.own(self.of.features).items()}
        starts |= {"encoder": 0.2 * size * F.normalize(x[drawn], dim=1), "decoder": F.normalize(e[drawn], dim=1)}
        starts["encoder_bias"] = torch.zeros(len(dead)).to(x)
        for name, value in starts.items():
            p[name][dead] = value
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[p[name]][moment][dead] = 0.0
        idle[dead] = 0

    def finished(self, model: str, digest: str) -> Dictionary:
        """The weights for the data as they are: u / s_out is read off x, and s_out f' written as f."""
        p, b = {name: value.detach() for name, value in self.parameters.items()}, self.beside
        s_in, s_out, limit = b["norms"].tolist()
        return Dictionary(
            encoder=(p["encoder"] * (s_in / s_out)).T.contiguous(),
            encoder_bias=(p["encoder_bias"] - s_in * (p["encoder"] @ b["mean_in"])) / s_out,
            decoder=p["decoder"].clone(),
            decoder_bias=p["decoder_bias"] / s_out + b["mean_out"],
            activation=self.of.objective.activation(p, s_out),
            site=self.of.site,
            writes=self.of.writes,
            limit=limit,
            model=model,
            digest=digest,
        )


def _origin(data: Any) -> tuple[str, str]:
    """Name and digest of the model the data come from, where they say."""
    if isinstance(data, ActivationStore):
        return "", data.index.digest
    if isinstance(data, Stream):
        return data.model.name, data.model.digest
    return "", ""


def _identity(data: Any) -> str:
    """A digest of the data: of the rows themselves, or of the texts that they come from."""
    if isinstance(data, ActivationStore):
        return fingerprint(data.index.place["digest"], data.index.dtype, [s.rows for s in data.index.shards])
    if isinstance(data, Stream):
        return fingerprint(digest(data.corpus.rows(data.model)), data.batch)
    return fingerprint(data if isinstance(data, Tensor | tuple) else list(data))
