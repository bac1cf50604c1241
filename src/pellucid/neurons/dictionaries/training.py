"""Which few directions, out of thousands, add up to what a site holds? Learnt from activations, and kept as a dictionary.

Adam on the objectives of `objectives.py`, decoder rows held at length 1 (the part of their gradient along them is taken
out), encoder started as the decoder's transpose, learning rate and sparsity raised over the first `warm` share of the
steps and the rate lowered to 0 over the last fifth. Data are centred and scaled first: x' = s (x - mean) with
E |x'|^2 = d; rows longer than `limit` times the median are left out (see `dictionary.py`). Both are folded into the
finished weights. A bias taken off the input before encoding, as in Bricken et al. 2023, would only be another way to
write the encoder's bias, and is not used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from pellucid.store import ActivationStore
from pellucid.errors import InputError
from pellucid.neurons.dictionaries.dictionary import Dictionary
from pellucid.neurons.dictionaries.objectives import Objective, Parameters, Step, TopKLoss
from pellucid.neurons.dictionaries.rows import Stream, batches, blocks

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
    >>> sae.fit(rows, progress=False).dictionary_
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

    def fit(
        self,
        data: Any,
        y: None = None,
        *,
        checkpoint: str | Path | None = None,
        every: int = 200,
        progress: bool = True,
    ) -> SparseAutoencoder:
        """Train on rows: a tensor [rows, d] (or a pair of them), an ActivationStore that holds the sites, or a Stream.

        With a `checkpoint` (a .safetensors file, written `every` so many steps) an interrupted fit continues where it
        stopped and ends with the same weights. InputError for data of other shapes or too few rows.
        """
        self.writes = self.writes or self.site
        state = _State.begin(self, data)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            state.resume(path, self._identity(data))
        bar = tqdm(total=self.steps, initial=state.step, unit="step", disable=not progress)
        for x, target in self._batches(data, state):
            self._update(state, x, target)
            bar.update()
            bar.set_postfix(
                unexplained=f"{state.history[-1][1]:.3f}", dead=f"{state.history[-1][3]:.2f}", refresh=False
            )
            if path is not None and (state.step % every == 0 or state.step == self.steps):
                state.save(path, self._identity(data))
        bar.close()
        self.history_ = state.history
        self.dictionary_ = self._finished(state, data)
        return self

    def transform(self, rows: Tensor) -> Tensor:
        """Activations [rows, features], as `dictionary_.encode` gives them."""
        return self.dictionary_.encode(rows)

    # ---- the loop

    def _batches(self, data: Any, state: _State) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are still to come, the same ones whenever the fit was interrupted."""
        number = 0
        for epoch in range(self.steps if state.step < self.steps else 0):
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            before = number
            for x, y in batches(data, self.site, self.writes, self.batch, state.norms["limit"], generator):
                if number >= self.steps:
                    return
                if number >= state.step:
                    x = (x - state.mean_in) * state.norms["scale_in"]
                    y = x if self.writes == self.site else (y - state.mean_out) * state.norms["scale_out"]
                    yield x, y
                number += 1
            if number == before:
                raise InputError(f"there are fewer rows than one batch of {self.batch}: give more, or a smaller batch=")

    def _update(self, state: _State, x: Tensor, y: Tensor) -> None:
        p = state.parameters
        if self.objective.resample and state.step and state.step % self.objective.resample == 0:
            self._resample(state, x, y)
        dead = (state.idle >= self.dead_after).nonzero()[:, 0]
        warm = min(1.0, (state.step + 1) / max(1.0, self.warm * self.steps))
        found: Step = self.objective.step(p, x, y, dead, warm, self.scan)
        with torch.no_grad():
            gradient, rows = p["decoder"].grad, p["decoder"]
            assert gradient is not None
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            decay = min(1.0, (self.steps - state.step) / max(1.0, COOLING * self.steps))
            state.adam.param_groups[0]["lr"] = self.learning_rate * warm * decay
            state.adam.step()
            F.normalize(rows, dim=1, out=rows)
        state.idle = torch.where(found.on > 0, 0, state.idle + len(x))
        state.step += 1
        state.history.append(
            [found.loss, float(found.error.mean()), float(found.on.sum()) / len(x), len(dead) / self.features]
        )

    @torch.no_grad()
    def _resample(self, state: _State, x: Tensor, y: Tensor) -> None:
        """Dead features start anew on rows drawn by the square of their loss, with a quiet encoder, as if Adam never saw them."""
        dead = (state.idle >= self.dead_after).nonzero()[:, 0]
        if not len(dead) or state.step > (1 - COOLING) * self.steps:
            return
        p = {name: value.detach() for name, value in state.parameters.items()}
        f = self.objective.activation(p, 1.0)(x @ p["encoder"].T + p["encoder_bias"])
        e = y - f @ p["decoder"] - p["decoder_bias"]
        generator = torch.Generator().manual_seed(self.seed + state.step)
        drawn = torch.multinomial(
            e.pow(2).sum(1).cpu() ** 2 + 1e-12, len(dead), len(dead) > len(x), generator=generator
        )
        reads = F.normalize(x[drawn], dim=1)
        alive = state.idle < self.dead_after
        size = p["encoder"][alive].norm(dim=1).mean() if bool(alive.any()) else 1.0
        fresh = self.objective.own(self.features)
        starts: dict[str, Tensor | float] = {"encoder": 0.2 * size * reads, "decoder": F.normalize(e[drawn], dim=1), "encoder_bias": 0.0}  # fmt: skip
        for name, value in state.parameters.items():
            if name == "decoder_bias":
                continue
            value[dead] = starts[name] if name in starts else fresh[name].to(value)[dead]
            for moment in ("exp_avg", "exp_avg_sq"):
                state.adam.state[value][moment][dead] = 0.0
        state.idle[dead] = 0

    # ---- what comes of it

    def _finished(self, state: _State, data: Any) -> Dictionary:
        """The weights for the data as they are: u / s_out is read off x, and s_out f' written as f."""
        p = {name: value.detach() for name, value in state.parameters.items()}
        s_in, s_out = state.norms["scale_in"], state.norms["scale_out"]
        bias = (p["encoder_bias"] - s_in * (p["encoder"] @ state.mean_in)) / s_out
        name, digest = _origin(data)
        return Dictionary(
            (p["encoder"] * (s_in / s_out)).T.contiguous(), bias, p["decoder"].clone(),
            p["decoder_bias"] / s_out + state.mean_out, self.objective.activation(p, s_out),
            self.site, self.writes, state.norms["limit"], name, digest,
        )  # fmt: skip

    def _identity(self, data: Any) -> dict[str, Any]:
        """What two fits must have in common for one to continue the other."""
        own = {name: getattr(self, name) for name in ("site", "writes", "features", "steps", "batch", "learning_rate", "warm", "limit", "dead_after", "seed")}  # fmt: skip
        rule = {"objective": type(self.objective).__name__, **asdict(self.objective)}  # type: ignore[call-overload]
        return {**own, **rule, "scan": str(self.scan), "digest": _origin(data)[1]}


@dataclass(eq=False)
class _State:
    """All that a fit has come to: what a checkpoint holds."""

    parameters: Parameters
    adam: torch.optim.Adam
    mean_in: Tensor
    mean_out: Tensor
    norms: dict[str, float]  # scale_in, scale_out, limit
    idle: Tensor  # [features] rows since each was on
    step: int = 0
    history: list[list[float]] = field(default_factory=list)

    @classmethod
    def begin(cls, sae: SparseAutoencoder, data: Any) -> _State:
        generator = torch.Generator().manual_seed(sae.seed)
        x, y = next(iter(blocks(data, sae.site, sae.writes, torch.Generator().manual_seed(sae.seed))))
        rows = torch.randperm(len(x), generator=generator)[:SAMPLE]
        x, y = x[rows].float(), y[rows].float()
        norms = x.norm(dim=1)
        limit = sae.limit * float(norms.median()) if math.isfinite(sae.limit) else float("inf")
        x, y = x[norms <= limit], y[norms <= limit]
        mean_in, mean_out = x.mean(0), y.mean(0)
        scales = [math.sqrt(t.shape[1] / float((t - m).pow(2).sum(1).mean().clamp_min(1e-12))) for t, m in ((x, mean_in), (y, mean_out))]  # fmt: skip
        decoder = F.normalize(torch.randn(sae.features, y.shape[1], generator=generator), dim=1)
        encoder = decoder if sae.writes == sae.site else F.normalize(torch.randn(sae.features, x.shape[1], generator=generator), dim=1)  # fmt: skip
        parameters = {
            "encoder": encoder.clone(), "encoder_bias": torch.zeros(sae.features), "decoder": decoder,
            "decoder_bias": torch.zeros(y.shape[1]), **sae.objective.own(sae.features),
        }  # fmt: skip
        parameters = {name: value.to(x.device).requires_grad_() for name, value in parameters.items()}
        adam = torch.optim.Adam(list(parameters.values()), lr=sae.learning_rate, fused=True)
        numbers = {"scale_in": scales[0], "scale_out": scales[1], "limit": limit}
        return cls(
            parameters, adam, mean_in, mean_out, numbers, torch.zeros(sae.features, dtype=torch.long, device=x.device)
        )

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        tensors = {f"p/{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            tensors |= {f"{moment}/{name}": self.adam.state[value][moment] for moment in ("exp_avg", "exp_avg_sq")}
        tensors |= {"mean_in": self.mean_in, "mean_out": self.mean_out.clone(), "idle": self.idle}
        about = {"identity": identity, "norms": self.norms, "step": self.step, "history": self.history}
        part = path.with_name(path.name + ".part")
        save_file(tensors, str(part), {"pellucid_fit": json.dumps(about)})
        part.replace(path)

    def resume(self, path: Path, identity: dict[str, Any]) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["pellucid_fit"])
                saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{str(path)!r} is no checkpoint of a fit: delete it or name another file") from error
        other = {k for k, v in identity.items() if about["identity"].get(k) != v}
        if other:
            raise InputError(f"{str(path)!r} is the checkpoint of another fit ({', '.join(sorted(other))} differ): name another file")  # fmt: skip
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(saved[f"p/{name}"])
                self.adam.state[value] = {
                    "step": torch.tensor(float(about["step"]), device=value.device),
                    **{moment: saved[f"{moment}/{name}"].to(value.device) for moment in ("exp_avg", "exp_avg_sq")},
                }
        self.mean_in, self.mean_out, self.idle = (
            saved[k].to(self.idle.device) for k in ("mean_in", "mean_out", "idle")
        )
        self.norms, self.step, self.history = about["norms"], about["step"], about["history"]


def _origin(data: Any) -> tuple[str, str]:
    """Name and digest of the model the data come from, where they say."""
    if isinstance(data, ActivationStore):
        return "", data.index.digest
    if isinstance(data, Stream):
        return data.model.name, data.model.digest
    return "", ""
