"""When is a model sure enough to stop after a layer? A policy of early exit is a value.

After some layers the residual is read through a lens and the model's own head; the first check that is sure enough is the exit,
and its first choice the answer.

    probability    max p                    margin    p1 - p2 (CALM, Schuster et al. 2022)
    entropy        -H(p), nats              cosine    cos(h_l, h_l-1), CALM's saturation: no head is needed to check
    stable         for how many checks in a row the first choice has stayed           head      a fitted probe of the state: will this answer stay?

Each is confident at `threshold` or above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pellucid.errors import InputError, Refused, among, nearest
from pellucid.lenses.lens import Lens, layer_numbers
from pellucid.model import Model

By = Literal["probability", "margin", "entropy", "cosine", "stable", "head"]


@dataclass(frozen=True)
class Exit:
    """A policy: what confidence is, from which threshold on, after which layers it is looked at, and through which lens.

    `layers` are by default every third from the middle on, without the last. `lens` is the logit lens unless given (a
    `TunedLens`, any `Affine`); `head` an `ExitHead`. A threshold of infinity never exits.

    >>> Exit("margin", 0.9, layers=(12, 15, 18))
    Exit(by='margin', threshold=0.9, layers=(12, 15, 18), lens=None, head=None)
    """

    by: By = "margin"
    threshold: float = 0.9
    layers: tuple[int, ...] | None = None
    lens: Lens | None = None
    head: Any = None  # an ExitHead

    def __post_init__(self) -> None:
        if not among(self.by, By):
            raise InputError(f"by={self.by!r}{nearest(str(self.by), get_args(By))}")
        if (self.by == "head") != (self.head is not None):
            raise InputError("by='head' and head=ExitHead(...) go together")

    def checked(self, model: Model) -> list[int]:
        """The layers that are looked at, in order."""
        n = len(model.anatomy.stacks[-1].blocks)
        if self.layers is None:
            return list(range(n // 2, n - 1, 3))
        found = set(layer_numbers(model, list(self.layers))) if self.layers else set()
        return sorted(i for i in found if i < n - 1)

    def check(self, model: Model) -> None:
        """Refused where the model does not say the next token; InputError where lens or head belong to other weights."""
        stack = model.anatomy.stacks[-1]
        if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
            raise Refused(
                f"{model.name} does not say the next token of a text in one stack, so it has no early exit of this kind"
            )
        if model.anatomy.head is None or "head" in model.anatomy.refusals:
            raise Refused(
                f"{model.name} cannot exit early: its head cannot be read ({model.anatomy.refusals.get('head', 'it has none')})"
            )
        if self.lens is not None:
            self.lens.check(model)
        if self.head is not None:
            self.head.check(model)

    @property
    def reads(self) -> bool:
        """Whether a check needs the head's logits."""
        return self.by in ("probability", "margin", "entropy", "stable")


def confidence(
    by: str, z: Tensor | None, now: Tensor, before: Tensor | None, told: list[Tensor], layer: int, head: Any
) -> Tensor:
    """[row] from logits [row, token], the state [row, d] and the one at the check before; `told` are first choices so far."""
    if by == "cosine":
        return (
            torch.full((len(now),), -1.0)
            if before is None
            else torch.cosine_similarity(now.float(), before.float(), dim=-1).cpu()
        )
    if by == "head":
        assert head is not None
        sure: Tensor = head.confidence(layer, now)
        return sure
    assert z is not None
    if by == "stable":
        run = torch.ones(len(z), dtype=torch.long)
        alive = torch.ones(len(z), dtype=torch.bool)
        for earlier in reversed(told[:-1]):
            alive &= earlier == told[-1]
            run += alive.long()
        return run.float()
    p = z.softmax(-1)
    if by == "entropy":
        return torch.special.entr(p).sum(-1).neg().cpu()
    top = p.topk(2).values
    return (top[:, 0] - (top[:, 1] if by == "margin" else 0)).cpu()
