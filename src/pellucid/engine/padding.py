"""Does padding change what a model computes for the real tokens, and which position ids keep it from doing so?

Some families count positions from the first column, padding included, some count real tokens themselves, some start
past a padding index, some cannot be padded at all. Nothing here knows which: the first time padded prompts are met, a
short prompt is run alone and padded, and the first way of counting under which both agree is the one that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.heads import reads_both_ends
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import accepted_by, running
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.proofs import TOLERANCE
from pellucid.engine.inputs import Inputs, read_inputs
from pellucid.errors import Refused

Count = Callable[[Tensor, int], Tensor | None]  # mask [batch, length], padding index -> position ids


def _native(mask: Tensor, pad: int) -> Tensor | None:
    return None


def _real(mask: Tensor, pad: int) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _past_index(mask: Tensor, pad: int) -> Tensor:
    return mask.cumsum(1) * mask + pad


# Rotary families give the same logits without ids, but turn queries and keys by the column: left of the prompt, real
# tokens are counted first.
COUNTS: dict[str, tuple[Count, ...]] = {"right": (_native, _real, _past_index), "left": (_real, _native, _past_index)}
PADS = 3
PROBED = {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}


class Padding:
    """What is known about padding one model; asked through `fit`."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.module: nn.Module = anatomy.module
        self.probe = anatomy.inputs
        self.known: dict[str, Count | None] = {}  # side -> how positions are counted

    def fit(self, inputs: Inputs, generating: bool = False) -> Inputs:
        """The inputs with the position ids their padding needs. Refused where padding changes the results anyway.

        `generating`: it was put on the left because generation needs it there, whoever padded the prompts.
        """
        mask = inputs.streams.get("encoder", inputs.streams[""]).mask.long()
        left, right = not bool(mask[:, 0].all()), not bool(mask[:, -1].all())
        if not (left or right) or "position_ids" in inputs.tensors or not set(self.probe) <= PROBED:
            return inputs
        side = "both sides" if left and right else "left" if left else "right"
        if side not in self.known:
            counts = COUNTS["left" if left else "right"]
            self.known[side] = next((c for c in counts if self._agrees(c, side)), None)
        count = self.known[side]
        if count is None:
            raise Refused(
                f"padding on the {side} changes what this model computes for the real tokens: "
                + ("pad on the right, or " if left and not generating else "")
                + ("generate for" if generating else "run")
                + " prompts of unequal length one at a time"
            )
        accepted = accepted_by(self.module)
        positions = count(mask, self._index) if {"position_ids", "kwargs"} & set(accepted) else None
        return inputs if positions is None else replace(inputs, tensors={**inputs.tensors, "position_ids": positions})

    @property
    def _index(self) -> int:
        index = getattr(self.module.config, "pad_token_id", None)
        return index if isinstance(index, int) else 0

    def _agrees(self, count: Count, side: str) -> bool:
        """Whether the probe's first prompt gives the same output alone and with padding."""
        alone = {k: v[:1] if isinstance(v, Tensor) else v for k, v in self.probe.items()}
        if reads_both_ends(self.module):
            del alone["decoder_input_ids"]  # it is given the text as it is then, padding and all
        ids = alone["input_ids"]
        left, right = PADS * (side != "right"), PADS * (side != "left")
        filled = nn.functional.pad(ids, (left, right), value=self._index)
        mask = nn.functional.pad(torch.ones_like(ids), (left, right))
        padded: dict[str, Any] = {**alone, "input_ids": filled, "attention_mask": mask}
        positions = count(mask, self._index)
        if positions is not None:
            padded["position_ids"] = positions
        try:
            with running(self.module):
                wanted, got = (
                    main_output(self.module(**read_inputs(self.module, None, call).tensors)) for call in (alone, padded)
                )
        except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no position ids, or not these
            return False
        if got.ndim == 3 and got.shape[1] == filled.shape[1]:
            got = got[:, left : left + ids.shape[1]]
        allowed = TOLERANCE.get(wanted.dtype, 4e-2) * max(1.0, float(wanted.abs().max()))
        return got.shape == wanted.shape and float((got - wanted).abs().max()) <= allowed
