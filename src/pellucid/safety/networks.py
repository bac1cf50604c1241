"""How is a yes or no learnt from vectors of one or of several tokens and layers?

All take values [n, vector, d] with a mask [n, vector] and give a log odds [n]; `each` scores single vectors [..., d] -> [...].

    Linear         x.w + b, of one vector
    Mlp            two hidden layers, of one vector                                          SAPLMA (Azaria and Mitchell 2023)
    Attention      sum over vectors and heads of softmax(x.q) (x.v), + b                     attention probes
    Transformer    vectors made narrow, a learnt place for each, one encoder layer, the mean of what comes out

Networks see every axis with the mean 0 and the variance 1 of their training part, and are trained by the common loop with dropout
and weight decay for a fixed number of epochs: nothing is chosen on what they are judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellucid.errors import InputError
from pellucid.training import draws, train

Net = Literal["mlp", "attention", "transformer"]


class Learnt(nn.Module):
    """What was learnt: called with sets of vectors, `each` with single ones; `slope` and `offset` make log odds of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.slope: Tensor = nn.Buffer(torch.ones(()))
        self.offset: Tensor = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.slope * self.of_all(x, mask) + self.offset

    def each(self, values: Tensor) -> Tensor:
        return self.of_one(values) * self.slope.to(values) + self.offset.to(values)

    def of_all(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.of_one(x[:, -1])

    def of_one(self, values: Tensor) -> Tensor:
        raise InputError(f"{type(self).__name__} reads several vectors at once: it has no score for one of them")

    @property
    def direction(self) -> Tensor:
        raise InputError(f"{type(self).__name__} is no linear reader: it has no direction")

    def calibrated(self, slope: float, offset: float) -> Learnt:
        self.slope, self.offset = torch.tensor(slope).float(), torch.tensor(offset).float()
        return self


class Linear(Learnt):
    def __init__(self, weight: Tensor, bias: Tensor | float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight.float()), nn.Buffer(torch.as_tensor(bias).float())

    def of_one(self, values: Tensor) -> Tensor:
        return values @ self.weight.to(values) + self.bias.to(values)

    @property
    def direction(self) -> Tensor:
        return self.slope * self.weight

    def after(self, left: Tensor, right: Tensor, mean: Tensor) -> Linear:
        """The same reader of values x, fitted on x - left right (x - mean)."""
        w = self.weight.double()
        gone = right.double().T @ (left.double().T @ w)
        return Linear(w - gone, self.bias + gone @ mean.double())


class Standardised(Learnt):
    """A network on axes of mean 0 and variance 1."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mean: Tensor = nn.Buffer(torch.zeros(d))
        self.scale: Tensor = nn.Buffer(torch.ones(d))

    def seen(self, x: Tensor, mask: Tensor) -> None:
        real = x[mask]
        self.mean, self.scale = real.mean(0), real.std(0).clamp_min(1e-6)

    def scaled(self, x: Tensor) -> Tensor:
        return (x.to(self.mean) - self.mean) / self.scale


class Mlp(Standardised):
    def __init__(self, d: int, vectors: int, width: int = 64) -> None:
        super().__init__(d)
        self.layers = nn.Sequential(
            nn.Linear(d, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1)
        )  # fmt: skip

    def of_one(self, values: Tensor) -> Tensor:
        found: Tensor = self.layers(self.scaled(values))[..., 0]
        return found


class Attention(Standardised):
    """`each` is what a vector votes, x.v of all heads: the direction is v."""

    def __init__(self, d: int, vectors: int, heads: int = 4) -> None:
        super().__init__(d)
        self.query, self.value = nn.Parameter(torch.zeros(d, heads)), nn.Linear(d, heads)
        self.drop = nn.Dropout(0.2)

    def of_all(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.scaled(x)
        weight = (x @ self.query / x.shape[-1] ** 0.5).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        return (weight * self.value(self.drop(x))).sum((1, 2))

    def of_one(self, values: Tensor) -> Tensor:
        found: Tensor = self.value(self.scaled(values)).sum(-1)
        return found

    @property
    def direction(self) -> Tensor:
        return (self.slope * self.value.weight.sum(0) / self.scale).detach()


class Transformer(Standardised):
    def __init__(self, d: int, vectors: int, width: int = 24, heads: int = 2) -> None:
        super().__init__(d)
        self.down, self.out = nn.Linear(d, width), nn.Linear(width, 1)
        self.place = nn.Parameter(torch.randn(vectors, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.2, batch_first=True)

    def of_all(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.layer(self.down(self.scaled(x)) + self.place, src_key_padding_mask=~mask)
        real = mask[..., None].to(h)
        found: Tensor = self.out((h * real).sum(1) / real.sum(1))[:, 0]
        return found


KINDS: dict[str, Callable[[int, int], Standardised]] = {"mlp": Mlp, "attention": Attention, "transformer": Transformer}


def empty(kind: str, tensors: dict[str, Tensor], vectors: int) -> Learnt:
    """One with these tensors, as `state_dict` gave them."""
    made: Learnt
    if kind not in KINDS:
        made = Linear(tensors["weight"], tensors["bias"])
    else:
        made = KINDS[kind](len(tensors["mean"]), vectors)
    made.load_state_dict(tensors)
    return made.eval()


def learn(
    kind: Net, x: Tensor, mask: Tensor, labels: Tensor, *, epochs: int = 30, batch: int = 32, seed: int = 0
) -> Learnt:
    """A network fitted to values [n, vector, d] and truth values [n] by cross-entropy."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made: Any = KINDS[kind](x.shape[-1], x.shape[1])
    made.seen(x, mask)
    y = labels.float()
    made.train()
    train(
        dict(made.named_parameters()), draws(len(x), min(batch, len(x)), epochs, seed),
        lambda rows, step: nn.functional.binary_cross_entropy_with_logits(made(x[rows], mask[rows]), y[rows]),
        lambda each: torch.optim.AdamW(each, 3e-3, weight_decay=0.1), seed=seed, what=f"training of {kind}",
    )  # fmt: skip
    found: Learnt = made.eval().requires_grad_(False)
    return found
