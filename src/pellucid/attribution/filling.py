"""What could stand in the gaps of a text, according to a language model?

A masked model fills the gaps in PASSES random groups, each given the text and the groups filled before it, so that the
draws fit together. A causal model draws them from left to right: as the noise of every draw is fixed beforehand (the
argmax of logits + Gumbel noise is a draw from the softmax, Gumbel 1954), a token is a function of those before it, so that
whole prompts are run again until nothing changes; all draws are exact then, after at most one run more than there are gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError, Refused
from pellucid.model import Model

PASSES = 3
TOKENS = 256  # in one batch: each is given a row of the vocabulary


@dataclass(eq=False)
class Filler:
    """Fills gaps in a case's prompt with draws from `model`; `evaluations` counts its rows. InputError if it cannot."""

    case: Case
    model: Model
    evaluations: int = 0
    embedded: Embedded = field(init=False)

    def __post_init__(self) -> None:
        model, own = self.model, self.case.model
        mask = getattr(model.tokenizer, "mask_token_id", None)
        self.causal = bool(model.anatomy.stacks[-1].causal)
        able = model.anatomy.head is not None and len(model.anatomy.stacks) == 1 and model.tokenizer is not None
        if not able or (mask is None and not self.causal) or not self._speaks():
            raise InputError(
                f"{model.name} cannot fill gaps: give reference=, a masked or causal language model, or a list of prompts"
            )
        if model is not own and model.tokenizer.get_vocab() != getattr(own.tokenizer, "get_vocab", dict)():
            raise InputError(
                f"{model.name} and {own.name} have different vocabularies: its tokens cannot stand in the gaps"
            )
        self.embedded = Embedded(self.case)
        self.special = sorted({*range(self.vocabulary)} - {*ordinary_ids(model.tokenizer, self.vocabulary)})

    def _speaks(self) -> bool:
        """Whether it gives a word for every position, not a class for the text."""
        logits = self._run(self.case.ids[None, :2])
        self.vocabulary = logits.shape[-1]
        return logits.ndim == 3

    def _run(self, ids: Tensor) -> Tensor:
        device = next(self.model.module.parameters()).device
        with torch.no_grad():
            return main_output(self.model.module(input_ids=ids.to(device))).float().cpu()

    def fill(self, ids: Tensor, gone: Tensor, seeds: Sequence[int]) -> Tensor:
        """Token ids [row, position], those in `gone` drawn anew by each row's seed; special tokens are never drawn. All are
        on the CPU."""
        size = max(1, TOKENS // ids.shape[1])
        parts = zip(ids.split(size), gone.split(size), range(0, len(ids), size), strict=True)
        return torch.cat([self._part(i, g, seeds[start : start + size]) for i, g, start in parts])

    def _part(self, ids: Tensor, gone: Tensor, seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (ids.shape[1], self.vocabulary)
        noise = torch.stack([-torch.empty(shape).exponential_(generator=g).log() for g in generators])
        if self.causal:
            return self._leftwards(ids, gone, noise)
        turn = torch.stack([torch.randint(PASSES, (ids.shape[1],), generator=g) for g in generators])
        return self._around(ids, gone, noise, turn)

    def _logits(self, ids: Tensor) -> Tensor:
        self.evaluations += len(ids)
        logits = self._run(ids)
        logits[..., self.special] = -torch.inf
        return logits

    def _around(self, ids: Tensor, gone: Tensor, noise: Tensor, turn: Tensor) -> Tensor:
        ids = torch.where(gone, self.model.tokenizer.mask_token_id, ids)
        for n in range(PASSES):
            now = gone & (turn == n)
            if bool(now.any()):
                ids = torch.where(now, (self._logits(ids) + noise).argmax(-1), ids)
        return ids

    def _leftwards(self, ids: Tensor, gone: Tensor, noise: Tensor) -> Tensor:
        first = ids.new_full((len(ids), 1), beginning(self.model))
        for _ in range(int(gone.sum(1).max()) + 1):
            drawn = torch.where(gone, (self._logits(torch.cat([first, ids], 1))[:, :-1] + noise).argmax(-1), ids)
            if torch.equal(drawn, ids):
                break
            ids = drawn
        return ids


def beginning(model: Model) -> int:
    """The token that begins a text. Refused without one."""
    names = ("bos_token_id", "eos_token_id")
    found = next((i for n in names if isinstance(i := getattr(model.tokenizer, n, None), int)), None)
    if found is None:
        raise Refused(f"{model.name} has no token that begins a text, so there is no prompt without its tokens")
    return found
