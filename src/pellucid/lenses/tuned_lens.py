"""What would the model answer if it stopped after each layer, read in that layer's own basis?

Every residual gets an affine translator into the basis of the last one, before the model's own head reads it:

    q_l = softmax(unembed(final_norm(h_l + A_l h_l + b_l))),    A_l, b_l = argmin E KL(p_model || q_l)

(Belrose et al. 2023). A = b = 0 is the logit lens, where training starts. The optimiser is the paper's: SGD with
Nesterov momentum .9, learning rate 1 times (1 - .9), weight decay 1e-3, gradients clipped to norm 1 per translator,
linear decay. The paper's code computes the loss at every position; the vocabulary products are then seven eighths of
a step. Here a random `share` of the positions of every chunk is read, the same for all layers, and the model's own
logits only there: more text for the same work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pellucid.engine.inputs import Inputs
from pellucid.engine.run import Run
from pellucid.errors import InputError
from pellucid.lenses.chunks import chunks
from pellucid.lenses.logit_lens import lens_sites, unembed
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.statistics import interval

EVERY = 20  # steps between two checkpoints
MOMENTUM, DECAY = 0.9, 1e-3


@dataclass(eq=False)
class TunedLens:
    """A translator for every residual of the last stack but the last, which is its own.

    `fit` trains them; `translate` applies one; `logit_lens(model, prompt, through=lens)` reads a prompt with them.
    `bias_only` leaves A out: how much of the gain is a constant shift? `sites` may also name heads' outputs
    (`layers.*.attn.heads.*.out`): then each head has a translator (the attention lens of Sakarvadia et al. 2023).

    >>> lens = TunedLens().fit(model, texts, tokens=200_000)  # doctest: +SKIP
    >>> lens.save("lens.safetensors")  # doctest: +SKIP
    """

    sites: str | Sequence[str] = ("embed", "layers.*.resid_post")
    bias_only: bool = False
    learning_rate: float = 1.0
    share: float = 0.1
    seed: int = 0
    digest: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)  # site -> A [d, d]
    biases: dict[str, Tensor] = field(default_factory=dict)  # site -> b [d]
    losses: list[list[float]] = field(default_factory=list)  # [step][site], KL in nats

    def translate(self, site: str, x: Tensor) -> Tensor:
        """h + A h + b of residuals [..., d] met at a site; the last residual of the stack is returned as it is."""
        if site not in self.biases:
            return x
        moved = x + self.biases[site].to(x)
        return moved if self.bias_only else moved + x @ self.weights[site].to(x).T

    def check(self, model: Model) -> None:
        """InputError if the lens was fitted on other weights."""
        if not self.biases:
            raise InputError("this lens is not fitted: call fit(model, texts) or TunedLens.load(model, path)")
        if self.digest != model.digest:
            raise InputError(
                f"this lens belongs to other weights ({self.digest[:12]}) than {model.name} ({model.digest[:12]})"
            )

    # ---- training

    def fit(
        self,
        model: Model,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        *,
        tokens: int = 200_000,
        context: int = 256,
        batch: int = 8,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> TunedLens:
        """Train on the first `tokens` tokens of `texts` (pairs of source and target for an encoder-decoder).

        Chunks of `context` tokens, `batch` in a step, one pass. With a `checkpoint` (a .safetensors file) an interrupted
        fit continues where it stopped. Refused for a model without a head to read with; InputError without text.
        """
        names = [s for s in lens_sites(model, self.sites) if s != last_residual(model)]
        self._begin(model, names)
        data = chunks(model, texts, tokens, context, batch)
        if not data:
            raise InputError("there is no text to fit the lens on: give more of it, or a shorter context=")
        trained = [*self.biases.values(), *self.weights.values()]
        momenta = [torch.zeros_like(p) for p in trained]
        if checkpoint is not None:
            self._resume(Path(checkpoint), momenta)
        bar = tqdm(data[len(self.losses) :], unit="step", disable=not progress)
        for number, inputs in enumerate(bar, len(self.losses)):
            rate = self.learning_rate * (1 - MOMENTUM) * (1 - number / len(data))
            self.losses.append(self._step(model, inputs, names, number))
            for parameter, momentum in zip(trained, momenta, strict=True):
                _nesterov(parameter, momentum, rate)
            bar.set_postfix(kl=f"{np.mean(self.losses[-1]):.3f}", refresh=False)
            if checkpoint is not None and (number % EVERY == EVERY - 1 or number == len(data) - 1):
                self._keep(Path(checkpoint), momenta)
        for parameter in trained:
            parameter.grad = None
            parameter.requires_grad_(False)
        return self

    def _begin(self, model: Model, names: list[str]) -> None:
        like = next(p for p in model.module.parameters() if p.is_floating_point())
        d = model.anatomy.stacks[-1].d_model
        zeros = partial(torch.zeros, device=like.device, dtype=torch.float32, requires_grad=True)
        self.digest, self.losses = model.digest, []
        self.biases = {name: zeros(d) for name in names}
        self.weights = {} if self.bias_only else {name: zeros(d, d) for name in names}

    def _step(self, model: Model, inputs: Inputs, names: list[str], number: int) -> list[float]:
        """Gradients of every translator on one batch; returns the KL of each. One layer's logits are held at a time."""
        run = states(model, inputs, names)
        cells = _cells(inputs, self.share, self.seed + number)
        with torch.no_grad():
            log_p = _log_softmax(model, run.tensor(last_residual(model))[cells][None])
            p = log_p.exp()
        losses = []
        for name in names:
            log_q = _log_softmax(model, self.translate(name, run.tensor(name)[cells][None].float()))
            loss = (p * (log_p - log_q)).sum(-1).mean()
            mine = [group[name] for group in (self.biases, self.weights) if group]
            for parameter, gradient in zip(mine, torch.autograd.grad(loss, mine), strict=True):
                parameter.grad = gradient
            losses.append(float(loss.detach()))
        return losses

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights' digest."""
        return self._write(Path(path), {})

    @classmethod
    def load(cls, model: Model, path: str | Path) -> TunedLens:
        """A lens saved for this model. InputError if the file is none, or was fitted on other weights."""
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["pellucid_lens"])
                kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{str(path)!r} is no tuned lens: expected a file that TunedLens.save wrote") from error
        lens = cls(**about)
        lens.weights = {key[2:]: value for key, value in kept.items() if key.startswith("A/")}
        lens.biases = {key[2:]: value for key, value in kept.items() if key.startswith("b/")}
        lens.check(model)
        return lens

    def _write(self, path: Path, more: dict[str, Tensor]) -> Path:
        names = ("sites", "bias_only", "learning_rate", "share", "seed", "digest", "losses")
        about = {name: getattr(self, name) for name in names}
        tensors = {f"A/{k}": v.detach() for k, v in self.weights.items()} | {
            f"b/{k}": v.detach() for k, v in self.biases.items()
        }
        part = path.with_name(path.name + ".part")
        save_file({**tensors, **more}, str(part), {"pellucid_lens": json.dumps(about)})
        part.replace(path)
        return path

    def _keep(self, path: Path, momenta: list[Tensor]) -> None:
        self._write(path, {f"m/{i}": m for i, m in enumerate(momenta)})

    def _resume(self, path: Path, momenta: list[Tensor]) -> None:
        if not path.exists():
            return
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("pellucid_lens", "{}"))
            own = {"digest": self.digest, "seed": self.seed, "bias_only": self.bias_only, "share": self.share}
            if any(about.get(k) != v for k, v in own.items()) or set(file.keys()) < {f"b/{k}" for k in self.biases}:
                raise InputError(f"{str(path)!r} is the checkpoint of another fit: name another file")
            with torch.no_grad():
                for prefix, group in (("A", self.weights), ("b", self.biases)):
                    for name, parameter in group.items():
                        parameter.copy_(file.get_tensor(f"{prefix}/{name}"))
                for i, momentum in enumerate(momenta):
                    momentum.copy_(file.get_tensor(f"m/{i}"))
        self.losses = about["losses"]


def last_residual(model: Model) -> str:
    stack = model.anatomy.stacks[-1]
    return f"{stack.prefix}layers.{len(stack.blocks) - 1}.resid_post"


def states(model: Model, inputs: Inputs, names: Sequence[str]) -> Run:
    """A run that kept these sites and the last residual, without unembedding more than it must."""
    with torch.no_grad():
        few = model.inputs({**inputs.tensors, "logits_to_keep": 1})
        return model.run(few, keep=[*names, last_residual(model)])


def _log_softmax(model: Model, resid: Tensor) -> Tensor:
    """[cell, vocabulary] of residuals [1, cell, d], through the model's own head."""
    like = next(p for p in model.module.parameters() if p.is_floating_point())
    return unembed(model, resid.to(like.dtype))[0].float().log_softmax(-1)


def _cells(inputs: Inputs, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) of a random share of a batch's real tokens."""
    real = inputs.stream("").mask.bool().cpu().nonzero()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(real), generator=generator)[: max(1, round(share * len(real)))]
    rows, columns = real[chosen].unbind(1)
    return rows, columns


def _nesterov(parameter: Tensor, momentum: Tensor, rate: float) -> None:
    with torch.no_grad():
        assert parameter.grad is not None
        gradient = parameter.grad / parameter.grad.norm().clamp_min(1.0) + DECAY * parameter
        momentum.mul_(MOMENTUM).add_(gradient)
        parameter.sub_(rate * (gradient + MOMENTUM * momentum))
        parameter.grad = None


# ---- how good is it


def lens_quality(
    model: Model,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    lens: TunedLens,
    *,
    tokens: int = 20_000,
    context: int = 256,
    share: float = 1.0,
    seed: int = 0,
) -> Result:
    """KL(model || layer) in nats on held-out text, of the tuned lens and of the logit lens beside it.

    Gives over `layer` (site) `tuned` and `logit`, the mean over the positions read, `gain` = logit - tuned with its 95 %
    bootstrap interval `low` to `high` over chunks of text (1000 draws by `seed`), and `agreement`, the share of
    positions where the tuned lens already has the model's own first choice.
    """
    lens.check(model)
    names = list(lens.biases)
    rows = list(_measured(model, texts, lens, tokens, context, share, seed, names))
    if not rows:
        raise InputError("there is no text to measure the lens on: give more of it, or a shorter context=")
    counts = np.array([n for n, _ in rows], dtype=float)
    sums = np.stack([values for _, values in rows])  # [chunk, 3, site]
    low, high = interval(sums[:, 1] - sums[:, 0], seed, over=counts)
    tuned, plain, agreement = sums.sum(0) / counts.sum()
    data = xr.Dataset(
        {"tuned": ("layer", tuned), "logit": ("layer", plain), "gain": ("layer", plain - tuned),
         "low": ("layer", low), "high": ("layer", high), "agreement": ("layer", agreement)},
        coords={"layer": names}, attrs={"unit": "nats", "tokens": int(counts.sum())},
    )  # fmt: skip
    provenance = Provenance(
        "lens_quality", model.name, digest=model.digest, inputs=f"{len(rows)} chunks of held-out text", seed=seed,
        arguments={"tokens": tokens, "context": context, "share": share},
    )  # fmt: skip
    return Result(data, kind="lens quality", title=f"Tuned and logit lens of {model.name}", provenance=provenance)


@torch.no_grad()
def _measured(
    model: Model, texts: Any, lens: TunedLens, tokens: int, context: int, share: float, seed: int, names: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """For every chunk the positions read and the sums [3, site] of KL tuned, KL logit, and agreement."""
    for number, inputs in enumerate(chunks(model, texts, tokens, context, 1)):
        run = states(model, inputs, names)
        cells = _cells(inputs, share, seed + number)
        log_p = _log_softmax(model, run.tensor(last_residual(model))[cells][None])
        p, best = log_p.exp(), log_p.argmax(-1)
        found = np.zeros((3, len(names)))
        for i, name in enumerate(names):
            h = run.tensor(name)[cells][None].float()
            tuned, plain = (_log_softmax(model, x) for x in (lens.translate(name, h), h))
            found[:2, i] = [float((p * (log_p - q)).sum()) for q in (tuned, plain)]
            found[2, i] = float((tuned.argmax(-1) == best).sum())
        yield len(cells[0]), found
