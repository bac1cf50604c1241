"""What stands where a token is absent? A choice, which changes the ranking; so it has a name and is kept in the result.

    "pad", "mask", "unk"     that token of the tokenizer, in the place of every token
    any other token          such as ".", in the place of every token; or a prompt, or ids, of the same length
    "zero", "mean"           the zero or the mean embedding
    "remove", "resample"     the token is left out, or one that could stand there is drawn (`pellucid.attribution.absence`):
                             nothing an embedding could move from, so methods with a gradient refuse them

The names mean the same in every method and in the evaluation; a token that is spelt like one is given as ids. Fixed tokens
(marks) keep their own embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded
from pellucid.errors import InputError, Refused
from pellucid.question import pieces
from pellucid.tasks.tokens import encode

NAMED = ("pad", "mask", "unk")
WITHOUT = ("remove", "resample")  # absence that is no embedding


@dataclass(frozen=True, eq=False)
class Baseline:
    """Embeddings [1, position, d] of absence, what stands there in words, and its token ids where it has any."""

    name: str
    values: Tensor
    labels: tuple[str, ...]
    ids: Tensor | None = None
    kept: bool = False  # whether the first token stays though it is none that is fixed

    @classmethod
    def of(cls, embedded: Embedded, baseline: Any = None, keep_first: bool | None = False) -> Baseline:
        """By default "mask" for a tokenizer that has it, else "pad", else "mean". With `keep_first` the first token stays;
        None: where it is an attention sink (see `sink`). InputError if it does not fit, Refused where the model has no
        gradient at it."""
        case = embedded.case
        if baseline is None:
            baseline = next((n for n in ("mask", "pad") if _special_id(case, n) is not None), "mean")
        if isinstance(baseline, str) and baseline in WITHOUT:
            raise InputError(
                f"baseline={baseline!r} puts nothing in a token's place, so there is no embedding to start from: give a "
                "token, 'mask', 'pad', 'mean' or ids, or a method that only runs the model, such as occlusion or shapley"
            )
        ids = None
        if isinstance(baseline, str) and baseline in ("zero", "mean"):
            values = embedded.mean if baseline == "mean" else torch.zeros_like(embedded.values)
            labels: tuple[str, ...] = (f"({baseline})",) * len(case.tokens)
        else:
            ids = _ids(case, baseline)
            values, labels = embedded.embed(ids), pieces(case.model, ids)
        stays = case.fixed.copy()
        uniform = isinstance(baseline, str) and (ids is None or bool((ids == ids[0]).all()))
        if keep_first or (keep_first is None and uniform and sink(case)):
            stays[0] = True
        fixed = torch.tensor(stays, device=values.device)
        labels = tuple(own if f else b for own, b, f in zip(case.tokens, labels, stays, strict=True))
        if ids is not None:
            ids = torch.where(fixed.to(ids.device), case.ids, ids)
        made = cls(
            baseline if isinstance(baseline, str) else "token ids",
            torch.where(fixed[:, None], embedded.values, values),
            labels,
            ids,
            bool(stays[0] and not case.fixed[0]),
        )
        made._check(embedded)
        return made

    @property
    def about(self) -> dict[str, str]:
        """As results say it."""
        return {"baseline": self.name, **({"kept": "the first token"} if self.kept else {})}

    def _check(self, embedded: Embedded) -> None:
        """A norm has no gradient at zero: refuse to start where the residual stream is nothing."""
        taps = [
            s.blocks[0].taps["resid_pre"]
            for s in embedded.model.anatomy.stacks
            if s.blocks and "resid_pre" in s.blocks[0].taps and (s.name or "") in embedded.case.streams
        ]
        if self.name != "zero" or not taps:
            return
        if any(bool((x == 0).all(-1).any()) for x in embedded.met(taps, self.values).values()):
            raise Refused(
                "at the zero baseline the residual stream of this model is zero (it adds no positions), "
                "where its first norm divides zero by zero and there is no gradient: choose "
                "baseline='pad', 'mean' or a token such as '.'"
            )


def sink(case: Case) -> bool:
    """Whether the first word is where a decoder parks attention it has no use for: there is no mark before it that would
    do. A path that takes it away as well leads where the model has never been, and is too rough to integrate."""
    last = case.model.anatomy.stacks[-1]
    return bool(last.causal) and list(case.streams) == [""] and not case.fixed[0] and int((~case.fixed).sum()) > 1


def _special_id(case: Case, name: str) -> int | None:
    found = getattr(case.model.tokenizer, f"{name}_token_id", None)
    return None if found is None else int(found)


def _ids(case: Case, baseline: Any) -> Tensor:
    """[position] of a baseline named by a token, a prompt or ids."""
    length = len(case.ids)
    if isinstance(baseline, Tensor | np.ndarray | list | tuple):
        try:
            ids = torch.as_tensor(baseline).reshape(-1).to(case.ids)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{baseline!r} is no baseline: expected token ids, a number for every token") from None
    elif not isinstance(baseline, str):
        raise InputError(
            f"{baseline!r} is no baseline: give a token, a prompt, token ids, 'pad', 'mask', 'zero' or 'mean'"
        )
    elif case.model.tokenizer is None:
        raise InputError(f"the baseline {baseline!r} needs a tokenizer: give 'zero', 'mean' or token ids")
    elif baseline in NAMED:
        token = _special_id(case, baseline)
        if token is None:
            raise InputError(f"this tokenizer has no {baseline} token: choose baseline='mean' or a token such as '.'")
        ids = torch.full_like(case.ids, token)
    else:
        alone = encode(case.model.tokenizer, baseline, specials=False)[0]
        ids = case.ids.new_tensor(alone * length if len(alone) == 1 else encode(case.model.tokenizer, baseline)[0])
    if len(ids) != length:
        raise InputError(
            f"the baseline has {len(ids)} tokens and the prompt {length}: give one token, a prompt of "
            f"{length} tokens, 'pad', 'mask', 'zero' or 'mean'"
        )
    return ids
