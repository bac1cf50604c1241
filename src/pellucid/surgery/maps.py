"""The maps between two residual streams that `Stitch` knows: least squares in closed form, and one that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.lenses import unembed
from pellucid.lenses.lens import layer_numbers
from pellucid.model import Model
from pellucid.surgery.aligned import Pair
from pellucid.training import draws as drawn
from pellucid.training import linear, train

Kind = Literal["identity", "orthogonal", "affine", "ridge", "low_rank", "trained"]


def solve(kind: Kind, x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """(weight [d, e], bias [e]) from rows of both."""
    d, e = x.shape[1], y.shape[1]
    nothing = torch.zeros(e)
    if kind == "identity":
        if d != e:
            raise InputError(
                f"the sender is {d} wide and the receiver {e}: identity joins models of one width; use 'affine' or 'orthogonal'"
            )
        return torch.eye(d), nothing
    x, y = x.double(), y.double()
    if kind == "orthogonal":
        u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        return (u @ v).float(), nothing
    if kind != "ridge" and len(x) < 2 * d:
        raise InputError(
            f"{len(x)} positions for a map of {d} inputs: give more text (tokens=), at least {2 * d}, or kind='ridge'"
        )
    mean, to = x.mean(0), y.mean(0)
    gram = (x - mean).T @ (x - mean)
    strength = max(ridge if kind == "ridge" else 0.0, 1e-10) * float(gram.diagonal().mean())
    weight = torch.linalg.solve(gram + strength * torch.eye(d, dtype=x.dtype), (x - mean).T @ (y - to))
    if kind == "low_rank":
        made = (x - mean) @ weight
        _, vectors = torch.linalg.eigh(made.T @ made)
        top = vectors[:, -min(rank, e) :]
        weight = weight @ top @ top.T
    return weight.float(), (to - mean @ weight).float()


def trained(stitch: Any, receiver: Model, found: Sequence[Pair], sent: Sequence[Tensor]) -> None:
    """Gradient steps on the receiver's loss through its frozen blocks after `into`; all below was run once, and is `sent`."""
    number = layer_numbers(receiver, [stitch.into])[0]
    alone, blocks = receiver.layers[number + 1 :].alone, receiver.anatomy.stacks[-1].blocks[number + 1 :]
    like = next(p for p in receiver.module.parameters() if p.is_floating_point())
    weight, bias = (t.to(like.device, torch.float32).clone() for t in (stitch.weight_, stitch.bias_))
    given: dict[int, list[Any]] = {}  # what the blocks read besides their residual, by length

    def loss(batch: Tensor, step: int) -> Tensor:
        total: Any = 0.0
        for i in batch.tolist():
            pair = found[i]
            n = len(pair)
            if n not in given:
                given[n] = alone.calls(1, n)
            x = (sent[i][pair.columns].to(like.device) @ weight + bias)[None].to(like.dtype)
            for block in blocks:
                x = alone.call(block, x, given[n][block.index])
            said = unembed(receiver, x)[:, :-1].float().log_softmax(-1)
            ids = pair.receiver.stream("").ids[:, 1:n, None].to(said.device)
            total = total - said.gather(2, ids).mean() / len(batch)
        return total

    epochs = -(-stitch.steps * stitch.batch // len(found)) + 1
    order = drawn(len(found), stitch.batch, epochs, stitch.seed)[: stitch.steps]
    stitch.losses_ = train({"weight": weight, "bias": bias}, order, loss, partial(torch.optim.Adam, lr=stitch.learning_rate),
                           schedule=linear, seed=stitch.seed, what="trained stitch")  # fmt: skip
    stitch.weight_, stitch.bias_ = weight.detach().cpu(), bias.detach().cpu()
