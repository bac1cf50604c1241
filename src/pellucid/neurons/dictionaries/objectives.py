"""What is a dictionary trained to do: explain its input with few features, by which measure of few?

x and y are scaled to a mean squared length of d (the trainer does it), decoder rows have length 1, and every loss is
divided by d, so that 1 is what the mean of the data would cost. With e = y - y^:

    TopKLoss       |e|^2 / d + aux_weight |e - e^|^2 / |e|^2         e^ from the dead features that read most (AuxK)
    L1Loss         |e|^2 / d + c sum f / sqrt(d)
    GatedLoss      L1Loss with max(u, 0) under the sum + |y - decode(max(u, 0))|^2 / d, this last decoder held constant
    JumpReLULoss   |e|^2 / d + c L0 / d, threshold trained through a rectangle of width `bandwidth`
    BatchTopKLoss  |e|^2 / d, where the k x rows largest u of a batch are on; and for each prefix of the features (Matryoshka)
                   |y - what they alone explain|^2 / d

Gao et al. 2024; Bricken et al. 2023; Rajamanoharan et al. 2024a and 2024b; Bussmann et al. 2024 and 2025. In AuxK e is held constant, as in Gao's code.
The dead features of the others are put anew on badly explained rows every `resample` steps (Bricken et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.neurons.dictionaries.functions import Activation, Gated, JumpReLU, ReLU, TopK
from pellucid.neurons.dictionaries.sparse import decode, encode, gradients

Parameters = dict[
    str, Tensor
]  # encoder [features, d_in], decoder [features, d_out], their biases, and an objective's own


@dataclass(frozen=True, eq=False)
class Step:
    """What a step found; gradients are on the parameters."""

    loss: float
    error: Tensor  # [rows] |e|^2 / d
    on: Tensor  # [features] in how many rows each feature was on


class Objective(Protocol):
    """A way of training: `step` puts gradients on the parameters, `activation` is what the finished dictionary does."""

    @property
    def resample(self) -> int: ...

    def own(self, features: int) -> Parameters:
        """Parameters beyond encoder, decoder and their biases, as they start."""
        ...

    def step(self, p: Parameters, x: Tensor, y: Tensor, dead: Tensor, warm: float, scan: torch.dtype) -> Step:
        """One batch of rows x [rows, d_in], y [rows, d_out]; `dead` [n] features; `warm` from 0 to 1 as sparsity sets in."""
        ...

    def activation(self, p: Parameters, scale: float) -> Activation:
        """The rule for activations that are `scale` times smaller than those of training."""
        ...


@dataclass(frozen=True)
class TopKLoss:
    """Exactly k features explain each row; `aux` dead ones help where they can."""

    k: int = 32
    aux: int = 64
    aux_weight: float = 1 / 32
    resample: int = 0

    def own(self, features: int) -> Parameters:
        return {}

    @torch.no_grad()
    def step(self, p: Parameters, x: Tensor, y: Tensor, dead: Tensor, warm: float, scan: torch.dtype) -> Step:
        rows, d = y.shape
        code = encode(x, p["encoder"], p["encoder_bias"], self.k, scan=scan)
        e = y - decode(code, p["decoder"]) - p["decoder_bias"]
        error = e.pow(2).sum(1) / d
        loss = error.mean()
        g = e * (-2 / (rows * d))
        p["decoder_bias"].grad = g.sum(0)
        by_encoder, by_bias, by_decoder = gradients(code, x, g, p["decoder"])
        if len(dead):
            spare = encode(x, p["encoder"], p["encoder_bias"], self.aux, scan=scan, among=dead)
            rest = e - decode(spare, p["decoder"])
            weight = self.aux_weight / e.pow(2).sum().clamp_min(1e-12)
            loss = loss + weight * rest.pow(2).sum()
            more = gradients(spare, x, rest * (-2 * weight), p["decoder"])
            by_encoder, by_bias, by_decoder = (
                a + b for a, b in zip((by_encoder, by_bias, by_decoder), more, strict=True)
            )
        p["encoder"].grad, p["encoder_bias"].grad, p["decoder"].grad = by_encoder, by_bias, by_decoder
        on = torch.bincount(code.index[code.u > 0], minlength=len(p["decoder"]))
        return Step(float(loss), error, on)

    def activation(self, p: Parameters, scale: float) -> TopK:
        return TopK(self.k)


class _Dense:
    """Objectives whose features are all computed; gradients by autograd."""

    def own(self, features: int) -> Parameters:
        return {}

    def step(self, p: Parameters, x: Tensor, y: Tensor, dead: Tensor, warm: float, scan: torch.dtype) -> Step:
        with torch.enable_grad(), torch.autocast(x.device.type, scan, enabled=scan != torch.float32):
            u = x @ p["encoder"].T + p["encoder_bias"]
            f, loss = self.penalised(p, u, y, warm)
            e = (y - f @ p["decoder"] - p["decoder_bias"]).float()
            error = e.pow(2).sum(1) / y.shape[1]
            loss = loss + error.mean()
        gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
        for each, gradient in zip(p.values(), gradients, strict=True):
            each.grad = torch.zeros_like(each) if gradient is None else gradient
        return Step(float(loss.detach()), error.detach(), (f > 0).sum(0))

    def penalised(self, p: Parameters, u: Tensor, y: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        """Activations [rows, features] and what is paid for them."""
        raise NotImplementedError


@dataclass(frozen=True)
class L1Loss(_Dense):
    """ReLU features at a price for their sum."""

    weight: float = 0.1
    resample: int = 500

    def penalised(self, p: Parameters, u: Tensor, y: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        f = u.relu()
        return f, warm * self.weight * f.sum(1).mean() / y.shape[1] ** 0.5

    def activation(self, p: Parameters, scale: float) -> ReLU:
        return ReLU()


@dataclass(frozen=True)
class GatedLoss(_Dense):
    """A gate says which features are on and is paid for; a magnitude of its own says how strongly, free of charge."""

    weight: float = 0.1
    resample: int = 500

    def own(self, features: int) -> Parameters:
        return {"rescale": torch.zeros(features), "shift": torch.zeros(features)}

    def penalised(self, p: Parameters, u: Tensor, y: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        gate = u.relu()
        held = y - gate @ p["decoder"].detach() - p["decoder_bias"].detach()
        loss = warm * self.weight * gate.sum(1).mean() / y.shape[1] ** 0.5 + held.pow(2).sum(1).mean() / y.shape[1]
        return Gated(p["rescale"], p["shift"])(u), loss

    def activation(self, p: Parameters, scale: float) -> Gated:
        return Gated(p["rescale"].detach(), p["shift"].detach() / scale)


@dataclass(frozen=True)
class JumpReLULoss(_Dense):
    """Features count once they are above their threshold, whatever their size; thresholds are trained too."""

    weight: float = 1.0
    bandwidth: float = 0.05
    start: float = 0.05
    resample: int = 500

    def own(self, features: int) -> Parameters:
        return {"log_threshold": torch.full((features,), self.start).log()}

    def penalised(self, p: Parameters, u: Tensor, y: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        threshold = p["log_threshold"].exp()
        f = _Jump.apply(u, threshold, self.bandwidth)
        count = _Count.apply(u, threshold, self.bandwidth).sum(1).mean()
        return f, warm * self.weight * count / y.shape[1]

    def activation(self, p: Parameters, scale: float) -> JumpReLU:
        return JumpReLU(p["log_threshold"].detach().exp() / scale)


@dataclass(frozen=True)
class BatchTopKLoss(_Dense):
    """k features on average explain a row; hard rows may take more. With `prefixes` (Matryoshka), the first so many features
    must explain what they can without the others, so that early features stay general.

    While training the batch decides what is on; the finished dictionary has the threshold that this came to on average (a
    running mean with `decay`), and looks at every row alone.
    """

    k: int = 32
    prefixes: tuple[int, ...] = ()
    decay: float = 0.99
    resample: int = 500

    def own(self, features: int) -> Parameters:
        if not all(0 < n < features for n in self.prefixes):
            raise InputError(f"prefixes={self.prefixes}: expected numbers of features from 1 to {features - 1}")
        return {"threshold": torch.zeros(features)}

    def penalised(self, p: Parameters, u: Tensor, y: Tensor, warm: float) -> tuple[Tensor, Tensor]:
        largest = u.relu().flatten().topk(min(self.k * len(u), u.numel()), sorted=False)
        f = torch.zeros_like(u).flatten().scatter(0, largest.indices, largest.values).view_as(u)
        with torch.no_grad():
            least = largest.values[largest.values > 0].amin() if bool(largest.values.any()) else u.new_zeros(())
            began = p["threshold"] == 0
            p["threshold"].copy_(torch.where(began, least, p["threshold"].lerp(least.float(), 1 - self.decay)))
        loss = u.new_zeros(())
        for n in self.prefixes:
            loss = loss + (y - f[:, :n] @ p["decoder"][:n] - p["decoder_bias"]).pow(2).sum(1).mean() / y.shape[1]
        return f, loss

    def activation(self, p: Parameters, scale: float) -> JumpReLU:
        return JumpReLU(p["threshold"].detach() / scale)


def _near(u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((u - threshold) / bandwidth) / bandwidth for the rectangle K on [-1/2, 1/2]."""
    return ((u - threshold).abs() <= bandwidth / 2).to(u.dtype) / bandwidth


class _Jump(torch.autograd.Function):
    """u where it is above the threshold; by the threshold -(threshold / bandwidth) K."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return u.relu() * (u > threshold)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor, None]:
        u, threshold = ctx.saved_tensors
        by_threshold = -(g[0] * threshold * _near(u, threshold, ctx.bandwidth)).sum(0)
        return g[0] * (u > threshold) * (u > 0), by_threshold, None


class _Count(torch.autograd.Function):
    """1 where u is above the threshold; by the threshold -K / bandwidth, by u nothing."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, threshold)
        ctx.bandwidth = bandwidth
        return (u > threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[None, Tensor, None]:
        u, threshold = ctx.saved_tensors
        return None, -(g[0] * _near(u, threshold, ctx.bandwidth)).sum(0), None
